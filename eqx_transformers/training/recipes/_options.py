"""The options that all recipes have: fields of one dataclass, of which the command line is made."""

import argparse
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from ..._files import writing
from ...serialisation import is_native
from .._tables import DataError, NoColumn

# Of `Training`, what may differ when a run goes on: who runs it, and what is only looked at.
UNSETTLED = ("progress", "coordinator", "process", "keep", "checkpoint_every")


class WrongUsage(ValueError):
    """The options make no sense, alone or together."""


@contextmanager
def usage() -> Iterator[None]:
    """What the library says of an option that makes no sense, as the command's own error."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise WrongUsage(str(error)) from error


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Of a column that is not there: by the column, which option names another."""
    try:
        yield
    except NoColumn as error:
        if error.column not in options:
            raise
        raise DataError(f"{error} {options[error.column]} names another column.") from error


def expect_share(name: str, share: float) -> None:
    """Raises `WrongUsage` for what is no share of something."""
    if not 0 < share < 1:
        raise WrongUsage(f"{name} {share} must be a share between 0 and 1.")


def expect_at_least(record: Any, least: Mapping[str, int]) -> None:
    """Raises `WrongUsage` for a number of a dataclass that is below its least; None is none."""
    for name, smallest in least.items():
        given = getattr(record, name)
        if given is not None and not given >= smallest:
            raise WrongUsage(f"{_spelled(name)} {given} must be at least {smallest}.")


def expect_dropout(rate: float | None) -> None:
    """Raises `WrongUsage` for what cannot be a rate of dropout."""
    if rate is not None and not 0 <= rate < 1:
        raise WrongUsage(f"--dropout {rate} must be at least 0 and below 1.")


def option(default: Any, said: str, **more: Any) -> Any:
    """A field that is an option of the command line too, with its help."""
    return field(default=default, metadata={"help": said, **more})


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recipe trains; what is None is the recipe's own. Raises `WrongUsage` for what is out of range."""

    epochs: float | int | None = option(None, "how often all data is gone through")
    steps: int | None = option(None, "how many updates, in the place of --epochs")
    batch_size: int | None = option(None, "rows of a batch, over all devices")
    learning_rate: float | None = option(None, "at its peak")
    warmup: float | int | None = option(
        None, "the share of the steps in which AdamW's rate rises from 0, before it falls"
    )
    weight_decay: float | int | None = option(None, "AdamW's, of matrices alone: not of biases and norms")
    clip_norm: float | int | None = option(None, "largest norm of a gradient; 0 is without")
    accumulate: int = option(1, "micro-batches of a batch, gone through one after another")
    bfloat16: bool = option(False, "compute in bfloat16; the parameters stay in float32")
    seed: int = option(0, "of all that is drawn")
    evaluate_every: int | None = option(None, "steps between two evaluations")
    checkpoint_every: int | None = option(None, "steps between two checkpoints (default: as evaluations)")
    keep: int = option(2, "how many checkpoints are kept, beside the best one")
    patience: int | None = option(None, "stop after so many evaluations without a better one; 0: never")
    mesh: str | None = option(None, "devices by axis, such as data=2,model=4", metavar="AXES")
    fully_sharded: bool = option(False, "parameters and optimizer spread over the mesh's data axis")
    coordinator: str | None = option(None, "of several processes: HOST:PORT, or auto", metavar="ADDRESS")
    processes: int | None = option(None, "how many there are")
    process: int | None = option(None, "which of them this is, from 0")
    progress: bool = option(True, "no bar and no lines while it trains")

    def __post_init__(self):
        if self.epochs is not None and self.steps is not None:
            raise WrongUsage(f"--epochs {self.epochs:g} and --steps {self.steps} both say how long: give one of them.")
        least = {"batch_size": 1, "accumulate": 1, "keep": 1, "steps": 1, "patience": 0}
        least |= {"evaluate_every": 1, "checkpoint_every": 1, "weight_decay": 0, "clip_norm": 0, "warmup": 0, "seed": 0}
        expect_at_least(self, least)
        if self.seed >= 2**32:
            raise WrongUsage(f"--seed {self.seed} must be below {2**32}.")
        for name in ("learning_rate", "epochs"):
            given = getattr(self, name)
            if given is not None and not 0 < given < math.inf:
                raise WrongUsage(f"{_spelled(name)} {given:g} must be above 0, and finite.")
        if self.warmup is not None and not self.warmup < 1:
            raise WrongUsage(f"--warmup {self.warmup}, a share of the steps, must be below 1.")
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise WrongUsage(f"--batch-size {self.batch_size} must be a multiple of --accumulate {self.accumulate}.")
        if self.mesh is None and self.fully_sharded:
            raise WrongUsage("--fully-sharded spreads arrays over a mesh: give --mesh data=N too.")
        if self.mesh is None and self.coordinator is not None:
            raise WrongUsage("Several processes train one model on a --mesh over all their devices: data=N, say.")
        if self.coordinator is None and (self.processes is not None or self.process is not None):
            raise WrongUsage("--processes and --process need --coordinator HOST:PORT, the address of process 0.")

    def settled(self, **own: Any) -> "Settled":
        """With a recipe's own numbers where none are said; where there are none either, those of `Settled`."""
        said = {one.name: x for one in fields(self) if (x := getattr(self, one.name)) is not None}
        if self.epochs is not None or self.steps is not None:
            own = {name: x for name, x in own.items() if name not in ("epochs", "steps")}
        return Settled(**(own | said))

    def total(self, per_epoch: int, epochs: float | int) -> int:
        """The number of updates, of so many batches an epoch; `epochs` where none are asked for."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(per_epoch * (epochs if self.epochs is None else self.epochs)))


@dataclass(frozen=True, kw_only=True)
class Settled(Training):
    """`Training` in which nothing is left to the recipe."""

    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: float | int = 0.1
    weight_decay: float | int = 0.01
    clip_norm: float | int = 1.0


class Parser(argparse.ArgumentParser):
    """One whose exit is `command`'s."""

    def error(self, message: str) -> NoReturn:
        raise WrongUsage(f"{message} (--help lists what there is)")


