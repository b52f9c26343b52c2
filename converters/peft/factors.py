"""The numbers of a low-rank change as the PEFT library holds them, and as several layers of ours in one of theirs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eqx_transformers.surgery.lora import LowRank

from ..errors import ConversionError
from .modules import Site


@dataclass(frozen=True)
class Factors:
    r"""$W \mapsto W + s\,BA$: `a` is `rank inputs`, `b` is `outputs rank`, the others are `outputs` or None."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    b_bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    @classmethod
    def of(cls, adapter: LowRank, layer: int | None) -> "Factors":
        """Of an adapter, or of one layer of stacked ones. What is of several parts becomes one block-diagonal."""
        pick = lambda x: np.asarray(x) if layer is None else np.asarray(x)[layer]
        a, b = pick(adapter.a), pick(adapter.b)
        parts = len(a) // b.shape[1]
        b = b if parts == 1 else _diagonal(np.split(b, parts))
        bias, magnitude = (None if x is None else pick(x) for x in (adapter.b_bias, adapter.magnitude))
        return cls(a, b, float(pick(adapter.scale)), bias, magnitude)

    def transposed(self) -> "Factors":
        """The change of the transposed matrix."""
        return Factors(self.b.T, self.a.T, self.scale)


def split(site: Site, whole: Factors) -> tuple[Factors, ...]:
    """For each of our layers in one of theirs: the same A, and its rows of B."""
    rows = lambda x: [None] * len(site.paths) if x is None else site.split(x)
    parts = zip(site.split(whole.b), rows(whole.b_bias), rows(whole.magnitude), strict=True)
    return tuple(Factors(whole.a, b, whole.scale, bias, magnitude) for b, bias, magnitude in parts)


def join(site: Site, parts: Sequence[Factors | None], matrix: Callable[[int], np.ndarray]) -> Factors:
    """One of theirs, of several layers of ours, of which some may have none.

    Where A is the same, to the bit, it stays one; else the ranks add up, and B is block-diagonal. A scale other than
    the largest is multiplied into B. What has no magnitude of its own, beside others that do, gets the norms of the
    rows of `matrix(i)`, with which nothing changes.
    """
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    there = [part for part in parts if part is not None]
    _expect_alike(site, there)
    one, scale = there[0], max((part.scale for part in there), key=abs)
    scaled = [part if part is None or part.scale == scale else _rescaled(part, scale) for part in parts]
    is_shared = all(part.a.dtype == one.a.dtype and np.array_equal(part.a, one.a) for part in there)
    a = one.a if is_shared else np.concatenate([part.a for part in there])
    sizes = [len(rows) for rows in site.split(np.zeros(site.outputs, np.bool_))]
    b = site.join(_in_rows(scaled, sizes, len(a), is_shared))
    bias = magnitude = None
    if one.b_bias is not None:
        bias = _filled(site, [part and part.b_bias for part in scaled], lambda i: np.zeros(sizes[i], b.dtype))
    if one.magnitude is not None:
        norm = lambda i: np.linalg.norm(matrix(i), axis=1)
        magnitude = _filled(site, [part and part.magnitude for part in scaled], norm)
    return Factors(a, b, scale, bias, magnitude)


def _filled(site: Site, parts: list[np.ndarray | None], fill: Callable[[int], np.ndarray]) -> np.ndarray:
    return site.join([fill(i) if part is None else part for i, part in enumerate(parts)])


def _expect_alike(site: Site, parts: Sequence[Factors]) -> None:
    for name in ("magnitude", "b_bias"):
        if len({getattr(part, name) is None for part in parts}) > 1:
            raise ConversionError(
                f"{', '.join(site.paths)} are one layer ({site.name}) in the reference, and some of their adapters have"
                f" a {name} and some have none. Give all of them one, or none."
            )


def _rescaled(part: Factors, scale: float) -> Factors:
    b = (part.b.astype(np.float64) * (part.scale / scale)).astype(part.b.dtype)
    bias = None if part.b_bias is None else (part.b_bias * (part.scale / scale)).astype(part.b_bias.dtype)
    return Factors(part.a, b, scale, bias, part.magnitude)


def _in_rows(parts: Sequence[Factors | None], sizes: list[int], rank: int, is_shared: bool) -> list[np.ndarray]:
    """B of every part, `outputs rank`; unless A is shared, each in columns of its own."""
    dtype = np.result_type(*(part.b.dtype for part in parts if part is not None))
    rows, at = [], 0
    for part, size in zip(parts, sizes, strict=True):
        b = np.zeros((size, rank), dtype)
        if part is not None:
            b[:, at : at + part.rank] = part.b
            at += 0 if is_shared else part.rank
        rows.append(b)
    return rows


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    size = blocks[0].shape[1]
    out = np.zeros((sum(map(len, blocks)), size * len(blocks)), blocks[0].dtype)
    row = 0
    for i, block in enumerate(blocks):
        out[row : row + len(block), i * size : (i + 1) * size] = block
        row += len(block)
    return out


def scale_of(alpha: int | float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def alphas(factors: Sequence[Factors]) -> tuple[bool, list[int | float]]:
    """(whether as rsLoRA, alphas) that give the very scales back: whole numbers, if there are any."""
    for rslora in (False, True):
        found = [_whole(one, rslora) for one in factors]
        if None not in found:
            return rslora, [alpha for alpha in found if alpha is not None]
    return False, [one.scale * one.rank for one in factors]


def _whole(factors: Factors, rslora: bool) -> int | None:
    alpha = round(factors.scale / scale_of(1, factors.rank, rslora))
    again: Any = np.float32(scale_of(alpha, factors.rank, rslora))
    return alpha if again == np.float32(factors.scale) else None
