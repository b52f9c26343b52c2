"""BERT, RoBERTa, XLM-R, DistilBERT and ELECTRA encoders: one implementation, the differences are facts of the config.

Sources: Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116;
Sanh et al. 2019, arXiv:1910.01108; Clark et al. 2020, arXiv:2003.10555.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from ..nn import (
    ACTIVATIONS,
    MLP,
    AbstractCache,
    Attention,
    Cache,
    Dropout,
    Embedding,
    LayerCache,
    LayerNorm,
    Linear,
    Mask,
    Stack,
)
from ..nn._errors import within
from ..nn._keys import keyed
from ..nn.positions import count
from .decoder import coming, dtype_of, empty_cache, stepped
from .encoder_config import EncoderConfig
from .inputs import Attended, Ids, mask_of, whole_numbers


class EncoderEmbedding(eqx.Module):
    """norm(tokens + token types + positions), then dropout, then a projection if the tables are of another width."""

    tokens: eqx.Module
    positions: eqx.Module
    token_types: eqx.Module | None
    norm: eqx.Module
    dropout: Dropout
    projection: eqx.Module | None
    rule: Literal["index", "after_padding"] = eqx.field(static=True)
    offset: int = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        tokens, positions, types = jax.random.split(key, 3)
        padding = lambda table: config.padding_id if table in config.padding_rows else None
        init, width = config.initializer, config.table_dim
        table = lambda rows, name, k: Embedding(rows, width, padding_id=padding(name), init=init, key=k)
        self.tokens = table(config.vocab_size, "tokens", tokens)
        self.positions = table(config.max_positions, "positions", positions)
        self.token_types = table(config.token_types, "token_types", types) if config.token_types else None
        self.norm = LayerNorm(width, eps=config.norm_eps)
        self.dropout = Dropout(config.rate("embedding_dropout"))
        project = Linear(width, config.embed_dim, init=init, key=jax.random.fold_in(key, 3))
        self.projection = None if width == config.embed_dim else project
        self.rule = config.positions
        self.offset = config.position_offset
        self.padding_id = config.padding_id

    def __call__(
        self,
        token_ids: Int[Array, " seq"],
        *,
        token_type_ids: Int[Array, " seq"] | None = None,
        position_ids: Int[Array, " seq"] | None = None,
        segment_ids: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq embed_dim"]:
        if position_ids is None:
            position_ids = self.position_ids(token_ids, segment_ids)
        with within("tokens"):
            x = self.tokens(token_ids)  # its dtype is that of the stream through the model
        if self.token_types is not None:
            with within("token_types"):
                types = jnp.zeros_like(token_ids) if token_type_ids is None else token_type_ids
                x = x + self.token_types(types).astype(x.dtype)
        elif token_type_ids is not None:
            raise ValueError("EncoderEmbedding: token_type_ids were given, but this model has no token types.")
        with within("positions"):
            x = x + self.positions(position_ids).astype(x.dtype)
        with within("norm"):
            x = self.norm(x)
        x = self.dropout(x, key=key, inference=True if key is None else None)
        if self.projection is None:
            return x
        with within("projection"):
            return keyed(self.projection, x, key)

    def position_ids(
        self, token_ids: Int[Array, " seq"], segment_ids: Int[Array, " seq"] | None = None
    ) -> Int[Array, " seq"]:
        """Each token's row of the position table by the family's rule; positions restart where the segment changes.

        Raises a `ValueError` when the sequence is longer than the table can hold.
        """
        room, seq = self.room, token_ids.shape[-1]
        if segment_ids is None and seq > room:
            raise ValueError(
                f"EncoderEmbedding: a sequence of {seq} tokens is longer than the position table allows, which is"
                f" {room} ({self.positions.vocab_size} rows, the first {self.first} not for tokens). Truncate it when"
                " tokenizing, or pass position_ids."
            )
        if self.rule == "index" or self.padding_id is None:
            return count(jnp.ones_like(token_ids, bool), segment_ids) - 1 + self.first
        real = token_ids != self.padding_id
        return jnp.where(real, count(real, segment_ids) - 1 + self.first, self.padding_id)

    @property
    def first(self) -> int:
        """The row of the first token."""
        return self.offset if self.rule == "index" or self.padding_id is None else self.padding_id + 1

    @property
    def room(self) -> int:
        """How many tokens the table of positions has rows for."""
        return self.positions.vocab_size - self.first


class EncoderBlock(eqx.Module):
    """Post-norm: x = norm(x + dropout(attention(x))), then x = norm(x + dropout(mlp(x)))."""

    attention: eqx.Module
    attention_norm: eqx.Module
    mlp: eqx.Module
    mlp_norm: eqx.Module
    attention_output_dropout: Dropout
    mlp_output_dropout: Dropout

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        attention, mlp = jax.random.split(key)
        init = config.initializer
        self.attention = Attention(
            config.embed_dim,
            config.num_heads,
            dropout=config.attention_dropout,
            empty=config.empty,
            init=init,
            key=attention,
        )
        self.attention_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, ACTIVATIONS[config.activation], init=init, key=mlp)
        self.mlp_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attention_output_dropout = Dropout(config.rate("attention_output_dropout"))
        self.mlp_output_dropout = Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "*axes seq embed_dim"], mask: Mask | None = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes seq embed_dim"]:
        inside, after, last = (None, None, None) if key is None else jax.random.split(key, 3)
        with within("attention"):
            y = self.attention(x, mask, key=inside)
        return self._rest(x, y, after, last)

    def step(
        self, x: Float[Array, "seq embed_dim"], mask: Mask, cache: LayerCache, index: Int[Array, ""] | int
    ) -> tuple[Float[Array, "seq embed_dim"], LayerCache]:
        """The same for tokens after those in `cache`, and the cache with theirs; see `nn.Attention.step`."""
        with within("attention"):
            y, cache = self.attention.step(x, mask, cache, index)
        return self._rest(x, y, None, None), cache

    def _rest(self, x: Array, y: Array, after: PRNGKeyArray | None, last: PRNGKeyArray | None) -> Array:
        x = self._join("attention", x, y, after)
        with within("mlp"):
            y = self.mlp(x)
        return self._join("mlp", x, y, last)

    def _join(self, part: str, x: Array, y: Array, key: PRNGKeyArray | None) -> Float[Array, "*axes seq embed_dim"]:
        dropout, norm = getattr(self, f"{part}_output_dropout"), getattr(self, f"{part}_norm")
        y = dropout(y, key=key, inference=True if key is None else None)
        with within(f"{part}_norm"):
            return norm(x + y)


class Pooler(eqx.Module):
    """tanh(dense(hidden state of the first token)): the vector that BERT's sentence-level heads read."""

    dense: eqx.Module

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        self.dense = Linear(config.embed_dim, config.embed_dim, init=config.initializer, key=key)

    def __call__(self, hidden: Float[Array, "seq embed_dim"]) -> Float[Array, " embed_dim"]:
        with within("dense"):
            return jnp.tanh(self.dense(hidden[0]))


