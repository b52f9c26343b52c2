"""Everything that can be said about a conversion before a tensor is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from .errors import Mismatch
from .rules import Link

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
    - `links`: what is read: keys (of the tables; `spelled` gives the file's), paths and the operation between them
    - `tensors`: of each key of the file, dtype, shape and bytes
    - `memory`: bytes of the model's arrays, and how many more at most while it is read
    - `causes`: what usually stands behind what is missing, unexpected or mismatched
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
    num_read: int = 0
    spelled: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, tuple[str, Shape, int]] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    causes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every array gets its tensor and every tensor has its place or its reason."""
        return not (self.missing or self.unexpected or self.mismatched)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, `links` as a list of (keys, paths, operation)."""
        plain = {name: value for name, value in vars(self).items() if name not in ("links", "spelled")}
        spelled = lambda link: [self.spelled.get(key, key) for key in link.keys]
        links = [{"keys": spelled(link), "paths": list(link.ours), "op": link.op.name} for link in self.links]
        return plain | {"ok": self.ok, "links": links}

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_parameters / 1e6:.1f}M parameters, {self.num_bytes / 1e6:.1f} MB"
        lines = [f"{self.architecture} -> {self.model}: {size}, {', '.join(self.dtypes)}"]
        wanted = sum(len(link.keys) for link in self.links)
        lines.append(f"  read        {wanted - len(self.missing) - len(self.mismatched):>4}")
        for name, entries, show in self._sections():
            lines += _section(name, entries, show)
        lines += [f"  likely cause: {cause}" for cause in self.causes]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _sections(self) -> Iterable[tuple[str, Mapping[str, Any], Any]]:
        yield "renamed", _by_ending(self.renamed), lambda old, new: f"{old} is {new} today"
        yield "tied", self.tied, lambda alias, key: f"{alias} = {key}"
        yield "ignored", self.ignored, lambda key, why: f"{key}: {why}"
        yield "dropped", self.dropped, lambda key, why: f"{key}: {why}"
        yield "new", self.new, lambda path, shape: f"{path} {list(shape)}: drawn from the key"
        there = list(self.unexpected)[:1000]
        yield "missing", self.missing, lambda key, path: f"{key}, needed by {path}{nearest(key, there)}"
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
    endings = dict(_ending(old, new) for old, new in renamed.items())
    return {old: new for old, new in endings.items() if old != new}


def _ending(old: str, new: str) -> tuple[str, str]:
    if "/" in old and "/" not in new:  # Flax's names: only the last steps differ
        return f"…{old.rsplit('/', 1)[-1]}", f"…{new.rsplit('.', 1)[-1]}"
    last_two = lambda key: "…" + ".".join(key.split(".")[-2:])
    return last_two(old), last_two(new)


def nearest(key: str, names: list[str]) -> str:
    """For messages: the name that was probably meant, in brackets, or nothing."""
    near = get_close_matches(key, names, n=1, cutoff=0.6)
    return f" (nearest known: {near[0]})" if near else ""


def expect_ok(report: Report) -> None:
    """Raises a `Mismatch` with the whole report unless it is clean."""
    if not report.ok:
        raise Mismatch(f"The tensors of the checkpoint are not those of the model:\n{report}", report)
