"""Weights of 8 or 4 bits: a quarter or an eighth of the memory, for errors that are measured.

Only weights are rounded, after training, to the nearest whole multiple of a scale, with symmetric scales: one a row for
8 bits (as in LLM.int8(), arXiv:2208.07339, without its outliers), one a group of a row for 4. This loses something:
unlike an adapter, it changes what a model computes. `dequantize` gives plain layers of the rounded weights, not of the
old ones.

The whole numbers are frozen and take no gradient: an adapter on a quantized layer trains, as in arXiv:2305.14314.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import KeyPath

from ..nn import Embedding, Linear
from ._bases import AbstractWrapper
from ._quantized import (
    Int4Embedding as Int4Embedding,
    Int4Linear as Int4Linear,
    Int8Embedding as Int8Embedding,
    Int8Linear as Int8Linear,
    Quantized as Quantized,
)
from .paths import at, is_array_like, nodes, spell
from .select import Selection, expect_selection, select

Model = TypeVar("Model")


def quantize(model: Model, selection: Selection, bits: int = 8, group: int = 64) -> Model:
    """The model with the selected `Linear`s and `Embedding`s quantized; see `Quantized.make`.

        quantize(model, select("Linear", under="**.blocks"), bits=4, group=64)

    A tied output stays tied: it is the embedding's `attend`, of the quantized table. In stacked blocks every layer is
    quantized by itself. Raises as `Quantized.make` does, and a `ValueError` where nothing is selected.
    """
    expect_selection(selection, "quantize")
    return selection.map(model, Quantized.make(bits, group))


def dequantize(model: Model) -> Model:
    """The model with plain layers of the rounded weights, in the dtype of their scales.

    Raises a `ValueError` where nothing is quantized.
    """
    return select(Quantized).map(model, lambda node: node.plain())


class QuantizedLayer(NamedTuple):
    """One line of a report. `error` is |W - dense| / |W| in the Frobenius norm; bytes are of the whole layer."""

    path: str
    bits: int
    error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What quantizing cost and saved, layer by layer; `str` is a table. Stacked layers are one line."""

    layers: tuple[QuantizedLayer, ...]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def worst(self) -> QuantizedLayer:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def __str__(self) -> str:
        said = lambda n: f"{n:,}"
        rows = [("path", "bits", "error", "bytes before", "bytes after")]
        rows += [
            (x.path, str(x.bits), f"{x.error:.2%}", said(x.bytes_before), said(x.bytes_after)) for x in self.layers
        ]
        rows.append(("all", "", f"{self.worst.error:.2%}", said(self.bytes_before), said(self.bytes_after)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pad = lambda cell, i: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
        return "\n".join("  ".join(pad(cell, i) for i, cell in enumerate(row)) for row in rows)


def quantization_report(model: Any, quantized: Any) -> QuantizationReport:
    """How far the weights of each quantized layer are from those of the same layer in `model`.

    The last line of the table has the largest error and all bytes. Raises a `ValueError` where nothing is quantized,
    and where `model` has no plain layer of that size at the path.
    """
    found = [(path, node) for path, node in nodes(quantized) if isinstance(node, Quantized)]
    if not found:
        raise ValueError(f"Nothing in this {type(quantized).__name__} is quantized; the second model must be.")
    lines = [_line(spell(place), at(model, place), node) for place, node in ((_own(quantized, p), n) for p, n in found)]
    return QuantizationReport(tuple(lines))


def _own(model: Any, path: KeyPath) -> KeyPath:
    """The path of a layer without the adapters that stand in its place."""
    while path and isinstance(at(model, path[:-1]), AbstractWrapper):
        path = path[:-1]
    return path


def _line(path: str, layer: Any, quantized: Quantized) -> QuantizedLayer:
    dense = np.asarray(quantized.dense(), np.float64)
    if type(layer) not in (Linear, Embedding) or layer.weight.shape != dense.shape:
        raise ValueError(
            f"At {path} the quantized layer is of {dense.shape}, but the first model has"
            f" {_said(layer)}: it must be the model that was quantized."
        )
    weight = np.asarray(layer.weight, np.float64)
    error = float(np.linalg.norm(weight - dense) / (np.linalg.norm(weight) or 1.0))
    return QuantizedLayer(path, quantized.bits, error, _bytes(layer), _bytes(quantized))


def _said(layer: Any) -> str:
    shape = getattr(getattr(layer, "weight", None), "shape", None)
    return f"a {type(layer).__name__}" + ("" if shape is None else f" of {shape}")


def _bytes(layer: eqx.Module) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(layer) if is_array_like(x))
