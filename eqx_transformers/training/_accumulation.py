"""What a loss says of a batch, and of the micro-batches of one together."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn._dtypes import wider

RESERVED = ("loss", "gradient_norm", "finite")


class Told(NamedTuple):
    """What a loss says of some rows: its value, what it is a mean of, and the rest."""

    value: Float[Array, ""]
    weight: Float[Array, ""]
    tokens: Array
    aux: dict[str, Array]


def called(loss: Callable[..., Any], model: Any, batch: Any, **known: Any) -> Any:
    """The loss, told what it has arguments for; the key too if it takes any keyword."""
    parameters = inspect.signature(loss).parameters
    takes = {*parameters} | {"key" for x in parameters.values() if x.kind is x.VAR_KEYWORD}
    return loss(model, batch, **{name: x for name, x in known.items() if name in takes})


def told_by(found: Any, batch: Any) -> Told:
    value, aux = found if isinstance(found, tuple) else (found, {})
    for name, x in {"value": value, **aux}.items():
        if jnp.shape(x) != ():
            raise ValueError(f"A loss gives numbers, but its {name} is an array {jnp.shape(x)}: take the mean of it.")
    if taken := [name for name in aux if name in RESERVED]:
        raise ValueError(f"A loss said {taken[0]!r} in aux, which is a metric of the Updater: call it something else.")
    aux = dict(aux)
    weight = jnp.asarray(aux.pop("weight") if "weight" in aux else _weight(batch), jnp.float32)
    tokens = jnp.asarray(aux.pop("tokens") if "tokens" in aux else _tokens(batch), jnp.int32)
    wide = lambda x: jnp.asarray(x).astype(jnp.float32)
    return Told(value, jax.lax.stop_gradient(weight), tokens, {name: wide(x) for name, x in aux.items()})


def _weight(batch: Any) -> Any:
    if isinstance(batch, dict) and "weights" in batch:
        return jnp.asarray(batch["weights"]).sum()
    return len(jax.tree.leaves(batch)[0])


def _tokens(batch: Any) -> Any:
    given = batch if isinstance(batch, dict) else {}
    mask = given.get("attention_mask")
    if mask is not None:
        return jnp.asarray(mask).sum()
    return jnp.size(given["token_ids"]) if "token_ids" in given else 0


def divided(batch: Any, count: int) -> Any:
    """Micro-batches along a new leading axis: of `count`, every one has each `count`-th row.

    (Not neighbours: rows that are spread over devices stay where they are.)
    """

    def one(x: Any) -> Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[0] % count:
            raise ValueError(
                f"accumulate = {count} micro-batches cannot be made of a batch whose arrays are {x.shape}: the number"
                " of rows must be a multiple of it."
            )
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, batch)


def accumulated(one: Callable[..., Any], trained: Any, parts: Any, key: PRNGKeyArray) -> tuple[Told, Any]:
    """What `one` says of all parts together: sums of weights and tokens, of the rest the mean by weight."""
    count = len(jax.tree.leaves(parts)[0])
    scaled = lambda weight, x: jnp.where(weight > 0, weight.astype(x.dtype) * x, 0)

    def step(total: Any, part: Any) -> tuple[Any, Told]:
        i, batch = part
        told, gradient = one(batch, jax.random.fold_in(key, i))
        add = lambda x, g: x + scaled(told.weight, g.astype(x.dtype))
        return jax.tree.map(add, total, gradient), told

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, wider(x.dtype, jnp.float32)), trained)
    total, told = jax.lax.scan(step, zeros, (jnp.arange(count), parts))
    weight = told.weight.sum()
    over = jnp.where(weight == 0, 1, weight)
    mean = lambda x: scaled(told.weight, x).sum() / over.astype(x.dtype)
    gradient = jax.tree.map(lambda x, like: (x / over.astype(x.dtype)).astype(like.dtype), total, trained)
    return Told(mean(told.value), weight, told.tokens.sum(), jax.tree.map(mean, told.aux)), gradient
