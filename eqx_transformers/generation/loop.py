"""The one loop: the prompts in one pass, then a token a row and turn, over a cache that never grows.

It knows of a model only `init_cache` and `step`, and of how it begins only a `Start`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .processors import SoFar, processed
from .turned import for_rows

C = TypeVar("C")
ALIGNED = 16  # slots: rows of keys of another length than a multiple lie across cache lines, which costs a third


class Prompt(NamedTuple):
    """What is to be continued: rows of tokens that end at the right edge, or what an encoder has made of them.

    Of the `length` slots of a cache, `width` are for what comes before the new tokens: of a model with an encoder, for
    the decoder's first one.
    """

    ids: Any
    real: Any
    memory: Any
    width: int
    length: int


class Start(NamedTuple):
    """Where generation begins: an empty cache for every row, and the first tokens, which end at the right edge."""

    cache: Any
    ids: Int[Array, "rows prompt"]
    real: Bool[Array, "rows prompt"]


class Ends(NamedTuple):
    """After which tokens a row has ended, and what stands behind them."""

    ids: Int[Array, " ends"]
    padding_id: Int[Array, ""]


class State(NamedTuple):
    """Rows that are under way: `new` tokens each, of which the last one is not in the cache yet.

    `ids` and `real` are the tokens in the slots of the cache, the prompt's and then the new ones. `sound` is False once
    no token could be chosen: its score was NaN, or nothing is allowed any more.
    """

    cache: Any
    ids: Int[Array, "rows length"]
    real: Bool[Array, "rows length"]
    new: Int[Array, ""]
    ended: Bool[Array, " rows"]
    sound: Bool[Array, ""]


def start_of(model: Any, prompt: Prompt) -> Start:
    """A model with an encoder reads the prompt there, and its decoder begins with `start_id`; another continues it."""
    slots = -(-prompt.length // ALIGNED) * ALIGNED
    if not hasattr(model, "encode"):
        return Start(caches(lambda _: model.init_cache(slots), prompt.ids[:, 0]), prompt.ids, prompt.real)
    memory = prompt.memory
    if memory is None:
        memory = jax.vmap(lambda ids, real: model.encode(ids, attention_mask=real))(prompt.ids, prompt.real)
    first = jnp.full((len(jax.tree.leaves(memory)[0]), 1), model.start_id, jnp.int32)
    return Start(caches(lambda one: model.init_cache(one, slots), memory), first, jnp.ones(first.shape, bool))


def caches(make: Callable[[Any], Any], rows: Any, axes: Any = 0) -> Any:
    """The caches that `make` gives for the rows, which lie along `axes`: each array's rows along the axis that the
    cache says."""
    first = lambda axis, part: part if axis is None else jax.tree.map(lambda x: x[0], part)
    one = jax.eval_shape(make, jax.tree.map(first, axes, rows, is_leaf=lambda axis: axis is None))
    return jax.vmap(make, (axes,), one.axes)(rows)


def stepped(
    model: Any, ids: Int[Array, "rows seq"], cache: C, real: Bool[Array, "rows seq"]
) -> tuple[Float[Array, "rows vocab"], C]:
    """The scores of every row's next token, in float32, and the cache with these tokens."""
    one = lambda ids, cache, real: model.step(ids, cache, last=True, attention_mask=real)
    scores, cache = jax.vmap(one, in_axes=(0, cache.axes, 0), out_axes=(0, cache.axes))(ids, cache, real)
    return scores[:, -1].astype(jnp.float32), cache


