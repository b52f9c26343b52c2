"""What a decoder keeps of the tokens that it has read, so that the next one costs one token's work."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ._errors import error_if
from .mask import Mask


class LayerCache(eqx.Module):
    """The keys and values of one attention layer, in `length` slots of which a `Cache` knows how many are filled.

    The heads come first in memory: attention reads a head's keys in one go, and nothing is put in order at every step.
    """

    keys: Float[Array, "num_kv_heads length head_dim"]
    values: Float[Array, "num_kv_heads length value_dim"]

    def __init__(self, length: int, num_kv_heads: int, head_dim: int, value_dim: int, dtype: DTypeLike):
        self.keys = jnp.zeros((num_kv_heads, length, head_dim), dtype)
        self.values = jnp.zeros((num_kv_heads, length, value_dim), dtype)

    def extended(
        self,
        k: Float[Array, "seq num_kv_heads head_dim"],
        v: Float[Array, "seq num_kv_heads value_dim"],
        index: Int[Array, ""] | int,
    ) -> "LayerCache":
        """With these in the slots from `index` on."""
        put = lambda held, x: jax.lax.dynamic_update_slice_in_dim(held, x.swapaxes(0, 1).astype(held.dtype), index, 1)
        return eqx.tree_at(lambda c: (c.keys, c.values), self, (put(self.keys, k), put(self.values, v)))


class MemoryCache(eqx.Module):
    """The keys and values of a memory that every step looks at, and which of its tokens are `real`.

    It never changes, so that all continuations of one prompt share it. The heads come first, as in a `LayerCache`.
    """

    keys: Float[Array, "num_kv_heads memory head_dim"]
    values: Float[Array, "num_kv_heads memory value_dim"]
    real: Bool[Array, " memory"]


class Cache(eqx.Module):
    """The state of decoding one sequence: a cache for every layer, and what its slots hold.

    `index` slots are filled; `real` marks those that hold a token and not padding. The same `index` serves all rows of
    a batch (`jax.vmap` over a cache with `in_axes=cache.axes`): rows of different lengths are padded on the left.
    """

    layers: tuple[Any, ...]
    index: Int[Array, ""]
    real: Bool[Array, " length"]

    def __init__(self, layers: tuple[Any, ...], length: int):
        self.layers = layers
        self.index = jnp.zeros((), jnp.int32)
        self.real = jnp.zeros(length, bool)

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.real.shape[-1]

    @property
    def axes(self) -> "Cache":
        """`in_axes` and `out_axes` of a `jax.vmap` over the rows of a batch."""
        batched = jax.tree.map(lambda _: 0, self)
        return eqx.tree_at(lambda c: c.index, batched, None)

    def extended(self, real: Bool[Array, " seq"]) -> "Cache":
        """With `seq` further slots filled, after which the layers' keys and values have still to come.

        Raises a `ValueError` where there are too few slots, if that is known while tracing; where it is not,
        `EQX_TRANSFORMERS_CHECK=1` makes it an error at run time, and `overfull` tells.
        """
        seq, held = real.shape[-1], self.index
        known = None if isinstance(held, jax.core.Tracer) else int(held)
        if seq + (known or 0) > self.length:
            raise ValueError(
                f"The cache has {self.length} slots, of which {known or 0} are filled: there is no room for {seq} more"
                " tokens. Make it longer with init_cache."
            )
        held = error_if(held, held + seq > self.length, f"The cache of {self.length} slots is full.")
        marked = jax.lax.dynamic_update_slice_in_dim(self.real, real, held, 0)
        return eqx.tree_at(lambda c: (c.index, c.real), self, (held + seq, marked))

    @property
    def overfull(self) -> Bool[Array, ""]:
        """Whether more tokens came than there are slots: the last ones stand where others stood, and all is wrong."""
        return self.index > self.length

    def mask(self, seq: int) -> Mask:
        """What the last `seq` tokens may look at."""
        return Mask(causal=True, offset=self.index - seq, keys=self.real)
