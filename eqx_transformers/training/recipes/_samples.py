"""What a language model says after a prompt, while it is trained and afterwards."""

from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PRNGKeyArray

from ...generation import generate


def continued(
    model: Any,
    prompt: Int[np.ndarray, " prompt"],
    *,
    new: int,
    length: int,
    temperature: float | None = None,
    key: PRNGKeyArray | None = None,
) -> Int[np.ndarray, " new"]:
    """`new` tokens after `prompt`: the best ones, or draws at a `temperature` by a `key`.

    Where all of it fits in `length` tokens and the model has a cache, `generate` makes them. Else each is said by a
    forward pass over the last `length` tokens: a model that was trained on rows of this length has no position behind
    them that it has ever seen. That is one program for all prompts.
    """
    greedy = temperature is None
    if hasattr(model, "init_cache") and len(prompt) + new <= length:
        options: dict[str, Any] = {} if greedy else {"key": key, "temperature": temperature}
        return np.asarray(generate(model, prompt[None], max_new_tokens=new, **options))[0]
    kept = prompt[-length:]
    window = np.zeros(length, np.int32)
    window[: len(kept)] = kept
    keys = jax.random.split(jax.random.key(0) if key is None else key, new)
    heat = np.float32(1.0 if temperature is None else temperature)
    return np.asarray(_windowed(model, window, np.int32(len(kept)), keys, heat, greedy))


@eqx.filter_jit
def _windowed(
    model: Any, window: Any, count: Any, keys: Key[Array, " new"], temperature: Any, greedy: bool
) -> Int[Array, " new"]:
    """Rows are filled up with zeros, which no token before them sees."""

    def one(carry: tuple[Array, Array], key: PRNGKeyArray) -> tuple[tuple[Array, Array], Array]:
        window, count = carry
        scores = model(window)[count - 1].astype(jnp.float32)
        drawn = jnp.argmax(scores) if greedy else jax.random.categorical(key, scores / temperature)
        token = drawn.astype(jnp.int32)
        is_full = count == len(window)
        window = jnp.where(is_full, jnp.roll(window, -1), window)
        at = jnp.where(is_full, count - 1, count)
        return (window.at[at].set(token), at + 1), token

    return jax.lax.scan(one, (jnp.asarray(window), jnp.asarray(count)), keys)[1]


@dataclass
class Watch:
    """What looks at a model while it is trained: `measure(model)`, and `say(model, step)` at every n-th evaluation.

    It is the `evaluate` of `fit` and one of its callbacks, by which it knows the step. `each` is how many steps there
    are between two evaluations; `every=0` says nothing.
    """

    measure: Any
    say: Any
    each: int
    every: int
    step: int = field(default=0, init=False)

    def on_start(self, info: dict[str, Any]) -> None:
        self.step = info["step"]

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        self.step = step

    def __call__(self, model: Any) -> dict[str, float]:
        if self.every and self.step % (self.each * self.every) == 0:
            self.say(model, self.step)
        return self.measure(model)
