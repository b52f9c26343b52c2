"""What all causal models share: the pre-norm block, the way through a stack of them, and the cache beside it."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from ..nn import AbstractCache, Cache, Dropout, Embedding, LayerCache, Mask, Rotation, Stack
from ..nn._errors import within
from ..nn.positions import count
from .inputs import Attended, Ids, mask_of, whole_numbers


class DecoderEmbedding(eqx.Module):
    """dropout(token_scale * tokens[id] + position_scale * positions[position]); without a table, tokens alone."""

    tokens: eqx.Module
    positions: eqx.Module | None
    dropout: Dropout
    token_scale: float = eqx.field(static=True)
    position_scale: float = eqx.field(static=True)

    def __init__(
        self,
        tokens: Embedding,
        positions: Embedding | None = None,
        *,
        dropout: float = 0.0,
        token_scale: float = 1.0,
        position_scale: float = 1.0,
    ):
        self.tokens = tokens
        self.positions = positions
        self.dropout = Dropout(dropout)
        self.token_scale = token_scale
        self.position_scale = position_scale

    def __call__(
        self, token_ids: Int[Array, " seq"], position_ids: Int[Array, " seq"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "seq embed_dim"]:
        with within("tokens"):
            x = self.tokens(token_ids) * self.token_scale  # its dtype is that of the stream through the model
        if self.positions is not None:
            with within("positions"):
                x = x + self.positions(position_ids).astype(x.dtype) * self.position_scale
        return self.dropout(x, key=key, inference=True if key is None else None)


class DecoderBlock(eqx.Module):
    """Pre-norm: x = x + dropout(attention(norm(x))), then x = x + dropout(mlp(norm(x)))."""

    attention_norm: eqx.Module
    attention: eqx.Module
    mlp_norm: eqx.Module
    mlp: eqx.Module
    attention_output_dropout: Dropout
    mlp_output_dropout: Dropout

    def __init__(
        self,
        *,
        attention_norm: eqx.Module,
        attention: eqx.Module,
        mlp_norm: eqx.Module,
        mlp: eqx.Module,
        dropout: float = 0.0,
    ):
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.attention_output_dropout = Dropout(dropout)
        self.mlp_output_dropout = Dropout(dropout)

    def __call__(
        self,
        x: Float[Array, "*axes seq embed_dim"],
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*axes seq embed_dim"]:
        inside, after, last = (None, None, None) if key is None else jax.random.split(key, 3)
        with within("attention"):
            y = self.attention(normed(self, "attention", x), mask, rotation=rotation, key=inside)
        return self._rest(x, y, after, last)

    def step(
        self,
        x: Float[Array, "seq embed_dim"],
        mask: Mask,
        cache: LayerCache,
        index: Int[Array, ""] | int,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "seq embed_dim"], LayerCache]:
        """The same for tokens after those in `cache`, and the cache with theirs; see `nn.Attention.step`."""
        with within("attention"):
            y, cache = self.attention.step(normed(self, "attention", x), mask, cache, index, rotation=rotation)
        return self._rest(x, y, None, None), cache

    def _rest(self, x: Array, y: Array, after: PRNGKeyArray | None, last: PRNGKeyArray | None) -> Array:
        x = x + self.attention_output_dropout(y, key=after, inference=True if after is None else None)
        with within("mlp"):
            y = self.mlp(normed(self, "mlp", x))
        return x + self.mlp_output_dropout(y, key=last, inference=True if last is None else None)


def normed(block: Any, part: str, x: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes embed_dim"]:
    """`x` behind the norm that stands before this part of a block."""
    with within(f"{part}_norm"):
        return getattr(block, f"{part}_norm")(x)


class Decoder(eqx.Module):
    """Token ids -> hidden states `seq embed_dim`, each of what stands before it. One sequence; `jax.vmap` it.

    `positions` says what is counted: "real" tokens alone, so that padding on the left moves nothing, or the "index".
    `rotary` makes the rotations of queries and keys where there is no table of positions.
    Where a call gives no attention mask, tokens with the id `padding_id` are hidden if `hides_padding`.
    """

    embedding: eqx.AbstractVar[eqx.Module]
    stack: eqx.AbstractVar[Stack]
    norm: eqx.AbstractVar[eqx.Module]
    rotary: eqx.AbstractVar[eqx.Module | None]
    positions: eqx.AbstractVar[Literal["real", "index"]]
    padding_id: eqx.AbstractVar[int | None]
    hides_padding: eqx.AbstractVar[bool]
    config: eqx.AbstractVar[Any]

    @property
    def room(self) -> int | None:
        """How many tokens a sequence may have; None where no table of positions ends."""
        return None if self.embedding.positions is None else self.embedding.positions.vocab_size

    @property
    def hidden_id(self) -> int | None:
        """The id of the tokens that are hidden where a call gives no mask; None where none are."""
        return self.padding_id if self.hides_padding else None

    def __call__(
        self,
        token_ids: Ids,
        *,
        attention_mask: Attended | None = None,
        position_ids: Integer[Array | np.ndarray, " seq"] | None = None,
        segment_ids: Integer[Array | np.ndarray, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq embed_dim"]:
        """`attention_mask`: 1 or True where a key exists (` seq`) or may be seen (`seq seq`: queries, keys).

        `segment_ids` mark several texts packed in one row: each sees only itself, and its positions start anew.
        `key` switches dropout on. Raises a `ValueError` for a batch (`jax.vmap` the model), for inputs of different
        lengths, for floating-point ids or masks, and for a sequence longer than the table of positions.
        """
        ids: Any = whole_numbers("token_ids", token_ids)
        segments = whole_numbers("segment_ids", segment_ids, ids)
        if attention_mask is None and self.hidden_id is not None:
            attention_mask = ids != self.hidden_id
        mask = mask_of(attention_mask, segments, len(ids), causal=True)
        given = whole_numbers("position_ids", position_ids, ids)
        if given is None:
            self._expect_room(len(ids), anyhow=self.positions == "index" or mask.keys is None, packed=segments)
            real = jnp.ones(len(ids), bool) if mask.keys is None or self.positions == "index" else mask.keys
            given = jnp.maximum(count(real, segments) - 1, 0)
        embed, blocks = (None, None) if key is None else jax.random.split(key)
        with within("embedding"):
            x = self.embedding(ids, given, key=embed)
        with within("stack"):
            x = self.stack(x, mask, self._rotation(given), key=blocks)
        with within("norm"):
            return self.norm(x)

    def init_cache(self, length: int) -> Cache:
        """An empty cache with room for `length` tokens, padding included.

        Raises a `ValueError` for stacked blocks: a cache runs on a tuple of blocks, one cache a layer.
        """
        return empty_cache(self.stack, length, dtype_of(self.embedding.tokens))

    def step(
        self,
        token_ids: Ids,
        cache: AbstractCache,
        *,
        attention_mask: Integer[Array | np.ndarray, " seq"] | Bool[Array | np.ndarray, " seq"] | None = None,
    ) -> tuple[Float[Array, "seq embed_dim"], AbstractCache]:
        """Hidden states of tokens that come after those in `cache`, and the cache with theirs.

        What a call of all of them at once gives, but that padding never takes a position here, whatever the model
        counts: rows of a batch may be padded on the left.
        """
        more = coming(token_ids, attention_mask, self.hidden_id, cache)
        with within("embedding"):
            x = self.embedding(more.ids, more.places)
        with within("stack"):
            x, cache = stepped(self.stack, x, cache, more.real, self._rotation(more.places))
        with within("norm"):
            return self.norm(x), cache

    def summary(
        self, hidden: Float[Array, "seq embed_dim"], token_ids: Ids, **inputs: Any
    ) -> Float[Array, " embed_dim"]:
        """What a classifier of whole sequences reads: the state of the last token that is not padding.

        As in transformers, with whose rule classifiers are trained, padding is what has the id `padding_id`, whatever
        the mask says; where the config names none, it is what the mask hides.
        """
        mask = inputs.get("attention_mask") if self.padding_id is None else jnp.asarray(token_ids) != self.padding_id
        real = real_of(mask, len(hidden))
        return hidden[jnp.max(jnp.where(real, jnp.arange(len(hidden)), 0))]

    def _rotation(self, position_ids: Int[Array, " seq"]) -> Rotation | None:
        if self.rotary is None:
            return None
        with within("rotary"):
            return self.rotary(position_ids)

    def _expect_room(self, seq: int, anyhow: bool, packed: Any) -> None:
        if anyhow and packed is None and self.room is not None and seq > self.room:
            raise ValueError(
                f"{type(self).__name__}: a sequence of {seq} tokens is longer than the position table allows, which is"
                f" {self.room}. Truncate it when tokenizing, or pass position_ids."
            )


def real_of(attention_mask: Any, seq: int) -> Bool[Array, " seq"]:
    """Which tokens are not padding."""
    keys = mask_of(attention_mask, None, seq, causal=True)
    if keys.dense is not None:
        raise ValueError("attention_mask must be 'seq' here: which tokens exist.")
    return jnp.ones(seq, bool) if keys.keys is None else keys.keys


class Coming(NamedTuple):
    """Tokens that come after those of a cache: which are `real`, and their `places` among the real ones, from 0."""

    ids: Int[Array, " seq"]
    real: Bool[Array, " seq"]
    places: Int[Array, " seq"]


def coming(token_ids: Ids, attention_mask: Any, hidden_id: int | None, cache: AbstractCache) -> Coming:
    """The door of every step. Without a mask, what has the id `hidden_id` is hidden."""
    ids: Any = whole_numbers("token_ids", token_ids)
    if attention_mask is None and hidden_id is not None:
        attention_mask = ids != hidden_id
    real = real_of(attention_mask, len(ids))
    return Coming(ids, real, jnp.maximum(cache.counted(real) - 1, 0))


def empty_cache(stack: Stack, length: int, dtype: DTypeLike) -> Cache:
    """One with room for `length` tokens. Raises a `ValueError` for stacked blocks."""
    return Cache(tuple(block.attention.init_cache(length, dtype) for block in blocks_of(stack)), length)


def dtype_of(table: Any) -> DTypeLike:
    """The dtype of a token table's rows, that of the stream through the model, whatever stands in its place."""
    return eqx.filter_eval_shape(table, jax.ShapeDtypeStruct((1,), jnp.int32)).dtype


def blocks_of(stack: Stack) -> tuple[Any, ...]:
    """The blocks, which are a tuple. Raises a `ValueError` where they are stacked."""
    if not isinstance(stack.blocks, tuple):
        raise ValueError(
            "The blocks are stacked, but a cache runs on a tuple of them, one cache a layer: unstack(model) once,"
            " outside of jit."
        )
    return stack.blocks


def stepped(
    stack: Stack, x: Float[Array, "seq embed_dim"], cache: AbstractCache, real: Bool[Array, " seq"], *args: Any
) -> tuple[Float[Array, "seq embed_dim"], AbstractCache]:
    """`x` through all blocks, each with its own cache; NaN if that has no room for it."""
    index, cache = cache.index, cache.extended(real)
    x = jnp.where(cache.overfull, jnp.nan, x)
    mask, layers = cache.mask(len(real)), []
    for i, (block, held) in enumerate(zip(blocks_of(stack), cache.layers, strict=True)):
        with within(f"blocks.{i}"):
            x, held = block.step(x, mask, held, index, *args)
        layers.append(held)
    return x, eqx.tree_at(lambda c: c.layers, cache, tuple(layers))
