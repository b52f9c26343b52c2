"""A Flax file of parameters (flax_model.msgpack), written without flax and without msgpack.

As flax's serialization.py writes them: nested maps of names, whose leaves are arrays. An array of more than 2^30 bytes
is cut into flat ones, because a length in msgpack has 32 bits.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from .msgpack_reader import CHUNKED
from .msgpack_walker import ARRAY

CHUNK = 2**30
Get = Callable[[str], np.ndarray]


def write(path: Path, specs: Mapping[str, jax.ShapeDtypeStruct], get: Get) -> None:
    """The tensors by their names, whose steps are joined with "/"; one at a time is in memory."""
    with open(path, "wb") as file:
        _tree(file, _nested(specs), "", get)
        file.flush()
        os.fsync(file.fileno())


def _nested(specs: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in sorted(specs):
        *outer, last = name.split("/")
        inner = tree
        for step in outer:
            inner = inner.setdefault(step, {})
        inner[last] = specs[name]
    return tree


def _tree(file: BinaryIO, tree: Mapping[str, Any], path: str, get: Get) -> None:
    file.write(_map(len(tree)))
    for name, value in tree.items():
        file.write(_text(name))
        if isinstance(value, Mapping):
            _tree(file, value, f"{path}{name}/", get)
        else:
            _leaf(file, np.asarray(get(path + name), order="C"))


def _leaf(file: BinaryIO, x: np.ndarray) -> None:
    if x.nbytes <= CHUNK:
        return _array(file, x)
    size = CHUNK // x.itemsize
    pieces = [x.reshape(-1)[i : i + size] for i in range(0, x.size, size)]
    file.write(_map(3) + _text(CHUNKED) + b"\xc3" + _text("shape") + _map(x.ndim))
    for i, length in enumerate(x.shape):
        file.write(_text(str(i)) + _number(length))
    file.write(_text("chunks") + _map(len(pieces)))
    for i, piece in enumerate(pieces):
        file.write(_text(str(i)))
        _array(file, piece)
    return None


def _array(file: BinaryIO, x: np.ndarray) -> None:
    """An extension whose bytes are msgpack again: the list (shape, dtype's name, the array's bytes in C order)."""
    head = bytes([0x93]) + _list(x.shape) + _text(x.dtype.name) + b"\xc6" + x.nbytes.to_bytes(4, "big")
    file.write(b"\xc9" + (len(head) + x.nbytes).to_bytes(4, "big") + bytes([ARRAY]) + head)
    file.write(x.reshape(-1).view(np.uint8).data)


def _list(numbers: tuple[int, ...]) -> bytes:
    return bytes([0x90 + len(numbers)]) + b"".join(map(_number, numbers))  # arrays of NumPy have few axes


def _map(count: int) -> bytes:
    return bytes([0x80 + count]) if count < 16 else b"\xdf" + count.to_bytes(4, "big")


def _number(value: int) -> bytes:
    return bytes([value]) if value < 128 else b"\xcf" + value.to_bytes(8, "big")


def _text(value: str) -> bytes:
    content = value.encode()
    return (bytes([0xA0 + len(content)]) if len(content) < 32 else b"\xdb" + len(content).to_bytes(4, "big")) + content
