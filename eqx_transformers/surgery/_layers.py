"""Nodes of stacked blocks: which paths lead there, and functions of one layer's node over all layers."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey
from jaxtyping import PRNGKeyArray

from ..nn import Stack
from .paths import at, is_array_like, spell

BLOCKS = GetAttrKey("blocks")


def leads_to_layers(node: Any, key: Any) -> bool:
    """Whether what lies at `key` in a node is all layers in one."""
    return isinstance(node, Stack) and node.is_stacked and key == BLOCKS


def _layers(model: Any, path: KeyPath) -> list[tuple[int, int]]:
    """(where the index of a layer belongs in the path, how many layers) for all stacked blocks that it leads into."""
    found = []
    for i, key in enumerate(path):
        node = at(model, path[:i])
        if leads_to_layers(node, key):
            shapes = [x.shape for x in jax.tree.leaves(node) if is_array_like(x)]
            found.append((i + 1, shapes[0][len(found)] if found else node.num_layers))
    return found


def made(model: Any, path: KeyPath, make: Callable[..., Any], key: PRNGKeyArray | None) -> Any:
    """`make` of the node at a path, with a key folded from the path: for each layer of its own, where it is of all."""
    node, layers = at(model, path), _layers(model, path)
    run = lambda node, number: make(node) if key is None else make(node, key=_folded(key, number))
    axis = lambda x: 0 if is_array_like(x) else None  # NumPy's too, whatever this Equinox takes for an array
    for _ in layers:
        run = eqx.filter_vmap(run, in_axes=(axis, 0), out_axes=axis)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(node)):  # a skeleton stays one
        run = partial(eqx.filter_eval_shape, run)
    return run(node, _numbers(path, layers))


def _folded(key: PRNGKeyArray, number: Any) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(key, number[0]), number[1])


def _numbers(path: KeyPath, layers: list[tuple[int, int]]) -> np.ndarray:
    """64 bits of a path, in two; a row of them for every layer, of its path in unstacked blocks."""
    sizes = tuple(size for _, size in layers)
    rows = [_number(_indexed(path, layers, index)) for index in np.ndindex(sizes)]
    return np.array(rows, np.uint32).reshape(*sizes, 2)


def _indexed(path: KeyPath, layers: list[tuple[int, int]], index: tuple[int, ...]) -> KeyPath:
    for (place, _), i in reversed(list(zip(layers, index, strict=True))):  # from behind, so that places stay right
        path = (*path[:place], SequenceKey(i), *path[place:])
    return path


def _number(path: KeyPath) -> np.ndarray:
    digest = hashlib.blake2b(spell(path).encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4")
