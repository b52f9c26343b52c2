"""The containers that weights come in, and how a directory and its index say which files hold what."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from eqx_transformers import tensor_file
from eqx_transformers.tensor_file import DamagedFile, Spec

from . import flax_names, msgpack_reader, torch_reader
from .errors import MalformedCheckpoint, UnsafeCheckpoint
from .files import is_one_component, read_json

Header = tuple[dict[str, Spec], dict[str, str]]


@dataclass(frozen=True)
class Container:
    """One way to keep tensors: the names of its files, and `read(path)`, which gives a file's header.

    A header is the tensors by name, where each lies, and the file's metadata. `read` raises `MalformedCheckpoint` or
    `UnsafeCheckpoint`, runs nothing that the file holds, and reads no tensor.
    """

    name: str
    weights: str
    ending: str
    read: Callable[[Path], Header]

    @property
    def index(self) -> str:
        return f"{self.weights}.index.json"


def _safetensors(path: Path) -> Header:
    try:
        return tensor_file.read_header(path)
    except DamagedFile as error:
        raise MalformedCheckpoint(str(error)) from error


def _flax(path: Path) -> Header:
    specs, metadata = msgpack_reader.read_header(path)
    return flax_names.turned(specs), metadata


# The first of these that a directory has is read, one file before an index: transformers' order, then Flax.
CONTAINERS = (
    Container("safetensors", "model.safetensors", ".safetensors", _safetensors),
    Container("torch", "pytorch_model.bin", ".bin", torch_reader.read_header),
    Container("flax", "flax_model.msgpack", ".msgpack", _flax),
)
SAFETENSORS, _, FLAX = CONTAINERS
# The names of weights, as globs: those of an earlier model beside a new one would be taken for it, or for more of it.
WEIGHTS = tuple(
    pattern
    for one in CONTAINERS
    for pattern in (one.weights, one.index, one.weights.removesuffix(one.ending) + f"-*-of-*{one.ending}")
)
KNOWN = tuple(name for one in CONTAINERS for name in (one.weights, one.index))
# Weights that are there and not read, by the ends of their names.
MAX_TENSORS, MAX_NAME = 100_000, 1000
OTHERS = (".h5", ".pt", ".pth", ".ckpt", ".gguf", ".onnx")


Stamp = tuple[int, ...]


def stamp(status: os.stat_result) -> Stamp:
    """What tells whether a file is still the one whose header was read."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Weights:
    """What a directory's weights are, from headers: `specs` by key, and which of `layout`'s files holds each.

    `stamps` of the files; `notes` say what else lies there and was not read.
    """

    container: Container
    specs: dict[str, Spec]
    layout: dict[str, list[str]]
    stamps: dict[str, Stamp]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_weights(directory: Path) -> Weights:
    """The headers of the weights that are preferred here. Raises `Malformed-` or `UnsafeCheckpoint`."""
    container, whole = _preferred(directory)
    weight_map, stated = ({}, {}) if whole else read_index(directory / container.index, container)
    files = [container.weights] if whole else sorted(set(weight_map.values()))
    specs, layout, stamps, metadata = {}, {}, {}, {}
    for name in files:
        found, more, stamps[name] = _header(directory / name, container)
        metadata |= more
        for key in found.keys() & specs.keys():
            first = next(file for file, keys in layout.items() if key in keys)
            raise MalformedCheckpoint(
                f"{directory}: {key} is in two files, {first} and {name}. Are they of two versions of the model?"
                " Fetch or save it again."
            )
        specs |= found
        layout[name] = list(found)
    if not whole:
        _expect_agreement(directory / container.index, weight_map, layout)
        _expect_total(directory / container.index, stated.get("total_size"), specs, layout)
    if not specs:
        raise MalformedCheckpoint(f"{directory}: {', '.join(files)} holds no tensors. Save the model again.")
    _expect_names(directory, specs)
    return Weights(container, specs, layout, stamps, metadata, _unread(directory, container, files, whole))


def _preferred(directory: Path) -> tuple[Container, bool]:
    """The container, and whether it is one file."""
    for one in CONTAINERS:
        for name in (one.weights, one.index):
            if os.path.lexists(directory / name):
                _expect_file(directory / name)
                return one, name == one.weights
    raise MalformedCheckpoint(f"{directory} has no weights: none of {', '.join(KNOWN)}.{_near(directory)}")


def _expect_file(path: Path) -> None:
    """A link to nothing must not let a checkpoint that is there in second place step in."""
    if not path.is_file():
        what = "is a link to nothing" if path.is_symlink() else "is not a file"
        raise MalformedCheckpoint(f"{path} {what}. Was a cache cleared, or a copy made of links? Fetch it again.")