class Encoder(eqx.Module):
    """Token ids -> hidden states `seq embed_dim`. Takes one sequence; `jax.vmap` it over a batch.

    `pooler` is there when the config (the file) has one; call it on the hidden states.
    """

    embedding: eqx.Module
    stack: Stack
    pooler: eqx.Module | None
    causal: bool = eqx.field(static=True)
    hidden_id: int | None = eqx.field(static=True)
    config: EncoderConfig | None = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        embedding, blocks, pooler = jax.random.split(key, 3)
        self.embedding = EncoderEmbedding(config, key=embedding)
        block = lambda i: EncoderBlock(config, key=jax.random.fold_in(blocks, i))
        self.stack = Stack(tuple(block(i) for i in range(config.num_layers)))
        self.pooler = Pooler(config, key=pooler) if config.pooler else None
        self.causal = config.causal
        self.hidden_id = config.padding_id if config.hides_padding else None
        self.config = config

    def __call__(
        self,
        token_ids: Ids,
        *,
        attention_mask: Attended | None = None,
        token_type_ids: Integer[Array | np.ndarray, " seq"] | None = None,
        position_ids: Integer[Array | np.ndarray, " seq"] | None = None,
        segment_ids: Integer[Array | np.ndarray, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq embed_dim"]:
        """`attention_mask`: 1 or True where a key exists (` seq`) or may be seen (`seq seq`: queries, keys).

        `segment_ids` mark several texts packed in one row: each sees only itself, and its positions start anew.
        `key` switches dropout on. Raises a `ValueError` for a batch (`jax.vmap` the model), for inputs of different
        lengths, and for floating-point ids or masks.
        """
        ids: Any = whole_numbers("token_ids", token_ids)
        segments = whole_numbers("segment_ids", segment_ids, ids)
        if attention_mask is None and self.hidden_id is not None:
            attention_mask = ids != self.hidden_id
        mask = mask_of(attention_mask, segments, len(ids), self.causal)
        embed, blocks = (None, None) if key is None else jax.random.split(key)
        with within("embedding"):
            x = self.embedding(
                ids,
                token_type_ids=whole_numbers("token_type_ids", token_type_ids, ids),
                position_ids=whole_numbers("position_ids", position_ids, ids),
                segment_ids=segments,
                key=embed,
            )
        with within("stack"):
            return self.stack(x, mask, key=blocks)

    def summary(
        self, hidden: Float[Array, "seq embed_dim"], token_ids: Ids, **inputs: Any
    ) -> Float[Array, " embed_dim"]:
        """What a sentence-level head reads: the pooler's vector where there is one, else the first token's state."""
        if self.pooler is None:
            return hidden[0]
        with within("pooler"):
            return self.pooler(hidden)

    @property
    def room(self) -> int:
        """How many tokens a sequence may have."""
        return self.embedding.room

    def init_cache(self, length: int) -> Cache:
        """An empty cache with room for `length` tokens; see `Decoder.init_cache`."""
        return empty_cache(self.stack, length, dtype_of(self.embedding.tokens))

    def step(
        self,
        token_ids: Ids,
        cache: AbstractCache,
        *,
        attention_mask: Integer[Array | np.ndarray, " seq"] | Bool[Array | np.ndarray, " seq"] | None = None,
    ) -> tuple[Float[Array, "seq embed_dim"], AbstractCache]:
        """Of a causal encoder, the hidden states of tokens that come after those in `cache`; see `Decoder.step`."""
        if not self.causal:
            raise ValueError("Encoder: every token sees those that follow it, so nothing can be kept in a cache.")
        more = coming(token_ids, attention_mask, self.hidden_id, cache)
        with within("embedding"):
            x = self.embedding(more.ids, position_ids=more.places + self.embedding.first)
        with within("stack"):
            return stepped(self.stack, x, cache, more.real)
