"""A joblib file of NumPy arrays, read without joblib and without Python's unpickler.

The format, from joblib's numpy_pickle.py: a pickle, possibly compressed as a whole, in which each array is a
`NumpyArrayWrapper` with a state (shape, order, dtype). Right after the opcode BUILD that sets the state lie the
array's bytes in that order, without a length. From joblib 1.2 on they begin with one byte p and p bytes of padding;
the wrapper's state then has `numpy_array_alignment_bytes`. After them the pickle goes on.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eqx_transformers import tensor_file

from . import pickle_reader
from .errors import ConversionError, MalformedCheckpoint, SourceNotFound, UnsafeCheckpoint
from .pickle_reader import Name
from .unpacked import CHUNK, DECOMPRESSORS, Unpacked

MAX_ARRAY = 64 << 30  # bytes of one array
MAX_DIMENSIONS = 32
MAX_SCALAR = 16  # bytes
MAX_NAMES, MAX_NAME = 100_000, 1000  # how many, and characters of one
# A compressed file does not show how much it holds. Weights compress to a half at best.
MAX_UNPACKED, MAX_RATIO = 1 << 30, 20  # whichever is more

CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
DTYPES = {code: np.dtype(code) for code in CODES} | {"ml_dtypes.bfloat16": np.dtype(jnp.bfloat16)}
# Subclasses of an array that joblib writes like one; they are read as plain arrays.
SUBCLASSES = {"numpy.ndarray", "numpy.memmap", "numpy.matrix"}
SUBCLASSES |= {"numpy.core.memmap.memmap", "numpy.matrixlib.defmatrix.matrix"}

ONLY = "Only dictionaries of NumPy arrays with names as keys are read."
ADVICE = (
    ONLY + " If you trust the file, save it again:"
    " joblib.dump({k: numpy.asarray(v) for k, v in joblib.load(path).items()}, path), and inner dictionaries likewise."
)
OLD = "It was written by joblib before 0.10, which kept arrays apart. Save it again with a newer joblib: load and dump."

FOREIGN = (
    (b"version https://git-lfs", "It is a Git LFS pointer: run `git lfs pull` where you cloned it."),
    (b"<", "It is a web page, probably an error page of the download. Download it again."),
    (b"PK", "It is a zip archive (an .npz file or a pytorch_model.bin is one), not a joblib file."),
    (b"\x89HDF", "It is an HDF5 file, not a joblib file."),
    (b"\x93NUMPY", "It is an .npy file, not a joblib file."),
    (b"\x04\x22\x4d\x18", "It is compressed with lz4, which is not read. Save it again with compress='zlib'."),
    (b"ZF", OLD),
)


def open_joblib(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file that `joblib.dump({name: array}, path)` wrote, by name and in the file's order.

    Inner dictionaries, one level deep as in Haiku's parameters, are flattened: `{"module": {"w": x}}` is
    `{"module/w": x}`. Each array has the shape and the dtype of the file, is in C order and in the machine's byte
    order, and lies in a buffer of its own, aligned to 64 bytes, so that JAX on a CPU adopts it without a copy. dtypes:
    floating point (with bfloat16), integers, booleans. Compression: zlib, gzip, bz2, lzma, xz.

    Raises `SourceNotFound` if there is no such file, `UnsafeCheckpoint` if it would build or call anything else, and
    `MalformedCheckpoint` if it is damaged, is no joblib file, or holds other things than arrays.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise SourceNotFound(f"{path} {what}; a joblib file is expected.")
    try:
        with open(path, "rb") as file:
            return _flat(_read(file))
    except ConversionError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise MalformedCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(file: io.BufferedReader) -> Any:
    source = _open(file)
    value = pickle_reader.read(source.stream, BUILD, source.built, advice=ADVICE)
    source.expect_end()
    return value


def _flat(value: Any) -> dict[str, np.ndarray]:
    if not isinstance(value, dict):
        raise MalformedCheckpoint(f"It holds {_kind(value)}, not a dictionary of arrays. {ONLY}")
    arrays: dict[str, np.ndarray] = {}
    for name, x in _leaves(value):
        # One inner dictionary may be used under many names, and one long name for many inner ones: the names could
        # take far more memory than the file.
        if len(arrays) == MAX_NAMES or len(name) > MAX_NAME:
            raise MalformedCheckpoint(f"It holds more than {MAX_NAMES} names, or one of over {MAX_NAME} characters.")
        if name in arrays:
            raise MalformedCheckpoint(f"{name!r} is there twice.")
        if not isinstance(x, np.ndarray):
            raise MalformedCheckpoint(f"{name!r} is {_kind(x)}, not an array. {ADVICE}")
        arrays[name] = x
    if not arrays:
        raise MalformedCheckpoint("It holds an empty dictionary: there are no arrays.")
    return arrays


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, x in tree.items():
        if isinstance(x, dict):
            yield from ((f"{name}/{inner}", y) for inner, y in x.items())
        else:
            yield name, x


def _kind(value: Any) -> str:
    if isinstance(value, Name):
        return f"the bare name {value}"
    known = {
        _Wrapper: "an array without its data",
        _Dtype: "a dtype",
        dict: "a dictionary inside a dictionary inside a dictionary",
    }
    return known.get(type(value), f"a value of type {type(value).__name__}")


class _Wrapper:
    """joblib's NumpyArrayWrapper before its state is set."""


