"""A `pytorch_model.bin` gives the tensors that torch wrote, bit for bit; what is damaged or hostile gives our errors.

torch writes files here, and reads them again to compare. Hostile files are put together by hand.
"""

import builtins
import inspect
import io
import os
import pickle
import posix
import runpy
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch._utils import _rebuild_parameter, _rebuild_parameter_with_state, _rebuild_tensor_v2, _rebuild_tensor_v3

from converters import torch_tensors, zip_reader
from converters.errors import MalformedCheckpoint, UnsafeCheckpoint
from converters.torch_reader import read_header
from eqx_transformers import tensor_file
from eqx_transformers.tensor_file import Spec

TORCH = {name: getattr(torch, name) for name in torch_tensors.DTYPES}
SPELLED = {TORCH[name]: spelled for name, (spelled, _) in torch_tensors.DTYPES.items()}
REAL = ["float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool"]
REAL += ["uint16", "uint32", "uint64"]


def written(folder: Path, value, **options) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


def numbers(shape: tuple[int, ...], dtype=torch.float32, seed=0) -> torch.Tensor:
    """Random bits, also of NaN and infinity."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, (*shape, size), np.uint8)
    return torch.from_numpy(raw).view(dtype)[..., 0]


def bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(path: Path, found: dict[str, Spec], expected: dict[str, torch.Tensor]) -> None:
    """Names in their order, shapes, dtypes, and the bits by both ways to read."""
    assert list(found) == list(expected)
    for spec, x in zip(found.values(), expected.values(), strict=True):
        assert isinstance(x, torch.Tensor)
        assert (spec.shape, spec.dtype) == (tuple(x.shape), SPELLED[x.dtype])
        for y in read(path, spec):
            assert (y.shape, y.tobytes()) == (spec.shape, bits(x))


def read(path: Path, spec: Spec) -> list[np.ndarray]:
    if spec.numpy_dtype is None:
        return [by_hand(path, spec)]
    with open(path, "rb") as file:
        return [tensor_file.read_tensor(file, spec), tensor_file.mapped(path, spec)]


def by_hand(path: Path, spec: Spec) -> np.ndarray:
    """A tensor of a dtype that NumPy does not have."""
    size = next(size for name, size in torch_tensors.DTYPES.values() if name == spec.dtype)
    flat = np.frombuffer(path.read_bytes()[spec.start : spec.end], f"V{size}")
    if spec.strides is None:
        return flat.reshape(spec.shape)
    return np.lib.stride_tricks.as_strided(flat, spec.shape, [step * size for step in spec.strides])


def assert_read(path: Path) -> dict[str, Spec]:
    found, metadata = read_header(path)
    assert metadata == {}
    assert_same(path, found, torch.load(path, weights_only=True))
    return found


# --- what torch writes


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", TORCH)
def test_every_dtype(tmp_path, dtype):
    x = numbers((5, 3), TORCH[dtype])
    found = assert_read(written(tmp_path, {"x": x, "row": x[2], "column": x[:, 1], "t": x.T, "empty": x[:0]}))
    assert found["x"].strides is None and found["t"].strides == (1, 3) and found["column"].strides == (3,)


def test_every_dtype_that_arrays_have_is_read():
    assert {torch_tensors.DTYPES[name][0] for name in REAL} == set(tensor_file.DTYPES)


X = numbers((4, 6, 5))
VIEWS = {
    "a slice": (X[1:3], None),
    "an offset": (X[2, 3, 1:4], None),
    "rows": (X[:, 0], (30, 1)),
    "every other": (X[::2, ::3, ::2], (60, 15, 2)),
    "transposed": (X.permute(2, 0, 1), (1, 30, 5)),
    "expanded": (X[0, 0].expand(7, 5), (0, 1)),
    "one number, expanded": (X[0, 0, 0].expand(3, 4), (0, 0)),
    "a diagonal": (X[0].diagonal(), (6,)),
    "overlapping": (X.as_strided((3, 4), (2, 1), 7), (2, 1)),
    "channels last": (numbers((2, 3, 4, 5)).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
    "one row, any stride": (X.as_strided((1, 5), (999, 1)), None),
    "one column": (X[0, 0].as_strided((5, 1), (1, 77)), None),
    "a scalar": (X[3, 2, 1], None),
    "a scalar of its own": (torch.tensor(2.5), None),
    "empty": (X[:, 2:2], None),
    "empty, of its own": (torch.empty(3, 0), None),
    "eight axes": (numbers((1, 2, 1, 2, 1, 2, 1, 2)), None),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(tmp_path, view):
    x, strides = VIEWS[view]
    spec = assert_read(written(tmp_path, {"x": x, "whole": X}))["x"]
    assert spec.strides == strides
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    assert spec.stored == reach * x.element_size()


def test_all_views_in_one_file(tmp_path):
    assert_read(written(tmp_path, {name: x for name, (x, _) in VIEWS.items()}))


def test_shared_storages_are_the_same_bytes(tmp_path):
    found = assert_read(written(tmp_path, {"a": X, "b": X, "c": X[1], "d": X.clone()}))
    assert found["a"] == found["b"] and found["a"].start < found["c"].start < found["c"].end < found["a"].end
    assert found["d"].ranges != found["a"].ranges


def with_attributes(x: torch.Tensor) -> torch.Tensor:
    x.sequence_parallel, x.note, x.sizes = True, "text", [1, (2, 3), {"four": 5.5}, x.shape, torch.bfloat16]
    return x


VALUES = {
    "parameters": lambda: {"p": torch.nn.Parameter(X), "q": torch.nn.Parameter(X[0].long(), requires_grad=False)},
    "a parameter with attributes": lambda: {"p": with_attributes(torch.nn.Parameter(X[0].T))},
    "a tensor with attributes": lambda: {"p": with_attributes(X[0].clone().T), "q": X},
    "a buffer": lambda: {"p": torch.nn.Buffer(numbers((3,)))},
    "a tensor with a gradient": lambda: {"p": X.clone().requires_grad_()},
    "an ordered dictionary": lambda: OrderedDict(z=X, a=X[0]),
    "a state dict": lambda: torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict(),
    "parameters of a module": lambda: dict(torch.nn.GRU(3, 2).named_parameters()),
    "names of any language": lambda: {"é.βeta": X, "a b/c": X[0], "": X[1]},
    "nothing": lambda: {},
    "many": lambda: {f"layer.{i}": torch.full((i % 5,), i) for i in range(300)},
}


@pytest.mark.parametrize("value", VALUES)
def test_values(tmp_path, value):
    assert_read(written(tmp_path, VALUES[value]()))


def test_a_name_of_the_folder_that_is_not_ascii(tmp_path):
    torch.save({"x": X}, path := tmp_path / "wéights.v2.bin")
    assert_read(path)


def test_files_of_other_versions_of_torch(tmp_path):
    """Before 2.1 there was no byte order, and storages had other numbers for keys."""
    path = rezipped(tmp_path, lambda name, data: None if "byteorder" in name or "/." in name else data)
    assert_read(path)


def test_storages_of_a_gpu(tmp_path):
    path = rezipped(tmp_path, lambda name, data: data.replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:1"))
    expected = torch.load(path, weights_only=True, map_location="cpu")
    assert_same(path, read_header(path)[0], expected)


def test_without_check_sums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        assert_read(written(tmp_path, {"x": X}))
    finally:
        torch.serialization.set_crc32_options(before)


def test_64_bit_numbers_in_the_directory(tmp_path):
    """As for a file of more than 4 GiB: the numbers of 32 bits are full, and those of 64 bits count."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(wide(plain()))
    assert_same(path, read_header(path)[0], torch.load(path, weights_only=True))


