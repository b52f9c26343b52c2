"""joblib files give the arrays that joblib wrote, and a file that is damaged or hostile gives one of our errors.

joblib writes files here and never reads one: it would run what a pickle says.
"""

import bz2
import gzip
import io
import lzma
import os
import pickle
import pickletools
import struct
import zlib
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import joblib
import ml_dtypes
import numpy as np
import pytest
from joblib.numpy_pickle import NumpyArrayWrapper
from safetensors.numpy import load_file

from converters import joblib_reader, pickle_reader
from converters.errors import ConversionError, MalformedCheckpoint, SourceNotFound, UnsafeCheckpoint
from converters.joblib_reader import open_joblib
from converters.pickle_reader import Name

GOLDEN = Path(__file__).parent.parent / "golden" / "roberta_haiku"
DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ">f2", ">f4", ">f8", ">i4", ">u2"]
COMPRESSIONS = ["zlib", "gzip", "bz2", "lzma", "xz"]


def numbers(shape: tuple[int, ...], dtype="f4", seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).integers(0, 256, (*shape, 8), np.uint8)
    return x.astype(dtype)[..., 0] / np.array(2, dtype) if np.dtype(dtype).kind == "f" else x[..., 0].astype(dtype)


SMALL = {"embedding": numbers((5, 3)), "head/bias": numbers((7,), ">f8", 1), "count": numbers((), "i4", 2)}


def written(folder: Path, value, **options) -> Path:
    path = folder / "model.jl"
    joblib.dump(value, path, **options)
    return path


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names in their order, shapes, values bit for bit, dtypes up to the byte order; and what the reader promises."""
    assert list(found) == list(expected)
    for x, y in zip(found.values(), expected.values(), strict=True):
        native = np.asarray(y, np.dtype(y.dtype).newbyteorder("=") if y.dtype.kind != "V" else y.dtype)
        assert (x.shape, x.dtype, x.tobytes()) == (native.shape, native.dtype, native.tobytes())
        assert type(x) is np.ndarray and x.dtype.isnative and x.flags.c_contiguous and x.flags.writeable
        assert x.ctypes.data % 64 == 0 or not x.size  # NumPy gives no address of an empty array


# --- what joblib writes


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("compress", [0, *COMPRESSIONS])
def test_what_joblib_writes_is_read_back(tmp_path, protocol, compress):
    assert_same(open_joblib(written(tmp_path, SMALL, protocol=protocol, compress=compress)), SMALL)


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_every_dtype_and_order(tmp_path, dtype, protocol):
    """Two arrays of one dtype, so that the second takes it from the pickle's memo."""
    x, y = numbers((5, 3, 2), dtype), numbers((7,), dtype, 1)
    given = {
        "c": x,
        "f": np.asfortranarray(x),
        "strided": x[::2, ::-1],
        "vector": y,
        "empty": x[:0],
        "scalar": x[0, 0, 0:1][0],
    }
    given["scalar"] = np.asarray(given["scalar"])
    assert_same(open_joblib(written(tmp_path, given, protocol=protocol)), given)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (1,), (1, 1, 1), (3,), (2, 3, 5, 7)])
@pytest.mark.parametrize("compress", [0, "zlib"])
def test_every_shape(tmp_path, shape, compress):
    given = {"x": numbers(shape), "y": numbers((3,)), "f": np.asfortranarray(numbers(shape))}
    assert_same(open_joblib(written(tmp_path, given, compress=compress)), given)


@pytest.mark.parametrize("compress", [0, *COMPRESSIONS])
def test_arrays_larger_than_every_buffer(tmp_path, compress):
    given = {"large": numbers((1 << 17, 5)), "small": numbers((3,)), "zeros": np.zeros((1000, 1001), "f4")}
    assert_same(open_joblib(written(tmp_path, given, compress=compress)), given)


@pytest.mark.parametrize("protocol", range(6))
def test_dictionaries_of_dictionaries_are_flattened(tmp_path, protocol):
    """As Haiku keeps parameters; an inner dictionary may be empty, an outer one ordered."""
    x, y = numbers((3, 5)), numbers((5,), seed=1)
    given = OrderedDict({"net/linear": {"w": x, "b": y}, "net": {}, "net/norm": OrderedDict(scale=y), "top": y})
    expected = {"net/linear/w": x, "net/linear/b": y, "net/norm/scale": y, "top": y}
    assert_same(open_joblib(written(tmp_path, given, protocol=protocol)), expected)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("protocol", range(6))
