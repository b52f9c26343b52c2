"""Everything that can be said about a conversion before a tensor is read."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from eqx_transformers.tensor_file import Spec

from .errors import Mismatch
from .ops import SAME
from .rules import Ignore, Link, Table, Tie

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What becomes of every key of a checkpoint (spelled as the file spells it) and of every array of a model.

    - `missing`: keys that an array needs and the file lacks, with the array's path
    - `unexpected`: keys that nothing needs, with the nearest name that is known
    - `mismatched`: keys of another shape than the array's, with (expected, found)
    - `tied`: second names of a tensor, with the name of the first; `renamed`: old names, with today's
    - `ignored`: keys that are no parameters; `dropped`: parameters that this model does not use; each with the reason
    - `new`: arrays that are built from the key instead of read, with their shapes
    - `links`: what is read: keys, paths and the operation between them
    """

    architecture: str
    model: str
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: dict[str, Shape] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every array gets its tensor and every tensor has its place or its reason."""
        return not (self.missing or self.unexpected or self.mismatched)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, `links` as a list of (keys, paths, operation)."""
        plain = {name: value for name, value in vars(self).items() if name != "links"}
        links = [{"keys": link.keys, "paths": list(link.ours), "op": link.op.name} for link in self.links]
        return plain | {"ok": self.ok, "links": links}

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_parameters / 1e6:.1f}M parameters, {self.num_bytes / 1e6:.1f} MB"
        lines = [f"{self.architecture} -> {self.model}: {size}, {', '.join(self.dtypes)}"]
        wanted = sum(len(link.keys) for link in self.links)
        lines.append(f"  read        {wanted - len(self.missing) - len(self.mismatched):>4}")
        for name, entries, show in self._sections():
            lines += _section(name, entries, show)
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _sections(self) -> Iterable[tuple[str, Mapping[str, Any], Any]]:
        yield "renamed", _by_ending(self.renamed), lambda old, new: f"{old} is {new} today"
        yield "tied", self.tied, lambda alias, key: f"{alias} = {key}"
        yield "ignored", self.ignored, lambda key, why: f"{key}: {why}"
        yield "dropped", self.dropped, lambda key, why: f"{key}: {why}"
        yield "new", self.new, lambda path, shape: f"{path} {list(shape)}: drawn from the key"
        yield "missing", self.missing, lambda key, path: f"{key}, needed by {path}"
        yield "unexpected", self.unexpected, lambda key, near: f"{key}{near}"
        yield "mismatched", self.mismatched, lambda key, two: f"{key}: expected {list(two[0])}, found {list(two[1])}"


def _section(name: str, entries: Mapping[str, Any], show: Any, most: int = 12) -> list[str]:
    if not entries and name not in ("missing", "unexpected", "mismatched"):
        return []
    shown = [f"                    {show(k, v)}" for k, v in list(entries.items())[:most]]
    more = [f"                    … and {len(entries) - most} more"] if len(entries) > most else []
    return [f"  {name:<11} {len(entries):>4}", *shown, *more]


def _by_ending(renamed: Mapping[str, str]) -> dict[str, str]:
    """One line for each kind of renaming instead of one for each key."""
    ending = lambda key: "…" + ".".join(key.split(".")[-2:])
    return {ending(old): ending(new) for old, new in renamed.items()}


def examine(
    table: Table,
    links: Iterable[Link],
    leaves: Mapping[str, Any],
    specs: Mapping[str, Spec],
    spell: Any,
    *,
    new: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    **facts: Any,
) -> Report:
    """Compares shapes only. `specs` are by today's keys, `spell` gives a key as the file spells it.

    A key or an array that two rules claim, or an array that no rule fills, is a fault of the table: `AssertionError`.
    """
    links, new = tuple(links), set(new)
    ties = {one.theirs: one.to for one in table if isinstance(one, Tie)}
    claimed = Counter(key for link in links for key in link.keys)
    filled = Counter(path for link in links for path in link.ours)
    _expect_sound(claimed, filled, leaves, new)
    missing, mismatched = {}, {}
    for link in links:
        absent = [key for key in link.keys if key not in specs]
        missing |= {spell(key): link.ours[0] for key in absent}
        if not absent:
            mismatched |= {spell(k): v for k, v in _mismatches(link, leaves, specs).items()}
    tied, ignored, dropped, unexpected = {}, {}, {}, {}
    for key in specs.keys() - claimed.keys():
        why = next((one for one in table if isinstance(one, Ignore) and one.matches(key)), None)
        if key in ties:
            owner = ties[key]
            if owner in specs and specs[owner].shape != specs[key].shape:
                mismatched[spell(key)] = specs[owner].shape, specs[key].shape
            tied[spell(key)] = spell(owner)
        elif why is not None:
            (dropped if why.parameter else ignored)[spell(key)] = why.why
        elif any(fnmatchcase(spell(key), glob) for glob in allow_unexpected):
            ignored[spell(key)] = "allowed by allow_unexpected"
        else:
            unexpected[spell(key)] = _nearest(
                spell(key), [spell(k) for k in claimed if k not in specs] or list(claimed)
            )
    sort = lambda entries: dict(sorted(entries.items()))
    return Report(
        missing=sort(missing),
        unexpected=sort(unexpected),
        mismatched=sort(mismatched),
        tied=sort(tied),
        ignored=sort(ignored),
        dropped=sort(dropped),
        new={path: tuple(leaves[path].shape) for path in leaves if path in new},
        renamed=sort({spell(key): key for key in specs if _last(spell(key)) != _last(key)}),
        links=links,
        num_tensors=len(specs),
        num_parameters=sum(prod(s.shape) for s in specs.values() if s.dtype[0] in "FB" and s.dtype != "BOOL"),
        num_bytes=sum(s.end - s.start for s in specs.values()),
        dtypes=tuple(sorted({s.dtype for s in specs.values()})),
        **facts,
    )


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _expect_sound(claimed: Counter, filled: Counter, leaves: Mapping[str, Any], new: set[str]) -> None:
    twice = [name for c in (claimed, filled) for name, n in c.items() if n > 1]
    holes = [path for path in leaves if path not in filled and path not in new]
    if twice or holes:
        raise AssertionError(f"The family's table claims {twice} twice and leaves {holes} unfilled; this is a bug.")


def _mismatches(link: Link, leaves: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, tuple[Shape, Shape]]:
    """Keys whose shape is not the one that the model's arrays would write."""
    if link.op is SAME:  # most rules: nothing to trace
        wanted = {row[0]: leaves[link.ours[0]].shape[len(link.sizes) :] for row in link.theirs}
    else:
        traced = jax.eval_shape(lambda: link.write(lambda path: jnp.zeros(leaves[path].shape)))
        wanted = {key: x.shape for key, x in traced.items()}
    return {key: (shape, specs[key].shape) for key, shape in wanted.items() if shape != specs[key].shape}


def _nearest(key: str, names: list[str]) -> str:
    near = get_close_matches(key, names, n=1, cutoff=0.6)
    return f" (nearest known: {near[0]})" if near else ""


def expect_ok(report: Report) -> None:
    """Raises a `Mismatch` with the whole report unless it is clean."""
    if not report.ok:
        raise Mismatch(f"The tensors of the checkpoint are not those of the model:\n{report}", report)
