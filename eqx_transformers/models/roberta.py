"""BERT, RoBERTa, XLM-R, DistilBERT and ELECTRA encoders: one implementation, the differences are facts of the config.

Sources: Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116;
Sanh et al. 2019, arXiv:1910.01108; Clark et al. 2020, arXiv:2003.10555.
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from ..nn import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Linear, Mask, Stack
from ..nn._errors import error_if, within
from .encoder_config import EncoderConfig


class EncoderEmbedding(eqx.Module):
    """norm(tokens + token types + positions), then dropout, then a projection if the tables are of another width."""

    tokens: eqx.Module
    positions: eqx.Module
    token_types: eqx.Module | None
    norm: eqx.Module
    dropout: eqx.nn.Dropout
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
        self.dropout = eqx.nn.Dropout(config.rate("embedding_dropout"))
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
            return self.projection(x)

    def position_ids(
        self, token_ids: Int[Array, " seq"], segment_ids: Int[Array, " seq"] | None = None
    ) -> Int[Array, " seq"]:
        """Each token's row of the position table by the family's rule; positions restart where the segment changes.

        Raises a `ValueError` when the sequence is longer than the table can hold.
        """
        before = -1 if self.padding_id is None else self.padding_id  # "after_padding" always has one
        first = self.offset if self.rule == "index" else before + 1
        room, seq = self.positions.vocab_size - first, token_ids.shape[-1]
        if segment_ids is None and seq > room:
            raise ValueError(
                f"EncoderEmbedding: a sequence of {seq} tokens is longer than the position table allows, which is"
                f" {room} ({self.positions.vocab_size} rows, the first {first} not for tokens). Truncate it when"
                " tokenizing, or pass position_ids."
            )
        counted = jnp.ones_like(token_ids, bool) if self.rule == "index" else token_ids != before
        real = counted.astype(token_ids.dtype)
        count = jnp.cumsum(real) - _before_segment(real, segment_ids)
        return count - 1 + first if self.rule == "index" else count * real + before


def _before_segment(real: Int[Array, " seq"], segment_ids: Int[Array, " seq"] | None) -> Int[Array, " seq"]:
    """How many tokens were counted before the segment of each token began."""
    if segment_ids is None:
        return jnp.zeros_like(real)
    starts = jnp.concatenate([jnp.ones_like(real[:1]), (segment_ids[1:] != segment_ids[:-1]).astype(real.dtype)])
    return jax.lax.cummax(jnp.where(starts == 1, jnp.cumsum(real) - real, 0))


class EncoderBlock(eqx.Module):
    """Post-norm: x = norm(x + dropout(attention(x))), then x = norm(x + dropout(mlp(x)))."""

    attention: eqx.Module
    attention_norm: eqx.Module
    mlp: eqx.Module
    mlp_norm: eqx.Module
    attention_output_dropout: eqx.nn.Dropout
    mlp_output_dropout: eqx.nn.Dropout

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
        self.attention_output_dropout = eqx.nn.Dropout(config.rate("attention_output_dropout"))
        self.mlp_output_dropout = eqx.nn.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "*axes seq embed_dim"], mask: Mask | None = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes seq embed_dim"]:
        inside, after, last = (None, None, None) if key is None else jax.random.split(key, 3)
        with within("attention"):
            y = self.attention(x, mask, key=inside)
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
        token_ids: Integer[Array | np.ndarray, " seq"],
        *,
        attention_mask: Bool[Array | np.ndarray, "*queries seq"]
        | Integer[Array | np.ndarray, "*queries seq"]
        | None = None,
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
        ids: Any = _ids("token_ids", token_ids)
        segments = _ids("segment_ids", segment_ids, ids)
        if attention_mask is None and self.hidden_id is not None:
            attention_mask = ids != self.hidden_id
        mask = _mask(attention_mask, segments, len(ids), self.causal)
        embed, blocks = (None, None) if key is None else jax.random.split(key)
        with within("embedding"):
            x = self.embedding(
                ids,
                token_type_ids=_ids("token_type_ids", token_type_ids, ids),
                position_ids=_ids("position_ids", position_ids, ids),
                segment_ids=segments,
                key=embed,
            )
        with within("stack"):
            return self.stack(x, mask, key=blocks)


def _ids(name: str, x: Any, like: Array | None = None) -> Array | None:
    """One whole number a token, as int32: counts of tokens would overflow in the bytes that tokenizers save."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, but it is {x.dtype}.")
    if x.ndim == 1 and not x.size:
        raise ValueError(f"{name} is empty: a model takes a sequence of at least one token.")
    if x.ndim != 1:
        raise ValueError(f"{name} must be 'seq', but it is {x.shape}. {ONE}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} must be as long as token_ids, {like.shape[0]}, but it is {x.shape[0]}.")
    return x.astype(jnp.int32)


def _mask(attention_mask: Any, segments: Int[Array, " seq"] | None, seq: int, causal: bool) -> Mask:
    """The encoder's mask from what a tokenizer or a packer gives."""
    if attention_mask is None:
        return Mask(causal=causal, segments=segments)
    given = jnp.asarray(attention_mask)
    if given.shape not in ((seq,), (seq, seq)):
        wanted = f"{(seq,)} (keys) or {(seq, seq)} (queries, keys)"
        raise ValueError(f"attention_mask must be {wanted}, but it is {given.shape}. {ONE}")
    if jnp.issubdtype(given.dtype, jnp.floating):
        # In an additive mask 0 means attend: read as one of ours, it would hide exactly what should be seen.
        raise ValueError(f"attention_mask must be bool or integers, 1 where to attend, but it is {given.dtype}.")
    if given.dtype != jnp.bool_:
        wrong = (given != 0) & (given != 1)
        given = error_if(given, wrong, "attention_mask must hold 0 and 1 (or False and True).") != 0
    keys, dense = (given, None) if given.ndim == 1 else (None, given)
    return Mask(causal=causal, segments=segments, keys=keys, dense=dense)


ONE = "A model takes one sequence: jax.vmap it over a batch."


def as_part(encoder: Encoder, pooler: eqx.Module | None, causal: bool) -> Encoder:
    """The encoder as a part of a model: without a config of its own, which the model carries, and with these."""
    part = object.__new__(Encoder)
    changed = {"config": None, "pooler": pooler, "causal": causal}
    for name, value in ({f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)} | changed).items():
        object.__setattr__(part, name, value)
    return part
