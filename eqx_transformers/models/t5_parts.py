"""What T5 is made of: the block of either half, the half itself, and what a decoder keeps of what it looks at."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..nn import (
    ACTIVATIONS,
    MLP,
    AbstractCache,
    Attention,
    Cache,
    Dropout,
    GatedMLP,
    LayerCache,
    Mask,
    MemoryCache,
    Places,
    RelativeBias,
    RMSNorm,
    Stack,
)
from ..nn._errors import within
from .decoder import blocks_of, normed, stepped
from .t5_config import T5Config


class Memory(NamedTuple):
    """What a decoder looks at: the hidden states of a sequence, and which of them exist."""

    states: Float[Array, "*batch memory embed_dim"]
    real: Bool[Array, "*batch memory"]


def expect_one(memory: Memory) -> None:
    """Raises a `ValueError` for a batch of memories, and where the two parts are not of one length."""
    states, real = jnp.shape(memory.states), jnp.shape(memory.real)
    if len(states) != 2 or real != states[:1]:
        raise ValueError(
            f"A memory is what encode gave for one text, states 'memory embed_dim' and real 'memory', but these are"
            f" {states} and {real}. jax.vmap over a batch of them."
        )


class T5LayerCache(NamedTuple):
    """One decoder layer's keys and values: of the tokens so far, and of the memory."""

    own: LayerCache
    memory: MemoryCache


class T5Block(eqx.Module):
    """Pre-norm: x = x + dropout(part(norm(x))) for each of attention, attention to the memory, and the MLP.

    An encoder's block has no `cross_attention`. `bias`: the relative positions of this block alone, or None.

    float16 ends at 65504, which sums and products within trained T5s surpass: there the MLP is computed in float32 from
    its norm on, and what is added to the stream stays within the range. In any other dtype nothing of this is done.
    """

    attention_norm: eqx.Module
    attention: eqx.Module
    cross_attention_norm: eqx.Module | None
    cross_attention: eqx.Module | None
    mlp_norm: eqx.Module
    mlp: eqx.Module
    bias: eqx.Module | None
    output_dropout: Dropout

    def __init__(self, config: T5Config, *, decoder: bool, key: PRNGKeyArray):
        attention, cross, mlp, bias = jax.random.split(key, 4)
        norm = lambda: RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.attention_norm = norm()
        self.attention = attention_of(config, key=attention)
        self.cross_attention_norm = norm() if decoder else None
        self.cross_attention = attention_of(config, key=cross) if decoder else None
        self.mlp_norm = norm()
        self.mlp = (GatedMLP if config.gated else MLP)(
            config.embed_dim,
            config.mlp_dim,
            ACTIVATIONS[config.activation],
            dropout=config.dropout,
            use_bias=False,
            init=config.initializer,
            output_init=config.drawn(config.mlp_dim**-0.5),
            key=mlp,
        )
        self.bias = bias_of(config, decoder=decoder, key=bias) if config.bias_per_layer else None
        self.output_dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "seq embed_dim"],
        mask: Mask,
        bias: Float[Array, "num_heads seq seq"] | None = None,
        memory: Memory | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq embed_dim"]:
        """`bias` is that of all blocks, `memory` what a decoder's looks at."""
        keys = [None] * 6 if key is None else list(jax.random.split(key, 6))
        bias = self._bias(bias, len(x), len(x), 0)
        with within("attention"):
            y = self.attention(normed(self, "attention", x), mask, bias=bias, key=keys[0])
        x = self._added(x, y, keys[1])
        if self.cross_attention is not None and memory is not None:
            with within("cross_attention"):
                y = normed(self, "cross_attention", x)
                y = self.cross_attention(y, Mask(keys=memory.real), memory=memory.states, key=keys[2])
            x = self._added(x, y, keys[3])
        return self._added(x, self._fed(x, keys[4]), keys[5])

    def init_cache(self, memory: Memory, length: int, dtype: DTypeLike) -> T5LayerCache:
        """An empty cache with room for `length` tokens, and the memory's keys and values."""
        looking: Any = self.cross_attention
        with within("cross_attention"):
            kept = looking.remember(memory.states, memory.real)
        return T5LayerCache(self.attention.init_cache(length, dtype), kept)

    def step(
        self,
        x: Float[Array, "seq embed_dim"],
        mask: Mask,
        cache: T5LayerCache,
        index: Int[Array, ""] | int,
        bias: Float[Array, "num_heads seq length"] | None = None,
    ) -> tuple[Float[Array, "seq embed_dim"], T5LayerCache]:
        """The same for tokens after those in `cache`, and the cache with theirs; see `nn.Attention.step`."""
        bias = self._bias(bias, len(x), cache.own.length, mask.offset)
        with within("attention"):
            y, own = self.attention.step(normed(self, "attention", x), mask, cache.own, index, bias=bias)
        x = self._added(x, y, None)
        looking: Any = self.cross_attention
        with within("cross_attention"):
            y = looking.recall(normed(self, "cross_attention", x), cache.memory)
        x = self._added(x, y, None)
        return self._added(x, self._fed(x, None), None), cache._replace(own=own)

    def _bias(self, shared: Array | None, seq: int, keys: int, offset: Places | Int[Array, ""] | int) -> Array | None:
        if self.bias is None:
            return shared
        with within("bias"):
            return self.bias(seq, keys, offset)

    def _fed(self, x: Array, key: PRNGKeyArray | None) -> Array:
        y = normed(self, "mlp", x)
        with within("mlp"):
            return self.mlp(y.astype(jnp.float32) if x.dtype == jnp.float16 else y, key=key)

    def _added(self, x: Array, y: Array, key: PRNGKeyArray | None) -> Array:
        y = self.output_dropout(y, key=key, inference=True if key is None else None)
        if x.dtype != jnp.float16:
            return x + y
        largest = float(jnp.finfo(jnp.float16).max)
        return jnp.clip(x.astype(jnp.float32) + y.astype(jnp.float32), -largest, largest).astype(jnp.float16)


