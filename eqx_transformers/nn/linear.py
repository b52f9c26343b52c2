"""Affine maps of the last axis."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, PRNGKeyArray

from ._dtypes import wider
from ._errors import expect_last_axis

# The CPU runtime of the oldest JAX has no products of bfloat16 numbers that are summed in float32, in some shapes.
WIDENS = jax.__version_info__ < (0, 8)
fan_in = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)


def contract(
    x: Float[Array, "*axes inner"], weight: Float[Array, "rows columns"], axis: int = -1
) -> Float[Array, "*axes outer"]:
    """x Wᵀ in the wider of both dtypes; products of half-precision numbers are summed, and returned, in float32.

    `axis` of the weight is summed over: with 0 it is x W, for a matrix that is stored the other way round.
    One `dot_general` over the last axes: inside a model this spelling lets XLA run dense layers at the speed of their
    matrix products alone (`benchmarks/forward.py`), where `x @ W.T` and a `vmap` over tokens do not.
    """
    wide = wider(x.dtype, weight.dtype)
    sums = wider(wide, jnp.float32)
    wide = sums if WIDENS else wide
    axes = (((x.ndim - 1,), (axis % weight.ndim,)), ((), ()))
    return jax.lax.dot_general(x.astype(wide), weight.astype(wide), axes, preferred_element_type=sums)


class Linear(eqx.Module):
    r"""$x \mapsto x W^\top + b$ over the last axis, for any leading axes.

    `weight` is `out_features in_features`, as in `equinox.nn.Linear`. Sums run in float32 at least, the bias is added
    before the one rounding, and the result has the input's dtype. Nothing is drawn: `key` is for what may stand in a
    layer's place, as in `equinox.nn`.

    Raises a `ValueError` when the last axis of the input is not `in_features`.
    """

    weight: Float[Array, "out_features in_features"]
    bias: Float[Array, " out_features"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        init: Initializer = fan_in,
        key: PRNGKeyArray,
    ):
        self.weight = init(key, (out_features, in_features), jnp.float32)
        self.bias = jnp.zeros(out_features) if use_bias else None

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def __call__(
        self, x: Float[Array, "*axes {self.in_features}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes {self.out_features}"]:
        expect_last_axis(self, "in_features", self.in_features, x.shape)
        y = contract(x, self.weight)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)
        return y.astype(x.dtype)
