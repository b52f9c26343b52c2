"""The table that relates a checkpoint's keys to a model's leaves, and its expansion on a concrete model."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from string import Formatter
from typing import Any

import numpy as np

from .ops import SAME, Op

Get = Callable[[str], Any]


@dataclass(frozen=True)
class Rule:
    """`theirs` -> `op` -> `ours`, as whole-name templates; `{i}` stands for a layer's number.

    Rules are written for a tuple of blocks (`stack.blocks.{i}.mlp…`); `Rule.expand` drops `{i}` from ours where the
    model's blocks are stacked.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op = SAME

    def expand(self, leaves: Mapping[str, Any]) -> Iterator["Link"]:
        """One link for every place in the model at which this rule applies."""
        for template in dict.fromkeys((self.ours[0], self.ours[0].replace(".{i}", ""))):
            pattern = _pattern(template)
            ours = self.ours if template == self.ours[0] else tuple(o.replace(".{i}", "") for o in self.ours)
            for match in filter(None, map(pattern.fullmatch, leaves)):
                yield self._link(ours, match.groupdict(), leaves[match.group()])

    def _link(self, ours: tuple[str, ...], at: dict[str, str], leaf: Any) -> "Link":
        named = (name for template in self.theirs for _, name, *_ in Formatter().parse(template) if name)
        free = [name for name in dict.fromkeys(named) if name not in at]
        sizes = tuple(leaf.shape[: len(free)])
        rows = [at | dict(zip(free, map(str, place), strict=True)) for place in np.ndindex(*sizes)]
        theirs = tuple(tuple(template.format(**row) for template in self.theirs) for row in rows)
        return Link(theirs, tuple(template.format(**at) for template in ours), sizes, self.op)


@dataclass(frozen=True)
class Link:
    """One rule at one place: rows of keys (one row, or one a layer of stacked blocks) and the leaves they make."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]
    sizes: tuple[int, ...]
    op: Op

    @property
    def keys(self) -> list[str]:
        return [key for row in self.theirs for key in row]

    def read(self, get: Get) -> dict[str, Any]:
        """Their tensors, one row at a time, to our leaves by path."""
        rows = (self.op.forward(*map(get, row)) for row in self.theirs)
        if not self.sizes:
            return dict(zip(self.ours, next(rows), strict=True))
        return {path: _gather(column, self.sizes) for path, column in zip(self.ours, _columns(rows), strict=True)}

    def write(self, get: Get) -> dict[str, Any]:
        """Our leaves by path to their tensors by key."""
        leaves = [get(path) for path in self.ours]
        flat = [leaf.reshape(len(self.theirs), *leaf.shape[len(self.sizes) :]) for leaf in leaves]
        if not self.sizes:
            flat = [[leaf] for leaf in leaves]
        rows = (self.op.backward(*row) for row in zip(*flat, strict=True))
        return {key: x for keys, row in zip(self.theirs, rows, strict=True) for key, x in zip(keys, row, strict=True)}


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _gather(rows: list[Any], sizes: tuple[int, ...]) -> Any:
    return rows[0].__array_namespace__().stack(rows).reshape(*sizes, *rows[0].shape)


@dataclass(frozen=True)
class Tie:
    """`theirs` is a second name of the tensor called `to`: if a file has it, it must be equal.

    `written`: the reference library lists it as a parameter of its own, so that an export must have it.
    """

    theirs: str
    to: str
    written: bool = False


@dataclass(frozen=True)
class Ignore:
    """Keys (a glob) that no leaf needs, and the sentence that says why that is fine."""

    theirs: str
    why: str
    parameter: bool = False

    def matches(self, key: str) -> bool:
        return fnmatchcase(key, self.theirs)


Table = tuple[Rule | Tie | Ignore, ...]


def rule(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], op: Op = SAME) -> Rule:
    """A `Rule`, for one name or several on either side."""
    wrap = lambda names: (names,) if isinstance(names, str) else tuple(names)
    return Rule(wrap(theirs), wrap(ours), op)


def affine(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The two rules of a module with `weight` and `bias`."""
    return rule(f"{theirs}.weight", f"{ours}.weight"), rule(f"{theirs}.bias", f"{ours}.bias")


def expand(table: Table, leaves: Mapping[str, Any]) -> list[Link]:
    """Every link of a table on the leaves of one model."""
    return [link for one in table if isinstance(one, Rule) for link in one.expand(leaves)]
