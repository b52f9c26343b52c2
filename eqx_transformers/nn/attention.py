"""Multi-head attention: four projections around `attend`, which decides how the middle runs."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, PRNGKeyArray

from . import kernels
from ._errors import within
from .linear import Linear, fan_in
from .mask import Mask


class Attention(eqx.Module):
    r"""$\mathrm{concat}_h(\mathrm{softmax}(q_h k_h^\top \cdot s + \mathrm{bias}) v_h) W_o^\top$ within a sequence.

    `attend` is a field: `tree_at` replaces the way it is computed (`kernels.attend`) by another, such as
    `kernels.plain`. `num_heads` query heads share `num_kv_heads` key and value heads. The scale $s$ is
    `head_dim ** -0.5` unless given. `dropout` acts on the attention weights.
    A query that may see nothing gives zeros, or the mean of all values with `empty="uniform"`.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    query_proj: eqx.Module
    key_proj: eqx.Module
    value_proj: eqx.Module
    attend: Callable
    output_proj: eqx.Module
    dropout: eqx.nn.Dropout
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    scale: float | None = eqx.field(static=True)
    empty: Literal["zeros", "uniform"] = eqx.field(static=True)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        empty: Literal["zeros", "uniform"] = "zeros",
        init: Initializer = fan_in,
        key: PRNGKeyArray,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"Attention: embed_dim = {embed_dim} is not a multiple of num_heads = {num_heads}.")
        if num_heads % num_kv_heads:
            raise ValueError(f"Attention: num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}.")
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        query, key_, value, output = jax.random.split(key, 4)
        dense = lambda outer, k: Linear(embed_dim, outer, use_bias=use_bias, init=init, key=k)
        self.query_proj = dense(num_heads * head_dim, query)
        self.key_proj = dense(num_kv_heads * head_dim, key_)
        self.value_proj = dense(num_kv_heads * head_dim, value)
        self.attend = kernels.attend
        self.output_proj = Linear(num_heads * head_dim, embed_dim, use_bias=use_bias, init=init, key=output)
        self.dropout = eqx.nn.Dropout(dropout)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.scale = scale
        self.empty = empty

    def __call__(
        self,
        x: Float[Array, "*axes seq embed_dim"],
        mask: Mask | None = None,
        *,
        bias: Float[Array, "num_heads seq seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*axes seq embed_dim"]:
        q = self._heads("query_proj", x, self.num_heads)
        k = self._heads("key_proj", x, self.num_kv_heads)
        v = self._heads("value_proj", x, self.num_kv_heads)
        on = key is not None and not self.dropout.inference
        with within("attend"):
            attended = self.attend(
                q,
                k,
                v,
                Mask() if mask is None else mask,
                bias=bias,
                scale=q.shape[-1] ** -0.5 if self.scale is None else self.scale,
                rate=self.dropout.p if on else 0.0,
                key=key if on else None,
                empty=self.empty,
            )
        with within("output_proj"):
            return self.output_proj(attended.reshape(*x.shape[:-1], -1))

    def _heads(
        self, name: str, x: Float[Array, "*axes seq embed_dim"], heads: int
    ) -> Float[Array, "*axes seq heads head_dim"]:
        with within(name):
            y = getattr(self, name)(x)
        return y.reshape(*y.shape[:-1], heads, -1)
