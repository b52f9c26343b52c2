"""Checkpoints of a training run, on orbax-checkpoint: written in the background, whole or not at all, and checked.

A checkpoint is a directory named by its step. `state/` has the arrays, `meta/` a JSON with the rest: the position in
the data, metrics, the history, and of every array its path, shape, dtype and a CRC-32 of its bytes.
"""

import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._stored import Damaged, arrays_of, described, expect_written, filled, packed, problems_of, spec, unpacked

FORMAT = 1


class CheckpointError(ValueError):
    """Checkpoints cannot be gone on from: all of them are damaged, or they are of another model."""


class Restored(NamedTuple):
    """What a checkpoint held. `state` is a tree like the one that was asked for, its arrays where that one's are."""

    state: Any
    data: Any
    step: int
    metrics: dict[str, float]
    history: Any


class Checkpoints:
    """Checkpoints of one run in a directory, which is made: the last `keep`, and the `keep_best` by a metric.

        with Checkpoints("run/checkpoints", keep=2, best="accuracy", mode="max") as checkpoints:
            fit(updater, state, batches, steps=1000, checkpoints=checkpoints, checkpoint_every=100)

    `best` is a metric of those that `save` is told; a checkpoint without it is none of the best. `asynchronous`: `save`
    returns when the arrays are copied, and they are written while training goes on; the next `save` waits for it.

    A checkpoint appears under its name when it is complete, and only then others are thrown away, so that a process may
    be killed at any moment. What such a process left half written is removed here. One directory serves one run at a
    time. With several processes every one calls the same methods in the same order (the directory is a shared one); the
    first writes the JSON, and CRCs are of arrays that a process can see whole.

    Raises an `ImportError` without orbax-checkpoint, and a `ValueError` for settings out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_best: int = 1,
        best: str = "loss",
        mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
    ):
        if keep < 1 or keep_best < 0 or mode not in ("min", "max"):
            raise ValueError(
                f"keep = {keep} must be at least 1, keep_best = {keep_best} at least 0 and mode = {mode!r} 'min' or"
                " 'max'."
            )
        self.directory = Path(os.path.abspath(directory))
        self.keep, self.keep_best, self.best, self.mode = keep, keep_best, best, mode
        self._damaged: set[int] = set()
        self._manager = _manager(self.directory, _Keep(self._kept), asynchronous)
        self._scores = {step: score for step in self.steps if (score := self._score_of(step)) is not None}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, complete or being written, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric, the first of equal ones; None where none has it."""
        return next(iter(self._ranked(self.steps)), None)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
        history: Any = None,
    ) -> None:
        """Saves the arrays of `state`, which may be donated as soon as this returns.

        `data` is the position in the data: JSON, or bytes. `metrics` are numbers, of which the one named by `best`
        counts; `history` is JSON. Raises a `ValueError` where there is a checkpoint of that step already (but for a
        damaged one, which is replaced), and what went wrong in writing the one before.
        """
        arrays = arrays_of(state)
        said = {
            "format": FORMAT,
            "step": int(step),
            "data": packed(data),
            "metrics": {name: float(x) for name, x in (metrics or {}).items()},
            "history": history,
            "arrays": described(arrays),
        }
        self.wait()
        self._clear(step)
        if (score := said["metrics"].get(self.best)) is not None and np.isfinite(score):
            self._scores[step] = score
        args = _orbax().args
        large = {str(i): x for i, x in enumerate(arrays.values()) if x.size}
        text = json.dumps(said)  # at once: a history grows while it is written
        meta = args.JsonSave({"crc32": zlib.crc32(text.encode()), "said": text})
        self._manager.save(step, args=args.Composite(state=args.StandardSave(large), meta=meta), force=True)

    def restore(self, like: Any, *, best: bool = False) -> Restored | None:
        """The newest checkpoint that is whole, or the best one; None where there is none at all.

        `like` is the state as it is built anew: its structure, what it holds beside arrays, and where its arrays lie
        (of `ShapeDtypeStruct`s, their sharding) are kept. A damaged checkpoint (a file that is missing, cut off or
        changed) is passed over for the one before it, with a warning that names it and says why.

        Raises a `CheckpointError` where all are damaged, and where the checkpoint is of another model or optimizer; it
        names the first arrays that differ.
        """
        self.wait()
        found: dict[int, str] = {}
        for step in self._ranked(self.steps) if best else reversed(self.steps):
            try:
                restored = self._restored(step, like)
            except Damaged as error:
                found[step] = str(error)
                self._damaged.add(step)
                continue
            if found:
                warnings.warn(_PASSED.format(_listed(found, self.directory), step), stacklevel=2)
            return restored
        if found:
            raise CheckpointError(_ALL.format(self.directory, _listed(found, self.directory)))
        return None

    def wait(self) -> None:
        """Returns when all is written. Raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends what runs in the background. Nothing can be saved afterwards."""
        self._manager.close()

    def _clear(self, step: int) -> None:
        if step not in self.steps:
            return
        if step not in self._damaged:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {step} already, of another run or of a later part of this"
                " one. Choose another directory, or go on from it with restore."
            )
        self._manager.delete(step)
        self._damaged.remove(step)

    def _kept(self, steps: list[int]) -> set[int]:
        """What stays when the last of these is complete. Damaged ones go, for something newer is there."""
        whole = [step for step in sorted(steps) if step not in self._damaged]
        return {*whole[-self.keep :], *self._ranked(whole)[: self.keep_best]}

    def _ranked(self, steps: list[int]) -> list[int]:
        """Steps with the metric, the best first and of equal ones in their order."""
        sign = 1 if self.mode == "min" else -1
        return sorted((x for x in steps if x in self._scores), key=lambda x: (sign * self._scores[x], x))

    def _score_of(self, step: int) -> float | None:
        try:
            score = self._said(step)["metrics"].get(self.best)
        except Damaged:
            return None  # it is said when it is restored
        return score if score is not None and np.isfinite(score) else None

    def _said(self, step: int) -> dict[str, Any]:
        args = _orbax().args
        held = _read(lambda: self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"])
        is_ours = isinstance(held, dict) and held.keys() == {"crc32", "said"} and isinstance(held["said"], str)
        if not is_ours or zlib.crc32(held["said"].encode()) != held["crc32"]:
            raise Damaged("meta/ is not what was written")
        said = json.loads(held["said"])
        if said["format"] != FORMAT:
            raise CheckpointError(
                f"{self.directory / str(step)} is of format {said['format']}; this version reads {FORMAT}."
            )
        return said

    def _restored(self, step: int, like: Any) -> Restored:
        said, wanted = self._said(step), arrays_of(like)
        if problems := problems_of(said["arrays"], wanted):
            raise CheckpointError(_OTHER.format(self.directory / str(step), "\n  ".join(problems)))
        names = {path: str(i) for i, path in enumerate(said["arrays"])}
        specs = {names[path]: spec(x) for path, x in wanted.items() if x.size}
        args = _orbax().args
        items = args.Composite(state=args.StandardRestore(specs))
        held = _read(lambda: self._manager.restore(step, args=items)["state"])
        # Files hold no empty arrays, so that these are those of `like`, or made.
        empty = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
        arrays = {path: held[names[path]] if x.size else empty(x) for path, x in wanted.items()}
        expect_written(arrays, said["arrays"])
        state = filled(like, iter(arrays.values()))
        return Restored(state, unpacked(said["data"]), said["step"], said["metrics"], said["history"])


class _Keep:
    """A policy as orbax asks it: of each checkpoint there is, whether it stays."""

    def __init__(self, kept: Callable[[list[int]], set[int]]):
        self.kept = kept

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        kept = self.kept([one.step for one in checkpoints])
        return [one.step in kept for one in checkpoints]


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("Checkpoints need orbax-checkpoint: pip install 'eqx_transformers[train]'") from error
    return orbax.checkpoint


def _manager(directory: Path, policy: _Keep, asynchronous: bool) -> Any:
    orbax = _orbax()
    options = orbax.CheckpointManagerOptions(
        preservation_policy=policy,
        enable_async_checkpointing=asynchronous,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # what is damaged is found when it is restored, not before
        save_root_metadata=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    return orbax.CheckpointManager(directory, options=options)


@contextmanager
def _without_late_readers() -> Iterator[None]:
    """Where one array cannot be read, orbax ends its event loop while others still come: each of them prints, from a
    thread of its own, that there is no loop any more, and the message would be lost among hundreds of them. These, and
    nothing else, are not shown; where something could not be read, from then on, for nobody knows when the last comes.
    """
    hook = sys.unraisablehook

    def said(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            hook(what)

    sys.unraisablehook = said
    yield
    sys.unraisablehook = hook


def _read(read: Callable[[], Any]) -> Any:
    # Whatever a file that is missing, cut off or changed makes of orbax, tensorstore and the JSON reader. What is no
    # fault of the file is not said of it: the checkpoint would be passed over, and removed.
    try:
        with _without_late_readers():
            return read()
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        said = f"{type(error).__name__}: {error}"
        raise Damaged(" ".join(said.split())[:300]) from error


def _listed(found: dict[int, str], directory: Path) -> str:
    return "\n  ".join(f"{directory / str(step)}: {why}" for step, why in found.items())


_PASSED = """Damaged checkpoints were passed over:
  {}
The run goes on from step {} instead."""
_ALL = """Every checkpoint in {} is damaged:
  {}
The disk was full or failed, or files were moved. To begin anew, remove the directory or choose another one."""
_OTHER = """{} is a checkpoint of another model or optimizer than the state that is to go on from it:
  {}
Build both as they were, or choose another directory."""