@dataclass
class _Dtype:
    """numpy.dtype before and after its state is set; changed in place, for a pickle uses one object for all arrays."""

    dtype: np.dtype
    swapped: bool = False


def _dtype(code: Any, *_: Any) -> _Dtype:
    """What `numpy.dtype(code, align, copy)` stands for. Raises for objects, texts, dates, records and other kinds."""
    code = code.path if isinstance(code, Name) else code
    if isinstance(code, str) and code in DTYPES:
        return _Dtype(DTYPES[code])
    what = code if isinstance(code, str) and len(code) < 30 else type(code).__name__
    kinds = {"O": "Python objects", "U": "texts", "S": "texts", "V": "records", "M": "dates", "c": "complex numbers"}
    named = next((f"{kind} ({what})" for start, kind in kinds.items() if what.startswith(start)), repr(what))
    raise MalformedCheckpoint(f"An array holds {named}; read are floating point, integers and booleans.")


def _set_dtype(value: _Dtype, state: Any) -> _Dtype:
    """The state is (version, byte order, subdtype, names, fields, size, alignment, flags)."""
    if not isinstance(state, tuple) or len(state) < 5 or any(x is not None for x in state[2:5]):
        raise MalformedCheckpoint("An array's dtype is a record or damaged; read are floats, integers and booleans.")
    order = state[1]
    if not isinstance(order, str) or order not in ("<", ">", "|", "="):
        raise MalformedCheckpoint(f"An array's dtype has no byte order but {_kind(order)}: the file is damaged.")
    value.swapped = order == (">" if np.little_endian else "<")
    return value


def _scalar(dtype: Any, data: Any) -> np.ndarray:
    """A NumPy scalar, as an array of shape ()."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise MalformedCheckpoint(f"A NumPy scalar is made of {_kind(dtype)} and {_kind(data)}: the file is damaged.")
    view = _aligned(len(data))
    view[:] = np.frombuffer(data, np.uint8)
    return _native(view, dtype).reshape(())


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocols 0 to 2 write bytes; here those of a NumPy scalar, so that a long text is not copied each time."""
    if not isinstance(text, str) or len(text) > MAX_SCALAR or encoding != "latin1":
        raise MalformedCheckpoint("Bytes are written in an unknown way: the file is damaged.")
    return text.encode("latin1")


def _old(*_: Any) -> None:
    raise MalformedCheckpoint(OLD)


JOBLIB = ("joblib", "sklearn.externals.joblib")
BUILD = {
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
    "collections.OrderedDict": lambda: {},
    **{f"{package}.numpy_pickle.NumpyArrayWrapper": _Wrapper for package in JOBLIB},
    **{
        f"{package}.{module}.{name}": _old
        for package in JOBLIB
        for module in ("numpy_pickle", "numpy_pickle_compat")
        for name in ("NDArrayWrapper", "ZNDArrayWrapper")
    },
}


