"""A Hugging Face directory as a config, the shapes of its tensors, and a way to read one at a time."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eqx_transformers import tensor_file
from eqx_transformers.tensor_file import Spec

from .containers import Stamp, open_weights, stamp
from .errors import MalformedCheckpoint, SourceNotFound
from .files import read_json


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, known from headers: `specs` by key, and which of `layout`'s files holds each.

    `container` is the word for the kind of those files; `notes` are for the report. Without a directory, `arrays` are
    the tensors themselves.
    """

    directory: Path | None
    config: dict[str, Any]
    specs: dict[str, Spec]
    layout: dict[str, list[str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    container: str = "arrays"
    stamps: dict[str, Stamp] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return {key: name for name, keys in self.layout.items() for key in keys}

    def get(self, key: str) -> np.ndarray:
        """One tensor, in a buffer of its own."""
        if self.directory is None:
            return tensor_file.copied(self.arrays[key])
        path = self.directory / self._file_of[key]
        try:
            with open(path, "rb", buffering=0) as file:
                self._expect_unchanged(path, os.fstat(file.fileno()))
                found = tensor_file.read_tensor(file, self.specs[key])
                self._expect_unchanged(path, os.fstat(file.fileno()))
            return found
        except EOFError as error:
            raise MalformedCheckpoint(f"{path} ended while {key} was read ({error}). Did it change?") from error

    def view(self, key: str) -> np.ndarray:
        """The same for those who copy a part of it: a map of the file, where the tensor lies in one piece."""
        if self.directory is None:
            return self.arrays[key]
        if self.specs[key].more:
            return self.get(key)
        path = self.directory / self._file_of[key]
        self._expect_unchanged(path, os.stat(path))
        return tensor_file.mapped(path, self.specs[key])

    def _expect_unchanged(self, path: Path, status: os.stat_result) -> None:
        """Offsets are those of the header that was read: of another file they would give plausible garbage."""
        if path.name in self.stamps and stamp(status) != self.stamps[path.name]:
            raise MalformedCheckpoint(f"{path} changed after its header was read. Is somebody writing it? Load again.")

    def size(self, key: str) -> int:
        return self.specs[key].stored


def open_directory(directory: Path) -> Checkpoint:
    """Reads config.json and the headers; no tensor. Raises `SourceNotFound`, `Malformed-` or `UnsafeCheckpoint`."""
    if not directory.is_dir():
        raise SourceNotFound(f"{directory} is not a directory; a checkpoint is one with config.json and weights.")
    config = _config(directory)
    weights = open_weights(directory)
    return Checkpoint(
        directory,
        config,
        weights.specs,
        weights.layout,
        weights.metadata,
        weights.container.name,
        weights.stamps,
        weights.notes,
    )


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        found = sorted(p.name for p in directory.iterdir())
        if "adapter_config.json" in found:
            raise MalformedCheckpoint(
                f"{directory} is a PEFT adapter, not a model: load its base, and then converters.peft.load(model, …),"
                " or python -m converters.hf BASE --adapter DIR."
            )
        what = f"it holds {', '.join(found[:5])}{', …' if len(found) > 5 else ''}" if found else "it is empty"
        raise MalformedCheckpoint(f"{directory} has no config.json: not a Hugging Face model directory ({what}).")
    return read_json(path)