def test_numpy_scalars_and_subclasses_are_plain_arrays(tmp_path, protocol):
    on_disk = np.memmap(tmp_path / "raw", "f4", "w+", shape=(3, 2))
    on_disk[:] = numbers((3, 2))
    given = {"step": np.int64(300), "rate": np.float32(0.25), "map": on_disk, "old": np.asmatrix(numbers((2, 3)))}
    expected = {k: np.array(v) for k, v in given.items()}
    assert_same(open_joblib(written(tmp_path, given, protocol=protocol)), expected)


@pytest.mark.parametrize("compress", [0, "gzip"])
def test_files_of_joblib_before_padding(tmp_path, monkeypatch, compress):
    """Up to joblib 1.1 the wrapper had no alignment, and no padding came before an array."""
    make = NumpyArrayWrapper.__init__

    def without(self, *arguments, **options):
        make(self, *arguments, **options)
        del self.numpy_array_alignment_bytes

    monkeypatch.setattr(NumpyArrayWrapper, "__init__", without)
    path = written(tmp_path, SMALL, compress=compress)
    assert b"alignment" not in path.read_bytes()
    assert_same(open_joblib(path), SMALL)


def test_files_of_joblib_inside_scikit_learn(tmp_path):
    path = written(tmp_path, SMALL, protocol=2)
    path.write_bytes(path.read_bytes().replace(b"cjoblib.numpy", b"csklearn.externals.joblib.numpy"))
    assert_same(open_joblib(path), SMALL)


@pytest.mark.parametrize("name, rows", [("roberta_model.jl", 0), ("roberta_model_plus4rows.jl", 4)])
def test_a_model_that_was_published_this_way(name, rows):
    """The second file has four more rows at the start of two arrays."""
    found, expected = open_joblib(GOLDEN / name), load_file(GOLDEN / "weights_raw_names.safetensors")
    assert found.keys() == expected.keys()
    longer = {k for k, x in found.items() if x.shape != expected[k].shape}
    assert len(longer) == (2 if rows else 0)
    for key, x in found.items():
        assert np.array_equal(x[rows:] if key in longer else x, expected[key])


def test_jax_adopts_the_arrays(tmp_path):
    """On a CPU without a copy: also what the file keeps in Fortran's order."""
    given = {"c": numbers((64, 33)), "f": np.asfortranarray(numbers((64, 33)))}
    for x in open_joblib(written(tmp_path, given)).values():
        adopted = jax.device_put(x, jax.devices("cpu")[0], may_alias=True)
        assert adopted.unsafe_buffer_pointer() == x.ctypes.data


# --- what would run something


class Calls:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


class Record:
    """A class of its own, with a state."""

    def __init__(self):
        self.x = 1


def hostile(folder: Path) -> dict:
    dtype = ("f4", False, True), (4, "<", None, None, None, -1, -1, 0)
    ran = f"touch {folder / 'ran'}"
    shell = Calls(os.system, (ran,))
    return {
        "a call in the dictionary": ({"x": shell}, "system"),
        "a call instead of a dictionary": (shell, "system"),
        "eval": ({"x": Calls(eval, (f"__import__('os').system({ran!r})",))}, "eval"),
        "a call in a call": ({"x": Calls(np.dtype, (shell,))}, "system"),
        "a call after an array": ({"w": numbers((3,)), "x": [{"y": (1, shell)}]}, "system"),
        "a call as a name": ({"w": numbers((3,)), Calls(os.getenv, ("HOME", "x")): numbers((2,))}, "getenv"),
        "an import": ({"x": Calls(getattr, (Calls(__import__, ("os",)), "system"))}, "__import__"),
        "in a dtype's metadata": ({"x": Calls(np.dtype, dtype[0], (*dtype[1], shell))}, "system"),
        "a state that is run": ({"x": Calls(OrderedDict, (), shell)}, "system"),
        "a class": ({"x": Record()}, "Record"),
        "an array of objects": ({"x": np.array([shell, 1], object)}, "objects"),
        "a jax array": ({"x": jnp.ones(3)}, "jax"),
    }  # fmt: skip


HOSTILE = sorted(hostile(Path()))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_runs(tmp_path, case, protocol):
    value, named = hostile(tmp_path)[case]
    path = written(tmp_path, value, protocol=protocol)
    kind = MalformedCheckpoint if case == "an array of objects" else UnsafeCheckpoint
    with pytest.raises(kind, match=f"(?s)model.jl.*({named})"):
        open_joblib(path)
    assert not (tmp_path / "ran").exists()


