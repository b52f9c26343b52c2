"""GPT-2: learned positions, pre-norm blocks with biases everywhere, an output tied to the token embedding.

Source: Radford et al. 2019, "Language models are unsupervised multitask learners".
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
from jax.nn.initializers import Initializer
from jaxtyping import PRNGKeyArray

from ..nn import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Stack
from ..nn._shapes import normal
from .decoder import Decoder, DecoderBlock, DecoderEmbedding
from .facts import expect_activations, expect_at_least, expect_rates, expect_words


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """What decides the function that a GPT-2 computes; the defaults are the smallest published one's.

    - `mlp_dim`: None means four times `embed_dim`.
    - `embedding_dropout` after the embedding, `attention_dropout` on the attention weights, `dropout` after the
      attention and after the feed-forward network.
    - `init_std`: of every matrix; those that write to the stream are drawn with `init_std / sqrt(2 * num_layers)`.
    - `padding_id`: a classifier of whole sequences skips it at the end of a sequence that comes without a mask.
    - `tied`: the output scores against the token embedding.
    """

    family: Literal["gpt2"] = "gpt2"
    vocab_size: int = 50257
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int | None = None
    max_positions: int = 1024
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    padding_id: int | None = None
    dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    labels: int = 2
    tied: bool = True
    causal: ClassVar[bool] = True

    def __post_init__(self):
        expect_activations(self, ["activation"])
        expect_at_least(1, self, ["vocab_size", "embed_dim", "num_heads", "mlp_dim", "max_positions", "labels"])
        expect_at_least(0, self, ["num_layers"])
        expect_words(self)
        expect_rates(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is not a multiple of num_heads = {self.num_heads}.")

    @property
    def initializer(self) -> Initializer:
        """How every matrix is drawn that does not write to the stream."""
        return normal(self.init_std)


def block(config: GPT2Config, *, key: PRNGKeyArray) -> DecoderBlock:
    attention, mlp = jax.random.split(key)
    init, output = config.initializer, normal(config.init_std / math.sqrt(2 * config.num_layers))
    norm = lambda: LayerNorm(config.embed_dim, eps=config.norm_eps)
    inner = 4 * config.embed_dim if config.mlp_dim is None else config.mlp_dim
    return DecoderBlock(
        attention_norm=norm(),
        attention=Attention(
            config.embed_dim,
            config.num_heads,
            dropout=config.attention_dropout,
            init=init,
            output_init=output,
            key=attention,
        ),
        mlp_norm=norm(),
        mlp=MLP(config.embed_dim, inner, ACTIVATIONS[config.activation], init=init, output_init=output, key=mlp),
        dropout=config.dropout,
    )


class GPT2(Decoder):
    """Token ids -> hidden states `seq embed_dim`; `CausalLM` puts the output on it. See `Decoder`."""

    embedding: eqx.Module
    stack: Stack
    norm: eqx.Module
    rotary: eqx.Module | None
    positions: Literal["real", "index"] = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)
    hides_padding: bool = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: GPT2Config, *, key: PRNGKeyArray):
        tokens, positions, blocks = jax.random.split(key, 3)
        table = lambda rows, k: Embedding(rows, config.embed_dim, init=config.initializer, key=k)
        self.embedding = DecoderEmbedding(
            table(config.vocab_size, tokens),
            table(config.max_positions, positions),
            dropout=config.embedding_dropout,
        )
        self.stack = Stack(tuple(block(config, key=jax.random.fold_in(blocks, i)) for i in range(config.num_layers)))
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.rotary = None
        self.positions = "real"
        self.padding_id = config.padding_id
        self.hides_padding = False
        self.config = config
