"""What dictionaries of arrays tell of a model whose config does not."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np


def side(arrays: Mapping[str, np.ndarray], name: str, axis: int) -> int | None:
    """The size of a matrix along an axis; None where there is no such matrix."""
    found = arrays[name].shape if name in arrays else ()
    return int(found[axis]) if len(found) == 2 else None


def highest(names: Collection[str], pattern: str) -> int:
    """How many numbers there are, from 0 on, where `pattern` has its group."""
    return max((int(found[1]) + 1 for name in names if (found := re.search(pattern, name))), default=0)


def completed(config: Mapping[str, Any], inferred: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and what is known beside it."""
    return {name: value for name, value in inferred.items() if value is not None} | dict(config)


def other_depth(config: Mapping[str, Any], name: str, found: int) -> tuple[str, ...]:
    """What is to be said where the config has another number of layers than the arrays: their names count it."""
    stated = config.get(name, found)
    return () if stated == found else (f"the config says {name} = {stated}, the arrays are those of {found} layers",)
