"""Where a token stands: counted ids for tables, rotations of queries and keys, and biases by distance."""

import functools
import math
from typing import Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._dtypes import wider
from .mask import Places


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


@functools.cache
def distance_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> Int[np.ndarray, " distances"]:
    """The bucket of every distance (position of the key - that of the query) from -`max_distance` to `max_distance`.

    A half of the buckets are for keys that follow, if `bidirectional`; if not, these share bucket 0 with the query
    itself. Of the rest, a half is for one distance each, and the other half for ranges that grow as the logarithm does,
    up to `max_distance`; what is further away is in the last one.
    """
    # A table of logarithms in float64, rounded: one in float32 is not the same everywhere, and decides where a bucket
    # ends.
    distance = np.arange(-max_distance, max_distance + 1)
    side = num_buckets // 2 if bidirectional else num_buckets
    away = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    exact = side // 2
    ratio = np.maximum(away, 1).astype(np.float32) / np.float32(exact)
    logarithm = np.log(ratio.astype(np.float64)).astype(np.float32)
    grown = logarithm / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    found = np.where(away < exact, away, np.minimum(exact + grown.astype(np.int64), side - 1))
    return found + np.where(bidirectional & (distance > 0), side, 0)


class RelativeBias(eqx.Module):
    r"""$\mathrm{bias}_{h,i,j} = \mathrm{weight}[\mathrm{bucket}(j - i), h]$: a number for every head and distance.

    It is added to the scores of attention. See `distance_buckets` for which distances share one.
    Source: Raffel et al. 2020, arXiv:1910.10683.
    """

    weight: Float[Array, "num_buckets num_heads"]
    bidirectional: bool = eqx.field(static=True)
    max_distance: int = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool,
        init: Initializer = jax.nn.initializers.normal(1.0),  # noqa: B008
        key: PRNGKeyArray,
    ):
        exact = num_buckets // (4 if bidirectional else 2)
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"RelativeBias: num_buckets = {num_buckets} and max_distance = {max_distance}: there must be at least"
                f" {4 if bidirectional else 2} buckets, and distances beyond the {exact} that have one each."
            )
        self.weight = init(key, (num_buckets, num_heads), jnp.float32)
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    @property
    def num_buckets(self) -> int:
        return self.weight.shape[-2]

    @property
    def num_heads(self) -> int:
        return self.weight.shape[-1]

    def __call__(
        self, seq: int, keys: int, offset: Places | Int[Array, ""] | int = 0
    ) -> Float[Array, "num_heads {seq} {keys}"]:
        """Of `seq` queries, the first at position `offset`, and keys from position 0 on; or as `Places` says."""
        if isinstance(offset, Places):
            return self._of(offset.keys[None, :] - offset.queries[:, None])
        # All queries see the same numbers, shifted: those of the distances that occur, and every row one step further.
        length = seq + keys
        place = jnp.arange(length)
        values = self._of(jnp.where(place < keys, place, place - length) - offset)
        rows = jnp.broadcast_to(values[:, None, :], (self.num_heads, seq, length)).reshape(self.num_heads, -1)
        return rows[:, : seq * (length - 1)].reshape(self.num_heads, seq, length - 1)[:, :, :keys]

    def _of(self, distance: Int[Array, "*shape"]) -> Float[Array, "num_heads *shape"]:
        buckets = jnp.asarray(distance_buckets(self.num_buckets, self.max_distance, self.bidirectional))
        near = jnp.clip(distance, -self.max_distance, self.max_distance)
        return self.weight.T[:, buckets[near + self.max_distance]]