def _near(directory: Path) -> str:
    """What may have been meant, where no weights have a name that is known."""
    found = sorted(p.name for p in directory.iterdir() if p.is_file())
    if near := [name for name in found if name.endswith(tuple(one.ending for one in CONTAINERS))]:
        return f" There is {some(near)}: rename it, or add an index."
    if other := [name for name in found if name.endswith(OTHERS)]:
        return (
            f" There is only {some(other)}, a container that is not read. Save it as safetensors with the library"
            " that wrote it: AutoModel.from_pretrained(…).save_pretrained(…) of transformers, for one."
        )
    return " Was the download complete?"


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _expect_names(directory: Path, specs: dict[str, Spec]) -> None:
    """Names go into reports and are compared with each other: they can neither forge a line nor take an hour."""
    if len(specs) > MAX_TENSORS:
        raise MalformedCheckpoint(f"{directory} holds {len(specs)} tensors; {MAX_TENSORS} is the most that is read.")
    for key in specs:
        if len(key) > MAX_NAME or not key.isprintable():
            raise MalformedCheckpoint(f"{directory} holds a tensor with the name {key[:80]!r}: the file is damaged.")


def _header(path: Path, container: Container) -> tuple[dict[str, Spec], dict[str, str], Stamp]:
    if not path.is_file():
        raise MalformedCheckpoint(f"{path} is missing, but the index names it. Was the download complete?")
    try:
        before = stamp(os.stat(path))
        header = container.read(path)
        if stamp(os.stat(path)) != before:
            raise MalformedCheckpoint(f"{path} changed while its header was read. Is it still being written?")
        return *header, before
    except OSError as error:
        raise MalformedCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error


def read_index(index: Path, container: Container) -> tuple[dict[str, str], dict[str, Any]]:
    """(which shard holds each key, the index's metadata: empty where it is not an object).

    Raises `MalformedCheckpoint`, or `UnsafeCheckpoint` for a shard that is elsewhere.
    """
    held = read_json(index)
    weight_map, metadata = held.get("weight_map"), held.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedCheckpoint(
            f"{index} has no weight_map of keys to files. Fetch it again, or save the model again."
        )
    for key, name in weight_map.items():
        # One path component, so that an index cannot make us read files from elsewhere; the hub cache's symlinks may.
        if not isinstance(name, str) or not is_one_component(name) or not name.endswith(container.ending):
            raise UnsafeCheckpoint(
                f"{index} maps {key!r} to {name!r}; a shard must be the name of a {container.ending} file beside it."
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _expect_agreement(index: Path, weight_map: dict[str, str], layout: dict[str, list[str]]) -> None:
    """The index and the shards must say the same."""
    held = {key: name for name, keys in layout.items() for key in keys}
    for key in weight_map.keys() - held.keys():
        raise MalformedCheckpoint(f"{index} says {weight_map[key]} holds {key}, but it does not. {AGAIN}")
    for key in held.keys() - weight_map.keys():
        raise MalformedCheckpoint(f"{index.parent / held[key]} holds {key}, which {index.name} does not list. {AGAIN}")
    for key, name in weight_map.items():
        if held[key] != name:
            raise MalformedCheckpoint(f"{index} says {name} holds {key}, but {held[key]} does. {AGAIN}")


AGAIN = "Index and shards are of one save only together: fetch all of them again, or save the model again."


def _expect_total(index: Path, stated: Any, specs: dict[str, Spec], layout: dict[str, list[str]]) -> None:
    """`total_size`, where it is stated, counts every tensor, or (torch of old) memory that two share once."""
    if stated is None or any(s.numpy_dtype is None for s in specs.values()):
        return
    size = lambda s: prod(s.shape) * s.numpy_dtype.itemsize
    places = {(file, specs[k].ranges, specs[k].dtype): size(specs[k]) for file, keys in layout.items() for k in keys}
    every, once = sum(map(size, specs.values())), sum(places.values())
    if isinstance(stated, bool) or stated not in (every, once):
        raise MalformedCheckpoint(
            f"{index} states a total_size of {stated!r} bytes, but the tensors have {every}. Shards of another version"
            " of the model? Fetch or save it again (a total_size that is known to be wrong can be taken out)."
        )


def _unread(directory: Path, container: Container, files: Iterable[str], whole: bool) -> tuple[str, ...]:
    """A second checkpoint beside the one that is read may be another model: say that it was left alone."""
    used = {*files, *(() if whole else (container.index,))}
    endings = (*(one.ending for one in CONTAINERS), *(f"{one.ending}.index.json" for one in CONTAINERS), *OTHERS)
    left = sorted(p.name for p in directory.iterdir() if p.name.endswith(endings) and p.name not in used)
    left = [name for name in left if name not in NOT_WEIGHTS]
    if not left:
        return ()
    read = container.weights if whole else f"the shards of {container.index}"
    return (f"read from {read}; {some(left)} {'is' if len(left) == 1 else 'are'} there too, and not read",)


NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
