"""BERT, RoBERTa and XLM-R encoders: one implementation, the differences are facts of the config.

Sources: Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116.
"""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from ..nn import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Linear, Mask, Stack
from ..nn._errors import error_if, within


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What decides the function that an encoder and its heads compute: `BERT`, `ROBERTA` and `XLM_R` are such facts.

    - `positions`: "index" counts 0, 1, 2, …; "after_padding" counts the tokens that are not padding, from
      `padding_id + 1`, and gives padding the row `padding_id`.
    - `padding_rows`: tables whose row `padding_id` gets no gradient from lookups.
    - `classifier`: a sequence classifier reads the "pooler" of the encoder, or has a dense layer of its own ("dense").
    - `prediction_activation`: of the masked-LM head; None means `activation`.
    - `tied`: the masked-LM head scores against the token embedding; `spare_bias`: an untied file keeps a second,
      unused output bias, carried so that it goes back.
    - `pooling`, `normalize`: how a sentence embedder makes one vector.
    """

    family: Literal["bert", "roberta", "xlm-roberta"]
    vocab_size: int
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    positions: Literal["index", "after_padding"] = "index"
    padding_id: int | None = 0
    padding_rows: tuple[Literal["tokens", "positions"], ...] = ("tokens",)
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    pooler: bool = True
    labels: int = 2
    classifier: Literal["pooler", "dense"] = "pooler"
    classifier_dropout: float | None = None
    prediction_activation: str | None = None
    tied: bool = True
    spare_bias: bool = False
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = True

    def __post_init__(self):
        for name in ("activation", "prediction_activation"):
            chosen = getattr(self, name)
            if chosen is not None and chosen not in ACTIVATIONS:
                raise ValueError(f"{name} = {chosen!r} is not one of {', '.join(ACTIVATIONS)}.")
        for name in ("vocab_size", "embed_dim", "num_heads", "mlp_dim", "max_positions", "token_types", "labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.num_layers < 0:
            raise ValueError(f"num_layers = {self.num_layers} must not be negative.")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is not a multiple of num_heads = {self.num_heads}.")
        if self.positions == "after_padding" and self.padding_id is None:
            raise ValueError("positions = 'after_padding' counts from padding_id + 1, but padding_id is None.")


BERT = EncoderConfig(family="bert", vocab_size=30522)
ROBERTA = EncoderConfig(
    family="roberta",
    vocab_size=50265,
    max_positions=514,
    token_types=1,
    norm_eps=1e-5,
    positions="after_padding",
    padding_id=1,
    padding_rows=("tokens", "positions"),
    classifier="dense",
    prediction_activation="gelu",
)
XLM_R = replace(ROBERTA, family="xlm-roberta", vocab_size=250002)


def normal(config: EncoderConfig) -> Initializer:
    """The family's initialiser of every matrix: normal with standard deviation `init_std`."""
    return jax.nn.initializers.normal(config.init_std)