def test_the_hostile_files_do_run_elsewhere(tmp_path):
    """Else the test above would show nothing."""
    value, _ = hostile(tmp_path)["a call after an array"]
    joblib.load(written(tmp_path, value))
    assert (tmp_path / "ran").exists()


def test_the_message_teaches(tmp_path):
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_joblib(written(tmp_path, {"x": Calls(os.system, ("true",))}))
    assert str(caught.value) == (
        f"{tmp_path / 'model.jl'}: The pickle would call {os.system.__module__}.system, which was refused; nothing that"
        " the file names was imported or run. Only dictionaries of NumPy arrays with names as keys are read. If you"
        " trust the file, save it again: joblib.dump({k: numpy.asarray(v) for k, v in joblib.load(path).items()},"
        " path), and inner dictionaries likewise."
    )


@pytest.mark.parametrize(
    "code, named",
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "INST of os system"),
        (b"(cos\nsystem\nS'true'\no.", "OBJ"),
        (b"\x80\x02cos\nsystem\n}b.", "os.system"),
        (b"\x80\x02cos\nsystem\n)\x81.", "os.system"),
        (b"\x80\x04cos\nsystem\n)}\x92.", "NEWOBJ_EX"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.", "os.system"),
        (b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.", "os.system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02\x83\x01\x00.", "EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        (b"Pname\n.", "persistent id"),
        (b"\x80\x02K\x01Q.", "persistent id"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02}}b.", "type dict"),
        (b"\x80\x02c" + b"m" * 5000 + b"\nf\n)R.", "mmmm'"),
    ],
)  # fmt: skip
def test_every_way_to_call_is_refused_by_name(code, named):
    with pytest.raises(UnsafeCheckpoint, match=named) as caught:
        pickle_reader.read(io.BytesIO(code), {})
    assert len(str(caught.value)) < 400


# --- the machine by itself


@pytest.mark.parametrize("protocol", range(6))
def test_plain_containers(protocol):
    inner = {"a": [1, -2, 3000000, 1 << 80, -(1 << 3000)], "b": (1.5, float("inf"), True, False, None)}
    value = {
        "": [],
        "x": inner,
        "y": inner,
        "z": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}],
        "é\n\ud800": "x" * 300,
    }
    value |= {str(i): [i] * (i % 5) for i in range(2000)} | ({"bytes": b"\x00\xff" * 200} if protocol > 2 else {})
    data = pickle.dumps(value, protocol)
    stream = io.BytesIO(data + b"rest")
    found = pickle_reader.read(stream, {})
    assert found == value and found["x"] is found["y"] and stream.read() == b"rest"
    assert pickle_reader.read(io.BytesIO(pickletools.optimize(data)), {}) == value


def test_opcodes_that_pickle_does_not_write():
    assert pickle_reader.read(io.BytesIO(b"\x80\x02(K\x01K\x02((10K\x03K\x0400K\x052t."), {}) == (1, 2, 5, 5)


def test_a_table_with_persistent_ids_suffices_for_torch():
    """The pattern of pytorch_model.bin: storages are persistent ids, tensors are calls, the dictionary has a state."""
    torch = pytest.importorskip("torch")
    from zipfile import ZipFile

    given = OrderedDict(w=torch.arange(6.0).reshape(2, 3), b=torch.ones(3, dtype=torch.float64))
    torch.save(given, file := io.BytesIO())
    with ZipFile(file) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    table = {"torch._utils._rebuild_tensor_v2": lambda *of: of[:4], "collections.OrderedDict": lambda: {}}
    found = pickle_reader.read(io.BytesIO(data), table, lambda value, state: value, lambda key: (key[1], key[4]))
    assert found == {
        "w": ((Name("torch.FloatStorage"), 6), 0, (2, 3), (3, 1)),
        "b": ((Name("torch.DoubleStorage"), 3), 0, (3,), (1,)),
    }


