"""What a tree holds beside its arrays: classes, static fields, numbers and functions, by path, as text."""

from dataclasses import fields
from typing import Any

import equinox as eqx
import jax

from .skeletons import HOW_TO_RUN
from .surgery.paths import is_array_like, nodes, spell


def settings(tree: Any) -> dict[str, str]:
    """Path -> what is there, but arrays, configs, and what only says how a model runs."""
    found: dict[str, str] = {}
    for path, node in nodes(tree):
        name = spell(path)
        if isinstance(node, eqx.Module):
            found[name or "the model"] = _said(node)
        elif _is_setting(node) and name.split(".")[-1] not in HOW_TO_RUN:
            found[name] = _value(node)
    return found


def gaps(saved: dict[str, str], built: dict[str, str]) -> list[str]:
    """Where the two differ, in words."""
    paths = [*saved, *(path for path in built if path not in saved)]
    return [
        f"{path}: saved {saved.get(path, 'nothing')}, the skeleton builds {built.get(path, 'nothing')}"
        for path in paths
        if saved.get(path) != built.get(path)
    ]


def _said(module: eqx.Module) -> str:
    static = [f.name for f in fields(module) if f.metadata.get("static") and f.name != "config"]  # pyright: ignore[reportArgumentType]
    inside = ", ".join(f"{name}={_value(getattr(module, name, None))}" for name in static)
    return f"{type(module).__name__}({inside})"


def _is_setting(node: Any) -> bool:
    return not is_array_like(node) and len(jax.tree.leaves(node)) == 1 and jax.tree.leaves(node)[0] is node


def _value(x: Any) -> str:
    return x.__qualname__ if callable(x) and hasattr(x, "__qualname__") else repr(x)
