"""Pictures, written as files: points in a plane, and what a classifier confuses."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ._files import writing

# Okabe & Ito 2008, told apart by colour-blind readers; without yellow, which is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P")
# Where a label may stand: so many printer's points right of and above its point, and which side of it is there.
CORNERS = tuple(
    ((6 * x, 5 * y), ha, va) for y, va in ((1, "bottom"), (-1, "top")) for x, ha in ((1, "left"), (-1, "right"))
)
SUFFIXES = (".png", ".svg")


def picture(
    points: Float[Array | np.ndarray, "points 2"],
    colours: Sequence[Any] | Shaped[Array | np.ndarray, " points"] | None = None,
    *,
    path: str | os.PathLike[str],
    labels: Sequence[str | None] | None = None,
    title: str | None = None,
    lines: Sequence[Float[Array | np.ndarray, "_ 2"]] | None = None,
    meaning: str | None = None,
    axes: tuple[str, str] = ("first direction", "second direction"),
) -> Path:
    """Writes a scatter plot of a plane to `path`, a PNG or an SVG by its suffix, and returns it.

    `colours` says for each point what its colour shows: floats are numbers, with a colour bar; texts, bools and whole
    numbers are classes, with a legend, each of a colour and a marker that colour-blind readers tell apart, 42 at most.
    `meaning` is the title of the bar or the legend. `labels` are written beside the points (none beside a None), and
    `lines` are ways through the plane, such as interpolations: dots on a line, from a circle to a square.

    The file appears whole or not at all, under its name only when it is written; folders are made. Raises an
    `ImportError` without matplotlib, and a `ValueError` for another suffix, for points that are not finite pairs, for
    `colours` or `labels` of another number, and for more classes than there are signs.
    """
    target = _target(path)
    where = np.asarray(points, np.float64)
    if where.ndim != 2 or where.shape[1] != 2 or not np.isfinite(where).all():
        raise ValueError(f"Points are finite pairs of numbers, but these are {where.shape}, or some are not finite.")
    if labels is not None and len(labels) != len(where):
        raise ValueError(f"Each point has its label or None, but there are {len(where)} and {len(labels)}.")
    figure, plane = _plane(title, axes)
    _scatter(figure, plane, where, colours, meaning)
    for way in lines or ():
        _line(plane, np.asarray(way, np.float64))
    _label(figure, plane, where, [None] * len(where) if labels is None else labels)
    _write(figure, target)
    return target


def confusion_picture(
    confusion: Int[np.ndarray, "classes classes"],
    names: Sequence[str],
    *,
    path: str | os.PathLike[str],
    title: str | None = None,
) -> Path:
    """Writes a picture of a confusion matrix to `path`, a PNG or an SVG by its suffix, and returns it.

    A line is a true class and a column what its texts were taken for. A cell is as dark as its share of the line, so
    that rare classes are seen too; of at most 25 classes it has the number of texts, and in small print the share.

    The file appears whole or not at all; folders are made. Raises an `ImportError` without matplotlib, and a
    `ValueError` for another suffix and for another number of names than of classes.
    """
    target = _target(path)
    counts = np.asarray(confusion)
    if counts.shape != (len(names), len(names)) or not len(names):
        raise ValueError(f"There are {len(names)} names, but the confusion matrix is {counts.shape}.")
    size = min(3.5 + 0.55 * len(names), 16.0)
    figure, plane = _figure((size + 1, size))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    cells = plane.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(cells, ax=plane, label="share of the true class", shrink=0.8)
    plane.set(title=title or "", xlabel="predicted", ylabel="true")
    for axis, turned in ((plane.xaxis, len(names) > 2), (plane.yaxis, False)):
        axis.set_ticks(range(len(names)), [_short(name) for name in names], rotation=45 * turned)
        for text in axis.get_ticklabels():
            text.set(parse_math=False, ha="right" if turned or axis is plane.yaxis else "center")
    if len(names) <= 25:
        _count(plane, counts, shares)
    _write(figure, target)
    return target


def _count(plane: Any, counts: np.ndarray, shares: np.ndarray) -> None:
    few = len(counts) <= 10
    for (i, j), count in np.ndenumerate(counts):
        text = f"{count}\n{shares[i, j]:.0%}" if few else str(count)
        color = "white" if shares[i, j] > 0.5 else "black"
        plane.text(j, i, text, ha="center", va="center", color=color, fontsize=10 if few else 7)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"A picture is written as {' or '.join(SUFFIXES)}, but the path is {os.fspath(path)!r}.")
    return target


def _figure(inches: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: pip install 'eqx_transformers[train]'") from error
    figure = Figure(figsize=inches, layout="constrained")  # not of pyplot, which keeps every figure
    return figure, figure.add_subplot()


def _plane(title: str | None, axes: tuple[str, str]) -> tuple[Any, Any]:
    figure, plane = _figure((7.5, 5.5))
    plane.set(title=title or "", xlabel=axes[0], ylabel=axes[1])
    plane.set_aspect("equal", adjustable="datalim")  # distances in the plane are as long in both directions
    plane.margins(0.1)
    plane.grid(color="#e3e3e3", linewidth=0.6)
    plane.set_axisbelow(True)
    plane.spines[["top", "right"]].set_visible(False)
    return figure, plane


def _scatter(figure: Any, plane: Any, where: np.ndarray, colours: Any, meaning: str | None) -> None:
    style = {"s": 42 if len(where) <= 300 else 14, "edgecolors": "white", "linewidths": 0.5, "zorder": 2}
    values = np.zeros(len(where), int) if colours is None else np.asarray(colours)
    if values.shape != where.shape[:1]:
        raise ValueError(f"Each point has its colour, but there are {len(where)} and an array {values.shape}.")
    if jnp.issubdtype(values.dtype, jnp.floating):
        dots = plane.scatter(*where.T, c=values.astype(np.float64), cmap="cividis", **style)
        figure.colorbar(dots, ax=plane, label=meaning or "")
        return
    names, place = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
    # 7 colours and 6 markers have no common divisor: 42 pairs, and neighbours differ in both.
    if len(names) > (most := len(COLOURS) * len(MARKERS)):
        raise ValueError(f"Colours are {len(names)} classes, of {most} that can be told apart: floats are numbers.")
    sign = lambda i: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
    groups = [plane.scatter(*where[place == i].T, **sign(i), **style) for i in range(len(names))]
    if colours is not None and groups:
        _legend(figure, groups, [str(name) for name in names], meaning)


def _legend(figure: Any, groups: list[Any], names: list[str], meaning: str | None) -> None:
    columns = 1 + (len(names) - 1) // 21
    legend = figure.legend(groups, ["-"] * len(names), loc="outside right upper", title=meaning, ncols=columns)
    # Set afterwards: of the names that it is made of, matplotlib leaves out those that begin with an underscore.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def _line(plane: Any, way: np.ndarray) -> None:
    dark = "#333333"
    plane.plot(*way.T, color=dark, linewidth=1.2, marker=".", markersize=6, zorder=3)
    for end, marker in ((way[0], "o"), (way[-1], "s")):
        plane.plot(*end, marker, markersize=12, markerfacecolor="none", markeredgecolor=dark, zorder=4)


def _label(figure: Any, plane: Any, where: np.ndarray, labels: Sequence[str | None]) -> None:
    """Each at the corner of its point where it covers least of the points and of the labels before it."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    white = [withStroke(linewidth=2.5, foreground="white")]  # readable over points and lines
    style = {"textcoords": "offset points", "fontsize": 9, "path_effects": white, "parse_math": False, "zorder": 5}
    figure.draw_without_rendering()  # only then it is known where a point lies
    taken = [Bbox([xy - 8, xy + 8]) for xy in plane.transData.transform(where)]
    area = lambda box: 0 if box is None else box.width * box.height
    shared = lambda box, other: area(Bbox.intersection(box, other))
    lost = lambda box: 4 * (area(box) - shared(box, plane.bbox)) + sum(shared(box, other) for other in taken)
    for xy, label in zip(where, labels, strict=True):
        if label is not None:
            texts = [plane.annotate(label, xy, offset, ha=ha, va=va, **style) for offset, ha, va in CORNERS]
            boxes = [text.get_window_extent() for text in texts]
            best = min(range(len(boxes)), key=lambda i: lost(boxes[i]))
            taken.append(boxes[best])
            for text in texts[:best] + texts[best + 1 :]:
                text.remove()


def _write(figure: Any, target: Path) -> None:
    with writing(target) as fresh:
        figure.savefig(fresh, format=target.suffix[1:].lower(), dpi=160)
