"""The purely functional transformer: its article of 2022, and what its repository has become since.

Two models under one name. The article's has biases, and values as wide as the stream, so that the heads are summed
into it; the repository's has neither: its heads stand side by side. Neither has a projection behind the heads.
Source: https://github.com/awf/functional-transformer.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import MLP, Attention, Embedding, Stack, relu
from ..nn._errors import expect_last_axis
from ..nn._shapes import normal, traced_once
from ..nn.norm import along, widened
from .decoder import Decoder, DecoderBlock, DecoderEmbedding
from .facts import expect_at_least, expect_words


@dataclass(frozen=True, kw_only=True)
class FunctionalConfig:
    r"""What decides the function that such a model computes: `FUNCTIONAL_2022` and `FUNCTIONAL_HEAD` are such facts.

    - `use_bias`: of every layer and norm.
    - `merge`: what the heads give is added up ("sum", with values as wide as the stream), or stands side by side in
      the stream ("concatenate": then `num_heads * head_dim` must be `embed_dim`).
    - `lambda_e`, `lambda_pe`: the stream begins as $\lambda_e E[\mathrm{token}] + \lambda_{pe} P[\mathrm{position}]$;
      `lambda_e` is `embed_dim ** -0.5` unless given.
    - `tau`: the scores of the attention are multiplied by it; `head_dim ** -0.5` unless given.
    - `norm_eps`: see `standardize`.
    - `max_positions`: a longer sequence is refused, a shorter one takes the first rows of the table.
    """

    family: Literal["functional-transformer"] = "functional-transformer"
    vocab_size: int
    embed_dim: int = 512
    num_layers: int = 3
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 512
    max_positions: int = 4096
    norm_eps: float = 1e-5
    use_bias: bool
    merge: Literal["sum", "concatenate"]
    lambda_e: float | None = None
    lambda_pe: float = 1.0
    tau: float | None = None
    labels: int = 2
    causal: ClassVar[bool] = True
    tied: ClassVar[bool] = False

    def __post_init__(self):
        sizes = ["vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim", "max_positions", "labels"]
        expect_at_least(1, self, sizes)
        expect_at_least(0, self, ["num_layers"])
        expect_words(self)
        if self.merge == "concatenate" and self.embed_dim != self.num_heads * self.head_dim:
            raise ValueError(
                f"embed_dim = {self.embed_dim} must be num_heads * head_dim = {self.num_heads} * {self.head_dim} where"
                " heads stand side by side in the stream; merge = 'sum' adds them up."
            )

    @property
    def head_bias(self) -> bool:
        """Whether the output has a bias."""
        return self.use_bias

    @property
    def initializer(self) -> Initializer:
        """How every matrix is drawn: uniformly between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)."""
        return _uniform


_uniform = traced_once(jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2))


def standardize(x: Float[Array, "*axes dim"], eps: float) -> Float[Array, "*axes dim"]:
    r"""$(x - \mathrm{mean}(x)) / (\mathrm{sd}(x) + \epsilon)$ over the last axis, with the biased deviation.

    Unlike in a layer norm, $\epsilon$ stands outside of the root. The derivative of the deviation at a constant row,
    where there is none, counts as zero, so that gradients are finite there.
    """
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    varies = variance > 0
    # Both branches of a `where` are differentiated, so that the root must not see the zero: 0 * inf is NaN.
    deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
    return centred / (deviation + eps)


class Standardize(eqx.Module):
    """`weight * standardize(x) + bias`, computed in float32 at least; the result has the input's dtype."""

    weight: Float[Array, " dim"]
    bias: Float[Array, " dim"] | None
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, *, eps: float = 1e-5, use_bias: bool = True):
        self.weight = jnp.ones(dim)
        self.bias = jnp.zeros(dim) if use_bias else None
        self.eps = eps

    @property
    def dim(self) -> int:
        return self.weight.shape[-1]

    def __call__(self, x: Float[Array, "*axes {self.dim}"]) -> Float[Array, "*axes {self.dim}"]:
        expect_last_axis(self, "dim", self.dim, x.shape)
        y = standardize(widened(x, self.weight), self.eps)
        y = y * along(self.weight, y)
        return (y if self.bias is None else y + along(self.bias, y)).astype(x.dtype)


class HeadSum(eqx.Module):
    """All heads' results, side by side, added up: what stands in the place of a projection behind the attention."""

    num_heads: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "*axes heads_by_embed_dim"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes embed_dim"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1).sum(-2)


def block(config: FunctionalConfig, *, key: PRNGKeyArray) -> DecoderBlock:
    attention, mlp = jax.random.split(key)
    norm = lambda: Standardize(config.embed_dim, eps=config.norm_eps, use_bias=config.use_bias)
    summed = config.merge == "sum"
    return DecoderBlock(
        attention_norm=norm(),
        attention=Attention(
            config.embed_dim,
            config.num_heads,
            head_dim=config.head_dim,
            value_dim=config.embed_dim if summed else None,
            scale=config.tau,
            use_bias=config.use_bias,
            output_proj=HeadSum(config.num_heads) if summed else eqx.nn.Identity(),
            init=config.initializer,
            key=attention,
        ),
        mlp_norm=norm(),
        mlp=MLP(config.embed_dim, config.mlp_dim, relu, use_bias=config.use_bias, init=config.initializer, key=mlp),
    )


class FunctionalTransformer(Decoder):
    """Token ids -> hidden states `seq embed_dim`; `CausalLM` puts the output on it. See `Decoder`.

    It knows no padding, and drops nothing: a `key` changes nothing.
    """

    embedding: eqx.Module
    stack: Stack
    norm: eqx.Module
    rotary: eqx.Module | None
    positions: Literal["real", "index"] = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)
    hides_padding: bool = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: FunctionalConfig, *, key: PRNGKeyArray):
        tokens, positions, blocks = jax.random.split(key, 3)
        table = lambda rows, init, k: Embedding(rows, config.embed_dim, init=init, key=k)
        self.embedding = DecoderEmbedding(
            table(config.vocab_size, normal(1.0), tokens),
            table(config.max_positions, jax.nn.initializers.zeros, positions),
            token_scale=config.embed_dim**-0.5 if config.lambda_e is None else config.lambda_e,
            position_scale=config.lambda_pe,
        )
        self.stack = Stack(tuple(block(config, key=jax.random.fold_in(blocks, i)) for i in range(config.num_layers)))
        self.norm = Standardize(config.embed_dim, eps=config.norm_eps, use_bias=config.use_bias)
        self.rotary = None
        self.positions = "index"
        self.padding_id = None
        self.hides_padding = False
        self.config = config


# 65 characters: those of the public file of Shakespeare's plays that both are trained on.
FUNCTIONAL_2022 = FunctionalConfig(vocab_size=65, use_bias=True, merge="sum")
FUNCTIONAL_HEAD = replace(FUNCTIONAL_2022, use_bias=False, merge="concatenate")
