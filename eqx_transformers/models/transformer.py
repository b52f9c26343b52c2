"""The causal Transformers of Haiku: a tutorial's and the official example's, one implementation and two sets of facts.

Pre-norm blocks with biases everywhere, learned positions of a fixed length, padding hidden by its id, an output of its
own with a bias. Sources: a tutorial of March 2021 on causal language models in JAX and Haiku, and the example that it
descends from, `examples/transformer` of https://github.com/google-deepmind/dm-haiku as it is today.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Stack
from ..nn._shapes import normal, traced_once
from .decoder import Decoder, DecoderBlock, DecoderEmbedding
from .facts import expect_activations, expect_at_least, expect_rates, expect_words


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What decides the function that such a model computes: `HAIKU_TUTORIAL` and `HAIKU_EXAMPLE` are such facts.

    - `head_dim`: the original's key size. The tutorial has no free width of the attention: there, `embed_dim` must be
      `num_heads * head_dim`.
    - `widening_factor`: the feed-forward network is so many times as wide as the stream.
    - `max_positions`: the length that the table of positions is made for; a longer sequence is refused, and a shorter
      one takes the table's first rows.
    - `padding_id`: tokens with this id are hidden where a call gives no attention mask, and count as positions all the
      same; None hides nothing. A token that sees nothing at all (padding before a text) gets the mean of all values.
    - `dropout`: after the attention and after the feed-forward network; nothing else is dropped.
    """

    family: Literal["haiku-lm-tutorial", "haiku-lm-example"]
    vocab_size: int
    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    head_dim: int = 64
    widening_factor: int = 4
    max_positions: int = 128
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    padding_id: int | None = 0
    dropout: float = 0.1
    labels: int = 2
    causal: ClassVar[bool] = True
    tied: ClassVar[bool] = False
    head_bias: ClassVar[bool] = True

    def __post_init__(self):
        expect_activations(self, ["activation"])
        sizes = ["vocab_size", "embed_dim", "num_heads", "head_dim", "widening_factor", "max_positions", "labels"]
        expect_at_least(1, self, sizes)
        expect_at_least(0, self, ["num_layers"])
        expect_words(self)
        expect_rates(self)
        if self.family == "haiku-lm-tutorial" and self.embed_dim != self.num_heads * self.head_dim:
            raise ValueError(
                f"embed_dim = {self.embed_dim} must be num_heads * head_dim = {self.num_heads} * {self.head_dim} in the"
                " tutorial's model, whose attention is as wide as the stream; the example's may have another width."
            )

    @property
    def mlp_dim(self) -> int:
        """The inner width of the feed-forward network."""
        return self.widening_factor * self.embed_dim

    @property
    def initializer(self) -> Initializer:
        """How the matrices of the blocks are drawn: deviation sqrt(2 / (num_layers * fan_in)), cut at 2.27 times it."""
        return _scaled(2 / max(self.num_layers, 1))

    @property
    def head_initializer(self) -> Initializer:
        """How the output's matrix is drawn: a normal of deviation 1 / sqrt(fan_in), cut at twice that."""
        return _output


@functools.cache
def _scaled(scale: float) -> Initializer:
    draw = jax.nn.initializers.variance_scaling
    return traced_once(draw(scale, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2))


@traced_once
def _output(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Float[Array, "out_features in_features"]:
    return jax.nn.initializers.truncated_normal(shape[-1] ** -0.5)(key, shape, dtype)


def block(config: TransformerConfig, *, key: PRNGKeyArray) -> DecoderBlock:
    attention, mlp = jax.random.split(key)
    norm = lambda: LayerNorm(config.embed_dim, eps=config.norm_eps)
    activation, init = ACTIVATIONS[config.activation], config.initializer
    return DecoderBlock(
        attention_norm=norm(),
        attention=Attention(
            config.embed_dim,
            config.num_heads,
            head_dim=config.head_dim,
            empty="uniform",
            init=init,
            key=attention,
        ),
        mlp_norm=norm(),
        mlp=MLP(config.embed_dim, config.mlp_dim, activation, init=init, key=mlp),
        dropout=config.dropout,
    )


class Transformer(Decoder):
    """Token ids -> hidden states `seq embed_dim`; `CausalLM` puts the output on it. See `Decoder`.

    A call counts padding as positions, as the original does. With a cache (`step`), padding takes none: rows of
    different lengths that are padded on the left are generated from as if they were not.
    """

    embedding: eqx.Module
    stack: Stack
    norm: eqx.Module
    rotary: eqx.Module | None
    positions: Literal["real", "index"] = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)
    hides_padding: bool = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        tokens, positions, blocks = jax.random.split(key, 3)
        table = lambda rows, k: Embedding(rows, config.embed_dim, init=normal(0.02, truncated=True), key=k)
        self.embedding = DecoderEmbedding(table(config.vocab_size, tokens), table(config.max_positions, positions))
        self.stack = Stack(tuple(block(config, key=jax.random.fold_in(blocks, i)) for i in range(config.num_layers)))
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.rotary = None
        self.positions = "index"
        self.padding_id = config.padding_id
        self.hides_padding = config.padding_id is not None
        self.config = config


# The tutorial leaves its sizes open, but for heads of 64: these are the example's of its time, with the vocabulary of
# LM1B in 32k subwords.
HAIKU_TUTORIAL = TransformerConfig(family="haiku-lm-tutorial", vocab_size=32711)
HAIKU_EXAMPLE = replace(
    HAIKU_TUTORIAL,
    family="haiku-lm-example",
    vocab_size=128,
    embed_dim=128,
    num_heads=8,
    head_dim=32,
    max_positions=64,
)
