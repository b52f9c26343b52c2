"""Matrices turned once before a loop, where a CPU multiplies a few rows faster by the turned ones.

`x Wᵀ` reads a row of `W` for every number of the result. For one row of `x` that runs at the speed of memory; for
many, the matrix product first puts `W` in another order, at a cost that does not matter. For a few it is neither: a
token of a GPT-2 at batch 8 takes two thirds of the time with a `W` that is stored the other way round.
The price is a second copy of these matrices for as long as the loop runs, and to make it once.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn import Linear
from ..nn._dtypes import wider
from ..nn._errors import expect_last_axis

Tree = TypeVar("Tree")
FEWEST, MOST = 2, 16  # rows between which it pays
ALIGNED = 16  # numbers: rows of another length than a multiple lie across cache lines, which loses what turning gains


class TurnedLinear(eqx.Module):
    """What a `Linear` computes; `turned` is its weight, `in_features out_features`."""

    turned: Float[Array, "in_features out_features"]
    bias: Float[Array, " out_features"] | None

    @property
    def weight(self) -> Float[Array, "out_features in_features"]:
        return self.turned.T

    @property
    def in_features(self) -> int:
        return self.turned.shape[-2]

    @property
    def out_features(self) -> int:
        return self.turned.shape[-1]

    def __call__(self, x: Float[Array, "*axes {self.in_features}"]) -> Float[Array, "*axes {self.out_features}"]:
        expect_last_axis(self, "in_features", self.in_features, x.shape)
        wide = wider(x.dtype, self.turned.dtype)
        axes = (((x.ndim - 1,), (0,)), ((), ()))
        sums = wider(wide, jnp.float32)
        y = jax.lax.dot_general(x.astype(wide), self.turned.astype(wide), axes, preferred_element_type=sums)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)
        return y.astype(x.dtype)


def for_rows(model: Tree, rows: int) -> Tree:
    """`model` as it runs fastest on so many rows of one token each; the same numbers but for the order of sums.

    To be called inside of `jit`, before the loop: outside, the copy would stay.
    """
    if jax.default_backend() != "cpu" or not FEWEST <= rows <= MOST:
        return model
    return jax.tree.map(_turned, model, is_leaf=lambda node: isinstance(node, Linear))


def _turned(node: Any) -> Any:
    if not isinstance(node, Linear) or node.weight.ndim != 2 or node.out_features % ALIGNED:
        return node
    # The barrier keeps XLA from reading the matrix in its old order, which the transposition would otherwise become.
    return TurnedLinear(jax.lax.optimization_barrier(node.weight.T), node.bias)
