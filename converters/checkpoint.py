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

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights that are there and not read, by the ends of their names.
OTHERS = (".bin", ".msgpack", ".h5", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, known from headers: `specs` by key, and which of `layout`'s files holds each.

    Without a directory, `arrays` are the tensors themselves.
    """

    directory: Path | None
    config: dict[str, Any]
    specs: dict[str, Spec]
    layout: dict[str, list[str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
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
                return tensor_file.read_tensor(file, self.specs[key])
        except EOFError as error:
            raise MalformedCheckpoint(f"{path} ended while {key} was read ({error}). Did it change?") from error

    def size(self, key: str) -> int:
        return self.specs[key].end - self.specs[key].start


def open_directory(directory: Path) -> Checkpoint:
    """Reads config.json and the headers; no tensor. Raises `SourceNotFound`, `Malformed-` or `UnsafeCheckpoint`."""
    if not directory.is_dir():
        raise SourceNotFound(f"{directory} is not a directory; a checkpoint is one with config.json and weights.")
    config = _config(directory)
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


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value of a file, of this type. Raises a `MalformedCheckpoint` for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise MalformedCheckpoint(f"{path} is nested too deeply to be a file of a model.") from error
    except ValueError as error:
        raise MalformedCheckpoint(f"{path} is not JSON: {error}. {_usual_cause(path)}") from error
    except OSError as error:
        raise MalformedCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(value, kind):
        raise MalformedCheckpoint(f"{path} holds {_json_name(value)}; expected {_json_name(kind())}.")
    return value


def _json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _usual_cause(path: Path) -> str:
    start = path.read_bytes()[:64].lstrip()
    if not start:
        return "It is empty: a download or copy that stopped early? Fetch it again."
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer: run `git lfs pull` where you cloned it."
    if start.startswith(b"<"):
        return "It is a web page, probably an error page of the download. Download it again."
    return "Was it edited by hand, or cut off? Fetch it again."


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        found = sorted(p.name for p in directory.iterdir())
        what = f"it holds {', '.join(found[:5])}{', …' if len(found) > 5 else ''}" if found else "it is empty"
        raise MalformedCheckpoint(f"{directory} has no config.json: not a Hugging Face model directory ({what}).")
    return read_json(path)


def _weight_files(directory: Path) -> list[str]:
    """One plain file before an index, as transformers prefers them."""
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if (directory / INDEX).is_file():
        return sorted(set(read_weight_map(directory / INDEX).values()))
    others = sorted(p.name for p in directory.iterdir() if p.name.endswith(OTHERS))
    if others:
        raise MalformedCheckpoint(
            f"{directory} has no {WEIGHTS} (and no {INDEX}), only {_some(others)}, a container that is not read yet."
            " Save it as safetensors with transformers: AutoModel.from_pretrained(…).save_pretrained(…)."
        )
    near = sorted(p.name for p in directory.glob("*.safetensors"))
    hint = f" There is {', '.join(near[:3])}: rename it, or add an index." if near else ""
    raise MalformedCheckpoint(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}.{hint}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def read_weight_map(index: Path) -> dict[str, str]:
    """Which shard holds each key. Raises `MalformedCheckpoint`, or `UnsafeCheckpoint` for a shard that is elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedCheckpoint(
            f"{index} has no weight_map of keys to files. Fetch it again, or save the model again."
        )
    for key, name in weight_map.items():
        # One path component, so that an index cannot make us read files from elsewhere; the hub cache's symlinks may.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeCheckpoint(
                f"{index} maps {key!r} to {name!r}; a shard must be the name of a .safetensors file beside it."
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
    weight_map = read_weight_map(directory / INDEX)
    held = {key: name for name, keys in layout.items() for key in keys}
    for key in weight_map.keys() - held.keys():
        raise MalformedCheckpoint(f"{directory / INDEX} says {weight_map[key]} holds {key}, but it does not.")
    for key in held.keys() - weight_map.keys():
        raise MalformedCheckpoint(f"{directory / held[key]} holds {key}, which {INDEX} does not list.")
    for key, name in weight_map.items():
        if held[key] != name:
            raise MalformedCheckpoint(f"{directory / INDEX} says {name} holds {key}, but {held[key]} does.")
