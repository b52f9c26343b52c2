"""The loop around an `Updater`: data, progress, evaluation, checkpoints, logs, and an end that can be gone on from."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ._signals import Interrupted, agreed, signals
from .callbacks import expect_callback
from .checkpoint import Checkpoints
from .history import HELD_OUT, History, Log, expect_picture, is_finite, plot_curves, said
from .progress import Progress, numbers
from .updater import TrainState, Updater, compiled

LAG = 2  # steps that may be under way before the metrics of the first are asked for


class Fitted(NamedTuple):
    """How a run ended. `stopped` says why: `"steps"` (all are done), `"early"` or `"data"` (there was no more)."""

    state: TrainState
    history: History
    stopped: str


class NotFinite(ArithmeticError):
    """So many steps in a row were not finite that going on would change nothing."""


def fit(
    updater: Updater,
    state: TrainState,
    batches: Iterable[Any],
    *,
    steps: int,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    stop: Callable[[History], bool] | None = None,
    log: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool | Console = True,
    place: Callable[[Any], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    log_every: int = 1,
    most_skipped: int = 25,
) -> Fitted:
    """Trains until `state.step` is `steps`. `state` is donated: use the one of the result.

    - `batches`: its iterator gives batches and, for checkpoints, has `get_state()` and `set_state(…)`. Of data that
      ends before `steps`, all is used. `place` is a function of each batch, onto the devices of a mesh say.
    - `evaluate(model)` gives numbers, every `evaluate_every` steps and at the end. A `stop`, such as `EarlyStop`, is
      asked after it.
    - `checkpoints`: one is saved every `checkpoint_every` steps, after each evaluation and at the end. Where there are
      any, the run goes on from the newest, to the same numbers as if it had never stopped.
    - `log`: a `.csv` or `.jsonl` file of all records; `plot`: a `.png` or `.svg` of the curves, drawn at the end.
      `schedule(step)` is the learning rate, for both, as planned: skipped steps put it off. Every `log_every`-th step
      is recorded, and each that is evaluated.
    - `callbacks`: see `Callback`. `progress`: shown on standard output, on another `rich` console, or (False) nowhere.

    Metrics are read `LAG` steps late, so that the device never waits for the host. Steps that were not finite are
    counted (`history.skipped`); `most_skipped` of them in a row raise `NotFinite`.

    SIGINT (Ctrl-C) and SIGTERM: the step is finished and saved, a line on standard error says how to go on, whatever
    `progress` is, and `Interrupted`, which is a `KeyboardInterrupt`, is raised. A second one stops at once. (Only in
    the main thread, where signals arrive.)

    With several processes all call it alike, and the first logs, draws and shows. Raises a `ValueError` or `TypeError`
    for settings that cannot be meant, before the first step.
    """
    _expect_settings(steps, evaluate, evaluate_every, checkpoints, checkpoint_every, stop, log_every, callbacks)
    if plot is not None:
        expect_picture(plot)
    iterator = iter(batches)
    if checkpoints is not None and not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        raise TypeError(
            f"Checkpoints need the position in the data, but the iterator of a {type(batches).__name__} has no"
            " get_state and set_state. Batches has them, as have grain's datasets."
        )
    restored = None if checkpoints is None else checkpoints.restore(state)
    if restored is not None:
        state = restored.state
        iterator.set_state(restored.data)
    start = int(state.step)
    leads = jax.process_index() == 0
    run = _Run(
        updater=compiled(updater),
        state=state,
        iterator=iterator,
        step=start,
        steps=steps,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        stop=stop,
        place=place or (lambda batch: batch),
        rates=_rates(schedule, start, steps),
        log_every=log_every,
        most_skipped=most_skipped,
        callbacks=callbacks,
        history=History.from_json(None if restored is None else restored.history),
        saved=None if restored is None else start,
        log=Log(log, start) if leads and log is not None else None,
        progress=Progress(progress if leads else False, start, steps),
    )
    try:
        if restored is not None:
            run.progress.say(f"Going on from step {start} of {steps}.")
        stopped = run.go()
    finally:
        run.progress.close()
        if iterator is not batches and hasattr(iterator, "close"):
            iterator.close()  # of threads that read ahead
    if plot is not None and leads:
        plot_curves(run.history, plot)
    return Fitted(run.state, run.history, stopped)


@dataclass
class _Run:
    updater: Callable[..., Any]
    state: TrainState
    iterator: Any
    step: int
    steps: int
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    evaluate_every: int | None
    checkpoints: Checkpoints | None
    checkpoint_every: int | None
    stop: Callable[[History], bool] | None
    place: Callable[[Any], Any]
    rates: Callable[[int], dict[str, Any]]
    log_every: int
    most_skipped: int
    callbacks: Sequence[Any]
    history: History
    saved: int | None
    log: Log | None
    progress: Progress

    def go(self) -> str:
        self.pending: deque[tuple[int, Any]] = deque()
        self.row = 0  # of steps that were not finite
        self._tell("on_start", {"step": self.step, "steps": self.steps})
        with signals() as asked:
            stopped = self._steps(asked)
            self._flush()
            if stopped == "signal":
                self._save({})
                self._interrupt(asked[0])
            self._finish(stopped)
            if agreed(asked, 0):  # while that was done
                self._interrupt(asked[0])
        return stopped

    def _steps(self, asked: list[int]) -> str:
        """Up to the end, or until a signal came."""
        while True:
            # At the beginning, so that what a signal kept from happening is made up for.
            if self.step and self.step < self.steps and self._evaluates(self.step):
                self._evaluate()
            if self.stop is not None and self.history.evaluations and self.stop(self.history):
                return "early"
            if self.step >= self.steps:
                return "steps"
            if agreed(asked, self.step):
                return "signal"
            if (batch := next(self.iterator, None)) is None:
                return "data"
            self.state, metrics = self.updater(self.state, self.place(batch))
            self.step += 1
            self._later(metrics)
            if self._evaluates(self.step):  # first, even where a signal came: a checkpoint has what its evaluation said
                continue
            if agreed(asked, self.step):
                return "signal"
            if self.checkpoint_every and self.step % self.checkpoint_every == 0:
                self._save({})

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation comes after a step, which saves it with what it says."""
        every = self.evaluate_every
        return self.evaluate is not None and (step >= self.steps or bool(every and step % every == 0))

    def _later(self, metrics: Any) -> None:
        for x in jax.tree.leaves(metrics):
            x.copy_to_host_async()
        self.pending.append((self.step, metrics))
        while len(self.pending) > LAG:
            self._record(*self.pending.popleft())

    def _flush(self) -> None:
        while self.pending:
            self._record(*self.pending.popleft())

    def _record(self, step: int, metrics: Any) -> None:
        numbers = {name: np.asarray(x).item() for name, x in metrics.items()}
        numbers = {name: int(x) if isinstance(x, bool) else x for name, x in numbers.items()} | self.rates(step)
        self.progress.update(step, numbers)
        self._expect_finite(step, numbers)
        if step % self.log_every == 0 or step == self.steps or self._evaluates(step):
            speed = {"tokens_per_second": self.progress.tokens_per_second} if "tokens" in numbers else {}
            self.history.steps.append({"step": step, **numbers, **speed})
            self._write(self.history.steps[-1])
            self._tell("on_step", step, numbers | speed)

    def _expect_finite(self, step: int, metrics: dict[str, Any]) -> None:
        self.row = 0 if is_finite(metrics) else self.row + 1
        self.history.skipped += self.row > 0
        if self.row >= self.most_skipped:
            raise NotFinite(_NOT_FINITE.format(self.row, step, numbers(metrics)))

    def _evaluate(self) -> None:
        if self.evaluate is None or (self.history.evaluations and self.history.evaluations[-1]["step"] == self.step):
            return
        self._flush()
        metrics = {name: float(x) for name, x in self.evaluate(self.state.model).items()}
        record = {"step": self.step, **metrics}
        if self.checkpoints is not None and self.checkpoints.keep_best:
            said(record, self.checkpoints.best)
        self.history.evaluations.append(record)
        self._write({"step": self.step, **{HELD_OUT + name: x for name, x in metrics.items()}})
        self.progress.say(f"step {self.step}/{self.steps}  held out: {numbers(metrics)}")
        self._tell("on_evaluate", self.step, metrics)
        self._save(metrics)

    def _save(self, metrics: dict[str, Any]) -> None:
        if self.checkpoints is None or self.saved == self.step:
            return
        self._flush()
        data, history = self.iterator.get_state(), self.history.to_json()
        self.checkpoints.save(self.step, self.state, data=data, metrics=metrics, history=history)
        self.saved = self.step

    def _finish(self, stopped: str) -> None:
        self._evaluate()
        self._save({})
        if self.checkpoints is not None:
            self.checkpoints.wait()
        why = {"early": ", stopped early", "data": ", for there is no more data"}.get(stopped, "")
        skipped = f", {n} steps skipped that were not finite" if (n := self.history.skipped) else ""
        self.progress.say(f"{self.step} steps done{why}{skipped}.")
        self._tell("on_end", self.history)

    def _interrupt(self, number: int) -> None:
        name = signal.Signals(number).name
        text = f"{name}: stopped after step {self.step} of {self.steps}. Nothing is saved: there are no checkpoints."
        if self.checkpoints is not None:
            self.checkpoints.wait()
            text = (
                f"{name}: saved at step {self.step} of {self.steps} in {self.checkpoints.directory}."
                " Run the same again to go on from there."
            )
        self.progress.close()
        if jax.process_index() == 0:
            print(text, file=sys.stderr, flush=True)  # where no progress is shown too
        raise Interrupted(text, number)

    def _write(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)

    def _tell(self, moment: str, *what: Any) -> None:
        for callback in self.callbacks:
            if (call := getattr(callback, moment, None)) is not None:
                call(*what)


