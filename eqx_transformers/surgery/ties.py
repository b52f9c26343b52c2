"""Arrays that stand at several places of a tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .paths import leaves_by_path


def shared_leaves(model: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of paths at which one and the same array stands, in the tree's order; `()` where nothing is shared.

    One array is one object, or several whose numbers lie at the same place in memory with the same shape and dtype.
    (Nothing is known of the memory of arrays that are traced, donated or keys: there the object alone counts.)

    A tree does not know that two of its leaves are one: the first training step gives each a gradient and a value of
    its own, a saved file has both, and a step that donates its buffers fails. Weights that are to stay tied are one
    leaf, with None at the other place, as in the models of this library, so that there is nothing to find in them;
    `duplicate` makes shared leaves.
    """
    groups: dict[Any, list[str]] = {}
    for path, leaf in leaves_by_path(model).items():
        if isinstance(leaf, jax.Array | np.ndarray):
            groups.setdefault(_identity(leaf), []).append(path)
    return tuple(tuple(paths) for paths in groups.values() if len(paths) > 1)


def _identity(x: Any) -> Any:
    """Equal for two arrays that are one. Nothing lies anywhere in an array without elements."""
    place = _place(x) if x.size else None
    return id(x) if place is None else (place, x.shape, x.dtype)


def _place(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return "host", x.__array_interface__["data"][0], x.strides
    if isinstance(x, jax.core.Tracer) or x.is_deleted() or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return None
    return tuple((shard.device, shard.data.unsafe_buffer_pointer()) for shard in x.addressable_shards)
