"""The safetensors container, one tensor at a time: headers without data, aligned reads, streamed writes.

The format: eight bytes with the header's length, a JSON header, the tensors' bytes. The header of a file that is read
is validated by the safetensors library itself; reading and writing here exists because a tensor read into its own
64-byte aligned buffer is adopted by JAX on a CPU without a copy, and because writes stream without a second copy.

A `Spec` says of any container where a tensor lies in its file, so that `read_tensor` and `mapped` serve all of them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """One tensor of a file: where it lies and what it is, known from the header alone.

    Its bytes are those from `start` to `end`, and then those of the ranges `more`, one after the other. They hold it
    in C order, or with `strides` (in elements, not negative) as a view of what these bytes hold.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int
    strides: tuple[int, ...] | None = None
    more: tuple[tuple[int, int], ...] = ()

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype, or None for one that NumPy does not have (float8 and smaller)."""
        return DTYPES.get(self.dtype)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Every range of the file's bytes that the tensor is in, in order."""
        return (self.start, self.end), *self.more

    @property
    def stored(self) -> int:
        """How many bytes of the file that is."""
        return sum(end - start for start, end in self.ranges)

    @property
    def is_transposed(self) -> bool:
        """Whether it is a matrix whose transpose lies there in C order."""
        return len(self.shape) == 2 and self.strides == (1, self.shape[0]) and 0 not in self.shape

    @property
    def transposed(self) -> "Spec":
        """The transpose of a matrix in C order: the same bytes, seen the other way."""
        rows, columns = self.shape
        return replace(self, shape=(columns, rows), strides=(1, columns))


class DamagedFile(ValueError):
    """A file is not safetensors, or not whole."""


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Spec], dict[str, str]]:
    """(tensors by name in file order, metadata). Raises `DamagedFile` when malformed, `OSError` when unreadable."""
    with open(path, "rb") as file:
        try:
            with safetensors.safe_open(os.fspath(path), framework="np"):
                pass
        except safetensors.SafetensorError as error:
            raise DamagedFile(f"{path} is not a whole safetensors file: {_cause(path, file, str(error))}") from error
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length), object_pairs_hook=named_once)
        except ValueError as error:
            raise DamagedFile(f"{path}: of its header, {error}") from error
    metadata = header.pop("__metadata__", {})
    place = lambda entry: [8 + length + at for at in entry["data_offsets"]]
    return {k: Spec(tuple(e["shape"]), e["dtype"], *place(e)) for k, e in header.items()}, metadata


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (an `object_pairs_hook`). JSON lets a name come twice; one of two values would be lost silently.

    Raises a `ValueError` that gives the name.
    """
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"it names {name[:80]!r} twice")
        fields[name] = value
    return fields


def _cause(path: str | os.PathLike[str], file: BinaryIO, said: str) -> str:
    """What usually stands behind the library's message, from the first bytes and the size."""
    size, start = os.stat(path).st_size, file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Run `git lfs pull` where you cloned it."
    if start.lstrip()[:1] == b"<":
        return "it is a web page, probably an error page of the download. Download it again."
    if start[8:9] != b"{" and start.startswith((b"PK", b"\x80")):
        return "it is a pickle of torch under another name."
    if "not fully covered" in said or "invalid header length" in said or size < 8:
        return f"{said}. It has {size} bytes: a download or copy that stopped early? Fetch it again."
    return said


def read_tensor(file: BinaryIO, spec: Spec) -> np.ndarray:
    """The tensor as an array in a buffer of its own, aligned to 64 bytes, so that JAX on a CPU adopts it.

    Never a view of the file: an array that aliased a memory map would change when somebody writes to the file. A
    matrix that lies there transposed is turned on the way, without a second buffer of its size; other views come as
    views of a buffer of what they span.
    """
    if spec.is_transposed and not spec.more:
        return _turned(file, spec)
    view, at = aligned(spec.stored), 0
    for start, end in spec.ranges:
        file.seek(start)
        got = fill(file, view[at : at + end - start].data)
        if got != end - start:
            raise EOFError(f"expected {end - start} bytes at {start}, found {got}")
        at += got
    return _shaped(view, spec)