def wide(x: Array, length: int) -> Array:
    """Room for `length` slots."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[-1])))


def column(x: Array, index: Int[Array, ""] | int) -> Array:
    """Slot `index` of every row, `rows 1`."""
    return jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1)


def put(x: Array, index: Int[Array, ""] | int, column: Array) -> Array:
    """With these in slot `index` of every row."""
    return jax.lax.dynamic_update_slice_in_dim(x, column[:, None].astype(x.dtype), index, axis=1)


def begin(
    model: Any, start: Start, length: int, processors: tuple[Any, ...], ends: Ends, key: PRNGKeyArray | None
) -> State:
    """After the first new token."""
    rows = len(start.ids)
    scores, cache = stepped(model, start.ids, start.cache, start.real)
    no, yes = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    state = State(cache, wide(start.ids, length), wide(start.real, length), no, jnp.zeros(rows, bool), yes)
    return _chosen(state, scores, start.ids.shape[-1], processors, ends, key)


def advance(
    model: Any,
    state: State,
    prompt: int,
    bound: Int[Array, ""],
    processors: tuple[Any, ...],
    ends: Ends,
    key: PRNGKeyArray | None,
) -> State:
    """Until there are `bound` new tokens or every row has ended; `prompt` slots come before them."""

    def more(state: State) -> Bool[Array, ""]:
        return (state.new < bound) & ~state.ended.all()

    def turn(state: State) -> State:
        last = prompt + state.new - 1
        scores, cache = stepped(model, column(state.ids, last), state.cache, column(state.real, last))
        return _chosen(state._replace(cache=cache), scores, prompt, processors, ends, key)

    return jax.lax.while_loop(more, turn, settled(state))


def settled(state: C) -> C:
    """The same, made before a loop: XLA would put what made a memory last, which turned it, into the loop."""
    return jax.lax.optimization_barrier(state)


def _chosen(
    state: State,
    scores: Float[Array, "rows vocab"],
    prompt: int,
    processors: tuple[Any, ...],
    ends: Ends,
    key: PRNGKeyArray | None,
) -> State:
    """With one more token in every row: the best, or with a `key` a sample, which the other rows do not change."""
    index = prompt + state.new

    def one(row, scores, ids, real):
        scores = processed(processors, scores, SoFar(ids, real, index, state.new))
        token = jnp.argmax(scores) if key is None else jax.random.categorical(_fold(key, row, state.new), scores)
        return token.astype(jnp.int32), jnp.isfinite(scores[token])

    found, sound = jax.vmap(one)(jnp.arange(len(scores)), scores, state.ids, state.real)
    token = jnp.where(state.ended, ends.padding_id, found)
    return State(
        state.cache,
        put(state.ids, index, token),
        put(state.real, index, ~state.ended),
        state.new + 1,
        state.ended | jnp.any(token[:, None] == ends.ids[None, :], axis=1),
        state.sound & jnp.all(sound | state.ended),
    )


def _fold(key: PRNGKeyArray, *numbers: Int[Array, ""]) -> PRNGKeyArray:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def filled(state: State, prompt: int, ends: Ends) -> Int[Array, "rows new"]:
    """The new tokens; padding behind each row's end."""
    return jnp.where(state.real[:, prompt:], state.ids[:, prompt:], ends.padding_id)


@eqx.filter_jit
def run(
    model: Any,
    prompt: Prompt,
    bound: Int[Array, ""],
    processors: tuple[Any, ...],
    ends: Ends,
    key: PRNGKeyArray | None,
) -> tuple[Int[Array, "rows new"], Bool[Array, ""]]:
    """All of it as one program: the new tokens, and whether there always was one to choose."""
    start = start_of(model, prompt)
    state = begin(model, start, prompt.length, processors, ends, key)
    state = advance(for_rows(model, len(start.ids)), state, prompt.width, bound, processors, ends, key)
    return filled(state, prompt.width, ends), state.sound


@eqx.filter_jit
def run_begin(
    model: Any,
    prompt: Prompt,
    processors: tuple[Any, ...],
    ends: Ends,
    key: PRNGKeyArray | None,
) -> tuple[Any, State, Int[Array, " rows"]]:
    """The beginning alone, for a caller who looks at every token: the model for `run_advance`, and the first ones."""
    start = start_of(model, prompt)
    state = begin(model, start, prompt.length, processors, ends, key)
    return for_rows(model, len(start.ids)), state, column(state.ids, prompt.width)[:, 0]


@eqx.filter_jit(donate="all-except-first")
def run_advance(given: tuple[Any, ...], state: State, prompt: int) -> tuple[State, Int[Array, " rows"]]:
    """One more token, in the same buffers. `given` is the model and what follows the bound in `advance`."""
    model, *rest = given
    state = advance(model, state, prompt, state.new + 1, *rest)
    return state, column(state.ids, prompt + state.new - 1)[:, 0]