@dataclass
class _Source:
    """The pickle's bytes, and how many of them arrays can take: those of the file, or the bound of an unpacked one."""

    stream: io.BufferedIOBase
    size: int
    unpacked: Unpacked | None = None
    taken: int = 0

    def built(self, value: Any, state: Any) -> Any:
        if isinstance(value, _Dtype):
            return _set_dtype(value, state)
        if isinstance(value, _Wrapper):
            return self._array(state)
        raise UnsafeCheckpoint(f"The pickle would change {_kind(value)}, which was refused. {ADVICE}")

    def _array(self, state: Any) -> np.ndarray:
        shape, order, dtype = _facts(state)
        if state.get("numpy_array_alignment_bytes") is not None:
            self._skip_padding()
        size = prod(shape) * dtype.dtype.itemsize
        self._check(size, f"{dtype.dtype}{list(shape)}")
        view = _aligned(size)
        self._fill(view)
        x = _native(view, dtype)
        # Of an array in Fortran's order JAX would make the copy; here the first buffer is freed at once.
        return x.reshape(shape) if order == "C" else tensor_file.copied(x.reshape(shape[::-1]).T)

    def _skip_padding(self) -> None:
        length = self.stream.read(1)
        if not length or len(self.stream.read(length[0])) != length[0]:
            raise MalformedCheckpoint("The file ends before an array: a download or copy that stopped early?")

    def _check(self, size: int, what: str) -> None:
        """Before memory is taken."""
        left = self.size - (self.taken if self.unpacked else self.stream.tell())
        self.taken += size
        if size > MAX_ARRAY:
            raise MalformedCheckpoint(f"An array is declared as {what}: {size} bytes, but {MAX_ARRAY} is the most.")
        if size > left:
            where = "may still be unpacked from a file of this size" if self.unpacked else "are left: cut off?"
            raise MalformedCheckpoint(f"An array is declared as {what}, {size} bytes, but {left} {where}")

    def _fill(self, view: np.ndarray) -> None:
        got = tensor_file.fill(self.stream, view.data)
        if got < len(view):
            raise MalformedCheckpoint(f"An array ends after {got} of {len(view)} bytes. Fetch the file again.")

    def expect_end(self) -> None:
        if self.stream.read(1) or (self.unpacked and self.unpacked.rest()):
            raise MalformedCheckpoint("The file goes on after its dictionary: it is damaged, or two files in one.")


def _facts(state: Any) -> tuple[tuple[int, ...], str, _Dtype]:
    """(shape, order, dtype) of a wrapper's state."""
    if not isinstance(state, dict):
        raise MalformedCheckpoint(f"An array is described by {_kind(state)}: the file is damaged.")
    shape, order, dtype = state.get("shape"), state.get("order"), state.get("dtype")
    subclass = state.get("subclass")
    if not isinstance(subclass, Name) or subclass.path not in SUBCLASSES:
        raise MalformedCheckpoint(f"An array's class is {subclass if isinstance(subclass, Name) else _kind(subclass)}.")
    if not isinstance(dtype, _Dtype) or not isinstance(order, str) or order not in ("C", "F"):
        raise MalformedCheckpoint(f"An array has {_kind(dtype)} for a dtype, {_kind(order)} for an order.")
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise MalformedCheckpoint("An array's shape is not a tuple of sizes: the file is damaged.")
    return shape, order, dtype


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 1 << 48


def _aligned(size: int) -> np.ndarray:
    try:
        return tensor_file.aligned(size)
    except MemoryError as error:
        raise MalformedCheckpoint(f"An array is declared with {size} bytes, for which there is no memory.") from error


def _native(view: np.ndarray, dtype: _Dtype) -> np.ndarray:
    if dtype.swapped:
        view.view(f"u{dtype.dtype.itemsize}").byteswap(inplace=True)
    return view.view(dtype.dtype)


def _open(file: io.BufferedReader) -> _Source:
    """The file or what it unpacks to, by its first bytes. Raises for what is known not to be joblib's."""
    start, size = file.read(64), os.fstat(file.fileno()).st_size
    file.seek(0)
    if why := _foreign(start):
        raise MalformedCheckpoint(why)
    decompressor = next((make() for prefix, make in DECOMPRESSORS if start.startswith(prefix)), None)
    if decompressor is None:
        return _Source(file, size)
    unpacked = Unpacked(file, decompressor)
    stream = io.BufferedReader(unpacked, CHUNK)
    return _Source(stream, max(MAX_UNPACKED, MAX_RATIO * size), unpacked)


def _foreign(start: bytes) -> str | None:
    if not start:
        return "It is empty: a download or copy that stopped early? Fetch it again."
    if start[4:10] == b'\0\0\0\0{"':
        return "It is a safetensors file, not a joblib file."
    return next((why for prefix, why in FOREIGN if start.lstrip().startswith(prefix)), None)
