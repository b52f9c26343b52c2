"""A Hugging Face directory as a config, the shapes of its tensors, and a way to read one at a time."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eqx_transformers import tensor_file
from eqx_transformers.tensor_file import DamagedFile, Spec

from .errors import MalformedCheckpoint, SourceNotFound, UnsafeCheckpoint
from .hub import INDEX, WEIGHTS


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, known from headers: `specs` by key, and which of `layout`'s files holds each."""

    directory: Path
    config: dict[str, Any]
    specs: dict[str, Spec]
    layout: dict[str, list[str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return {key: name for name, keys in self.layout.items() for key in keys}

    def get(self, key: str) -> np.ndarray:
        """One tensor, in a buffer of its own."""
        path = self.directory / self._file_of[key]
        try:
            with open(path, "rb", buffering=0) as file:
                return tensor_file.read_tensor(file, self.specs[key])
        except EOFError as error:
            raise MalformedCheckpoint(f"{path} ended while {key} was read ({error}). Did it change?") from error

    def size(self, key: str) -> int:
        return self.specs[key].end - self.specs[key].start


def open_directory(directory: Path) -> Checkpoint:
    """Reads config.json and the headers; no tensor. Raises `SourceNotFound`, `MalformedCheckpoint`, `UnsafeCheckpoint`."""
    if not directory.is_dir():
        raise SourceNotFound(f"{directory} is a file; a checkpoint is a directory with config.json and weights.")
    config = _json(directory / "config.json", directory)
    files = _weight_files(directory)
    specs, layout, metadata = {}, {}, {}
    for name in files:
        found, metadata = _header(directory / name)
        for key in found.keys() & specs.keys():
            first = next(file for file, keys in layout.items() if key in keys)
            raise MalformedCheckpoint(f"{directory}: {key} is in two files, {first} and {name}.")
        specs |= found
        layout[name] = list(found)
    if (directory / INDEX).is_file() and files != [WEIGHTS]:
        _agrees(directory, layout)
    if not specs:
        raise MalformedCheckpoint(f"{directory}: {', '.join(files)} holds no tensors.")
    return Checkpoint(directory, config, specs, layout, metadata)


def _json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        found = sorted(p.name for p in directory.iterdir())
        what = f"it holds {', '.join(found[:5])}{', …' if len(found) > 5 else ''}" if found else "it is empty"
        raise MalformedCheckpoint(f"{directory} has no {path.name}: not a Hugging Face model directory ({what}).")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint(f"{path} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise MalformedCheckpoint(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def _weight_files(directory: Path) -> list[str]:
    """One plain file before an index, as transformers prefers them."""
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if (directory / INDEX).is_file():
        return sorted(set(_weight_map(directory).values()))
    others = sorted(
        p.name for p in directory.iterdir() if p.suffix in (".bin", ".msgpack", ".h5", ".pt", ".pth", ".ckpt", ".gguf")
    )
    if others:
        raise MalformedCheckpoint(
            f"{directory} has no {WEIGHTS} (and no {INDEX}), only {', '.join(others)}, a container that is not read yet."
            " Save it as safetensors with transformers: AutoModel.from_pretrained(…).save_pretrained(…)."
        )
    near = sorted(p.name for p in directory.glob("*.safetensors"))
    hint = f" There is {', '.join(near[:3])}: rename it, or add an index." if near else ""
    raise MalformedCheckpoint(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}.{hint}")


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = _json(directory / INDEX, directory).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedCheckpoint(f"{directory / INDEX} has no weight_map of keys to files.")
    for key, name in weight_map.items():
        # One path component, so that an index cannot make us read files from elsewhere; the hub cache's symlinks may.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeCheckpoint(
                f"{directory / INDEX} maps {key!r} to {name!r}; a shard must be the name of a .safetensors file beside it."
            )
    return weight_map


def _header(path: Path) -> tuple[dict[str, Spec], dict[str, str]]:
    if not path.is_file():
        raise MalformedCheckpoint(f"{path} is missing, but the index names it. Was the download complete?")
    try:
        return tensor_file.read_header(path)
    except DamagedFile as error:
        raise MalformedCheckpoint(str(error)) from error


def _agrees(directory: Path, layout: dict[str, list[str]]) -> None:
    """The index and the shards must say the same."""
    weight_map = _weight_map(directory)
    held = {key: name for name, keys in layout.items() for key in keys}
    for key in weight_map.keys() - held.keys():
        raise MalformedCheckpoint(f"{directory / INDEX} says {weight_map[key]} holds {key}, but it does not.")
    for key in held.keys() - weight_map.keys():
        raise MalformedCheckpoint(f"{directory / held[key]} holds {key}, which {INDEX} does not list.")
    for key, name in weight_map.items():
        if held[key] != name:
            raise MalformedCheckpoint(f"{directory / INDEX} says {name} holds {key}, but {held[key]} does.")
