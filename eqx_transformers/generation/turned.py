"""Matrices turned once before a loop, where a CPU multiplies a few rows faster by the turned ones.

`x Wᵀ` reads a row of `W` for every number of the result. For one row of `x` that runs at the speed of memory; for
many, the matrix product first puts `W` in another order, at a cost that does not matter. For a few it is neither: at
batch 8, a token of a GPT-2 takes two thirds of the time with matrices that are stored the other way round.
The price is a second copy of these matrices for as long as the loop runs, and to make it once.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..nn import Attention, Embedding, Linear, MemoryCache
from ..nn._errors import expect_last_axis
from ..nn.linear import contract

Tree = TypeVar("Tree")
FEWEST, MOST = 2, 32  # rows between which it pays
ALIGNED = 16  # numbers: rows of another length than a multiple lie across cache lines, which loses what turning gains


class Turned(eqx.Module):
    """A matrix the other way round, with columns of zeros to a multiple of `ALIGNED`; `size` are its own."""

    weight: Float[Array, "inner wide"]
    size: int = eqx.field(static=True)

    def __init__(self, weight: Float[Array, "outer inner"]):
        self.size = weight.shape[-2]
        wide = jnp.pad(weight.T, ((0, 0), (0, -self.size % ALIGNED)))
        # The barrier keeps XLA from reading the matrix in its old order, which turning it would otherwise become.
        self.weight = jax.lax.optimization_barrier(wide)

    @property
    def back(self) -> Float[Array, "outer inner"]:
        return self.weight.T[: self.size]

    def contract(self, x: Float[Array, "*axes inner"]) -> Float[Array, "*axes outer"]:
        """What `nn.linear.contract` computes with the matrix itself."""
        return contract(x, self.weight, axis=0)[..., : self.size]


class TurnedLinear(eqx.Module):
    """What a `Linear` computes."""

    turned: Turned
    bias: Float[Array, " out_features"] | None

    @property
    def weight(self) -> Float[Array, "out_features in_features"]:
        return self.turned.back

    @property
    def in_features(self) -> int:
        return self.turned.weight.shape[-2]

    @property
    def out_features(self) -> int:
        return self.turned.size

    def __call__(
        self, x: Float[Array, "*axes {self.in_features}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes {self.out_features}"]:
        expect_last_axis(self, "in_features", self.in_features, x.shape)
        y = self.turned.contract(x)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)
        return y.astype(x.dtype)


class TurnedEmbedding(eqx.Module):
    """What an `Embedding` computes: rows of the table as it is, scores by the turned one."""

    table: Embedding
    turned: Turned

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
        return self.turned.contract(x).astype(x.dtype)


class FusedAttention(eqx.Module):
    """The steps of an `Attention`, whose queries, keys and values are one product."""

    attention: Attention
    fused: TurnedLinear
    sizes: tuple[int, int] = eqx.field(static=True)

    def __init__(self, attention: Attention, turned: Attention):
        query, key, value = projections(attention)
        joined = lambda name: jnp.concatenate([getattr(part, name) for part in (query, key, value)])
        self.attention = turned
        self.fused = TurnedLinear(Turned(joined("weight")), None if query.bias is None else joined("bias"))
        self.sizes = (query.out_features, query.out_features + key.out_features)

    def step(self, x: Float[Array, "seq embed_dim"], *args: Any, **kwargs: Any) -> Any:
        """See `nn.Attention.step`."""
        query, key, value = jnp.split(self.fused(x), self.sizes, axis=-1)
        return self.attention.step_of(query, key, value, *args, **kwargs)

    def recall(self, x: Float[Array, "seq embed_dim"], cache: MemoryCache) -> Float[Array, "seq embed_dim"]:
        """See `nn.Attention.recall`."""
        return self.attention.recall(x, cache)


def projections(attention: Attention) -> tuple[Any, Any, Any]:
    return attention.query_proj, attention.key_proj, attention.value_proj


def _is_fused(attention: Attention) -> bool:
    """Whether its three projections are plain matrices of one dtype, with biases or without."""
    parts = projections(attention)
    if not all(type(part) is Linear and part.weight.ndim == 2 for part in parts):
        return False
    return len({(part.weight.dtype, part.bias is None) for part in parts}) == 1


def for_rows(model: Tree, rows: int) -> Tree:
    """`model` as it runs fastest on so many rows of one token each; the same numbers but for the order of sums.

    To be called inside of `jit`, before the loop: outside, the copies would stay, and those that the loop does not use
    would be made (tables that nothing is scored against, an encoder).
    """
    if jax.default_backend() != "cpu" or not FEWEST <= rows <= MOST:
        return model
    return _all_turned(model, Attention, Linear, Embedding)


def _all_turned(tree: Tree, *kinds: type) -> Tree:
    return jax.tree.map(_turned, tree, is_leaf=lambda node: isinstance(node, kinds))


def _turned(node: Any) -> Any:
    if isinstance(node, Attention):
        turned = _all_turned(node, Linear)
        return FusedAttention(node, turned) if _is_fused(node) else turned
    if isinstance(node, Linear) and node.weight.ndim == 2:
        return TurnedLinear(Turned(node.weight), node.bias)
    return TurnedEmbedding(node, Turned(node.weight)) if isinstance(node, Embedding) else node