DEEP = 20_000
LONG = struct.pack("<I", 0xFFFFFFFF)
MALFORMED = {
    "nothing": b"",
    "no stop": b"\x80\x02}",
    "no opcode": b"\x80\x02}\xff.",
    "a newer protocol": b"\x80\x06N.",
    "an empty stack": b".",
    "two values": b"NN.",
    "a mark is left": b"N(.",
    "no mark": b"Nt.",
    "below a mark": b"N(0000.",
    "below the mark": b"N(\x85.",
    "appending to a dictionary": b"}Na.",
    "items of a list": b"\x80\x02](NNu.",
    "an odd number of items": b"\x80\x02}(Nu.",
    "a key twice": b"\x80\x02}(U\x01aNU\x01aNu.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * DEEP + b"Ns.",
    "a number as a key": b"\x80\x02}K\x05Ns.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "a memo that is not there, in text": b"g" + b"9" * 4000 + b"\n.",
    "a negative memo": b"Np-1\n.",
    "a number of too many digits": b"I" + b"9" * 5000 + b"\n.",
    "a number in words": b"Ifive\n.",
    "a string without quotes": b"Sabc\n.",
    "a string with a wrong escape": b"S'\\q\\xZZ'\n.",
    "text that is not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "4 GiB of text": b"\x80\x02X" + LONG + b"abc",
    "16 EiB of text": b"\x80\x04\x8d" + LONG + LONG + b"abc",
    "16 EiB of bytes": b"\x80\x04\x8e" + LONG + LONG,
    "16 EiB of a buffer": b"\x80\x05\x96" + LONG + LONG,
    "a long of 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7f",
    "a long of negative length": b"\x80\x02\x8b\xff\xff\xff\xff",
    "a line without an end": b"S" + b"a" * (3 << 20),
    "a call of a list": b"\x80\x02])R.",
    "a call without a tuple": b"\x80\x02cnumpy\ndtype\n]R.",
    "a name of numbers": b"\x80\x04K\x01K\x02\x93.",
    "a long name from the memo": b"\x80\x04X\x00\x04\x00\x00" + b"a" * 1024 + b"\x94h\x00\x93.",
    "bytes from a long text": b"\x80\x02c_codecs\nencode\n(X\x00\x04\x00\x00" + b"a" * 1024 + b"U\x06latin1tR.",
    "too many arguments": b"\x80\x02ccollections\nOrderedDict\n(NNNtR.",
    "a dtype of nothing": b"\x80\x02cnumpy\ndtype\n)R.",
    "a scalar of nothing": b"\x80\x02cnumpy.core.multiarray\nscalar\n(NNtR.",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles(case):
    source = joblib_reader._Source(io.BytesIO(MALFORMED[case]), len(MALFORMED[case]))
    with pytest.raises(MalformedCheckpoint) as caught:
        pickle_reader.read(source.stream, joblib_reader.BUILD, source.built)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        b"\x80\x02)" + b"\x85" * DEEP + b".",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02]q\x000" + b"](h\x00h\x00eq\x000" * 1000 + b"h\x00.",
    ],
    ids=["deep lists", "deep tuples", "a list in itself", "doubling lists"],
)
def test_strange_values_that_are_harmless(code):
    """Each opcode adds at most one object, so what a pickle makes is no larger than it."""
    assert type(pickle_reader.read(io.BytesIO(code), {})) in (list, tuple)


def test_endless_files_come_to_an_end(monkeypatch):
    class Endless(io.BufferedIOBase):
        def __init__(self, unit: bytes):
            self.unit = unit

        def read(self, size=-1, /):
            return (self.unit * (size or 0))[: size or 0]

        def readline(self, size=-1, /):
            return self.unit * (size or 0)

    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", 10_000)
    for unit, why in ((b"N", "opcodes"), (b"(", "opcodes"), (b"2", "empty"), (b"U", "opcodes"), (b"S", "an item of")):
        with pytest.raises(MalformedCheckpoint, match=why):
            pickle_reader.read(Endless(unit), {})
    monkeypatch.setattr(pickle_reader, "MAX_BYTES", 10_000)
    with pytest.raises(MalformedCheckpoint, match="beside arrays"):
        pickle_reader.read(Endless(b"U"), {})


