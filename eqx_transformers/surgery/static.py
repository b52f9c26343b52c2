"""Static fields of a module inside a model: `tree_at` does not reach them, for they are structure and no leaves."""

import dataclasses
import re
from typing import Any, TypeVar

import equinox as eqx
import jax

from ..nn._trees import is_array_like, rebuilt
from .paths import at, keypath_of, listed, nearest

Model = TypeVar("Model")


def set_static(model: Model, path: str, /, **fields: Any) -> Model:
    """The model with static fields of the module at `path` (as printed, `""` for the model itself) changed.

        set_static(model, "backbone.stack.blocks.3.attention_norm", eps=1e-6)
        select("LayerNorm").map(model, lambda norm: set_static(norm, "", eps=1e-6))  # of all of them

    The module is built anew without its `__init__`: all other fields are the same objects. As when a module is made,
    a field's converter is applied, and every `__check_init__` of the class and its bases runs on the result. A model
    whose fields are no longer those of its config is saved with `edited=True`; `reconfigure` changes both.

    Raises a `ValueError` where no module is at the path, where it has no such field, and where a field is not static
    (`eqx.tree_at` changes it); a `TypeError` for a value that cannot be static: an array, or one without a hash.
    """
    place = keypath_of(model, path)
    module = at(model, place)
    if not isinstance(module, eqx.Module):
        raise ValueError(f"set_static: at {path!r} is a {type(module).__name__}, which is no module.")
    known = {f.name: f for f in dataclasses.fields(module)}
    for name, value in fields.items():
        _expect_static(module, path, known, name)
        _expect_structure(name, value)
    new = rebuilt(module, {name: _converted(known[name], value) for name, value in fields.items()})
    return eqx.tree_at(lambda tree: at(tree, place), model, new) if place else new


def _converted(field: Any, value: Any) -> Any:
    return field.metadata.get("converter", lambda x: x)(value)


def _expect_static(module: Any, path: str, known: dict[str, Any], name: str) -> None:
    where = f"the {type(module).__name__} at {path!r}" if path else f"this {type(module).__name__}"
    static = [one for one, field in known.items() if field.metadata.get("static", False)]
    if name not in known:
        there = nearest("static fields", name, static) or listed("static fields", static)
        raise ValueError(f"set_static: {where} has no field {name!r}.{there}")
    if name not in static:
        at_field = re.sub(r"\.(\d+)", r"[\1]", ".".join(filter(None, ["model", path, name])))
        raise ValueError(
            f"set_static: {name!r} of {where} is not static: it is a part of the tree."
            f" eqx.tree_at(lambda model: {at_field}, model, …) changes it."
        )


def _expect_structure(name: str, value: Any) -> None:
    if any(is_array_like(leaf) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"set_static: {name} is an array or holds one. Static fields are structure, which has none.")
    try:
        hash(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(
            f"set_static: {name} = {value!r} has no hash, so the model could not be jitted: a {kind} cannot be static."
            " Use a tuple, a string, a number or a frozen dataclass."
        ) from None