def test_a_large_file_is_not_read(tmp_path):
    """500 MB that are holes in the file."""
    value = {f"encoder.layer.{i}.attention.weight": torch.empty(1250, 250) for i in range(400)}
    with torch.serialization.skip_data():
        path = written(tmp_path, value)
    found, _ = read_header(path)
    assert {name: spec.shape for name, spec in found.items()} == dict.fromkeys(value, (1250, 250))
    assert sum(spec.stored for spec in found.values()) == 500_000_000 < path.stat().st_size


# --- files made by hand


class Calls:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


class Stored:
    """A storage: the persistent id of 6 numbers, with something else in its place."""

    def __init__(self, *, kind=torch.FloatStorage, key="0", device="cpu", count=6, whole=None):
        self.id = whole or ("storage", kind, key, device, count)


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.id if isinstance(obj, Stored) else None


def pickled(value, protocol=2) -> bytes:
    Pickler(file := io.BytesIO(), protocol).dump(value)
    return file.getvalue()


def tensor(offset=0, size=(2, 3), stride=(3, 1), grad=False, hooks=None, *more, storage=None):
    hooks = OrderedDict() if hooks is None else hooks
    return Calls(_rebuild_tensor_v2, (storage or Stored(), offset, size, stride, grad, hooks, *more))


def newer(dtype, size=(2, 3), stride=(3, 1), storage=None):
    return Calls(_rebuild_tensor_v3, (storage or Stored(), 0, size, stride, False, OrderedDict(), dtype))


def members(value=None, code: bytes | None = None, **more) -> dict[str, bytes]:
    parts = {"data.pkl": code or pickled({"x": tensor()} if value is None else value), "byteorder": b"little"}
    return parts | {"data/0": np.arange(6, dtype="f4").tobytes(), "version": b"3\n"} | more


def zipped(parts: dict[str, bytes | None], folder="archive/", **options) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", **options) as archive:
        for name, data in parts.items():
            if data is not None:
                archive.writestr(folder + name, data)
    return file.getvalue()


def plain() -> bytes:
    return zipped(members())


def holding(value, **more):
    return lambda: zipped(members(value, **more))


def with_part(name: str, data: bytes | None):
    return lambda: zipped(members() | {name: data})


def coded(code: bytes):
    return lambda: zipped(members(code=code))


def rezipped(folder: Path, change) -> Path:
    torch.save({"x": X, "y": X[0].clone()}, file := io.BytesIO())
    with zipfile.ZipFile(file) as archive:
        parts = {name: change(name, archive.read(name)) for name in archive.namelist()}
    path = folder / "pytorch_model.bin"
    path.write_bytes(zipped(parts, ""))
    return path


