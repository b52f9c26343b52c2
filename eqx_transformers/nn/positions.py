"""Where a token stands: counted ids for tables, and rotations of queries and keys."""

import math
from typing import Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._dtypes import wider


def count(
    real: Bool[Array, " seq"],
    segment_ids: Int[Array, " seq"] | None = None,
    before: Int[Array, ""] | int = 0,
) -> Int[Array, " seq"]:
    """How many `real` tokens there are up to each one, itself included, in its own segment.

    `before` tokens precede the sequence (those of a cache); they are of the first segment.
    """
    counted = jnp.cumsum(real, dtype=jnp.int32)
    if segment_ids is None:
        return counted + before
    starts = jnp.concatenate([jnp.zeros(1, bool), segment_ids[1:] != segment_ids[:-1]])
    return counted - jax.lax.cummax(jnp.where(starts, counted - real.astype(jnp.int32), -jnp.asarray(before)))


Scaling = Literal["default", "linear", "llama3"]


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which each token's queries and keys are turned."""

    cos: Float[Array, "seq pairs"]
    sin: Float[Array, "seq pairs"]


class Rotary(eqx.Module):
    r"""Position ids -> `Rotation`: at position $p$, pair $j$ of a head turns by $p\,\mathrm{base}^{-2j/\mathrm{dim}}$.

    `scaling` changes the frequencies for contexts longer than `original_positions`, which the model was trained on:

    - "linear": all are divided by `factor`.
    - "llama3": those with a wavelength above `original_positions / low_freq_factor` are divided by `factor`, those
      below `original_positions / high_freq_factor` stay, and between the two it goes over smoothly.

    Angles are computed in float32. Sources: Su et al. 2021, arXiv:2104.09864; Chen et al. 2023, arXiv:2306.15595;
    Dubey et al. 2024, arXiv:2407.21783.
    """

    dim: int = eqx.field(static=True)
    base: float = eqx.field(static=True, default=10000.0)
    scaling: Scaling = eqx.field(static=True, default="default")
    factor: float = eqx.field(static=True, default=1.0)
    low_freq_factor: float = eqx.field(static=True, default=1.0)
    high_freq_factor: float = eqx.field(static=True, default=4.0)
    original_positions: int = eqx.field(static=True, default=8192)

    def __check_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"Rotary: pairs of numbers are turned, so dim = {self.dim} must be even.")
        if self.scaling not in (words := get_args(Scaling)):
            raise ValueError(f"Rotary: scaling = {self.scaling!r} is not one of {', '.join(words)}.")
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            found = f"low_freq_factor = {self.low_freq_factor} and high_freq_factor = {self.high_freq_factor}"
            raise ValueError(f"Rotary: {found}, but the first must be less: between the two, scaling sets in.")

    @property
    def frequencies(self) -> Float[np.ndarray, " pairs"]:
        """Radians a position, for every pair."""
        plain = self.base ** (-np.arange(0, self.dim, 2) / self.dim)
        if self.scaling == "linear":
            plain = plain / self.factor
        if self.scaling == "llama3":
            turns = self.original_positions * plain / (2 * math.pi)  # within the original context
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(kept, 0, 1)
            plain = kept * plain + (1 - kept) * plain / self.factor
        return plain.astype(np.float32)

    def __call__(self, position_ids: Int[Array, " seq"]) -> Rotation:
        angles = position_ids.astype(jnp.float32)[:, None] * self.frequencies[None, :]
        return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "*axes seq heads head_dim"], rotation: Rotation) -> Float[Array, "*axes seq heads head_dim"]:
    """Every head turned by the angles of its token; number `j` of a head pairs with number `j + head_dim / 2`.

    Computed in float32 at least; the result has the input's dtype. Raises a `ValueError` when the heads do not have
    twice as many numbers as the rotation has pairs.
    """
    if x.shape[-1] != 2 * rotation.cos.shape[-1]:
        pairs, found = rotation.cos.shape[-1], x.shape[-1]
        raise ValueError(f"rotate: {pairs} pairs are turned, so heads must have {2 * pairs} numbers, not {found}.")
    cos, sin = (part[:, None, :].astype(wider(x.dtype, jnp.float32)) for part in rotation)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    along = lambda part: jnp.broadcast_to(part, first.shape)
    turned = first * along(cos) - second * along(sin), second * along(cos) + first * along(sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
