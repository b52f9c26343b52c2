"""How a place in a tree is spelled: `backbone.stack.blocks.3.attention.query_proj.weight`; and what stands there."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from jax.tree_util import KeyPath, keystr, tree_flatten_with_path, tree_leaves_with_path

from ..nn._trees import is_array_like as is_array_like


def spell(path: KeyPath) -> str:
    """A key path as text, its steps joined by dots."""
    return keystr(path, simple=True, separator=".")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree by its spelled path, in the tree's own order. Only real leaves count: None is no leaf."""
    return {spell(path): leaf for path, leaf in tree_leaves_with_path(tree)}


def children(node: Any) -> list[tuple[Any, Any]]:
    """(key, child) of what lies directly in a node, in the tree's order, None too; nothing lies in a leaf."""
    flat, _ = tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(path[0], child) for path, child in flat if path]


def nodes(tree: Any) -> Iterator[tuple[KeyPath, Any]]:
    """(key path, node) of a tree's modules, containers and leaves: the tree itself first, in its own order.

    None and static fields are no nodes; an object that stands at two places is two.
    """
    if tree is None:
        return
    yield (), tree
    for key, child in children(tree):
        for path, node in nodes(child):
            yield (key, *path), node


def at(tree: Any, path: KeyPath) -> Any:
    """The node at a key path. Raises a `ValueError` that names the nearest paths where there is none."""
    node = tree
    for key in path:
        node = dict(children(node)).get(key)
        if node is None:
            raise ValueError(_absent(tree, spell(path)))
    return node


def keypath_of(tree: Any, spelled: str) -> KeyPath:
    """The key path that is spelled so; `""` is the tree itself.

    Raises a `ValueError` where there is no node (it names the nearest paths), and where there are two: keys of a dict
    may have dots.
    """
    found = [path for path, _ in nodes(tree) if spell(path) == spelled]
    if not found:
        raise ValueError(_absent(tree, spelled))
    if len(found) > 1:
        said = " and ".join(keystr(path) for path in found)
        raise ValueError(f"{spelled!r} is not one place in this {type(tree).__name__}: it spells {said}.")
    return found[0]


def _absent(tree: Any, spelled: str) -> str:
    near = nearest("paths", spelled, (spell(path) for path, _ in nodes(tree)))
    return f"There is no node at {spelled!r} in this {type(tree).__name__} (None and static fields are none).{near}"


def nearest(what: str, wanted: str, names: Iterable[str]) -> str:
    """A sentence with the names that are most like the wanted one; empty where none is."""
    return listed(what, get_close_matches(wanted, sorted(set(names))))


def listed(what: str, names: list[str]) -> str:
    """The end of a message that says what there is instead."""
    return f" The nearest {what}: {', '.join(names)}." if names else ""
