"""What lies where, array by array, before anything is moved."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.sharding import NamedSharding, PartitionSpec as P
from jax.tree_util import tree_leaves_with_path

from ..surgery.paths import spell
from .mesh import AnyMesh, spelled
from .specs import decided


class ShardedArray(NamedTuple):
    """One line of a report. `note` says why an axis is not divided that should be."""

    path: str
    shape: tuple[int, ...]
    spec: P
    bytes: int
    bytes_per_device: int
    note: str


@dataclass(frozen=True)
class ShardingReport:
    """How a model lies on a mesh; `str` is a table: path, shape, spec, bytes per device, and notes."""

    mesh: str
    arrays: tuple[ShardedArray, ...]

    @property
    def bytes(self) -> int:
        """Of the whole model, once."""
        return sum(x.bytes for x in self.arrays)

    @property
    def bytes_per_device(self) -> int:
        """Of what each device holds."""
        return sum(x.bytes_per_device for x in self.arrays)

    def __str__(self) -> str:
        rows = [("path", "shape", "spec", "bytes per device", "")]
        rows += [
            (x.path, "x".join(map(str, x.shape)), _said(x.spec), f"{x.bytes_per_device:,}", x.note) for x in self.arrays
        ]
        rows.append((f"all, on {self.mesh}", "", "", f"{self.bytes_per_device:,}", f"of {self.bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pad = lambda cell, i: cell.rjust(widths[i]) if i == 3 else cell.ljust(widths[i])
        return "\n".join("  ".join(pad(cell, i) for i, cell in enumerate(row)).rstrip() for row in rows)


def report(model: Any, mesh: AnyMesh, rules: Any) -> ShardingReport:
    """How `shard` would put a model, or a skeleton, there. Raises as `specs` does.

    The mesh may be a `jax.sharding.AbstractMesh` of devices that are not here.
    """
    found = decided(model, mesh, rules)
    lines = []
    for path, x in tree_leaves_with_path(model):
        if path in found:
            spec, note = found[path]
            part = NamedSharding(mesh, spec).shard_shape(tuple(x.shape))
            size = x.dtype.itemsize
            whole, held = math.prod(x.shape) * size, math.prod(part) * size
            lines.append(ShardedArray(spell(path), tuple(x.shape), spec, whole, held, note))
    return ShardingReport(spelled(mesh), tuple(lines))


def _said(spec: P) -> str:
    """`model, -`: one word for each axis that the spec reaches."""
    said = lambda entry: "-" if entry is None else entry if isinstance(entry, str) else "*".join(entry)
    return ", ".join(map(said, spec)) or "replicated"