# --- wrong files


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04abc", "zip archive"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\x00", "npy"),
        (b"\x04\x22\x4d\x18abc", "lz4"),
        (b"ZF0x10              abc", "before 0.10"),
        (b"(S'x'\nccopy_reg\n_reconstructor\n(cjoblib.numpy_pickle\nNDArrayWrapper\nc__builtin__\nobject\nNtR", "0.10"),
        (b"\x80\x02}(U\x01xcjoblib.numpy_pickle\nZNDArrayWrapper\n)\x81}bu.", "before 0.10"),
        (b'{"a": 1}', "no pickle"),
        (b"hello world", "no pickle"),
        (b"xyz", "compression is damaged"),
        (b"BZhello", "compression is damaged"),
        (b"\x1f\x8b\x08", "cut off"),
        (pickle.dumps([1, 2]), "holds a value of type list"),
        (pickle.dumps("text"), "holds a value of type str"),
        (pickle.dumps({}), "empty dictionary"),
        (pickle.dumps({"x": {}}), "empty dictionary"),
        (pickle.dumps({"x": 1}), "'x' is a value of type int"),
        (pickle.dumps({"x": {"y": {"z": 1}}}), "'x/y' is a dictionary inside"),
        (pickle.dumps({"x": np.dtype("f4")}), "'x' is a dtype"),
        (pickle.dumps({"x": np.ndarray}), "'x' is the bare name numpy.ndarray"),
        (pickle.dumps({1: 2}), "keys must be strings"),
        (pickle.dumps({"x": 1}) + b"more", "goes on after"),
        (b"\x80\x02}(U\x01x(lu.", "type list"),
        (b"\x80\x02}U\x01xcjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81s.", "without its data"),
    ],
)  # fmt: skip
def test_files_that_are_something_else(tmp_path, content, why):
    (tmp_path / "model.jl").write_bytes(content)
    with pytest.raises(MalformedCheckpoint, match=f"(?s)model.jl.*{why}"):
        open_joblib(tmp_path / "model.jl")


def test_a_safetensors_file():
    with pytest.raises(MalformedCheckpoint, match="safetensors file"):
        open_joblib(GOLDEN / "weights_raw_names.safetensors")


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(SourceNotFound, match="does not exist"):
        open_joblib(tmp_path / "model.jl")
    with pytest.raises(SourceNotFound, match="is a directory"):
        open_joblib(str(tmp_path))


@pytest.mark.parametrize("dtype", ["O", "U3", "S3", "M8[s]", "c8", "g", [("a", "f4")]], ids=str)
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(MalformedCheckpoint, match="floating point, integers and booleans"):
        open_joblib(written(tmp_path, {"x": np.zeros(3, dtype)}))


@pytest.mark.parametrize("given", [{"a/b": numbers((2,)), "a": {"b": numbers((3,))}}, {1: numbers((2,))}])
def test_names_that_clash_or_are_none(tmp_path, given):
    with pytest.raises(MalformedCheckpoint, match=r"twice|keys must be strings"):
        open_joblib(written(tmp_path, given))


def test_names_cannot_multiply(tmp_path, monkeypatch):
    """A dictionary of n names used under n names would be n² names."""
    inner = {str(i): numbers((1,)) for i in range(20)}
    path = written(tmp_path, {str(i): inner for i in range(20)})
    assert len(open_joblib(path)) == 400
    monkeypatch.setattr(joblib_reader, "MAX_NAMES", 399)
    with pytest.raises(MalformedCheckpoint, match="more than 399 names"):
        open_joblib(path)
    with pytest.raises(MalformedCheckpoint, match="1000 characters"):
        open_joblib(written(tmp_path, {"x" * 1000: inner}))


# --- sizes


def declared(size=(16,), **changes) -> bytes:
    """A file with this shape in its array's state and 64 bytes after it."""
    wrapper = NumpyArrayWrapper(np.ndarray, size, "C", np.dtype("f4"))
    vars(wrapper).update({"numpy_array_alignment_bytes": None} | changes)
    return pickle.dumps({"x": wrapper}, 2).removesuffix(b"s.") + bytes(64) + b"s."


@pytest.mark.parametrize(
    "shape, why",
    [
        ((4, 5), "float32.4, 5., 80 bytes, but 66 are left"),
        ((1 << 30,), "4294967296 bytes, but 66 are left"),
        ((1 << 40, 7), "is the most"),
        ((1 << 47, 1 << 47), "is the most"),
        ((1 << 60,), "not a tuple of sizes"),
        ((-1, -16), "not a tuple of sizes"),
        ((16.0,), "not a tuple of sizes"),
        ((True, 16), "not a tuple of sizes"),
        ([16], "not a tuple of sizes"),
        ((1,) * 40, "not a tuple of sizes"),
        ((0, 1 << 47, 1 << 47), "too big|damaged"),
    ],
)
def test_a_shape_is_checked_before_memory_is_taken(tmp_path, monkeypatch, shape, why):
    (tmp_path / "model.jl").write_bytes(declared((16,)))
    assert open_joblib(tmp_path / "model.jl")["x"].shape == (16,)
    if "damaged" not in why:
        monkeypatch.setattr(joblib_reader, "_aligned", None)
    (tmp_path / "model.jl").write_bytes(declared(shape))
    with pytest.raises(MalformedCheckpoint, match=why):
        open_joblib(tmp_path / "model.jl")


