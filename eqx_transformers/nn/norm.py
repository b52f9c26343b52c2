"""Normalisation over the last axis."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._dtypes import wider
from ._errors import expect_last_axis


def widened(x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` as a norm is computed: beside this weight, in float32 at least."""
    # bfloat16 keeps 8 bits of mantissa, too few for a mean of squares over hundreds of numbers.
    return x.astype(wider(x.dtype, weight.dtype, jnp.float32))


def along(vector: Float[Array, " dim"], x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
    """The same numbers for all of the leading axes."""
    return jnp.broadcast_to(vector.astype(x.dtype), x.shape)


class LayerNorm(eqx.Module):
    r"""$x \mapsto \gamma (x - \mathrm{mean}(x)) / \sqrt{\mathrm{var}(x) + \epsilon} + \beta$ over the last axis.

    The variance is the biased one. Computed in float32 at least; the result has the input's dtype.
    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """

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
        wide = widened(x, self.weight)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        y = y * along(self.weight, y)
        return (y if self.bias is None else y + along(self.bias, y)).astype(x.dtype)


class RMSNorm(eqx.Module):
    r"""$x \mapsto (\gamma + \mathrm{offset}) \cdot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$ over the last axis.

    Computed in float32 at least; the result has the input's dtype. `offset` is 1 for files that store $\gamma - 1$.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    weight: Float[Array, " dim"]
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)

    def __init__(self, dim: int, *, eps: float = 1e-6, offset: float = 0.0):
        self.weight = jnp.full(dim, 1.0 - offset)
        self.eps = eps
        self.offset = offset

    @property
    def dim(self) -> int:
        return self.weight.shape[-1]

    def __call__(self, x: Float[Array, "*axes {self.dim}"]) -> Float[Array, "*axes {self.dim}"]:
        expect_last_axis(self, "dim", self.dim, x.shape)
        wide = widened(x, self.weight)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        gain = self.weight.astype(y.dtype) + self.offset
        return (y * along(gain, y)).astype(x.dtype)