def by_torch() -> bytes:
    torch.save({"x": torch.arange(6.0).reshape(2, 3)}, file := io.BytesIO())
    return file.getvalue()


def directory_of(whole: bytes) -> int:
    return zip_reader.END.unpack(whole[-22:])[6]


def at_end(field: int, value: int, make=plain):
    """A field of the end record, by its number in the struct."""

    def changed():
        whole = make()
        fields = list(zip_reader.END.unpack(whole[-22:]))
        fields[field] = value(fields[field]) if callable(value) else value
        return whole[:-22] + zip_reader.END.pack(*fields)

    return changed


def at_end_64(offset: int, data: bytes):
    """Bytes of the last 98: the 64-bit end record (56), its locator (20), the end record (22)."""
    return lambda: (
        (whole := by_torch())[: len(whole) - 98 + offset] + data + whole[len(whole) - 98 + offset + len(data) :]
    )


def in_entry(field: int, value):
    """A field of the directory's first entry."""

    def changed():
        whole = plain()
        at = directory_of(whole)
        fields = list(zip_reader.ENTRY.unpack_from(whole, at))
        fields[field] = value(fields[field]) if callable(value) else value
        return whole[:at] + zip_reader.ENTRY.pack(*fields) + whole[at + zip_reader.ENTRY.size :]

    return changed


def in_local(offset: int, data: bytes):
    return lambda: (whole := plain())[:offset] + data + whole[offset + len(data) :]


def with_extra(extra: bytes, full=False):
    """An extra field in each entry of the directory, whose sizes and place may be full."""

    def changed():
        whole, entries = plain(), b""
        start = at = directory_of(whole)
        while at < len(whole) - 22:
            fields = list(zip_reader.ENTRY.unpack_from(whole, at))
            name = whole[at + 46 : at + 46 + fields[10]]
            numbers = struct.pack("<3Q", fields[9], fields[8], fields[16])
            at += 46 + len(name)
            if full:
                fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
            own = struct.pack("<2H", 1, 24) + numbers if extra == b"right" else extra
            fields[11] = len(own)
            entries += zip_reader.ENTRY.pack(*fields) + name + own
        end = list(zip_reader.END.unpack(whole[-22:]))
        end[5] = len(entries)
        return whole[:start] + entries + zip_reader.END.pack(*end)

    return changed


def wide(whole: bytes) -> bytes:
    return with_extra(b"right", full=True)()


def renamed(old: str, new: str):
    """In the local header and the directory; of the same length."""
    assert len(old.encode()) == len(new.encode("utf-8", "surrogateescape"))
    return lambda: plain().replace(old.encode(), new.encode("utf-8", "surrogateescape"))


def npz() -> bytes:
    np.savez(file := io.BytesIO(), x=np.ones(3))
    return file.getvalue()