# Of a matrix that is turned: so many bytes are read at a time, which a core's cache holds, and so many rows are then
# written side by side, a cache line of each of the result's rows.
STRIP, SIDE_BY_SIDE = 2**18, 16


def _turned(file: Any, spec: Spec) -> np.ndarray:
    dtype, (columns, rows) = DTYPES[spec.dtype], spec.shape
    out = aligned(spec.stored).view(dtype).reshape(spec.shape)
    strip = np.empty((SIDE_BY_SIDE * max(1, STRIP // (SIDE_BY_SIDE * columns * dtype.itemsize)), columns), dtype)
    file.seek(spec.start)
    for row in range(0, rows, len(strip)):
        part = strip[: rows - row]
        if (got := fill(file, part.reshape(-1).view(np.uint8).data)) != part.nbytes:
            raise EOFError(f"expected {part.nbytes} bytes at {file.tell() - got}, found {got}")
        for i in range(0, len(part), SIDE_BY_SIDE):
            few = part[i : i + SIDE_BY_SIDE]
            out[:, row + i : row + i + len(few)] = few.T
    return out


def mapped(path: str | os.PathLike[str], spec: Spec) -> np.ndarray:
    """The tensor as a read-only view of a map of the file: nothing is read until it is looked at.

    For those who copy what they need of it. Raises a `ValueError` for a tensor that lies in several ranges.
    """
    if spec.more:
        raise ValueError("a tensor that lies in several ranges of a file cannot be mapped")
    if spec.start == spec.end:
        return np.empty(spec.shape, DTYPES[spec.dtype])
    return _shaped(np.memmap(path, np.uint8, "r", spec.start, (spec.end - spec.start,)), spec)


def _shaped(stored: np.ndarray, spec: Spec) -> np.ndarray:
    flat = stored.view(DTYPES[spec.dtype])
    if spec.strides is None:
        return flat.reshape(spec.shape)
    strides = [step * flat.itemsize for step in spec.strides]
    return np.lib.stride_tricks.as_strided(flat, spec.shape, strides, writeable=False)


def aligned(size: int) -> np.ndarray:
    """So many bytes of a buffer of their own that starts at a multiple of 64."""
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size]


def copied(x: np.ndarray) -> np.ndarray:
    """The array in an aligned buffer of its own, in C order."""
    out = aligned(x.nbytes).view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def fill(file: Any, view: memoryview) -> int:
    """Reads until `view` is full or the stream ends; how many bytes there were."""
    got = 0
    while got < len(view):  # one read() of an unbuffered file returns at most 2 GiB
        step = file.readinto(view[got:])
        if not step:
            break
        got += step
    return got


def write(
    path: str | os.PathLike[str],
    specs: dict[str, jax.ShapeDtypeStruct],
    get: Callable[[str], np.ndarray],
    metadata: dict[str, str],
) -> None:
    """Writes the tensors in the given order, asking `get` for one at a time, and waits until the disk has them.

    `get` may return any array of the right shape and dtype; strided ones are made contiguous first.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, spec in specs.items():
        size = prod(spec.shape) * np.dtype(spec.dtype).itemsize
        header[name] = {
            "dtype": NAMES[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            file.write(_bytes(name, get(name), spec))
        file.flush()
        os.fsync(file.fileno())


def _bytes(name: str, x: np.ndarray, spec: jax.ShapeDtypeStruct) -> memoryview:
    x = np.ascontiguousarray(x).reshape(np.shape(x))
    if (x.shape, x.dtype) != (spec.shape, spec.dtype):
        raise ValueError(f"{name}: announced as {spec.dtype}{list(spec.shape)}, but it is {x.dtype}{list(x.shape)}.")
    return x.reshape(-1).view(np.uint8).data