def _rates(schedule: Callable[[Any], Any] | None, start: int, steps: int) -> Callable[[int], dict[str, Any]]:
    """The learning rate of each update, all of them at once: one by one they would wait for the device."""
    if schedule is None or start >= steps:
        return lambda step: {}
    with jax.numpy_dtype_promotion("standard"):
        rates = np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(start, steps)))
    return lambda step: {"learning_rate": float(rates[step - 1 - start])}


def _expect_settings(
    steps: int, evaluate: Any, evaluate_every: Any, checkpoints: Any, checkpoint_every: Any, stop: Any, log_every: int,
    callbacks: Sequence[Any],
) -> None:  # fmt: skip
    counts = {"steps": steps, "evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, x in (counts | {"log_every": log_every}).items():
        if x is not None and x < 1:
            raise ValueError(f"{name} = {x} must be at least 1.")
    if evaluate_every is not None and evaluate is None:
        raise ValueError("evaluate_every needs evaluate=, a function of the model that gives numbers.")
    if stop is not None and (evaluate is None or evaluate_every is None):
        raise ValueError("stop= is asked after evaluations: give evaluate= and evaluate_every=.")
    if checkpoint_every is not None and checkpoints is None:
        raise ValueError("checkpoint_every needs checkpoints=Checkpoints(directory).")
    for one in callbacks:
        expect_callback(one)


_NOT_FINITE = """{} steps in a row were not finite, the last of them step {}: {}
The learning rate is too high, the data has what is not a number, or a half precision overflows: try a lower rate, a
warm-up, clip_norm=1.0 or float32. What was saved before is whole."""
