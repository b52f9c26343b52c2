"""Where golden data lies: numbers of the original systems, made by running them.

`EQX_TRANSFORMERS_GOLDEN` names another folder of the same layout, with other sizes, depths, options and cases; the
tests glob and read, and take nothing from the copy that lies here.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(os.environ.get("EQX_TRANSFORMERS_GOLDEN") or Path(__file__).parent)

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


def cases(place: Path, *holding: str, without: tuple[str, ...] = ()) -> list[Any]:
    """Every .npz of a folder that holds arrays of these names, and none of those."""
    paths = sorted(place.glob("*.npz"))
    found = [p for p in paths if {*holding} <= {*np.load(p).files} and not {*without} & {*np.load(p).files}]
    assert found, f"{place} has no case with {', '.join(holding)}"
    return [pytest.param(path, id=f"{place.name}-{path.stem}") for path in found]


def close(ours: Any, theirs: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)
