"""How a place in a tree is spelled: `backbone.stack.blocks.3.attention.query_proj.weight`."""

from typing import Any

from jax.tree_util import KeyPath, keystr, tree_leaves_with_path

from ..nn._trees import is_array_like as is_array_like


def spell(path: KeyPath) -> str:
    """A key path as text, its steps joined by dots."""
    return keystr(path, simple=True, separator=".")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree by its spelled path, in the tree's own order. Only real leaves count: None is no leaf."""
    return {spell(path): leaf for path, leaf in tree_leaves_with_path(tree)}
