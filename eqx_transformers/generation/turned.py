"""Matrices turned once before a loop, where a CPU multiplies a few rows faster by the turned ones.

`x Wᵀ` reads a row of `W` for every number of the result. For one row of `x` that is the speed of memory; for many, the
matrix product rearranges `W` at a cost that does not matter. For a few, it is neither, and a `W` that is stored the
other way round is faster (`benchmarks/decode.py`). The price is a second copy of the matrices for as long as it runs.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from ..nn import Embedding, Linear
from ..nn._dtypes import wider
from ..nn._errors import expect_last_axis

Tree = TypeVar("Tree")
FEWEST, MOST = 2, 16  # rows between which it pays


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
        y = _product(x, self.turned)
        if self.bias is not None:
            y = y + jax.numpy.broadcast_to(self.bias.astype(y.dtype), y.shape)
        return y.astype(x.dtype)


class TurnedEmbedding(eqx.Module):
    """What an `Embedding` computes: rows are looked up in it, and scores against all rows come from its turned copy."""

    table: Embedding
    turned: Float[Array, "embed_dim vocab_size"]

    @property
    def weight(self) -> Float[Array, "vocab_size embed_dim"]:
        return self.table.weight

    @property
    def vocab_size(self) -> int:
        return self.table.vocab_size

    @property
    def embed_dim(self) -> int:
        return self.table.embed_dim

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes {self.embed_dim}"]:
        return self.table(ids)

    def attend(self, x: Float[Array, "*axes {self.embed_dim}"]) -> Float[Array, "*axes {self.vocab_size}"]:
        expect_last_axis(self, "embed_dim", self.embed_dim, x.shape)
        return _product(x, self.turned).astype(x.dtype)


def _product(x: Float[Array, "*axes inner"], turned: Float[Array, "inner outer"]) -> Float[Array, "*axes outer"]:
    """As `nn.linear.contract`, with the other axis of the matrix."""
    wide = wider(x.dtype, turned.dtype)
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    sums = wider(wide, jax.numpy.float32)
    return jax.lax.dot_general(x.astype(wide), turned.astype(wide), axes, preferred_element_type=sums)


def for_rows(model: Tree, rows: int) -> Tree:
    """`model` as it runs fastest on so many rows of one token each; the same numbers but for the order of sums.

    To be called inside of `jit`, before the loop. Only `Linear`s and tables that score tokens are turned.
    """
    if jax.default_backend() != "cpu" or not FEWEST <= rows <= MOST:
        return model
    return jax.tree.map(_turn, model, is_leaf=lambda node: isinstance(node, Linear | Embedding))


def _turn(node: Any) -> Any:
    # The barrier keeps XLA from reading the matrix in its old order, which the transposition would otherwise become.
    if isinstance(node, Linear):
        return TurnedLinear(jax.lax.optimization_barrier(node.weight.T), node.bias)
    if isinstance(node, Embedding):
        return TurnedEmbedding(node, jax.lax.optimization_barrier(node.weight.T))
    return node