def tar() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def old(protocol=2) -> bytes:
    torch.save({"x": X}, file := io.BytesIO(), _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return file.getvalue()


def saved(value, **options):
    def make():
        torch.save(value, file := io.BytesIO(), **options)
        return file.getvalue()

    return make


def renumbered(count: int):
    return lambda: zipped(members({"x": tensor(storage=Stored(count=count))}))


TWO = {"x": tensor(), "y": tensor(storage=Stored(kind=torch.IntStorage))}
LENGTHS = {"x": tensor(), "y": tensor(storage=Stored(count=5))}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 498818054\n"

# fmt: off
MALFORMED = {
    # Another file under this name.
    "empty": (lambda: b"", "It is empty … Fetch it again"),
    "a Git LFS pointer": (lambda: LFS, "Git LFS pointer … git lfs pull"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html>404</html>", "a web page … Download it again"),
    "text": (lambda: b"not found", "no file of torch: it begins with b'not foun'"),
    "zeros": (lambda: bytes(1000), "no file of torch: it begins with"),
    "safetensors": (lambda: safetensors.numpy.save({"x": np.ones(3)}), "a safetensors file … Rename it"),
    "an npz file": (npz, "an .npz file of NumPy"),
    "an npy file": (lambda: b"\x93NUMPY\1\0", "an .npy file"),
    "a GGUF file": (lambda: b"GGUF\3\0\0\0", "a GGUF file"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", "an HDF5 file … Keras"),
    "Keras": (lambda: zipped({"config.json": b"{}", "model.weights.h5": b"x"}, ""), "a .keras file"),
    "another zip": (lambda: zipped({"weights/a.txt": b"x"}, ""), "no FOLDER/data.pkl … weights/a.txt"),
    "a zip of this file": (lambda: zipped({"pytorch_model.bin": b"x"}, ""), "no FOLDER/data.pkl … zipped for sending"),
    "a pickle": (lambda: pickle.dumps({"x": [1]}, 4), "a pickle, but not one of torch: from pickle.dump"),
    "torch before 1.6": (old, "torch before 1.6 … torch.save(torch.load(path, weights_only=True), path)"),
    "torch before 1.6, protocol 4": (lambda: old(4), "torch before 1.6"),
    "a tar": (tar, "a tar archive … If you trust the file: save it again with torch … weights_only=False"),
    "TorchScript": (with_part("constants.pkl", b"\x80\2)."), "TorchScript … torch.jit.load(path).state_dict()"),
    "TorchScript's code": (with_part("code/__torch__.py", b""), "TorchScript"),
    # The archive.
    "cut off by a byte": (lambda: by_torch()[:-1], "no end record at its end … stopped early"),
    "cut off in the data": (lambda: by_torch()[:900], "no end record at its end, after 900 bytes"),
    "only the first bytes": (lambda: by_torch()[:4], "no end record"),
    "something appended": (lambda: by_torch() + b"\0", "no end record … appended"),
    "a comment": (lambda: at_end(7, 3)() + b"abc", "no end record"),
    "compressed": (
        lambda: zipped(members(), compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed … zipped again"),
    "compressed with lzma": (lambda: zipped(members(), compression=zipfile.ZIP_LZMA), "is compressed"),
    "an unknown method": (in_entry(4, 99), "is compressed"),
    "a packed size": (in_entry(8, lambda n: n - 1), "is compressed"),
    "encrypted": (in_entry(3, 1), "data.pkl is encrypted … flags 0x1"),
    "several disks": (at_end(1, 1), "one part of several"),
    "entries on several disks": (at_end(3, 2), "one part of several"),
    "an entry of another disk": (in_entry(13, 1), "is a directory, or lies in another file"),
    "a directory by its attribute": (in_entry(15, 0x10), "is a directory"),
    "a member fewer": (lambda: at_end(3, 3, at_end(4, 3))(), "goes on after the 3 members"),
    "a member more": (lambda: at_end(3, 5, at_end(4, 5))(), "ends before the 5 members"),
    "too many members": (lambda: at_end_64(24, struct.pack("<2Q", 1 << 40, 1 << 40))(), "two end records disagree"),
    "far too many members": (
        lambda: at_end(3, 0xFFFF, at_end(4, 0xFFFF, at_end_64(24, struct.pack("<2Q", 1 << 40, 1 << 40))))(),
        "it declares 1099511627776 members"),
    "the directory elsewhere": (at_end(6, lambda n: n - 1), "its directory is said to end at byte"),
    "a shorter directory": (at_end(5, lambda n: n - 1), "its directory is said to end at byte"),
    "a larger directory": (at_end(5, 1 << 30), "it declares 4 members in a directory of 1073741824 bytes"),
    "no members": (lambda: b"PK\3\4" + zip_reader.END.pack(b"PK\5\6", 0, 0, 0, 0, 0, 4, 0),
        "no FOLDER/data.pkl; it is empty"),
    "a damaged entry": (in_entry(0, b"PK\1\3"), "an entry of its directory is damaged"),
    "a name longer than the directory": (in_entry(10, 60000), "an entry of its directory is damaged"),
    "the 64-bit end record elsewhere": (at_end_64(64, struct.pack("<Q", 5)), "locator of its 64-bit end record"),
    "a damaged 64-bit end record": (at_end_64(0, b"PK\6\5"), "its 64-bit end record is damaged"),
    "a 64-bit end record of another size": (at_end_64(4, b"\x2d"), "its 64-bit end record is damaged"),
    "a full number, without 64 bits": (in_entry(9, 0xFFFFFFFF), "the 64-bit numbers of its member … missing"),
    "unneeded 64-bit numbers": (with_extra(b"right"), "are more than needed"),
    "a damaged extra field": (with_extra(b"\1\0\x20\0abc"), "the extra fields of its member"),
    "half an extra field": (with_extra(b"\1\0"), "the extra fields of its member"),
    "64-bit numbers twice": (with_extra(b"\1\0\0\0" * 2), "the extra fields of its member"),
    "a member twice": (
        lambda: zipped(members() | {"data/1": b""}).replace(b"data/1", b"data/0"), "two members of one name"),
    "a member twice, in capitals": (
        with_part("DATA.PKL", b""), "two members of one name, archive/data.pkl and archive/DATA.PKL"),
    "a path upwards": (renamed("archive/data/0", "archive/../../"), "'archive/../../', which is no plain path"),
    "an absolute path": (renamed("archive/data/0", "/rchive/data/0"), "no plain path"),
    "a directory": (renamed("archive/data/0", "archive/data0/"), "no plain path"),
    "a backslash": (renamed("archive/data/0", "archive\\data/0"), "a member has the name"),
    "a NUL": (renamed("archive/data/0", "archive/data\0x"), "a member has the name 'archive/data\\x00x'"),
    "a name that is not UTF-8": (renamed("archive/data/0", "archive/data\udcff0"), "a member's name is not UTF-8"),
    "a long name": (with_part("x" * 600, b""), "a member has the name"),
    "no local header": (in_entry(16, 1), "the header of its member"),
    "a local method": (in_local(8, b"\x08"), "the header of its member archive/data.pkl"),
    "a local name": (in_local(30, b"A"), "the header of its member archive/data.pkl"),
    "local encryption": (in_local(6, b"\1"), "the header of its member archive/data.pkl"),
    "a long local name": (in_local(26, b"\xff"), "lies outside"),
    "a long local extra field": (in_local(28, b"\xff\xff"), "lies outside"),
    "a member outside": (in_entry(16, 1 << 30), "lies outside"),
    "a member beyond the data": (lambda: grown(1 << 20), "lies outside"),
    "members that overlap": (lambda: grown(40), "archive/byteorder overlaps another"),
    "two folders": (lambda: zipped({**{f"a/{k}": v for k, v in members().items()}, "b/x": b""}, ""), "a/ and b/x"),
    # The format.
    "no version": (with_part("version", None), "Its member version is missing"),
    "a version of the future": (with_part("version", b"11\n"), "format is b'11\\n'; read are 1 to 10"),
    "a version in words": (with_part("version", b"three"), "format is b'three'"),
    "a long version": (with_part("version", b"3" * 200), "version has 200 bytes; 100 is the most"),
    "another version first": (with_part(".data/version", b"0"), "format is b'0'"),
    "big endian": (with_part("byteorder", b"big"), "other byte order (big endian)"),
    "big endian, in capitals": (lambda: zipped({("BYTEORDER" if k == "byteorder" else k): b"big"
        if k == "byteorder" else v for k, v in members().items()}), "other byte order (big endian)"),
    "middle endian": (with_part("byteorder", b"middle"), "byteorder is b'middle'"),
    "an alignment in words": (with_part(".storage_alignment", b"x"), ".storage_alignment is b'x'"),
    "an id that is no text": (with_part(".data/serialization_id", b"\xff"), "serialization_id is b'\\xff'"),
    "a pickle of protocol 4": (saved({"x": X}, pickle_protocol=4), "no pickle of protocol 2 … without pickle_protocol"),
    "a pickle of text": (coded(b"(dp0\n."), "no pickle of protocol 2"),
    "a pickle that goes on": (lambda: zipped(members(code=pickled({"x": tensor()}) + b"x")), "goes on after the end"),
    "a pickle that is cut off": (lambda: zipped(members(code=pickled({"x": tensor()})[:-5])), "damaged or cut off"),
    # What the pickle holds.
    "a lone tensor": (saved(X), "a lone tensor of size (4, 6, 5) … torch.save(state_dict, path)"),
    "a list": (saved([X]), "a value of type list, not a dictionary of tensors"),
    "a training checkpoint": (
        saved({"epoch": 3, "state_dict": {"x": X}}),
        "a training checkpoint … torch.save(torch.load(path, weights_only=True)['state_dict'], path)"),
    "a checkpoint of Lightning": (
        saved({"state_dict": OrderedDict(x=X), "loops": {}, "lr": 0.5}), "['state_dict']"),
    "a number": (saved({"x": X, "epoch": 3}), "Its entry 'epoch' is 3, not a tensor"),
    "a text": (saved({"x": X, "name": "y"}), "Its entry 'name' is a value of type str"),
    "a dtype": (saved({"x": X, "dtype": torch.float16}), "'dtype' is the global torch.float16"),
    "a bare storage": (saved({"x": X.untyped_storage()}), "'x' is a bare storage"),
    "an inner dictionary": (saved({"x": {"y": {"z": X}}}), "Its entry 'x' is a dictionary"),
    "a number for a name": (saved({3: X}), "a value of type int as a key"),
    "a name twice": (coded(b"\x80\2}(X\1\0\0\0aNX\1\0\0\0aNu."), "the key a twice"),
    "a sparse tensor": (saved({"x": torch.eye(3).to_sparse()}), "a sparse tensor … to_dense()"),
    "a quantized tensor": (coded(b"\x80\2ctorch._utils\n_rebuild_qtensor\n."), "a quantized … dequantize()"),
    "a tensor without data": (saved({"x": torch.empty(3, device="meta")}), "device 'meta', which has no data"),
    "a conjugated tensor": (saved({"x": torch.ones(3, dtype=torch.complex64).conj()}), "resolve_conj()"),
    # Storages.
    "a storage that is missing": (with_part("data/0", None), "member data/0 is missing"),
    "a storage cut short": (with_part("data/0", bytes(20)), "declared with 24 bytes, but its member has 20"),
    "a storage too long": (with_part("data/0", bytes(25)), "declared with 24 bytes, but its member has 25"),
    "a storage of two dtypes": (holding(TWO), "storage 0 is used with two dtypes or lengths"),
    "a storage of two lengths": (holding(LENGTHS), "storage 0 is declared with 20 bytes"),
    "a storage of 2**62 numbers": (renumbered(2**62), "and 4611686018427387904 elements"),
    "a storage of -6 numbers": (renumbered(-6), "storage 0 has the class torch.FloatStorage and -6 elements"),
    "a storage of true numbers": (renumbered(True), "and True elements"),
    "a storage by name": (holding({"x": tensor(storage=Stored(key="../0"))}), "key is not a number"),
    "a storage by number": (holding({"x": tensor(storage=Stored(key=0))}), "key is not a number"),
    "a storage of no device": (holding({"x": tensor(storage=Stored(device=None))}), "its device not a text"),
    "a dtype for a storage": (holding({"x": tensor(storage=Stored(kind=torch.float32))}), "the class torch.float32"),
    "a storage of no class": (holding({"x": tensor(storage=Stored(kind="F"))}), "something that is no storage"),
    "a persistent module": (holding({"x": Stored(whole=("module", 1, 2, 3, 4))}), "something that is no storage"),
    "a persistent text": (holding({"x": Stored(whole="0")}), "something that is no storage"),
    # Tensors.
    "a negative offset": (holding({"x": tensor(-1)}), "the offset -1"),
    "a true offset": (holding({"x": tensor(True)}), "the offset True"),
    "a broken offset": (holding({"x": tensor(0.5)}), "the offset 0.5"),
    "a list of sizes": (holding({"x": tensor(0, [2, 3])}), "a tensor's size is not a tuple"),
    "a true size": (holding({"x": tensor(0, (True, 3))}), "a tensor's size is not a tuple"),
    "a negative size": (holding({"x": tensor(0, (-1, 3))}), "a tensor's size is not a tuple"),
    "nine axes": (holding({"x": tensor(0, (1,) * 9, (1,) * 9)}), "at most 8 whole numbers"),
    "a negative stride": (holding({"x": tensor(0, (2, 3), (-3, 1))}), "a tensor's stride is not a tuple"),
    "a stride too many": (holding({"x": tensor(0, (2, 3), (3, 1, 1))}), "has the stride (3, 1, 1)"),
    "a stride beyond 64 bits": (holding({"x": tensor(0, (1, 3), (1 << 70, 1))}), "a tensor's stride is not a tuple"),
    "beyond the storage by its offset": (holding({"x": tensor(1)}), "reaches beyond the 6 elements"),
    "beyond the storage by its size": (holding({"x": tensor(0, (3, 3))}), "reaches beyond the 6 elements"),
    "beyond the storage by its stride": (holding({"x": tensor(0, (2, 3), (4, 1))}), "reaches beyond the 6 elements"),
    "beyond the storage by its dtype": (holding({"x": newer(torch.float64)}), "reaches beyond the 3 elements"),
    "2**62 rows of nothing": (holding({"x": tensor(0, (0, 1 << 59, 1 << 59), (1, 1, 1))}), "has the size (0, "),
    "100 TB of one number": (holding({"x": tensor(0, (5 * 10**6, 5 * 10**6), (0, 0))}), "would fill the memory"),
    "a million aliases": (
        lambda: zipped(members({str(i): tensor(0, (1 << 20,), (0,)) for i in range(40)})), "would fill the memory"),
    "a tensor of a text": (holding({"x": tensor(storage="0")}), "a tensor is made of a value of type str"),
    "a tensor of a tensor": (holding({"x": tensor(storage=tensor())}), "a tensor is made of a tensor"),
    "a tensor of too little": (holding({"x": Calls(_rebuild_tensor_v2, (Stored(), 0))}), "made of 2 values"),
    "a gradient of whole numbers": (
        holding({"x": tensor(0, (2, 3), (3, 1), True, storage=Stored(kind=torch.IntStorage))}), "of I32 is True"),
    "a gradient of 1": (holding({"x": tensor(0, (2, 3), (3, 1), 1)}), "requires_grad of a tensor of F32 is 1"),
    "hooks": (holding({"x": tensor(0, (2, 3), (3, 1), False, {"a": 1})}), "has hooks"),
    "an unknown dtype": (holding({"x": newer("float12")}), "a tensor's dtype is a value of type str"),
    "a storage for a dtype": (holding({"x": newer(torch.FloatStorage)}), "dtype is the global torch.FloatStorage"),
    "a parameter of a number": (holding({"x": Calls(_rebuild_parameter, (1, True, {}))}), "a parameter is made of 1"),
    "a parameter's data replaced": (
        holding({"x": Calls(_rebuild_parameter_with_state, (tensor(), True, {}, {"data": tensor()}))}),
        "a tensor's attribute 'data' would be set"),
    "a parameter's class replaced": (
        holding({"x": Calls(_rebuild_parameter_with_state, (tensor(), True, {}, {"__class__": 1}))}), "'__class__'"),
    "attributes that are a list": (
        holding({"x": Calls(_rebuild_parameter_with_state, (tensor(), True, {}, [1]))}), "attributes are a value of"),
    "a tensor of another class": (
        holding({"x": Calls(torch._tensor._rebuild_from_type_v2, (_rebuild_tensor_v2, torch.Size, (), {}))}),
        "a tensor has the class the global torch.Size"),
    "a tensor by another call": (
        holding({"x": Calls(torch._tensor._rebuild_from_type_v2, (OrderedDict, torch.Tensor, (), {}))}),
        "is made by the global collections.OrderedDict"),
    "a state of a plain dictionary": (coded(b"\x80\2}}b."), "a state is set on a dictionary"),
    "a state of a tensor": (holding({"x": Calls(*tensor().what, {"a": 1})}), "a state is set on a tensor"),
    "an ordered dictionary of pairs": (
        holding(Calls(OrderedDict, ((("x", 1),),))), "an OrderedDict is made of 1 values"),
}
# fmt: on


def grown(by: int) -> bytes:
    """The first member's size, in the directory."""
    whole = plain()
    at = directory_of(whole) + 20
    sizes = [size + by for size in struct.unpack_from("<2I", whole, at)]
    return whole[:at] + struct.pack("<2I", *sizes) + whole[at + 8 :]


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path, case):
    make, says = MALFORMED[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make())
    with pytest.raises(MalformedCheckpoint) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < 800 and message.isprintable()
    for words in says.split(" … "):
        assert words in message


def parameter(state, *, grad=True, hooks=None):
    return Calls(_rebuild_parameter_with_state, (tensor(), grad, hooks, state))


def of_type(kind, state, make=_rebuild_tensor_v2):
    return Calls(torch._tensor._rebuild_from_type_v2, (make, kind, tensor().what[1], state))


UNTYPED = Stored(kind=torch.UntypedStorage, count=24)
ACCEPTED = {
    "a tensor": tensor(),
    "no hooks": Calls(_rebuild_tensor_v2, (Stored(), 0, (2, 3), (3, 1), True, None)),
    "no metadata": tensor(0, (2, 3), (3, 1), False, None, None),
    "empty metadata": tensor(0, (2, 3), (3, 1), False, None, {}),
    "a torch.Size": tensor(0, torch.Size((2, 3)), torch.Size((3, 1))),
    "the first way to rebuild": Calls(torch._utils._rebuild_tensor, (Stored(), 1, (5,), (1,))),
    "another dtype of the same bytes": newer(torch.int32),
    "a smaller dtype": newer(torch.uint16, (3, 4), (1, 3)),
    "bytes": tensor(1, (3, 4), (4, 1), storage=UNTYPED),
    "bytes as float8": newer(torch.float8_e4m3fn, (23,), (1,), UNTYPED),
    "bytes as complex numbers": newer(torch.complex64, (3,), (1,), UNTYPED),
    "a repeated number": tensor(0, (1 << 20,), (0,)),
    "a large stride of one row": tensor(0, (1, 6), (1 << 59, 1)),
    "an empty tensor anywhere": tensor(1 << 40, (0, 1 << 40), (1 << 40, 7)),
    "a parameter": Calls(_rebuild_parameter, (tensor(), True, OrderedDict())),
    "a parameter of a parameter": Calls(_rebuild_parameter, (parameter(None), False, None)),
    "no attributes": parameter(None),
    "attributes": parameter({"a": [1, -2, 1 << 70, 2.5], "b": {"c": (None, True)}, "numel": "text"}),
    "attributes and no slots": parameter(({"a": 1}, None)),
    "attributes and empty slots": parameter((None, {})),
    "a tensor with attributes": of_type(torch.Tensor, {"a": 1}),
    "a parameter by its class": of_type(torch.nn.Parameter, {"a": 1}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_files_made_by_hand_that_torch_reads(tmp_path, case):
    """Also shows that the cases above are refused for nothing else."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zipped(members({"x": ACCEPTED[case]})))
    assert_read(path)


@pytest.mark.parametrize("kind, dtype", torch_tensors.STORAGES.items())
def test_a_gradient_is_refused_where_torch_refuses_it(tmp_path, kind, dtype):
    path = tmp_path / "pytorch_model.bin"
    storage = Stored(kind=getattr(torch, kind.rsplit(".")[-1]), count=24 // torch_tensors.DTYPES[dtype][1])
    data = bytes(storage.id[4] * torch_tensors.DTYPES[dtype][1])
    path.write_bytes(zipped(members({"x": tensor(0, (1,), (1,), True, storage=storage)}) | {"data/0": data}))
    if TORCH[dtype].is_floating_point or TORCH[dtype].is_complex:
        assert_read(path)
        return
    with pytest.raises(MalformedCheckpoint, match="requires_grad"):
        read_header(path)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


def test_a_gradient_that_torch_writes_and_does_not_read(tmp_path):
    path = written(tmp_path, {"x": torch.ones(3).to(torch.float8_e5m2).requires_grad_()})
    with pytest.raises(MalformedCheckpoint, match="float8_e5m2 has requires_grad True: torch does not read that"):
        read_header(path)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


def test_the_message_teaches(tmp_path):
    with pytest.raises(MalformedCheckpoint) as caught:
        read_header(written(tmp_path, {"x": X}, _use_new_zipfile_serialization=False))
    assert str(caught.value) == (
        f"{tmp_path / 'pytorch_model.bin'}: It is in the format of torch before 1.6"
        " (_use_new_zipfile_serialization=False), which is not read. Save it again with a newer torch:"
        " torch.save(torch.load(path, weights_only=True), path)."
    )


def test_the_advice_works(tmp_path):
    path = written(tmp_path, {"x": X, "y": X[0].T}, _use_new_zipfile_serialization=False)
    torch.save(torch.load(path, weights_only=True), path)
    assert_read(path)
    path = written(tmp_path, {"epoch": 3, "state_dict": {"x": X}})
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)
    assert_read(path)
    path = written(tmp_path, torch.nn.Linear(3, 2))
    torch.save(torch.load(path, weights_only=False).state_dict(), path)
    assert_read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "pytorch_model.bin")


def test_every_field_of_a_tensor_is_known():
    """A pickle may set attributes of a tensor; none of them may be one that torch defines."""
    fields = {name for name in dir(torch.Tensor) if hasattr(inspect.getattr_static(torch.Tensor, name), "__set__")}
    assert {name for name in fields if not name.startswith("__")} <= set(torch_tensors.FIELDS.split())


# --- what would run something


def hostile(ran: Path) -> dict:
    """The value, and the global that is named; Python writes some in protocol 2 as Python 2 called them."""
    touch = f"touch {ran}"
    code = f"open({str(ran)!r}, 'w').close()"
    call = Calls(os.system, (touch,))
    return {
        "os.system": (call, "posix.system"),
        "posix.open": (Calls(posix.open, (str(ran), os.O_CREAT)), "posix.open"),
        "eval": (Calls(eval, (code,)), "__builtin__.eval"),
        "exec": (Calls(builtins.exec, (code,)), "__builtin__.exec"),
        "open": (Calls(open, (str(ran), "w")), "io.open"),
        "an import": (Calls(getattr, (Calls(__import__, ("os",)), "system")), "__builtin__.getattr"),
        "subprocess": (Calls(subprocess.check_call, (["touch", str(ran)],)), "commands.check_call"),
        "Popen": (Calls(subprocess.Popen, (["touch", str(ran)],)), "commands.Popen"),
        "runpy": (Calls(runpy._run_code, (code, {})), "runpy._run_code"),
        "torch.hub": (Calls(torch.hub.load, ("x/y", "z")), "torch.hub.load"),
        "torch.load": (Calls(torch.load, (str(ran),)), "torch.serialization.load"),
        "torch.save": (Calls(torch.save, ({}, str(ran))), "torch.serialization.save"),
        "numpy.save": (Calls(np.save, (str(ran), [1])), "numpy.save"),
        "numpy.load": (Calls(np.load, (str(ran),)), "numpy.load"),
        "numpy arrays": (np.ones(3), "numpy"),
        "in attributes": (
            Calls(_rebuild_parameter_with_state, (tensor(), True, OrderedDict(), {"a": call})), "posix.system"),
        "in hooks": (tensor(0, (2, 3), (3, 1), False, {"a": call}), "posix.system"),
        "as a class of a tensor": (
            Calls(torch._tensor._rebuild_from_type_v2, (_rebuild_tensor_v2, os.system, (), None)), "posix.system"),
        "as a call of a tensor": (
            Calls(torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, (touch,), None)), "posix.system"),
        "as a storage": (tensor(storage=Stored(kind=os.system)), "posix.system"),
        "as a size": (tensor(0, call), "posix.system"),
        "as a dtype": (newer(os.system), "posix.system"),
        "named and not called": (os.system, "posix.system"),
        "as a state": (Calls(OrderedDict, (), {"_metadata": call}), "posix.system"),
        "torch's other makers": (Calls(torch._utils._rebuild_wrapper_subclass, ()), "_rebuild_wrapper_subclass"),
        "a device": (torch.device("cpu"), "torch.device"),
        "a set": ({1, 2}, "__builtin__.set"),
    }  # fmt: skip


HOSTILE = sorted(hostile(Path("x")))


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_runs(tmp_path, case):
    value, named = hostile(tmp_path / "ran")[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zipped(members({"w": tensor(), "x": value})))
    with pytest.raises(UnsafeCheckpoint) as caught:
        read_header(path)
    message = str(caught.value)
    assert named in message and "nothing that the file names was imported or run" in message
    assert "torch.save(state_dict, path)" in message and not (tmp_path / "ran").exists()


def test_the_hostile_files_do_run_elsewhere(tmp_path):
    """Else the test above would show nothing."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zipped(members({"x": hostile(tmp_path / "ran")["os.system"][0]})))
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code, named",
    [
        (b"\x80\2(S'true'\nios\nsystem\n.", "opcode"),
        (b"\x80\2(cos\nsystem\nU\4trueo.", "os.system"),
        (b"\x80\2ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\2\x8c\2os\x8c\6system\x93)R.", "SHORT_BINUNICODE"),
        (b"\x80\2U\2os.", "SHORT_BINSTRING of os"),
        (b"\x80\2\x82\1.", "EXT1"),
        (b"\x80\2P0\n.", "PERSID"),
        (b"\x80\2}d.", "DICT"),
    ],
)
def test_opcodes_that_torch_does_not_write(tmp_path, code, named):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(coded(code)())
    with pytest.raises(UnsafeCheckpoint, match=named):
        read_header(path)


def test_a_whole_module(tmp_path):
    path = written(tmp_path, torch.nn.Sequential(torch.nn.Linear(3, 2)))
    with pytest.raises(UnsafeCheckpoint) as caught:
        read_header(path)
    assert "names torch.nn.modules.container.Sequential" in str(caught.value)
    assert "It looks like a whole module" in str(caught.value)
    assert "torch.save(torch.load(path, weights_only=False).state_dict(), path)" in str(caught.value)