class EncoderEmbedding(eqx.Module):
    """norm(tokens + token types + positions), then dropout."""

    tokens: eqx.Module
    positions: eqx.Module
    token_types: eqx.Module
    norm: eqx.Module
    dropout: eqx.nn.Dropout
    rule: Literal["index", "after_padding"] = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        tokens, positions, types = jax.random.split(key, 3)
        padding = lambda table: config.padding_id if table in config.padding_rows else None
        table = lambda rows, name, k: Embedding(
            rows, config.embed_dim, padding_id=padding(name), init=normal(config), key=k
        )
        self.tokens = table(config.vocab_size, "tokens", tokens)
        self.positions = table(config.max_positions, "positions", positions)
        self.token_types = table(config.token_types, "token_types", types)
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.dropout = eqx.nn.Dropout(config.dropout)
        self.rule = config.positions
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
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(token_ids)
        with within("tokens"):
            x = self.tokens(token_ids)  # its dtype is that of the stream through the model
        for name, ids in (("token_types", token_type_ids), ("positions", position_ids)):
            with within(name):
                x = x + getattr(self, name)(ids).astype(x.dtype)
        with within("norm"):
            x = self.norm(x)
        return self.dropout(x, key=key, inference=True if key is None else None)

    def position_ids(
        self, token_ids: Int[Array, " seq"], segment_ids: Int[Array, " seq"] | None = None
    ) -> Int[Array, " seq"]:
        """Each token's row of the position table by the family's rule; positions restart where the segment changes.

        Raises a `ValueError` when the sequence is longer than the table can hold.
        """
        before = -1 if self.padding_id is None else self.padding_id  # "after_padding" always has one
        first = 0 if self.rule == "index" else before + 1
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
        return count - 1 if self.rule == "index" else count * real + before


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
    dropout: eqx.nn.Dropout

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        attention, mlp = jax.random.split(key)
        self.attention = Attention(
            config.embed_dim, config.num_heads, dropout=config.attention_dropout, init=normal(config), key=attention
        )
        self.attention_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        activation = ACTIVATIONS[config.activation]
        self.mlp = MLP(config.embed_dim, config.mlp_dim, activation, init=normal(config), key=mlp)
        self.mlp_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.dropout = eqx.nn.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "*axes seq embed_dim"], mask: Mask | None = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes seq embed_dim"]:
        inside, after, last = (None, None, None) if key is None else jax.random.split(key, 3)
        with within("attention"):
            y = self.attention(x, mask, key=inside)
        x = self._join("attention_norm", x, y, after)
        with within("mlp"):
            y = self.mlp(x)
        return self._join("mlp_norm", x, y, last)

    def _join(self, norm: str, x: Array, y: Array, key: PRNGKeyArray | None) -> Float[Array, "*axes seq embed_dim"]:
        y = self.dropout(y, key=key, inference=True if key is None else None)
        with within(norm):
            return getattr(self, norm)(x + y)


class Pooler(eqx.Module):
    """tanh(dense(hidden state of the first token)): the vector that BERT's sentence-level heads read."""

    dense: eqx.Module

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        self.dense = Linear(config.embed_dim, config.embed_dim, init=normal(config), key=key)

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
    config: EncoderConfig | None = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        embedding, blocks, pooler = jax.random.split(key, 3)
        self.embedding = EncoderEmbedding(config, key=embedding)
        block = lambda i: EncoderBlock(config, key=jax.random.fold_in(blocks, i))
        self.stack = Stack(tuple(block(i) for i in range(config.num_layers)))
        self.pooler = Pooler(config, key=pooler) if config.pooler else None
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
        mask = _mask(attention_mask, segments, len(ids))
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
    if x.ndim != 1:
        raise ValueError(f"{name} must be 'seq', but it is {x.shape}. {_ONE}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} must be as long as token_ids, {like.shape[0]}, but it is {x.shape[0]}.")
    return x.astype(jnp.int32)


def _mask(attention_mask: Any, segments: Int[Array, " seq"] | None, seq: int) -> Mask:
    """The encoder's mask from what a tokenizer or a packer gives."""
    if attention_mask is None:
        return Mask(segments=segments)
    given = jnp.asarray(attention_mask)
    if given.shape not in ((seq,), (seq, seq)):
        wanted = f"{(seq,)} (keys) or {(seq, seq)} (queries, keys)"
        raise ValueError(f"attention_mask must be {wanted}, but it is {given.shape}. {_ONE}")
    if jnp.issubdtype(given.dtype, jnp.floating):
        # In an additive mask 0 means attend: read as one of ours, it would hide exactly what should be seen.
        raise ValueError(f"attention_mask must be bool or integers, 1 where to attend, but it is {given.dtype}.")
    if given.dtype != jnp.bool_:
        wrong = (given != 0) & (given != 1)
        given = error_if(given, wrong, "attention_mask must hold 0 and 1 (or False and True).") != 0
    return Mask(keys=given, segments=segments) if given.ndim == 1 else Mask(dense=given, segments=segments)


_ONE = "A model takes one sequence: jax.vmap it over a batch."


def as_part(encoder: Encoder, pooler: eqx.Module | None) -> Encoder:
    """The encoder as a part of a model: without a config of its own, which the model carries, and with this pooler."""
    part = object.__new__(Encoder)
    fields = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)} | {
        "config": None,
        "pooler": pooler,
    }
    for name, value in fields.items():
        object.__setattr__(part, name, value)
    return part
