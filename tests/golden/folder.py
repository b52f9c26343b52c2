"""Where golden data lies: numbers of the original systems, made by running them.

`EQX_TRANSFORMERS_GOLDEN` names another folder of the same layout, with other sizes, depths, options and cases; the
tests glob and read, and take nothing from the copy that lies here.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from eqx_transformers.surgery import leaves_by_path

OWN = Path(__file__).parent
ROOT = Path(os.environ.get("EQX_TRANSFORMERS_GOLDEN") or OWN)

FORWARD, GRADIENT, STEPS = 2e-5, 2e-5, 2e-6
SUMS = 1e-4  # of scalars that are sums of many terms


def folder(name: str) -> Path:
    return ROOT / name


def config(place: Path) -> dict[str, Any]:
    return json.loads((place / "config.json").read_bytes())


def weights(place: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(place / f"{name}.safetensors")


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def cases(place: Path, *holding: str) -> list[Any]:
    """Every .npz of a folder that holds arrays of these names."""
    held = {path: np.load(path).files for path in sorted(place.glob("*.npz"))}
    return present(place, [path for path, files in held.items() if {*holding} <= {*files}])


def present(place: Path, paths: list[Path]) -> list[Any]:
    """A test for each path that is there, named after it and its folder; our own copy has all kinds."""
    found = [pytest.param(path, id=f"{place.name}-{path.stem}") for path in paths if path.exists()]
    assert found or place.parent != OWN, f"{place} has nothing of a kind that is tested"
    return found


def among(places: list[Path], find: Callable[[Path], list[Any]]) -> list[Any]:
    """What is found in all of these folders; our own copy has some of every kind."""
    found = [case for place in places for case in find(place)]
    assert found or ROOT != OWN, f"{[place.name for place in places]} have nothing of a kind that is tested"
    return found


def close(ours: Any, theirs: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in leaves_by_path(eqx.filter(tree, eqx.is_array)).items()}


def norm(tree: Any) -> np.ndarray:
    """The root of the sum of all squares."""
    return np.sqrt(sum(np.square(x).sum() for x in by_path(tree).values()))


def close_gradients(ours: Any, theirs: Any) -> None:
    """Of all parameters. A key's bias has no gradient in exact arithmetic: what is there is rounding."""
    ours, theirs = by_path(ours), by_path(theirs)
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        close(ours[name], x, 1e-6 if name.endswith("key_proj.bias") else GRADIENT * np.abs(x).max() + 1e-7)


def close_parameters(ours: Any, theirs: Any) -> None:
    """After steps of Adam, which makes whole steps of the rounding in the gradient of a key's bias."""
    ours, theirs = by_path(ours), by_path(theirs)
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        if not name.endswith("key_proj.bias"):
            close(ours[name], x, STEPS)


class Recorded(eqx.Module):
    """A dropout that was recorded: `keep * x / (1 - rate)`."""

    keep: jax.Array
    rate: float

    def __call__(self, x, *, key=None, inference=None):
        return jnp.where(self.keep, x / (1 - self.rate), 0.0)