@pytest.mark.parametrize(
    "key, value",
    [
        ("order", "K"),
        ("order", None),
        ("dtype", "f4"),
        ("dtype", None),
        ("subclass", Record),
        ("subclass", 1),
        ("shape", 3),
    ],
)
def test_a_state_that_is_wrong(tmp_path, key, value):
    (tmp_path / "model.jl").write_bytes(declared(**{key: value}))
    with pytest.raises(MalformedCheckpoint, match="An array"):
        open_joblib(tmp_path / "model.jl")


COMPRESS = {"zlib": zlib.compress, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
COMPRESS["lzma"] = lambda data: lzma.compress(data, lzma.FORMAT_ALONE)


@pytest.mark.parametrize("method", COMPRESS)
def test_a_compressed_file_cannot_unpack_without_end(tmp_path, monkeypatch, method):
    path, wanted = tmp_path / "model.jl", 1 << 22
    path.write_bytes(COMPRESS[method](declared((wanted // 4,)).replace(bytes(64), bytes(wanted))))
    assert not open_joblib(path)["x"].any()
    monkeypatch.setattr(joblib_reader, "MAX_UNPACKED", wanted - 1)
    monkeypatch.setattr(joblib_reader, "MAX_RATIO", 1)
    with pytest.raises(MalformedCheckpoint, match="may still be unpacked"):
        open_joblib(path)


@pytest.mark.parametrize("method", COMPRESS)
def test_a_compressed_file_ends_with_its_dictionary(tmp_path, method):
    path = written(tmp_path, SMALL)
    for content in (COMPRESS[method](path.read_bytes() + b"more"), COMPRESS[method](path.read_bytes()) + b"more"):
        path.write_bytes(content)
        with pytest.raises(MalformedCheckpoint, match="goes on after"):
            open_joblib(path)


# --- damage


FUZZED = {"protocol 0": {"protocol": 0}, "protocol 2": {"protocol": 2}, "protocol 5": {"protocol": 5}}
FUZZED |= {method: {"compress": method} for method in COMPRESSIONS}


def outcome(path: Path) -> str:
    """What the file gives: arrays or an error. Any other exception fails the test."""
    try:
        found = open_joblib(path)
    except ConversionError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000
        return "error"
    assert all(isinstance(k, str) and isinstance(x, np.ndarray) for k, x in found.items())
    return "arrays"


@pytest.mark.parametrize("options", FUZZED.values(), ids=FUZZED)
def test_a_file_that_was_cut_off(tmp_path, options):
    path = written(tmp_path, SMALL, **options)
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        assert outcome(path) == "error"


@pytest.mark.parametrize("options", FUZZED.values(), ids=FUZZED)
def test_a_file_with_flipped_bits(tmp_path, options):
    """One to four bytes changed. Checksums find all of it in gzip and xz (zlib, bz2), a plain file has none."""
    path = written(tmp_path, SMALL, **options)
    whole, rng = path.read_bytes(), np.random.default_rng(7)
    outcomes = []
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 5)):
            damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        outcomes.append(outcome(path))
    assert outcomes.count("error") > 50


def test_random_opcodes():
    """Programs of real opcodes with small arguments get further than flipped bits."""
    rng = np.random.default_rng(11)
    units = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None and op.name != "STOP"]
    units += [
        b"K\x01",
        b"h\x00",
        b"h\x01",
        b"q\x00",
        b"q\x01",
        b"U\x01a",
        b"C\x01b",
        b"cnumpy\ndtype\n",
        b"X\x02\0\0\0f4",
    ]
    units += [b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\nndarray\n"]
    # Containers and what uses them more often, or nearly every program ends at its first opcode.
    units += [b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"s", b"\x81", b"2"] * 4
    for _ in range(10_000):
        code = b"".join(units[i] for i in rng.integers(0, len(units), rng.integers(1, 30))) + b"."
        source = joblib_reader._Source(io.BytesIO(code), len(code))
        try:
            pickle_reader.read(source.stream, joblib_reader.BUILD, source.built)
        except ConversionError as error:
            assert len(str(error)) < 1000
