"""Numbers of 8 and of 4 bits: how arrays are rounded to them, two of 4 bits share a byte, and matrices are computed."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from ..nn._dtypes import wider
from ..nn.linear import contract

LEVELS = {8: 127, 4: 7}


@partial(jax.jit, static_argnums=1)  # a dozen operations on every matrix: compiled once a shape
def rounded(w: Float[Array, "*axes size"], levels: int) -> tuple[Int8[Array, "*axes size"], Float[Array, "*axes"]]:
    r"""(numbers $q$, scale $s$) of each row: $|w - q s| \le s / 2$, exactly, and $|q| \le$ `levels`.

    The scale is the row's largest number by `levels`, rounded up to at most 16 significant bits of the row's own dtype,
    so that every product $q s$ is a float32 without rounding. A row with a NaN or an infinity has no finite scale:
    it comes back as NaN and infinities.
    """
    wide = w.astype(wider(w.dtype, jnp.float32))
    scale = _rounded_up(jnp.abs(wide).max(-1) / levels, w.dtype)
    step = jnp.broadcast_to(scale[..., None], wide.shape)
    q = jnp.round(wide / step)
    rest = wide - q * step  # exact; the quotient was rounded before it was rounded to a whole number
    q = jnp.where(jnp.abs(rest) > step / 2, q + jnp.sign(rest), q)
    return q.astype(jnp.int8), scale.astype(w.dtype)


def _rounded_up(x: Float[Array, "*axes"], dtype: DTypeLike) -> Float[Array, "*axes"]:
    """The next number that `dtype` has with at most 16 bits; never so small that a processor may take it for zero."""
    bits = min(jnp.finfo(dtype).nmant + 1, 16)
    smallest = 2.0**-24 if dtype == jnp.float16 else 2.0**-100  # of float16, the smallest there is
    unit = jnp.ldexp(jnp.ones_like(x), jnp.frexp(x)[1] - bits)
    unit = jnp.maximum(unit, smallest)
    return jnp.maximum(jnp.ceil(x / unit) * unit, smallest)


def in_groups(w: Float[Array, "*axes size"], group: int) -> Float[Array, "*axes groups {group}"]:
    """The last axis cut into groups; the last group is filled up with zeros."""
    missing = -w.shape[-1] % group
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, missing)])
    return w.reshape(*w.shape[:-1], -1, group)


def packed(q: Int8[Array, "*axes size"]) -> Int8[Array, "*axes half"]:
    """Two numbers of -8 to 7 a byte: the first half of a row in the low bits, the second in the high ones.

    In halves, and not by neighbours: unpacking is then a concatenation, which costs a third less.
    """
    half = -(-q.shape[-1] // 2)
    low, high = q[..., :half], q[..., half:]
    high = jnp.pad(high, [(0, 0)] * (q.ndim - 1) + [(0, half - high.shape[-1])])
    return (low & 15) | (high << 4)


def unpacked(p: Int8[Array, "*axes half"], size: int) -> Int8[Array, "*axes {size}"]:
    """The numbers of rows of this size."""
    return jnp.concatenate([(p << 4) >> 4, p >> 4], axis=-1)[..., :size]  # >> keeps the sign


def product(x: Array, numbers: Array, scale: Array) -> Array:
    """x (q · scale)ᵀ in float32 at least. Whole numbers of 8 bits are exact in every dtype, scales are not.

    Nothing is kept for a derivative but the numbers as they are: a scan would keep all layers' in float32.
    """

    def multiplied(x: Array, numbers: Array, scale: Array) -> Array:
        y = contract(x, numbers.astype(wider(x.dtype, scale.dtype)))
        return y * jnp.broadcast_to(scale.astype(y.dtype), y.shape)

    return jax.checkpoint(multiplied)(x, numbers, scale)


def product4(x: Array, numbers: Array, scale: Array, group: int, size: int) -> Array:
    """The same of packed numbers, whose scales are by groups."""
    multiplied = lambda x, numbers, scale: contract(x, dense4(numbers, scale, group, size))
    return jax.checkpoint(multiplied)(x, numbers, scale)


def dense8(numbers: Array, scale: Array) -> Array:
    """q · scale, row by row."""
    wide = wider(scale.dtype, jnp.float32)
    return numbers.astype(wide) * jnp.broadcast_to(scale.astype(wide)[..., None], numbers.shape)


def dense4(numbers: Array, scale: Array, group: int, size: int) -> Array:
    """q · scale, group by group."""
    wide = wider(scale.dtype, jnp.float32)
    steps = jnp.repeat(scale.astype(wide), group, axis=-1)[..., :size]
    return unpacked(numbers, size).astype(wide) * steps


@partial(jax.jit, static_argnums=1)
def rounded4(weight: Array, group: int) -> tuple[Array, Array]:
    """(numbers, two a byte, and scales of groups) of a matrix."""
    numbers, scale = rounded(in_groups(weight, group), LEVELS[4])
    return packed(numbers.reshape(*weight.shape[:-1], -1)[..., : weight.shape[-1]]), scale
