"""Fresh parameters of ours against the statistics of one draw of an original's.

A mean of n numbers errs by their deviation / sqrt(n); a deviation of n numbers by itself / sqrt(2 n), or less where no
tail is heavier than a normal's. Every bound here is five of these, of what both draws have together.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from converters import arrays as from_file

from .folder import by_path, config, weights

SEEDS, ERRORS = 8, 5


class Stats(NamedTuple):
    """Of one array as the original has it: its size, and mean, deviation, least and greatest number of one draw."""

    n: int
    mean: float
    std: float
    min: float
    max: float


def initial(path: Path, format: str) -> dict[str, list[Stats]]:
    """The statistics by our paths: several, where several of their arrays are one of ours."""
    stats = json.loads(path.read_bytes())
    report = from_file.inspect_arrays(format, weights(path.parent, "params"), config(path.parent))
    found: dict[str, list[Stats]] = {}
    for link in report.links:
        for key in link.keys:
            one = stats.pop(report.spelled[key])
            given = Stats(int(np.prod(one["shape"])), one["mean"], one["std"], one["min"], one["max"])
            found.setdefault(link.ours[0], []).append(given)
    assert found and not stats, f"of no array of ours: {sorted(stats)}"
    return found


def drawn(model_class: Any, config: Any) -> dict[str, np.ndarray]:
    """Every array of `SEEDS` fresh models, one model behind the other."""
    models = [by_path(model_class(config, key=jax.random.key(seed))) for seed in range(SEEDS)]
    return {name: np.stack([model[name] for model in models]) for name in models[0]}


def expect_same_distribution(ours: dict[str, np.ndarray], theirs: dict[str, list[Stats]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        for one in theirs[name]:
            if one.std == 0:
                assert one.min == one.max and (x == one.mean).all(), name
                continue
            error = ERRORS * np.sqrt(1 / one.n + 1 / x.size)
            assert abs(one.mean - x.mean()) <= error * x.std(), (name, one.mean, x.mean())
            assert abs(one.std - x.std()) <= error / np.sqrt(2) * x.std(), (name, one.std, x.std())


def expect_law(x: np.ndarray, theirs: list[Stats], *, deviation: float, bound: float = np.inf) -> None:
    """What is drawn has mean zero and this deviation, and ends at the bound, which theirs does not pass either."""
    assert abs(x.mean()) <= ERRORS * deviation / np.sqrt(x.size)
    assert abs(x.std() - deviation) <= ERRORS * deviation / np.sqrt(2 * x.size)
    end = bound * (1 + 1e-6)  # a bound in float64, numbers in float32
    assert np.abs(x).max() <= end and all(max(one.max, -one.min) <= end for one in theirs)
    # Within its bound, a draw of so many numbers comes close to it.
    assert bound == np.inf or np.abs(x).max() >= 0.9 * bound
