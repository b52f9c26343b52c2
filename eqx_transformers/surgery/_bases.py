"""What an adapter stands on: an affine map or a table of rows, whether its matrix is stored as it is or in a code."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..nn._dtypes import wider


class AbstractWrapper(eqx.Module):
    """Stands in the place of a layer, whose sizes it has; an `AttributeError` for those that the layer has not."""

    base: eqx.AbstractVar[eqx.Module]

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def embed_dim(self) -> int:
        return self.base.embed_dim


def unwrapped(node: Any) -> Any:
    """The layer in whose place adapters stand."""
    while isinstance(node, AbstractWrapper):
        node = node.base
    return node


def is_table(node: Any) -> bool:
    """Whether ids go in: it has `vocab_size`, `embed_dim` and `attend`, as an `Embedding` has."""
    return all(hasattr(node, name) for name in ("vocab_size", "embed_dim", "attend"))


def is_linear(node: Any) -> bool:
    return callable(node) and all(hasattr(node, name) for name in ("in_features", "out_features"))


def is_plain(node: Any) -> bool:
    """Whether its matrix is an array of its own, and not one that `dense()` computes."""
    return not hasattr(node, "dense") and hasattr(node, "weight")


def dense(node: Any) -> Array:
    """Its matrix in its own order, which what stores it in a code computes."""
    return node.dense() if hasattr(node, "dense") else node.weight


def matrix(node: Any) -> Float[Array, "outputs inputs"]:
    """Its matrix, in float32 at least; of a table the other way round, so that rows are outputs here too."""
    weight = dense(node)
    weight = weight.astype(at_least_float32(weight.dtype))
    return weight.T if is_table(node) else weight


def with_matrix(node: Any, new: Float[Array, "outputs inputs"]) -> Any:
    """It with another matrix in the place of its `weight`, rounded to that one's dtype."""
    new = new.T if is_table(node) else new
    return eqx.tree_at(lambda n: n.weight, node, new.astype(node.weight.dtype))


def sizes(node: Any, who: str) -> tuple[int, int]:
    """(inputs, outputs) of one layer: of a table, (vocab_size, embed_dim).

    Raises a `ValueError` for what is neither, and for layers that are stacked.
    """
    kind = type(node).__name__
    if not is_table(node) and not is_linear(node):
        raise ValueError(
            f"{who}: a {kind} is neither linear (in_features, out_features) nor an embedding (vocab_size, embed_dim,"
            ' attend). Select layers: select("Linear"), select("Embedding").'
        )
    shape = eqx.filter_eval_shape(dense, node).shape
    if len(shape) != 2:
        raise ValueError(
            f"{who}: the weight of this {kind} is {list(shape)}, not a matrix: are these stacked layers? Then let"
            " Selection.each or add_adapter show them one by one."
        )
    return (shape[0], shape[1]) if is_table(node) else (shape[1], shape[0])


def at_least_float32(dtype: DTypeLike) -> Any:
    return wider(dtype, jnp.float32)
