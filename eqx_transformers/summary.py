"""What a model holds, on one screen."""

from math import prod
from typing import Any

import jax.numpy as jnp

from .surgery.paths import is_array_like, leaves_by_path


def num_parameters(tree: Any) -> int:
    """How many numbers the floating-point arrays of a tree hold."""
    floats = lambda x: is_array_like(x) and jnp.issubdtype(x.dtype, jnp.inexact)
    return sum(prod(x.shape) for x in leaves_by_path(tree).values() if floats(x))


def summary(model: Any, depth: int = 2) -> str:
    """A table of the model's parts down to `depth` steps of their paths: arrays, parameters, bytes, dtypes.

    Works on skeletons too.
    """
    arrays = {path: x for path, x in leaves_by_path(model).items() if is_array_like(x)}
    groups: dict[str, list[Any]] = {}
    for path, x in arrays.items():
        steps = path.split(".")[:-1]
        groups.setdefault(".".join(steps[:depth]) or path, []).append(x)
    rows = [_row(name, group) for name, group in groups.items()]
    rows.append(_row(type(model).__name__, list(arrays.values())))
    header = ("part", "arrays", "parameters", "bytes", "dtype")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda row: "  ".join(
        cell.ljust(w) if i in (0, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows[:-1]), rule, line(rows[-1])])


def _row(name: str, arrays: list[Any]) -> tuple[str, str, str, str, str]:
    size = sum(prod(x.shape) * x.dtype.itemsize for x in arrays)
    dtypes = ", ".join(sorted({str(x.dtype) for x in arrays}))
    return name, str(len(arrays)), f"{sum(prod(x.shape) for x in arrays):,}", f"{size:,}", dtypes
