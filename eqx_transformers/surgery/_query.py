"""What `select` asks of the nodes of a tree, and what it says when none is so."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.tree_util import KeyPath

from ._layers import BLOCKS, leads_to_layers
from .paths import children, listed, nearest, spell
from .patterns import Pattern

Where = Callable[[str, Any], bool]
Kind = type | str  # a class or the name of one


class Visit(NamedTuple):
    """A node on the way through a tree; how far along a pattern it is, and how far what contains it was."""

    path: KeyPath
    node: Any
    reached: frozenset[int]
    before: frozenset[int]


@dataclass(frozen=True)
class Query:
    """The arguments of `select`, and how to say them in a message."""

    name: str
    kinds: tuple[Kind, ...]
    under: Pattern
    where: Where | None

    def find(self, tree: Any, structural: bool) -> list[KeyPath]:
        """The paths of what is asked for. `structural`: what looks at leaves raises."""
        pattern = self.under.and_below() if self.kinds else self.under
        visits = list(self._visits(tree, pattern, (), pattern.start, frozenset()))
        under = [visit for visit in visits if pattern.matches(visit.reached)]
        kind = [visit for visit in under if self._is_kind(visit.node, structural)]
        found = [visit.path for visit in kind if self._holds(visit, structural)]
        if not found:
            raise ValueError(f"{self.name}: {self._missing(tree, visits, under, kind)}")
        return found

    def _visits(
        self, node: Any, pattern: Pattern, path: KeyPath, reached: frozenset[int], before: frozenset[int]
    ) -> Iterator[Visit]:
        yield Visit(path, node, reached, before)
        inside = children(node)
        for key, child in inside:
            if child is not None:
                after = pattern.after(reached, key, len(inside))
                if leads_to_layers(node, key):
                    self._expect_all_layers((*path, key), pattern, after)
                yield from self._visits(child, pattern, (*path, key), after, reached)

    def _expect_all_layers(self, path: KeyPath, pattern: Pattern, reached: frozenset[int]) -> None:
        if (step := pattern.index(reached)) is not None:
            raise ValueError(
                f"{self.name}: {step.text!r} asks for layers by their index, but the blocks at {spell(path)} are"
                " stacked: all layers are one node. Select in unstack(model)."
            )

    def _is_kind(self, node: Any, structural: bool) -> bool:
        names = {base.__name__ for base in type(node).__mro__}
        found = any(kind in names if isinstance(kind, str) else isinstance(node, kind) for kind in self.kinds)
        if found and structural and jax.tree_util.all_leaves([node]):
            raise ValueError(_LOOKS.format(name=self.name, what="type"))
        return found or not self.kinds

    def _holds(self, visit: Visit, structural: bool) -> bool:
        if self.where is None:
            return True
        path = spell(visit.path)
        holds = bool(self.where(path, visit.node))
        if structural and holds != self._holds_blind(path, visit.node):
            raise ValueError(_LOOKS.format(name=self.name, what="where"))
        return holds

    def _holds_blind(self, path: str, node: Any) -> bool | None:
        """What `where` says when it can learn nothing from a leaf; None where it fails, in whichever way."""
        assert self.where is not None
        try:
            return bool(self.where(path, jax.tree.map(lambda _: object(), node)))
        except Exception:
            return None

    def _missing(self, tree: Any, visits: list[Visit], under: list[Visit], kind: list[Visit]) -> str:
        if not under:
            where = f"nothing lies at {self.under.text!r} in this {type(tree).__name__}."
            return where + listed("paths", _nearest_paths(self.under, visits)) + _stacked(visits)
        if not kind:
            there = [base for visit in under for base in type(visit.node).__mro__]
            kinds = " or ".join(map(said, self.kinds))
            return f"of {len(under)} nodes, none is a {kinds}." + "".join(_nearest_kinds(k, there) for k in self.kinds)
        return f"where was False of all {len(kind)} nodes that it was asked about."


_LOOKS = (
    "{name}: its {what} looks at leaves, which eqx.tree_at does not show to a where. Resolve it on the model first:"
    " where = selection.on(model); eqx.tree_at(where, model, …)."
)


def _nearest_paths(pattern: Pattern, visits: list[Visit]) -> list[str]:
    """Where the pattern fails: of the steps that go on from its last good place, those most like what it asks for."""

    tried = [visit for visit in visits if visit.before]
    place = max((max(visit.before) for visit in tried), default=0)
    likeness = lambda visit: pattern.steps[place].likeness(visit.path[-1])
    close = {}
    for visit in sorted((visit for visit in tried if place in visit.before), key=likeness, reverse=True):
        close.setdefault(visit.path[-1], spell(visit.path))  # the same step, in every block, is one
    return list(close.values())[:3]


def _stacked(visits: list[Visit]) -> str:
    places = [spell((*visit.path, BLOCKS)) for visit in visits if leads_to_layers(visit.node, BLOCKS)]
    return f" Blocks are stacked, their paths without an index, at {', '.join(places)}." if places else ""


def _nearest_kinds(kind: Kind, there: list[type]) -> str:
    if isinstance(kind, str):
        return nearest("classes", kind, (x.__name__ for x in there))
    full = lambda x: f"{x.__module__}.{x.__qualname__}"  # there is more than one Linear
    return listed("classes", sorted({full(x) for x in there if x.__name__ == kind.__name__})) or nearest(
        "classes", full(kind), map(full, there)
    )


def said(value: Any) -> str:
    """An argument of `select` as it was written."""
    if isinstance(value, tuple):
        return f"({', '.join(map(said, value))})"
    return getattr(value, "__name__", None) or repr(value)
