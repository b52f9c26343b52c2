"""Changing a fact of a model that exists."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax

from .skeletons import HOW_TO_RUN, differences, skeleton, stacked_paths
from .surgery.paths import is_array_like, leaves_by_path, spell

Model = TypeVar("Model")


def reconfigure(
    model: Model, grow: Callable[[str, Any, jax.ShapeDtypeStruct], Any] | None = None, **facts: Any
) -> Model:
    """The same model under a config in which `facts` are changed: its arrays, grafted by path onto the new skeleton.

    An array that has no place there of its own shape is handed to `grow(path, old, new)`: `old` is the array, or None
    where the new config adds one, `new` the shape and dtype wanted (that of `old`); it returns the new array. A
    vocabulary grows so:

        bigger = lambda path, old, new: jnp.zeros(new.shape, new.dtype).at[: len(old)].set(old)
        reconfigure(model, bigger, vocab_size=50270)

    Raises a `TypeError` for a fact that the config does not have, and a `ValueError` that names every array that does
    not fit, every array that the new config has no place for, or every edit that would be lost. An edited model is not
    rebuilt from a config (`eqx.tree_at` changes it further), unless it is what the new config builds already: blocks
    that were inserted or removed need their new number alone, `reconfigure(model, num_layers=…)`.
    """
    config = replace(model.config, **facts)  # pyright: ignore[reportAttributeAccessIssue]
    if (edits := differences(model)) and (left := differences(model, config)):
        raise ValueError(_LOST.format(edits="\n  ".join(min(edits, left, key=len))))
    built = skeleton(type(model), config, stacked_paths(model))
    old, problems = leaves_by_path(model), []

    def graft(path: Any, leaf: Any) -> Any:
        name = spell(path)
        was = old.pop(name, None)
        if not is_array_like(leaf):
            return was if name.split(".")[-1] in HOW_TO_RUN and was is not None else leaf
        if was is not None and was.shape == leaf.shape:
            return was
        wanted = leaf if was is None else jax.ShapeDtypeStruct(leaf.shape, was.dtype)
        new = None if grow is None else grow(name, was, wanted)
        if new is None or (tuple(new.shape), new.dtype) != (wanted.shape, wanted.dtype):
            gave = "" if grow is None else f", and grow gave {_said(new)}"
            problems.append(f"{name}: {_said(was)} -> {_said(wanted)}{gave}")
        return new

    new = jax.tree_util.tree_map_with_path(graft, built)
    problems += [f"{name}: has no place under the new config" for name, leaf in old.items() if is_array_like(leaf)]
    if problems:
        raise ValueError("These arrays do not fit the new config; pass grow=:\n  " + "\n  ".join(problems))
    return new


def _said(x: Any) -> str:
    return "None" if x is None else f"{x.dtype}{list(x.shape)}"


_LOST = """The model differs from what its config builds, and reconfiguring it would lose that:
  {edits}
Merge or undo these first, or change the model with eqx.tree_at."""
