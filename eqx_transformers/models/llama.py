"""Llama and its line: rotary positions, RMS norms, gated feed-forward networks, shared key and value heads.

Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3 are one implementation; the differences are facts of the config.
Sources: Touvron et al. 2023, arXiv:2307.09288; Dubey et al. 2024, arXiv:2407.21783; Jiang et al. 2023,
arXiv:2310.06825; Yang et al. 2024, arXiv:2407.10671; Yang et al. 2025, arXiv:2505.09388.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
from jax.nn.initializers import Initializer
from jaxtyping import PRNGKeyArray

from ..nn import ACTIVATIONS, Attention, Embedding, GatedMLP, RMSNorm, Rotary, Stack
from ..nn._shapes import normal
from .decoder import Decoder, DecoderBlock, DecoderEmbedding
from .facts import expect_activations, expect_at_least, expect_rates, expect_words


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What decides the function that a model of Llama's line computes: `LLAMA`, `QWEN3`, … are such facts.

    - `num_kv_heads`: key and value heads, shared by groups of query heads; None means `num_heads`.
    - `head_dim`: None means `embed_dim / num_heads`.
    - `max_positions`: the context that the model is meant for; nothing ends there.
    - `rope_base`, `rope_scaling`, `rope_factor`, `rope_low_freq_factor`, `rope_high_freq_factor`,
      `rope_original_positions`: see `nn.Rotary`; None means `max_positions`.
    - `window`: how many tokens a token sees, itself included; `windowed` says for every layer whether it is so there
      (None: in all). Layers that differ in this cannot be stacked.
    - `attention_bias`: of the projections to queries, keys and values; `output_bias`: of the one behind them.
    - `head_norm`: queries and keys are normalised head by head.
    - `padding_id`: a classifier of whole sequences skips it at the end of a sequence that comes without a mask; its row
      of the token embedding gets no gradient from lookups.
    - `tied`: the output scores against the token embedding.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3"]
    vocab_size: int
    embed_dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 11008
    max_positions: int = 2048
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope_base: float = 10000.0
    rope_scaling: Literal["default", "linear", "llama3"] = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_positions: int | None = None
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    padding_id: int | None = None
    attention_dropout: float = 0.0
    init_std: float = 0.02
    labels: int = 2
    tied: bool = False
    causal: ClassVar[bool] = True

    def __post_init__(self):
        expect_activations(self, ["activation"])
        sizes = ["vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_positions"]
        expect_at_least(1, self, [*sizes, "rope_original_positions", "window", "labels"])
        expect_at_least(0, self, ["num_layers"])
        expect_words(self)
        expect_rates(self)
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is not a multiple of num_heads = {self.num_heads}.")
        if self.kv_heads and self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.kv_heads}.")
        if self.head_width % 2:
            raise ValueError(f"heads of {self.head_width} cannot be turned in pairs: their width must be even.")
        if self.windowed is not None and len(self.windowed) != self.num_layers:
            raise ValueError(f"windowed is said of {len(self.windowed)} layers, but there are {self.num_layers}.")
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise ValueError(f"padding_id = {self.padding_id} is not one of the {self.vocab_size} tokens.")

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def initializer(self) -> Initializer:
        """How every matrix is drawn."""
        return normal(self.init_std)


def rotary(config: LlamaConfig) -> Rotary:
    original = config.rope_original_positions
    return Rotary(
        config.head_width,
        config.rope_base,
        config.rope_scaling,
        config.rope_factor,
        config.rope_low_freq_factor,
        config.rope_high_freq_factor,
        config.max_positions if original is None else original,
    )


def block(config: LlamaConfig, layer: int, *, key: PRNGKeyArray) -> DecoderBlock:
    attention, mlp = jax.random.split(key)
    norm = lambda dim: RMSNorm(dim, eps=config.norm_eps)
    windowed = config.windowed is None or config.windowed[layer]
    return DecoderBlock(
        attention_norm=norm(config.embed_dim),
        attention=Attention(
            config.embed_dim,
            config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_width,
            window=config.window if windowed else None,
            dropout=config.attention_dropout,
            use_bias=config.attention_bias,
            output_bias=config.output_bias,
            norm=norm if config.head_norm else None,
            init=config.initializer,
            key=attention,
        ),
        mlp_norm=norm(config.embed_dim),
        mlp=GatedMLP(
            config.embed_dim,
            config.mlp_dim,
            ACTIVATIONS[config.activation],
            use_bias=config.mlp_bias,
            init=config.initializer,
            key=mlp,
        ),
    )


class Llama(Decoder):
    """Token ids -> hidden states `seq embed_dim`; `CausalLM` puts the output on it. See `Decoder`."""

    embedding: eqx.Module
    stack: Stack
    norm: eqx.Module
    rotary: eqx.Module | None
    positions: Literal["real", "index"] = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)
    hides_padding: bool = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray):
        tokens, blocks = jax.random.split(key)
        init, padding = config.initializer, config.padding_id
        table = Embedding(config.vocab_size, config.embed_dim, padding_id=padding, init=init, key=tokens)
        self.embedding = DecoderEmbedding(table)
        self.stack = Stack(tuple(block(config, i, key=jax.random.fold_in(blocks, i)) for i in range(config.num_layers)))
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.rotary = rotary(config)
        self.positions = "real"
        self.padding_id = config.padding_id
        self.hides_padding = False
        self.config = config


LLAMA = LlamaConfig(family="llama", vocab_size=32000)
MISTRAL = replace(LLAMA, family="mistral", num_kv_heads=8, mlp_dim=14336, max_positions=131072, window=4096)
QWEN2 = replace(LLAMA, family="qwen2", vocab_size=151936, mlp_dim=22016, max_positions=32768, attention_bias=True)
QWEN3 = replace(QWEN2, family="qwen3", head_dim=128, attention_bias=False, head_norm=True)
