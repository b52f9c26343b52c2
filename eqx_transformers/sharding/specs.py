"""Which rule an array's path fits, and what becomes of its axes."""

import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey

from ..surgery._layers import leads_to_layers
from ..surgery.paths import children, is_array_like, spell
from ..surgery.patterns import Pattern, parse
from ..surgery.select import select
from .mesh import AnyMesh
from .rules import Rule, as_rules, expect_axes, names


class Place(NamedTuple):
    """Where an array stands in its tree: its key path, how many children each node on the way has, and how many of its
    axes are of layers."""

    path: KeyPath
    lengths: tuple[int, ...]
    depth: int

    def fits(self, pattern: Pattern) -> bool:
        reached = pattern.start
        for key, length in zip(self.path, self.lengths, strict=True):
            reached = pattern.after(reached, key, length)
        return pattern.matches(reached)


class Decided(NamedTuple):
    """How an array is divided, and why not as asked for, if it is not."""

    spec: P
    note: str = ""


def specs(model: Any, mesh: AnyMesh, rules: Any) -> Any:
    """The tree of `PartitionSpec`s: one for each array, None for typed keys and what is no array.

    An axis that its mesh axes do not divide is not divided; `report` says which. Works on skeletons too.

    Raises a `ValueError` for a pattern that fits no array (the rules of the built-in sets may), for a spec with more
    axes than the array has, for axes that the mesh has not, and for a mesh that is not of type Auto.
    """
    found = decided(model, mesh, rules)
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path].spec if path in found else None, model)


def decided(model: Any, mesh: AnyMesh, rules: Any) -> dict[KeyPath, Decided]:
    """`specs` by key path, with notes; raises as it does."""
    rules = as_rules(rules)
    expect_axes(rules, mesh)
    patterns = [(rule, parse(rule.pattern)) for rule in rules.rules]
    arrays = list(_arrays(model, (), (), 0))
    for rule, pattern in patterns:
        if not rule.optional and not any(place.fits(pattern) for place, _ in arrays):
            _nothing(model, rule, arrays)
    return {place.path: decide(place, x.shape, patterns, rules.spread, mesh) for place, x in arrays}


def decide(
    place: Place,
    shape: tuple[int, ...],
    patterns: list[tuple[Rule, Pattern]],
    spread: tuple[str, ...],
    mesh: AnyMesh,
) -> Decided:
    """The first rule that fits, and then the axes to spread over. Raises a `ValueError` for a spec that is too long."""
    entries: list[Any] = [None] * len(shape)
    rule = next((rule for rule, pattern in patterns if place.fits(pattern)), None)
    for i, entry in enumerate(() if rule is None else rule.spec, start=place.depth):
        if i >= len(shape) and rule is not None:
            layers = f", {place.depth} of them of layers" if place.depth else ""
            raise ValueError(
                f"The rule {rule.pattern!r} divides {len(rule.spec)} axes as {rule.spec}, but the array at"
                f" {spell(place.path)} has {len(shape)}{layers}: {list(shape)}."
            )
        entries[i] = entry
    notes = _undivided(entries, shape, mesh)
    notes += [note for axis in spread if (note := _spread(entries, shape, place.depth, axis, mesh))]
    while entries and entries[-1] is None:
        entries.pop()
    return Decided(P(*entries), "; ".join(notes))


def place_of(path: str) -> Place:
    """What a path tells by itself, of our own models: layers are stacked where no number stands behind `blocks`."""
    steps = path.split(".")
    keys = tuple(SequenceKey(int(step)) if step.isdigit() else GetAttrKey(step) for step in steps)
    stacked = [a for a, b in pairwise(steps) if a == "blocks" and not b.isdigit()]
    return Place(keys, (sys.maxsize,) * len(keys), len(stacked))


def is_placed(x: Any) -> bool:
    """Whether it is an array, or the shape of one, and not of typed keys."""
    return is_array_like(x) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _arrays(node: Any, path: KeyPath, lengths: tuple[int, ...], depth: int) -> Iterator[tuple[Place, Any]]:
    inside = children(node)
    if is_placed(node):
        yield Place(path, lengths, depth), node
    for key, child in inside:
        if child is not None:
            deeper = depth + leads_to_layers(node, key)
            yield from _arrays(child, (*path, key), (*lengths, len(inside)), deeper)


def _undivided(entries: list[Any], shape: tuple[int, ...], mesh: AnyMesh) -> list[str]:
    """Drops the entries that do not divide their axes, and says so."""
    notes = []
    for i, entry in enumerate(entries):
        size = _size(entry, mesh)
        if shape[i] % size:
            entries[i] = None
            notes.append(f"{shape[i]} not divisible by {'*'.join(names(entry))}={size}")
    return notes


def _spread(entries: list[Any], shape: tuple[int, ...], depth: int, axis: str, mesh: AnyMesh) -> str:
    """Divides the largest axis that is left, the first of several, or says that there is none."""
    size = _size(axis, mesh)
    left = [i for i in range(depth, len(shape)) if entries[i] is None]
    if not left or any(axis in names(entry) for entry in entries):
        return ""
    free = [i for i in left if shape[i] % size == 0]
    if not free:
        return f"nothing that {axis}={size} divides"
    entries[max(free, key=lambda i: shape[i])] = axis
    return ""


def _size(entry: Any, mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[name] for name in names(entry))


def _nothing(model: Any, rule: Rule, arrays: list[tuple[Place, Any]]) -> None:
    """Raises: a pattern that is a typing error would leave its arrays undivided, in silence."""
    select(under=rule.pattern).paths(model)  # raises with the nearest paths, where there is no node at all
    below = Pattern(rule.pattern, (*parse(rule.pattern).steps, *parse("*").steps))
    inside = [spell(place.path) for place, _ in arrays if place.fits(below.and_below())]
    hint = f" It is what contains {', '.join(inside[:3])}: {rule.pattern + '.**'!r} are all of them." if inside else ""
    raise ValueError(f"No array of this {type(model).__name__} lies at {rule.pattern!r}.{hint}")
