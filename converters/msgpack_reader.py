"""The header of a Flax file of parameters (flax_model.msgpack), read without flax and without msgpack.

As flax's serialization.py writes them: nested maps of names, whose leaves are arrays. Flax cuts an array of more than
2^30 bytes into flat ones: a map of a marker, its `shape` and its `chunks`, both maps from "0", "1", …
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import BinaryIO

from eqx_transformers.tensor_file import Spec

from .errors import MalformedCheckpoint
from .files import foreign
from .msgpack_walker import AGAIN, MAX_DIMENSIONS, ONLY, Map, Plain, Tree, Walker, joined, kind, named, quoted, sizes_of

CHUNKED = "__msgpack_chunked_array__"
OTHER_FILES = (
    (b"PK", "It is a zip archive (a pytorch_model.bin is one) under another name."),
    *((bytes([0x80, version]), "It is a pickle (an old pytorch_model.bin is one).") for version in range(2, 6)),
    (b"\x89HDF", "It is an HDF5 file (a tf_model.h5 is one) under another name."),
    (b"{", "It is JSON, not a Flax file of parameters."),
)


def read_header(path: Path) -> tuple[dict[str, Spec], dict[str, str]]:
    """(tensors by name in file order, no metadata). Names are joined with "/"; shapes are the file's.

    Where all of the file is under the one name `params`, as in `{"params": model.params}`, names start below it.
    Maps without entries are passed over. Raises `MalformedCheckpoint` for anything but a whole file of named arrays
    of floating point, integers or booleans, `OSError` when unreadable.
    """
    try:
        with open(path, "rb") as file:
            return _tensors(_tree(file)), {}
    except MalformedCheckpoint as error:
        raise MalformedCheckpoint(f"{path}: {error}") from error


def _tree(file: BinaryIO) -> Map:
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    if why := _foreign(start, size):
        raise MalformedCheckpoint(why)
    file.seek(0)
    walker = Walker(file, size)
    tree = walker.value("", 0)
    if not isinstance(tree, dict):
        raise MalformedCheckpoint(f"It holds {kind(tree)} without a name. {ONLY}")
    if walker.at != size:
        raise MalformedCheckpoint(
            f"It goes on for {size - walker.at} bytes after its map: damaged, or two files in one. Fetch it again."
        )
    return tree


def _foreign(start: bytes, size: int) -> str | None:
    if start[4:9] == b"\0\0\0\0{":
        return "It is a safetensors file under another name: rename it to model.safetensors."
    known = (why for prefix, why in OTHER_FILES if start.startswith(prefix))
    return foreign(start, size) or next(known, None)


def _tensors(tree: Map) -> dict[str, Spec]:
    tensors: dict[str, Spec] = {}
    for name, leaf in _leaves(_parameters(tree), ""):
        if not isinstance(leaf, Spec):
            raise MalformedCheckpoint(f"{named(name)} is {kind(leaf)}, not a tensor. {ONLY}")
        if name in tensors:
            raise MalformedCheckpoint(f"{named(name)} is there twice, by one name and by maps in maps.")
        tensors[name] = leaf
    if not tensors:
        raise MalformedCheckpoint("Its map holds no tensors. Save the model again.")
    return tensors


def _parameters(tree: Map) -> Map:
    inner = tree.get("params")
    if not isinstance(inner, dict):
        return tree
    if others := [name for name in tree if name != "params"]:
        raise MalformedCheckpoint(
            f"It holds more than a model: beside params, {', '.join(map(quoted, others[:3]))}. A state of training?"
            " Save the parameters alone: flax.serialization.to_bytes(state.params)."
        )
    return inner


def _leaves(tree: Map, path: str) -> Iterator[tuple[str, Spec | Plain]]:
    for name, value in tree.items():
        here = joined(path, name)
        if not isinstance(value, dict):
            yield here, value
        elif CHUNKED in value:
            yield here, _chunked(value, here)
        else:
            yield from _leaves(value, here)


def _chunked(entries: Map, path: str) -> Spec:
    """One tensor of many flat ones. Raises where they are not of one dtype, or not as many numbers as the shape."""
    shape, chunks = _listed(entries.get("shape"), path), _listed(entries.get("chunks"), path)
    if entries.keys() != {CHUNKED, "shape", "chunks"} or entries[CHUNKED] != Plain("bool", 1) or not chunks:
        raise MalformedCheckpoint(f"{named(path)} is in chunks, of which the description is not whole. {AGAIN}")
    parts = [part for part in chunks if isinstance(part, Spec) and len(part.shape) == 1]
    if len(parts) != len(chunks) or len({part.dtype for part in parts}) != 1 or len(shape) > MAX_DIMENSIONS:
        raise MalformedCheckpoint(f"{named(path)} is in chunks that are not flat arrays of one dtype. {AGAIN}")
    sizes = sizes_of([n if isinstance(n, Plain) else Plain("tensor", 0) for n in shape], path)
    if prod(sizes) != sum(part.shape[0] for part in parts):
        counts = [part.shape[0] for part in parts]
        raise MalformedCheckpoint(f"{named(path)} has the shape {list(sizes)}, but chunks of {counts[:8]}. {AGAIN}")
    return replace(parts[0], shape=sizes, more=tuple((part.start, part.end) for part in parts[1:]))


def _listed(value: Tree | None, path: str) -> list[Tree]:
    """How flax writes a tuple: by "0", "1", …"""
    entries = value if isinstance(value, dict) else None
    if entries is None or any(str(i) not in entries for i in range(len(entries))):
        raise MalformedCheckpoint(f"{named(path)} is in chunks that are not numbered from 0. {AGAIN}")
    return [entries[str(i)] for i in range(len(entries))]
