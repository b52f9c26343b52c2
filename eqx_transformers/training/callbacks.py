"""What may be said to a run while it goes on, and what it says to others."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from .history import History, said

MOMENTS = ("on_start", "on_step", "on_evaluate", "on_end")


@dataclass(frozen=True)
class EarlyStop:
    """Stops after `patience` evaluations in a row that did not make `metric` better than the best before by `least`.

    It is asked of the history alone, so that a run that goes on from a checkpoint stops where it would have.
    """

    metric: str = "loss"
    mode: str = "min"
    patience: int = 3
    least: float = 0.0

    def __post_init__(self):
        if self.mode not in ("min", "max") or self.patience < 1 or self.least < 0:
            raise ValueError(f"{self}: mode must be 'min' or 'max', patience at least 1 and least at least 0.")

    def __call__(self, history: History) -> bool:
        """Whether to stop."""
        sign = 1 if self.mode == "min" else -1
        best, waited = math.inf, 0
        for record in history.evaluations:
            value = sign * said(record, self.metric)
            waited = 0 if value < best - self.least else waited + 1
            best = value if waited == 0 else best
        return waited >= self.patience


class Callback(Protocol):
    """Any object with some of these; a step's metrics come some steps later, in order.

    class Printer:
        def on_evaluate(self, step, metrics):
            print(step, metrics["loss"])

    fit(…, callbacks=[Printer(), to_run(wandb.init(project="mine"))])
    """

    def on_start(self, info: dict[str, Any]) -> None:
        """Before the first step: `step` that is gone on from and `steps` to reach."""

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        """After a step: loss and what else the updater says."""

    def on_evaluate(self, step: int, metrics: dict[str, Any]) -> None:
        """After an evaluation."""

    def on_end(self, history: History) -> None:
        """After the last step, not after an error or a signal."""


def to_run(run: Any) -> Any:
    """A callback for a run of trackio, wandb or the like: anything with `log(dict, step=…)`.

        run = trackio.init(project="mine")
        fit(…, callbacks=[to_run(run)])
        run.finish()

    Names are `train/loss` and `held_out/loss`. The run is begun and finished by the caller. Raises a `TypeError` for
    what has no `log`.
    """
    if not callable(getattr(run, "log", None)):
        raise TypeError(f"to_run takes a run with log(dict, step=…), but a {type(run).__name__} has none.")
    return _Run(run)


@dataclass(frozen=True)
class _Run:
    run: Any

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        self.run.log({f"train/{name}": x for name, x in metrics.items()}, step=step)

    def on_evaluate(self, step: int, metrics: dict[str, Any]) -> None:
        self.run.log({f"held_out/{name}": x for name, x in metrics.items()}, step=step)


def expect_callback(one: Any) -> None:
    """Raises a `TypeError` for an object that could be told nothing."""
    if not any(hasattr(one, moment) for moment in MOMENTS):
        raise TypeError(f"A callback has some of {', '.join(MOMENTS)}; a {type(one).__name__} has none.")
