"""Nodes of a tree chosen by class, path and predicate: a `where` for `eqx.tree_at`."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
from jax.tree_util import KeyPath
from jaxtyping import PRNGKeyArray

from ._layers import made
from ._query import Kind, Query, Where, said
from .paths import at, is_array_like, nodes, spell
from .patterns import parse

Find = Callable[[Any, bool], list[KeyPath]]
Paths = set[KeyPath]  # `set` is a method of a selection


def select(type: Kind | tuple[Kind, ...] | None = None, under: str = "**", where: Where | None = None) -> "Selection":
    """The nodes of a tree (modules, containers, leaves; not None, not static fields) that

    - are a `type`: a class, the name of one, or a tuple of these; subclasses count;
    - are, by their paths, `under` a pattern (`patterns.py` has the grammar): with a `type`, at or below what the
      pattern matches; without one, the matches themselves. `select(under="**.attention")` are the attentions,
      `select("Linear", under="**.attention")` the linear layers in them;
    - satisfy `where(path, node)`, `path` as printed (`spell`).

    Raises a `ValueError` for a malformed pattern, and a `TypeError` for a `type` that is none. See `Selection`.
    """
    kinds = () if type is None else type if isinstance(type, tuple) else (type,)
    given = {"type": type, "under": under, "where": where}
    default = {"type": None, "under": "**", "where": None}
    name = f"select({', '.join(f'{arg}={said(x)}' for arg, x in given.items() if x != default[arg])})"
    return Selection(Query(name, _checked(kinds, type), parse(under), where).find, name)


def _checked(kinds: tuple[Any, ...], given: Any) -> tuple[Kind, ...]:
    if given is not None and not (kinds and all(isinstance(kind, Kind) for kind in kinds)):
        raise TypeError(f"select: type must be a class, the name of a class, or a tuple of these; it is {given!r}.")
    return kinds


@dataclass(frozen=True, repr=False, eq=False)
class Selection:
    """Nodes of whichever tree it is shown, in the tree's order. `|`, `&` and `-` combine selections by path.

    It is a `where` for `eqx.tree_at` as it stands, for it needs the structure of a tree alone:

        eqx.tree_at(select("LayerNorm"), model, replace_fn=to_rms_norm)

    What looks at leaves (a `type` of arrays, a `where` that reads `node.weight.shape`) must be resolved on the tree
    first, with `.on(model)`, and raises in `eqx.tree_at` otherwise. Resolved, it is the same paths on any tree.
    Every method that needs a tree takes it, resolved or not.

    A `ValueError` is raised, wherever a selection is used, when it or an operand of `|`, `&`, `-` finds nothing (it
    names the nearest paths or classes), when operands of `&` and `-` have nothing in common, when a pattern asks for
    some of the layers of stacked blocks, which are one node (`unstack` the model); and, where nodes are to be replaced,
    when one contains another.
    """

    _find: Find
    _name: str
    _fixed: list[KeyPath] | None = None

    def __repr__(self) -> str:
        return self._name

    def __call__(self, tree: Any) -> list[Any]:
        """The nodes, for `eqx.tree_at`: by structure alone, and none within another."""
        return [at(tree, path) for path in _apart(self._find(tree, True))]

    def on(self, model: Any) -> "Selection":
        """The same, resolved: the paths of what it finds in `model`, leaves looked at."""
        return _fixed(self._find(model, False), f"{self}.on(…)")

    def one(self) -> Callable[[Any], Any]:
        """A `where` that gives the node itself, for `eqx.tree_at` with one replacement. Raises unless there is one."""
        return lambda tree: self.expect(1)(tree)[0]

    def expect(self, n: int) -> "Selection":
        """The same, which raises a `ValueError` where it does not find `n`: when it is used, or at once if resolved."""

        def counted(paths: list[KeyPath]) -> list[KeyPath]:
            if len(paths) != n:
                found = ", ".join(map(_place, paths[:6])) + (", …" if len(paths) > 6 else "")
                raise ValueError(f"{self}: expected {n} nodes, found {len(paths)}: {found}")
            return paths

        return self._then(f"expect({n})", counted)

    def paths(self, model: Any) -> list[str]:
        """Where the nodes are, as printed."""
        return [spell(path) for path in self._find(model, False)]

    def count(self, model: Any) -> int:
        """How many there are."""
        return len(self._find(model, False))

    def get(self, model: Any) -> list[Any]:
        """The nodes. Of stacked blocks, each with its arrays' layer axis."""
        return [at(model, path) for path in self._find(model, False)]

    def each(self, model: Any, make: Callable[..., Any], key: PRNGKeyArray | None = None) -> list[Any]:
        """What `eqx.tree_at` is to put there: `make(node, key=…)` for every node, or `make(node)` without a `key`.

        A node's key is folded from `key` and its path alone. In stacked blocks, `make` is vmapped over the layers: it
        sees a layer's node with the key that it has when unstacked, so that both ways give the same numbers.
        """
        return [made(model, path, make, key) for path in _apart(self._find(model, False))]

    def map(self, model: Any, f: Callable[[Any], Any]) -> Any:
        """The model with `f(node)` for every node; in stacked blocks `f` is vmapped over the layers."""
        return eqx.tree_at(self.on(model), model, self.each(model, f))

    def set(self, model: Any, value: Any) -> Any:
        """The model with `value` for every node; in stacked blocks, for that of every layer."""
        return self.map(model, lambda _: value)

    def mask(self, model: Any) -> Any:
        """A tree of bools, for `eqx.partition`: which leaves are arrays at or below a node.

        (`optax.masked` hands on the gradients of the others as they are: it does not freeze them.)
        """
        chosen = set(self._find(model, False))
        is_inside = lambda path: any(path[:i] in chosen for i in range(len(path) + 1))
        keep = lambda path, leaf: is_array_like(leaf) and is_inside(path)
        return jax.tree_util.tree_map_with_path(keep, model)

    def outermost(self) -> "Selection":
        """Without the nodes that lie in another one."""

        def outer(paths: list[KeyPath]) -> list[KeyPath]:
            chosen = frozenset(paths)
            return [path for path in paths if not any(path[:i] in chosen for i in range(len(path)))]

        return self._then("outermost()", outer)

    def innermost(self) -> "Selection":
        """Without the nodes that contain another one."""

        def inner(paths: list[KeyPath]) -> list[KeyPath]:
            pairs = zip(paths, [*paths[1:], ()], strict=True)  # what a node contains comes right behind it
            return [path for path, following in pairs if not _contains(path, following)]

        return self._then("innermost()", inner)

    def _then(self, name: str, change: Callable[[list[KeyPath]], list[KeyPath]]) -> "Selection":
        name = f"{self}.{name}"
        if self._fixed is not None:
            return _fixed(change(self._fixed), name)
        return Selection(lambda tree, structural: change(self._find(tree, structural)), name)

    def __or__(self, other: "Selection") -> "Selection":
        return self._combined(other, "|", set.union)

    def __and__(self, other: "Selection") -> "Selection":
        return self._combined(other, "&", set.intersection)

    def __sub__(self, other: "Selection") -> "Selection":
        return self._combined(other, "-", set.difference)

    def _combined(self, other: "Selection", sign: str, keep: Callable[[Paths, Paths], Paths]) -> "Selection":
        if not isinstance(other, Selection):
            return NotImplemented
        name = f"({self} {sign} {other})"

        def find(tree: Any, structural: bool) -> list[KeyPath]:
            ours, theirs = set(self._find(tree, structural)), set(other._find(tree, structural))
            if sign != "|" and not ours & theirs:
                raise ValueError(
                    f"{name}: they have no node in common. Selections combine by path: select the same type."
                )
            if not (kept := keep(ours, theirs)):
                raise ValueError(f"{name}: nothing is left, for the second has every node of the first.")
            return [path for path, _ in nodes(tree) if path in kept]

        return Selection(find, name)


def expect_selection(given: Any, who: str) -> None:
    """Raises a `TypeError` where something else stands in a selection's place, a pattern say."""
    if not isinstance(given, Selection):
        hint = f'; select("Linear", under={given!r}) would be one' if isinstance(given, str) else ""
        raise TypeError(f"{who} takes a Selection, as select(…) makes it, and got {given!r}{hint}.")


def _fixed(paths: list[KeyPath], name: str) -> Selection:
    def find(tree: Any, structural: bool) -> list[KeyPath]:
        for path in paths:
            at(tree, path)  # raises where there is nothing
        return paths

    return Selection(find, name, paths)


def _apart(paths: list[KeyPath]) -> list[KeyPath]:
    """Paths in the tree's order, of which none leads into another."""
    for path, following in pairwise(paths):  # what a node contains comes right behind it
        if _contains(path, following):
            raise ValueError(
                f"{_place(path)} contains {_place(following)}: both are selected, and each can only be replaced by"
                " itself. Take .outermost() or .innermost() of the selection."
            )
    return paths


def _contains(path: KeyPath, other: KeyPath) -> bool:
    return len(path) < len(other) and other[: len(path)] == path


def _place(path: KeyPath) -> str:
    return spell(path) or "the tree itself"
