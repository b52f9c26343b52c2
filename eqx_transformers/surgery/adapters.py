"""Adapters of a whole model: added, and weighed."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn._errors import within
from ._inits import Init
from ._layers import made
from ._owners import found_or_owner
from .lora import LoRA
from .merging import expect_unmerged
from .paths import at, nearest, nodes, spell
from .select import Selection, expect_selection, select

Tree = TypeVar("Tree")
BASE = GetAttrKey("base")


def add_adapter(
    model: Tree,
    selection: Selection,
    *,
    rank: int,
    alpha: float | int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float | int] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    init: Init = "kaiming",
    dora: bool = False,
    parts: int = 1,
    use_bias: bool = False,
    name: str = "default",
    key: PRNGKeyArray,
) -> Tree:
    """The model with a LoRA in the place of every selected layer; see `LoRA.adapter` for the arguments.

    Without patterns it is `eqx.tree_at(where, model, where.each(model, LoRA.adapter(…), key=key))`, `where` being the
    selection resolved: numbers depend on `key` and on a layer's path alone, tuple or stacked. With them, a layer's rank
    and alpha are those of the first pattern of paths that matches it or something that it lies in:

        add_adapter(model, select("Linear", under="**.blocks"), rank=8, rank_pattern={"**.mlp": 4}, key=key)

    A layer that has an adapter gets a second one under another name: selecting the LoRA or its base is the same. Both
    count from then on, until `set_adapters(model, name)` says otherwise.

    Raises a `ValueError` where the selection does, where it asks for an end of tied weights that has none of its own
    (it names the owner), for a pattern that no layer needs, and where `LoRA.adapter` does, with the path as a note.
    """
    expect_selection(selection, "add_adapter")
    expect_unmerged(model, "add_adapter")
    paths = _places(model, selection)
    ranks = _by_pattern(model, paths, rank_pattern or {}, "rank_pattern")
    alphas = _by_pattern(model, paths, alpha_pattern or {}, "alpha_pattern")
    options = {"rslora": rslora, "dropout": dropout, "init": init, "dora": dora, "parts": parts, "use_bias": use_bias}

    def adapted(path: KeyPath) -> LoRA:
        make = LoRA.adapter(ranks.get(path, rank), alphas.get(path, alpha), name=name, **options)
        with within(spell(path)):
            return made(model, path, make, key)

    return eqx.tree_at(lambda tree: [at(tree, path) for path in paths], model, [adapted(path) for path in paths])


def set_adapters(model: Tree, which: str | Sequence[str] | Mapping[str, float | int]) -> Tree:
    """The model with other weights of its adapters: a name (that one alone), several, none (`()`), or weight by name.

    Those that are not named weigh 0. Only numbers change, so that nothing compiles anew. Raises a `ValueError` for a
    name that no `LoRA` in the model has, and where layers are merged.
    """
    expect_unmerged(model, "set_adapters")
    wanted = {which: 1.0} if isinstance(which, str) else which
    wanted = wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
    found = [(path, node) for path, node in nodes(model) if isinstance(node, LoRA)]
    _expect_named(model, wanted, {name for _, node in found for name in node.names})
    weights = [_weights(node, wanted) for _, node in found]
    return eqx.tree_at(lambda tree: [at(tree, path).weights for path, _ in found], model, weights)


def _places(model: Any, selection: Selection) -> list[KeyPath]:
    """Where layers are selected; the LoRA around a selected base is meant itself, so that the base stays one."""
    found = found_or_owner(model, selection)
    is_base = lambda path: bool(path) and path[-1] == BASE and isinstance(at(model, path[:-1]), LoRA)
    return list(dict.fromkeys(path[:-1] if is_base(path) else path for path in found))


def _by_pattern(model: Any, paths: list[KeyPath], pattern: Mapping[str, Any], what: str) -> dict[KeyPath, Any]:
    """What each layer's first pattern says, for those that have one."""
    chosen = {}
    for text, value in pattern.items():
        matched = _matched(model, text, what)
        covered = [path for path in paths if any(path[: len(top)] == top for top in matched)]
        if not covered:
            near = nearest("layers", text, map(spell, paths))
            raise ValueError(
                f"add_adapter: {what} has {text!r}, which none of the {len(paths)} selected layers matches or lies in."
                f"{near or f' The first of them: {spell(paths[0])}.'}"
            )
        if not set(covered) - chosen.keys():
            raise ValueError(
                f"add_adapter: {what} has {text!r}, but every layer that it matches has an earlier pattern, and the"
                " first one wins: put the narrower one first."
            )
        chosen = dict.fromkeys(covered, value) | chosen
    return chosen


def _matched(model: Any, text: str, what: str) -> list[KeyPath]:
    try:
        return found_or_owner(model, select(under=text))
    except ValueError as error:
        raise ValueError(f"add_adapter: {what} has {text!r}, but {error}") from error


def _expect_named(model: Any, wanted: Mapping[str, float | int], names: set[str]) -> None:
    if not names:
        raise ValueError(f"set_adapters: there is no LoRA in this {type(model).__name__}.")
    if unknown := sorted(wanted.keys() - names):
        raise ValueError(f"set_adapters: no LoRA is named {', '.join(unknown)}; there are {', '.join(sorted(names))}.")


def _weights(node: LoRA, wanted: Mapping[str, float | int]) -> Float[Array, "..."]:
    """The same for all layers, where these are stacked; at the same place as those that were there."""
    old = node.weights
    numbers = jnp.asarray([wanted.get(name, 0.0) for name in node.names], old.dtype)
    new = jnp.broadcast_to(numbers.reshape((1,) * (old.ndim - 1) + numbers.shape), old.shape)
    is_placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed
    return jax.device_put(new, old.sharding) if is_placed else new