class T5Half(eqx.Module):
    """An encoder, or a decoder with its eyes on a memory: dropout(norm(blocks(dropout(x)))).

    `bias`: the relative positions that all blocks share, or None where every block has its own. A decoder's tokens do
    not see those that follow them.
    """

    bias: eqx.Module | None
    stack: Stack
    norm: eqx.Module
    dropout: Dropout
    output_dropout: Dropout

    def __init__(self, config: T5Config, *, decoder: bool, key: PRNGKeyArray):
        bias, blocks = jax.random.split(key)
        depth = config.decoder_layers if decoder else config.num_layers
        block = lambda i: T5Block(config, decoder=decoder, key=jax.random.fold_in(blocks, i))
        self.bias = None if config.bias_per_layer else bias_of(config, decoder=decoder, key=bias)
        self.stack = Stack(tuple(block(i) for i in range(depth)))
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.output_dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "seq embed_dim"],
        mask: Mask,
        memory: Memory | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq embed_dim"]:
        before, blocks, after = (None, None, None) if key is None else jax.random.split(key, 3)
        x = self.dropout(x, key=before, inference=True if key is None else None)
        bias = self._bias(len(x), len(x), 0)
        with within("stack"):
            x = self.stack(x, mask, bias, memory, key=blocks)
        with within("norm"):
            x = self.norm(x)
        return self.output_dropout(x, key=after, inference=True if key is None else None)

    def init_cache(self, memory: Memory, length: int, dtype: DTypeLike) -> Cache:
        """An empty cache with room for `length` tokens, and every block's keys and values of the memory.

        Raises a `ValueError` for stacked blocks: a cache runs on a tuple of blocks, one cache a layer.
        """
        with within("stack"):
            return Cache(tuple(block.init_cache(memory, length, dtype) for block in blocks_of(self.stack)), length)

    def step(
        self, x: Float[Array, "seq embed_dim"], cache: AbstractCache, real: Bool[Array, " seq"]
    ) -> tuple[Float[Array, "seq embed_dim"], AbstractCache]:
        """The same for tokens after those in `cache`, and the cache with theirs."""
        bias = self._bias(len(x), cache.length, cache.offset(cache.index, len(x)))
        with within("stack"):
            x, cache = stepped(self.stack, x, cache, real, bias)
        with within("norm"):
            return self.norm(x), cache

    def _bias(self, seq: int, keys: int, offset: Places | Int[Array, ""] | int) -> Array | None:
        if self.bias is None:
            return None
        with within("bias"):
            return self.bias(seq, keys, offset)


def attention_of(config: T5Config, *, key: PRNGKeyArray) -> Attention:
    """Scores are not scaled: the query's matrix is drawn that much smaller instead."""
    return Attention(
        config.embed_dim,
        config.num_heads,
        head_dim=config.head_dim,
        scale=1.0,
        dropout=config.dropout,
        use_bias=False,
        init=config.initializer,
        query_init=config.drawn((config.embed_dim * config.head_dim) ** -0.5),
        output_init=config.drawn((config.num_heads * config.head_dim) ** -0.5),
        key=key,
    )


def bias_of(config: T5Config, *, decoder: bool, key: PRNGKeyArray) -> RelativeBias:
    return RelativeBias(
        config.num_heads,
        num_buckets=config.num_buckets,
        max_distance=config.max_distance,
        bidirectional=not decoder,
        init=config.initializer,
        key=key,
    )
