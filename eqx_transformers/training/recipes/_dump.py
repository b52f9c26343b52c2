"""A step of training as the compiler sees it, for those who want to read it."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from ..._files import written
from ..updater import TrainState, Updater

FILES = ("step.jaxpr.txt", "step.stablehlo.txt", "step.hlo.txt")


def dump(directory: Path, updater: Updater, state: TrainState, batch: Any) -> None:
    """Writes `step.jaxpr.txt` (the jaxpr), `step.stablehlo.txt` (lowered) and `step.hlo.txt` (compiled, for this
    machine's devices) of one step on such a batch. The step is compiled for it once more.
    """
    arrays, rest = eqx.partition(state, eqx.is_array)

    def step(arrays: Any, batch: Any) -> Any:
        state, metrics = updater.update(eqx.combine(arrays, rest), batch)
        return eqx.filter(state, eqx.is_array), metrics

    traced = jax.jit(step).trace(arrays, batch)
    lowered = traced.lower()
    texts = (str(traced.jaxpr), lowered.as_text(), lowered.compile().as_text())
    for name, text in zip(FILES, texts, strict=True):
        written(directory / name, (text or "").encode())