def parser(name: str, said: str, **own: Any) -> Parser:
    """Of the recipe `name`: with the options of `Training`, and `--out`; the help says the recipe's `own` numbers."""
    made = Parser(prog=f"python -m eqx_transformers.training.recipes.{name}", description=said, allow_abbrev=False)
    made.add_argument("--out", type=_directory, metavar="DIR", help=f"where all is written (default ./{name})")
    numbers = {one.name: one.default for one in fields(Settled) if one.default is not None}
    add_options(made, "training", Training, **(numbers | own))
    made.set_defaults(out=Path(name))
    return made


def add_options(made: argparse.ArgumentParser, title: str, record: type, **own: Any) -> None:
    """The fields of a dataclass as options of a command line, under a title.

    `own` says in the help what stands for a field that is None.
    """
    group = made.add_argument_group(title)
    for one in fields(record):
        told = dict(one.metadata)
        if isinstance(one.default, bool):
            off = one.default
            name_ = _spelled(one.name) if not off else "--no-" + one.name
            group.add_argument(name_, dest=one.name, action="store_false" if off else "store_true", help=told["help"])
            continue
        shown = own.get(one.name) if one.default is None else one.default
        said = told.pop("help") + ("" if shown is None else f" (default {shown})")
        group.add_argument(_spelled(one.name), type=_kind(one.type), default=one.default, help=said, **told)


def gathered(args: argparse.Namespace, record: type) -> Any:
    """The dataclass whose fields were added by `add_options`, of a command line."""
    return record(**{one.name: getattr(args, one.name) for one in fields(record)})


def training(args: argparse.Namespace) -> Training:
    """The options of a command line as fields."""
    return gathered(args, Training)


def settings_of(*records: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """All that a run that goes on must agree with, of these dataclasses."""
    left_out = {*UNSETTLED, *without}
    return {name: x for record in records for name, x in asdict(record).items() if name not in left_out}


def absolute(path: Any) -> str | None:
    """A path as the settings of a run have it."""
    return None if path is None else str(Path(path).absolute())


def located(source: Any) -> str | None:
    """Where a model comes from, as the settings of a run have it: a hub id stays as it is."""
    return absolute(source) if source is None or Path(source).exists() else str(source)


def expect_foreign(source: Any) -> None:
    """Raises a `WrongUsage` for a directory of this library, where one of transformers is meant."""
    if Path(source).is_dir() and is_native(source):
        raise WrongUsage(
            f"--model {source} is in this library's own format. A Hugging Face directory is needed: converters.export,"
            " or `python -m converters.hf … --export DIR`, writes one."
        )


def begun(out: Path) -> bool:
    """Whether there is a run to go on with: before its first checkpoint there is none."""
    checkpoints = out / "checkpoints"
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def kept_tokenizer(out: Path) -> Path | None:
    """That of the run, where there is one to go on with."""
    path = out / "tokenizer.json"
    return path if begun(out) and path.is_file() else None


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Notes the settings of a run in `out/settings.json`; one with checkpoints is gone on with only under the same.

    Raises `WrongUsage` where they differ, naming each.
    """
    told = json.loads(json.dumps(settings, default=str))
    path = out / "settings.json"
    if begun(out) and not path.exists():
        raise WrongUsage(
            f"{out} has checkpoints, but no {path.name}, which says of which run they are. Give another --out for a new"
            " run, or remove the directory."
        )
    if not begun(out):
        with writing(path) as fresh:
            fresh.write_text(json.dumps(told, indent=2) + "\n")
        return
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise WrongUsage(
            f"{path} is damaged ({error}): it says of which run the checkpoints beside it are. Give another --out for a"
            " new run, or remove the directory."
        ) from error
    said = lambda name: f"{_spelled(name)} was {there.get(name)!r} and is {told.get(name)!r}"
    differ = [name for name in told | there if told.get(name) != there.get(name)]
    # The texts' fingerprint is one of their batches, which other settings change too.
    other = [said(name) for name in differ if name != "texts"] or ["the texts have changed" for _ in differ]
    if other:
        raise WrongUsage(
            f"{out} holds a run with other settings: {'; '.join(other)}. Give these to go on with it, another --out for"
            " a new run, or remove the directory."
        )


def _directory(given: str) -> Path:
    if not given:
        raise argparse.ArgumentTypeError(
            "it is empty: is a variable of the shell not set? Give a directory (. is this)."
        )
    return Path(given)


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(annotation: Any) -> Any:
    """What a text of the command line becomes: the first type of a union; of words, themselves."""
    if typing.get_origin(annotation) is typing.Literal:
        return str
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation)[0] if union else annotation
