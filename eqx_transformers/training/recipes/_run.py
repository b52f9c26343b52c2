"""What happens in every recipe: how it begins and ends, and the training between."""

import math
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp

from ...serialisation import FormatError
from ...sharding import make_mesh, rules_for, shard, shard_batch, start_processes
from .._memory import keep_freed
from ..callbacks import EarlyStop
from ..checkpoint import CheckpointError, Checkpoints
from ..data import Batches
from ..loop import Fitted, Interrupted, NotFinite, fit
from ..optimizers import adamw
from ..schedules import warmup_linear
from ..text import DataError
from ..updater import TrainState, Updater
from ._gathered import whole
from ._options import Settled, WrongUsage, usage

RECORDS = 20_000  # of steps, which every checkpoint holds
Best = tuple[str, Literal["min", "max"]]  # a metric that is evaluated, and which of its values is best


def command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Runs a recipe as a command and gives its exit code.

    0: done. 2: wrong options or data. 130: stopped by Ctrl-C (143 by SIGTERM), after a checkpoint was saved.
    """
    from converters import ConversionError

    told = (WrongUsage, DataError, ConversionError, FormatError, CheckpointError, NotFinite, ImportError, OSError)
    try:
        main(argv)
    except KeyboardInterrupt as stopped:
        if not isinstance(stopped, Interrupted):
            print("stopped: what was not saved before is lost.", file=sys.stderr)
        return 128 + getattr(stopped, "signal", signal.SIGINT)
    except told as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def program(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Runs a recipe as a program of its own."""
    keep_freed()
    raise SystemExit(command(main))


def begin(training: Settled, out: str | PathLike[str]) -> tuple[Any, Path]:
    """(the mesh that is asked for, or None; where to write); joins the other processes first, where there are."""
    if Path(out).exists() and not Path(out).is_dir():
        raise WrongUsage(f"--out {out} is a file; a run is written to a directory of its own: choose another name.")
    with usage():
        if training.coordinator is not None:
            start_processes(training.coordinator, training.processes, training.process)
    if training.mesh is None:
        return None, Path(out)
    try:
        mesh = make_mesh(training.mesh)
        rules_for(mesh)
    except ValueError as error:
        raise WrongUsage(f"--mesh {training.mesh}: {error}") from error
    if training.batch_size % (training.accumulate * (parts := mesh.shape["data"])):
        raise WrongUsage(
            f"--batch-size {training.batch_size} must be a multiple of --accumulate {training.accumulate} times the"
            f" {parts} parts of data in --mesh {training.mesh}."
        )
    return mesh, Path(out)


def train(
    model: Any,
    loss: Callable[..., Any],
    batches: Batches,
    training: Settled,
    out: Path,
    *,
    epochs: float | int,
    mesh: Any = None,
    trains: Any = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    best: Best = ("loss", "min"),
    optimizer: Any = None,
    schedule: Any = None,
    callbacks: Iterable[Any] = (),
    look: Callable[[Updater, TrainState], None] | None = None,
) -> Fitted:
    """Trains by AdamW with a warm-up and a linear decay, or by `optimizer`, and writes to `out`:

    `checkpoints/`, from which a run that was stopped goes on, `log.jsonl` and `curves.png`. `epochs` is how many there
    are where `training` does not say; `best` names the metric of `evaluate` by which the best checkpoint is kept;
    `schedule` is the rate of `optimizer`, for the log; `look(updater, state)` is called before the first step.
    """
    per_epoch = batches.per_epoch
    steps = training.total(per_epoch, epochs)
    rates = schedule
    if optimizer is None:
        rates = warmup_linear(training.learning_rate, steps, training.warmup)
        optimizer = adamw(rates, weight_decay=training.weight_decay)
    updater = Updater(
        loss,
        optimizer,
        trains=trains,
        accumulate=training.accumulate,
        compute_dtype=jnp.bfloat16 if training.bfloat16 else None,
        clip_norm=training.clip_norm or None,
    )
    if mesh is not None:
        model = shard(model, mesh, rules_for(mesh, fully_sharded=training.fully_sharded))
    state = updater.init(model, key=jax.random.key(training.seed))
    place = (lambda batch: batch) if mesh is None else lambda batch: shard_batch(batch, mesh)
    if look is not None:
        look(updater, state)
    every = training.evaluate_every or per_epoch
    with _checkpoints(out, training, best) as checkpoints:
        return fit(
            updater,
            state,
            batches,
            steps=steps,
            place=place,
            schedule=rates,
            evaluate=evaluate,
            evaluate_every=None if evaluate is None else every,
            checkpoints=checkpoints,
            checkpoint_every=training.checkpoint_every or every,
            stop=None if not training.patience else EarlyStop(*best, training.patience),
            log=out / "log.jsonl",
            plot=out / "curves.png",
            callbacks=tuple(callbacks),
            progress=training.progress,
            log_every=max(1, steps // RECORDS),
        )


def final(fitted: Fitted, training: Settled, out: Path, best: Best | None, mesh: Any) -> tuple[Any, int]:
    """(the model that is best on held-out data, or the last one, whole on every device; the step that it is of)."""
    state = fitted.state
    if best is not None:
        with _checkpoints(out, training, best) as checkpoints:
            found = checkpoints.restore(state, best=True)
        state = state if found is None else found.state
    model = state.model
    return model if mesh is None else whole(model, mesh), int(state.step)


def expect_finite(metrics: Mapping[str, Any], out: Path) -> None:
    """Raises `NotFinite` for a model that is not worth a file."""
    for name, x in metrics.items():
        if isinstance(x, Mapping):
            expect_finite(x, out)
        elif isinstance(x, float) and not math.isfinite(x):
            raise NotFinite(
                f"The {name} of the final model is {x}: was the learning rate too high? No model is written; the"
                f" checkpoints are in {out / 'checkpoints'}."
            )


def _checkpoints(out: Path, training: Settled, best: Best) -> Checkpoints:
    metric, mode = best
    return Checkpoints(out / "checkpoints", keep=training.keep, best=metric, mode=mode)
