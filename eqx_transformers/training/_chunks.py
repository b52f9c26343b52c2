"""The logarithm of the sum of a vocabulary's exponentials, of which a chunk exists at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ..nn.linear import contract


def picked(scores: Float[Array, "*axes columns"], column: Integer[Array, "*axes"]) -> Float[Array, "*axes"]:
    """The score in each row's column; zero where it is none of them."""
    inside = (column >= 0) & (column < scores.shape[-1])
    found = jnp.take_along_axis(scores, jnp.where(inside, column, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, 0)


def even(vocab_size: int, chunk: int) -> int:
    """The largest size up to `chunk` that divides the vocabulary, if it is more than an eighth of it; else `chunk`.

    Equal chunks are read and their gradients written in place. Of GPT-2's 50,257 tokens, 1,733 are one.
    """
    sizes = range(min(chunk, vocab_size), chunk // 8, -1)
    return next((n for n in sizes if vocab_size % n == 0), min(chunk, vocab_size))


def by_chunks(
    hidden: Array, weight: Array, bias: Array | None, targets: Array, chunk: int, dtype: Any
) -> tuple[Float[Array, "*axes"], Float[Array, "*axes"]]:
    """(log of the sum of all scores' exponentials, score of the target) of every token."""
    wide = hidden.astype(dtype)

    def step(state, part):
        top, total, found = state
        start, rows, shift = part
        # Products are as narrow as they were given, but the sum of what every chunk adds to their gradient is wide.
        scores = contract(wide.astype(hidden.dtype), rows)
        if shift is not None:
            scores = scores + jnp.broadcast_to(shift.astype(dtype), scores.shape)
        # Of the result, nothing depends on the largest score: it need not be differentiated.
        higher = jnp.maximum(top, jax.lax.stop_gradient(scores.max(-1)))
        total = total * jnp.exp(top - higher) + jnp.exp(scores - higher[..., None]).sum(-1)
        return (higher, total, found + picked(scores, targets - start)), None

    # Only the state between chunks is kept; inside a scan XLA cannot merge the recomputation with the first pass.
    step = jax.checkpoint(step, prevent_cse=False)
    count = weight.shape[0] // chunk
    cut = lambda x: None if x is None else x[: count * chunk].reshape(count, chunk, *x.shape[1:])
    rest = lambda x: None if x is None else x[count * chunk :]
    zeros = jnp.zeros(targets.shape, dtype)
    state = (jnp.full(targets.shape, jnp.finfo(dtype).min, dtype), zeros, zeros)
    state, _ = jax.lax.scan(step, state, (jnp.arange(count) * chunk, cut(weight), cut(bias)))
    if weight.shape[0] % chunk:
        state, _ = step(state, (count * chunk, rest(weight), rest(bias)))
    top, total, found = state
    return top + jnp.log(total), found
