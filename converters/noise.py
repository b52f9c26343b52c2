"""How far a model in half precision is from exact arithmetic, in units of how far the reference is.

An absolute tolerance says nothing of bfloat16, whose numbers have 8 bits: what can be asked is that ours rounds no
more than the reference does with the same weights. Both are compared with the reference in float32.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np

from . import taps
from .taps import Inputs

LIMIT = 1.1
SEEDS = range(1, 21)
HALF = ("bfloat16", "float16")
# Of an output as wide as a vocabulary, every so many-th number is compared: these are enough, and a record stays small.
WIDEST = 1024


@dataclass(frozen=True)
class Exact:
    """What the reference computed: `outputs` in float32 of the module at `path` (ours, "" for the whole model) on
    `inputs`, both with an axis of seeds in front, and how far it is from them itself in `dtype` (root mean square)."""

    dtype: str
    path: str
    reference: float
    inputs: Inputs
    outputs: np.ndarray


@dataclass(frozen=True)
class Noise:
    """The distance from the reference in float32, root mean square, of ours and of the reference in `dtype`."""

    dtype: str
    path: str
    ours: float
    reference: float
    seeds: int

    @property
    def ratio(self) -> float:
        if self.reference == 0:
            return 1.0 if self.ours == 0 else float("inf")
        return self.ours / self.reference

    @property
    def passed(self) -> bool:
        return self.ratio <= LIMIT

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio, "limit": LIMIT, "passed": self.passed}

    def __str__(self) -> str:
        return f"{self.dtype}: {self.ratio:.2f} of the reference's own noise"


def dtype_of(model: Any) -> str | None:
    """The dtype of half precision that all of a model's arrays have; None of one that has others."""
    found = {str(x.dtype) for x in jax.tree.leaves(model) if eqx.is_inexact_array(x)}
    return found.pop() if len(found) == 1 and found <= set(HALF) else None


def place(model: Any, layers: dict[str, np.ndarray], inputs: Inputs) -> str:
    """Where to measure: the last that gives something of every token, or a sentence's embedding.

    A classifier's few numbers would need hundreds of seeds; the states that it reads do not.
    """
    if hasattr(model, "pooling"):
        return ""
    mask = taps.flat(inputs["attention_mask"])
    return [path for path, x in layers.items() if taps.of_tokens(x, mask)][-1]


def counted(x: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The numbers of an output that are compared: those of tokens, not of padding."""
    mask = taps.flat(inputs["attention_mask"])
    x = x[mask == 1] if taps.of_tokens(x, mask) else x
    return x[..., :: -(-x.shape[-1] // WIDEST)].astype(np.float32)


def rms(errors: list[np.ndarray]) -> float:
    return float(np.sqrt(np.mean([np.square(x, dtype=np.float64).mean() for x in errors])))


def measure(model: Any, exact: Exact) -> Noise:
    """The noise of a model of the dtype of `exact`, compiled once for all seeds."""
    run = taps.outputs(model, [exact.path] if exact.path else [])
    errors = []
    for seed, theirs in enumerate(exact.outputs):
        inputs = {name: x[seed] for name, x in exact.inputs.items()}
        errors.append(counted(run(inputs)[exact.path], inputs) - theirs)
    return Noise(exact.dtype, exact.path, rms(errors), exact.reference, len(errors))
