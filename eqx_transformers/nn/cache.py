"""What a decoder keeps of the tokens that it has read, so that the next one costs one token's work."""

import abc
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ._errors import error_if
from .mask import Mask, Places
from .positions import count

K = TypeVar("K", bound="AbstractCache")


class LayerCache(eqx.Module):
    """The keys and values of one attention layer, in `length` slots of which a `Cache` knows how many are filled.

    They lie as products with them want them: the heads first, and keys by columns, so that nothing is put in order at
    every step.
    """

    keys: Float[Array, "num_kv_heads head_dim length"]
    values: Float[Array, "num_kv_heads length value_dim"]

    def __init__(self, length: int, num_kv_heads: int, head_dim: int, value_dim: int, dtype: DTypeLike):
        self.keys = jnp.zeros((num_kv_heads, head_dim, length), dtype)
        self.values = jnp.zeros((num_kv_heads, length, value_dim), dtype)

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.keys.shape[-1]

    def extended(
        self,
        k: Float[Array, "seq num_kv_heads head_dim"],
        v: Float[Array, "seq num_kv_heads value_dim"],
        index: Int[Array, ""] | int,
    ) -> "LayerCache":
        """With these in the slots from `index` on."""
        put = lambda held, x, axis: jax.lax.dynamic_update_slice_in_dim(held, x.astype(held.dtype), index, axis)
        keys, values = put(self.keys, keys_first(k), 2), put(self.values, v.swapaxes(0, 1), 1)
        return eqx.tree_at(lambda c: (c.keys, c.values), self, (keys, values))


class MemoryCache(eqx.Module):
    """The keys and values of a memory that every step looks at, and which of its tokens are `real`.

    It never changes, so that all continuations of one prompt share it. They lie as in a `LayerCache`.
    """

    keys: Float[Array, "num_kv_heads head_dim memory"]
    values: Float[Array, "num_kv_heads memory value_dim"]
    real: Bool[Array, " memory"]


def keys_first(k: Float[Array, "seq num_kv_heads head_dim"]) -> Float[Array, "num_kv_heads head_dim seq"]:
    """Keys as caches hold them."""
    return k.transpose(1, 2, 0)


class AbstractCache(eqx.Module):
    """The state of decoding: a cache for every layer, and what its slots hold.

    `index` slots are filled; `real` marks those that hold a token and not padding. The same `index` serves all rows of
    a batch (`jax.vmap` over a cache with `in_axes=cache.axes`): rows of different lengths are padded on the left.
    """

    layers: eqx.AbstractVar[tuple[Any, ...]]
    index: eqx.AbstractVar[Int[Array, ""]]
    real: eqx.AbstractVar[Bool[Array, " length"]]

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.real.shape[-1]

    @property
    @abc.abstractmethod
    def axes(self: K) -> K:
        """`in_axes` and `out_axes` of a `jax.vmap` over the rows of a batch."""

    @abc.abstractmethod
    def extended(self: K, real: Bool[Array, " seq"]) -> K:
        """With `seq` further slots filled, after which the layers' keys and values have still to come.

        Raises a `ValueError` where there are too few slots, if that is known while tracing; where it is not,
        `EQX_TRANSFORMERS_CHECK=1` makes it an error at run time, and `overfull` tells.
        """

    @abc.abstractmethod
    def counted(self, real: Bool[Array, " seq"]) -> Int[Array, " seq"]:
        """How many real tokens there will be up to each of those to come, itself included."""

    @abc.abstractmethod
    def offset(self, index: Int[Array, ""] | int, seq: int) -> Places | Int[Array, ""] | int:
        """Where `seq` tokens stand that are put into the slots from `index` on, as a `Mask` has it."""

    @abc.abstractmethod
    def mask(self, seq: int) -> Mask:
        """What the last `seq` tokens may look at."""

    @property
    def overfull(self) -> Bool[Array, ""]:
        """Whether more tokens came than there are slots: the last ones stand where others stood, and all is wrong."""
        return self.index > self.length


