"""Ends of tied weights: what a selection asks for where a model has nothing of its own."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import equinox as eqx
import jax
from jax.tree_util import GetAttrKey, KeyPath

from ..nn import Linear
from ._bases import is_table
from .paths import at, nodes, spell
from .select import Selection


def found_or_owner(model: Any, selection: Selection) -> list[KeyPath]:
    """The key paths of the outermost nodes that are selected.

    Raises the selection's own `ValueError` where there are none; if they would be where a module may stand and None
    does, as at the output of a model whose output is tied, one that names the tables that may own it.
    """
    try:
        return selection.outermost()._find(model, False)
    except ValueError as error:
        absent = _absent(model, selection)
        if not absent:
            raise
        raise ValueError(_message(model, absent)) from error


def _absent(model: Any, selection: Selection) -> list[KeyPath]:
    """Which of the modules that are None would be selected if they were there."""
    empty = list(_empty(model))
    if not empty:
        return []
    filled = lambda tree: [getattr(at(tree, path[:-1]), path[-1].name) for path in empty]
    layer = Linear(1, 1, key=jax.random.key(0))
    whole = eqx.tree_at(filled, model, [layer] * len(empty), is_leaf=lambda x: x is None)
    try:
        return [path for path in selection._find(whole, False) if path in set(empty)]
    except ValueError:
        return []


def _empty(model: Any) -> Iterator[KeyPath]:
    for path, node in nodes(model):
        for field in dataclasses.fields(node) if isinstance(node, eqx.Module) else ():
            if getattr(node, field.name, None) is None and any(map(_is_module, get_args(field.type))):
                yield (*path, GetAttrKey(field.name))


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, eqx.Module)


def _message(model: Any, absent: list[KeyPath]) -> str:
    places = ", ".join(map(spell, absent))
    tables = [spell(path) for path, node in nodes(model) if is_table(node)]
    owners = f" Its tables: {', '.join(tables)}." if tables else ""
    return (
        f"{places} is None in this {type(model).__name__}: nothing is there to adapt. If its output is tied to an"
        f" embedding, that table is the owner of the weight.{owners} Adapt the owner, and the output uses the changed"
        f" table too (attend); or untie first, with a Linear of its own: eqx.tree_at(lambda m: m.{spell(absent[0])},"
        " model, layer, is_leaf=lambda x: x is None)."
    )
