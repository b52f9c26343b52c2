"""What a run has told of itself: records by step, a log file of them, and their curves as a picture."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._files import writing
from ..pictures import COLOURS, SUFFIXES, _write

Record = dict[str, Any]  # numbers
HELD_OUT = "held_out_"  # in a log file, before the names of what an evaluation says


@dataclass
class History:
    """Records in the order of their steps: of training `steps`, of `evaluations` what those said.

    A record is a dict of numbers, of which `step` counts the updates before it was taken. `skipped` counts all steps
    that were not finite, recorded or not.
    """

    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    skipped: int = 0

    def best(self, metric: str, mode: str = "min") -> Record | None:
        """The evaluation with the least or greatest `metric`, the first of equals; None before there is one.

        Raises a `ValueError` where evaluations do not say the metric. What is not a number is never the best.
        """
        found = [record for record in self.evaluations if not math.isnan(said(record, metric))]
        return min(found, key=lambda record: record[metric] * (1 if mode == "min" else -1), default=None)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": list(self.steps), "evaluations": list(self.evaluations), "skipped": self.skipped}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> "History":
        """As `to_json` gave it; None is a history without records."""
        return cls(list(value["steps"]), list(value["evaluations"]), value["skipped"]) if value else cls()


def is_finite(record: Mapping[str, Any]) -> bool:
    """Whether a step's loss and gradient were numbers, as the updater says or as the loss shows."""
    return bool(record["finite"]) if "finite" in record else math.isfinite(record.get("loss", 0.0))


def said(record: Mapping[str, Any], metric: str) -> float:
    """A metric of an evaluation. Raises a `ValueError` that names those there are."""
    if metric not in record:
        names = ", ".join(name for name in record if name != "step") or "nothing"
        raise ValueError(
            f"Evaluations do not say {metric!r}; evaluate gives {names}. Choose one of these as the metric."
        )
    return record[metric]


class Log:
    """Records as lines of a file, CSV or JSONL by its suffix: one a line, written at once.

    Lines after `step` are cut off, those of a run that was killed and goes on from there; where nothing is gone on from
    (`step` is 0), a file that is there already becomes `NAME.old`. The columns of a CSV are those of all records: with
    a new one, the file is written anew. Raises a `ValueError` for another suffix and a file that is not such a log.
    """

    def __init__(self, path: str | os.PathLike[str], step: int):
        self.path = Path(path)
        if self.path.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"A log is written as .csv or .jsonl, but the path is {os.fspath(path)!r}.")
        self.is_csv = self.path.suffix.lower() == ".csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step == 0 and self.path.is_file() and self.path.stat().st_size:
            os.replace(self.path, self.path.with_name(self.path.name + ".old"))
        records = [one for one in self._read() if float(one["step"]) <= step]
        self.columns: list[str] = list(dict.fromkeys(name for one in records for name in one))
        self._write_anew(records)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line."""
        if self.is_csv and (new := [name for name in record if name not in self.columns]):
            self.columns += new
            self._write_anew(self._read())
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._line(record))

    def _line(self, record: Mapping[str, Any]) -> str:
        if not self.is_csv:
            return json.dumps(record) + "\n"
        return ",".join(_cell(record.get(name, "")) for name in self.columns) + "\n"

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        try:
            if self.is_csv:
                rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(whole)]
            else:
                rows = [json.loads(line) for line in whole]
            return [row for row in rows if float(row["step"]) >= 0]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ValueError(f"{self.path} is not a log of training: {error!r}. Choose another file.") from error

    def _write_anew(self, records: Sequence[Mapping[str, Any]]) -> None:
        header = ",".join(self.columns) + "\n" if self.is_csv and self.columns else ""
        with writing(self.path) as fresh:
            fresh.write_text(header + "".join(map(self._line, records)), encoding="utf-8", newline="")


def _cell(value: Any) -> str:
    return str(int(value) if isinstance(value, bool | np.bool_) else value)


def plot_curves(history: History, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draws the curves of a run, a PNG or an SVG by the suffix of `path`, which it returns.

    The loss of training (each step faint, and smoothed) and of held-out data, every other number that evaluations say
    in a panel of its own, and the learning rate where the steps say it. The file appears whole or not at all. Raises an
    `ImportError` without matplotlib and a `ValueError` for another suffix.
    """
    target = expect_picture(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: pip install 'eqx_transformers[train]'") from error
    others = [name for name in _names(history.evaluations) if name not in ("step", "loss")]
    rates = ["learning rate"] if "learning_rate" in _names(history.steps) else []
    panels = ["loss", *others, *rates]
    figure = Figure(figsize=(7.5, 1.2 + 2.6 * len(panels)), layout="constrained")
    planes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for plane, name in zip(planes, panels, strict=True):
        _draw(plane, history, name)
    planes[0].set_title(title or "")
    planes[-1].set_xlabel("step")
    _write(figure, target)
    return target


def expect_picture(path: str | os.PathLike[str]) -> Path:
    """The file that is meant. Raises a `ValueError` for a suffix that cannot be written."""
    target = Path(os.path.realpath(path))
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"A picture is written as {' or '.join(SUFFIXES)}, but the path is {os.fspath(path)!r}.")
    return target


def _draw(plane: Any, history: History, name: str) -> None:
    plane.set_ylabel(name, parse_math=False)
    plane.grid(color="#e3e3e3", linewidth=0.6)
    plane.set_axisbelow(True)
    plane.spines[["top", "right"]].set_visible(False)
    if name == "learning rate":
        plane.plot(*_column(history.steps, "learning_rate"), color=COLOURS[2])
        return
    where, column = _column(history.steps, "loss")
    if name == "loss" and len(column):
        plane.plot(where, column, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        mean = smoothed(column)
        label = "training" if np.array_equal(mean, column, equal_nan=True) else "training, smoothed"
        plane.plot(where, mean, color=COLOURS[0], label=label)
    if len(column := _column(history.evaluations, name)[1]):
        plane.plot(
            _column(history.evaluations, name)[0], column, "o-", color=COLOURS[5], label="held out", markersize=4
        )
    if plane.get_legend_handles_labels()[0]:
        plane.legend()


def smoothed(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """The running mean of finite values, each step forgetting as much as a window of `share` of all does."""
    rate = 1 / max(1.0, share * len(values))
    found, mean = [], math.nan
    for x in values:
        if math.isfinite(x):
            mean = x if math.isnan(mean) else mean + rate * (x - mean)
        found.append(mean)
    return np.asarray(found)


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _column(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that say it."""
    found = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)