class Cache(AbstractCache):
    """The state of decoding one sequence. See `AbstractCache`."""

    layers: tuple[Any, ...]
    index: Int[Array, ""]
    real: Bool[Array, " length"]

    def __init__(self, layers: tuple[Any, ...], length: int):
        self.layers = layers
        self.index = jnp.zeros((), jnp.int32)
        self.real = jnp.zeros(length, bool)

    @property
    def axes(self) -> "Cache":
        return eqx.tree_at(lambda c: c.index, _rows(self), None)

    def extended(self, real: Bool[Array, " seq"]) -> "Cache":
        return _filled(self, real)

    def counted(self, real: Bool[Array, " seq"]) -> Int[Array, " seq"]:
        return count(real, before=self.real.sum(dtype=jnp.int32))

    def offset(self, index: Int[Array, ""] | int, seq: int) -> Int[Array, ""] | int:
        return index

    def mask(self, seq: int) -> Mask:
        return Mask(causal=True, offset=self.index - seq, keys=self.real)

    def branched(self, branches: int) -> "Branches":
        """The same for a text that goes on in so many ways at once, which share the slots that are left."""
        return Branches(self, branches)


class Branches(AbstractCache):
    """The state of decoding one text that goes on in several ways, each of which has one token a step.

    A step's tokens are the next ones of the branches, in their order. What the cache held is behind all of them, its
    `trunk` slots; a branch sees nothing of another, and `seen` says which slots are behind it. So it costs nothing that
    branches end and others part (`follow`): no key and no value is moved. See `AbstractCache`.
    """

    layers: tuple[Any, ...]
    index: Int[Array, ""]
    real: Bool[Array, " length"]
    trunk: Int[Array, ""]
    seen: Bool[Array, "branches length"]

    def __init__(self, cache: Cache, branches: int):
        self.layers = cache.layers
        self.index = cache.index
        self.real = cache.real
        self.trunk = cache.index
        self.seen = jnp.broadcast_to(cache.real[None, :], (branches, cache.length))

    @property
    def axes(self) -> "Branches":
        return eqx.tree_at(lambda c: (c.index, c.trunk), _rows(self), (None, None))

    def extended(self, real: Bool[Array, " branches"]) -> "Branches":
        own = jax.lax.dynamic_update_slice_in_dim(self.seen, jnp.diag(real), self.index, 1)
        return eqx.tree_at(lambda c: c.seen, _filled(self, real), own)

    def counted(self, real: Bool[Array, " branches"]) -> Int[Array, " branches"]:
        return self.seen.sum(axis=1, dtype=jnp.int32) + real.astype(jnp.int32)

    def offset(self, index: Int[Array, ""] | int, seq: int) -> Places:
        """All of one step's stand in one place."""
        place = lambda slot: jnp.where(slot < self.trunk, slot, self.trunk + (slot - self.trunk) // seq)
        return Places(jnp.broadcast_to(place(index), (seq,)), place(jnp.arange(self.length)))

    def mask(self, seq: int) -> Mask:
        return Mask(offset=self.offset(self.index - seq, seq), dense=self.seen)

    def follow(self, parents: Int[Array, " branches"]) -> "Branches":
        """Branch `i` goes on from where branch `parents[i]` is."""
        return eqx.tree_at(lambda c: c.seen, self, self.seen.at[parents].get(mode="promise_in_bounds"))


def _rows(cache: K) -> K:
    return jax.tree.map(lambda _: 0, cache)


def _filled(cache: K, real: Bool[Array, " seq"]) -> K:
    """See `AbstractCache.extended`."""
    seq, held = real.shape[-1], cache.index
    known = None if isinstance(held, jax.core.Tracer) else int(held)
    if seq + (known or 0) > cache.length:
        raise ValueError(
            f"The cache has {cache.length} slots, of which {known or 0} are filled: there is no room for {seq} more"
            " tokens. Make it longer with init_cache."
        )
    held = error_if(held, held + seq > cache.length, f"The cache of {cache.length} slots is full.")
    marked = jax.lax.dynamic_update_slice_in_dim(cache.real, real, held, 0)
    return eqx.tree_at(lambda c: (c.index, c.real), cache, (held + seq, marked))
