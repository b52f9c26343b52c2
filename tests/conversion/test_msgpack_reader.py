"""Flax files give the arrays that flax packed, from headers alone, and a file that is not one says what it is."""

import io
import json
import pickle
import zipfile
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from converters import msgpack_reader, msgpack_walker
from converters.errors import MalformedCheckpoint
from converters.msgpack_reader import read_header
from eqx_transformers import tensor_file

from .packing import CHUNKED, Extension, Pairs, Raw, chunked, packed, parts

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
]
FLOAT8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}


def numbers(shape, dtype="float32", seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).integers(0, 100, shape, np.uint8)
    return x.astype(getattr(ml_dtypes, dtype, dtype))


X, Y = numbers((5, 3)), numbers((7,), "float16", 1)


def written(folder, value):
    path = folder / "flax_model.msgpack"
    path.write_bytes(value if isinstance(value, bytes) else packed(value))
    return path


def arrays(path) -> dict[str, np.ndarray]:
    specs, metadata = read_header(path)
    assert metadata == {}
    with open(path, "rb", buffering=0) as file:
        return {name: tensor_file.read_tensor(file, spec) for name, spec in specs.items()}


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for x, y in zip(found.values(), expected.values(), strict=True):
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())


# --- what flax writes


def test_nested_maps_are_names_joined_with_slashes(tmp_path):
    given = {
        "bert": {"layer": {"0": {"kernel": X}, "1": {"kernel": X + 1, "bias": Y}}, "pooler": {}},
        "step": np.int32(3),
    }
    expected = {
        "bert/layer/0/kernel": X,
        "bert/layer/1/kernel": X + 1,
        "bert/layer/1/bias": Y,
        "step": np.array(3, "i4"),
    }
    assert_same(arrays(written(tmp_path, given)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path, dtype):
    given = {"x": numbers((5, 3, 2), dtype), "scalar": numbers((1,), dtype)[0], "empty": numbers((0, 3), dtype)}
    assert_same(arrays(written(tmp_path, given)), {k: np.asarray(v) for k, v in given.items()})


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_known_by_its_name(tmp_path, dtype):
    spec = read_header(written(tmp_path, {"x": numbers((5, 3), dtype)}))[0]["x"]
    assert (spec.dtype, spec.shape, spec.stored) == (FLOAT8[dtype], (5, 3), 15)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5, 7), (300,), (70_000,), (1,) * 20])
def test_every_shape_and_every_length_of_length(tmp_path, shape):
    assert_same(arrays(written(tmp_path, {"x": numbers(shape), "y": Y})), {"x": numbers(shape), "y": Y})


@pytest.mark.parametrize("count", [1, 15, 16, 70_000])
def test_maps_of_every_size(tmp_path, count, unchecked):
    x = np.zeros((), np.int8)
    assert list(read_header(written(tmp_path, {f"{i}": x for i in range(count)}))[0]) == [f"{i}" for i in range(count)]


@pytest.mark.parametrize("name", ["a", "ü" * 20, "n" * 255, "n" * 999, "a/b", "a.b", "a//b", " "])
def test_names_of_every_kind(tmp_path, name):
    assert list(arrays(written(tmp_path, {name: {"x": X}}))) == [f"{name}/x"]


def test_other_ways_to_write_the_same(tmp_path):
    """msgpack has several lengths of length; a writer need not take the shortest."""
    content = X.tobytes()
    payload = (
        b"\xdd\0\0\0\3"
        + b"\xdc\0\2\xcf\0\0\0\0\0\0\0\5\xd3\0\0\0\0\0\0\0\3"
        + b"\xdb\0\0\0\x07float32"
        + b"\xc6"
        + len(content).to_bytes(4, "big")
        + content
    )
    name = b"\xda\0\1x"
    whole_file = b"\xdf\0\0\0\1" + name + b"\xc9" + len(payload).to_bytes(4, "big") + b"\1" + payload
    assert_same(arrays(written(tmp_path, whole_file)), {"x": X})


@pytest.mark.parametrize("size", [1, 4, 15, 100])
def test_an_array_in_chunks_is_one_tensor(tmp_path, size):
    found = arrays(written(tmp_path, {"e": {"embedding": chunked(X, size)}, "y": Y}))
    assert_same(found, {"e/embedding": X, "y": Y})


def test_chunks_in_the_order_of_their_names_as_texts(tmp_path):
    given = chunked(X, 1)
    chunks = dict(sorted(given["chunks"].items()))
    assert list(chunks)[:3] == ["0", "1", "10"]
    assert_same(arrays(written(tmp_path, {"x": given | {"chunks": chunks}})), {"x": X})


def test_a_file_of_params_alone_is_read_without_that_name(tmp_path):
    assert_same(arrays(written(tmp_path, {"params": {"a": {"kernel": X}}})), {"a/kernel": X})
    assert_same(arrays(written(tmp_path, {"params": X})), {"params": X})
    assert_same(arrays(written(tmp_path, {"a": {"params": {"b": X}}, "y": Y})), {"a/params/b": X, "y": Y})


class Counting(io.FileIO):
    count = 0

    def readinto(self, buffer):
        got = super().readinto(buffer)
        self.count += got
        return got


def test_tensors_are_stepped_over(tmp_path, unchecked):
    """A sparse file of a gigabyte, of which hardly anything is read."""
    path, size = tmp_path / "flax_model.msgpack", 1 << 25
    head = packed([[size // 4], "float32"])[1:] + b"\xc6" + size.to_bytes(4, "big")
    array = b"\xc9" + (1 + len(head) + size).to_bytes(4, "big") + b"\1\x93" + head
    with open(path, "wb") as file:
        file.write(b"\xde\0\x20")
        for i in range(32):
            file.write(packed(f"{i}") + array)
            file.seek(size, io.SEEK_CUR)
        file.truncate()
    raw = Counting(path)
    with io.BufferedReader(raw) as stream:
        specs = msgpack_reader._tensors(msgpack_reader._tree(stream))
    assert sum(spec.stored for spec in specs.values()) == 1 << 30
    assert raw.count < 1 << 20


# --- what is none


def nested(depth, value):
    for _ in range(depth):
        value = {"a": value}
    return value


def of(x=X, **lie):
    return {"w": Extension(1, parts(x, **lie))}


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    return file.getvalue()


HUGE = 2**63
# fmt: off
CASES = {
    "an empty file": (b"", "It is empty … Fetch it again"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "It is a web page … Download it again"),
    "a zip archive of torch": (zipped(), "zip archive … pytorch_model.bin"),
    "a pickle": (pickle.dumps({"x": 1}, 2), "It is a pickle"),
    "a pickle of today": (pickle.dumps({"x": 1}, 5), "It is a pickle"),
    "a safetensors file": (save({"x": X}), "safetensors … rename it to model.safetensors"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5 … tf_model.h5"),
    "JSON": (json.dumps({"a": 1}).encode(), "It is JSON"),
    "some text": (b"hello", "It holds a number without a name"),
    "one tensor": (packed(X), "It holds a tensor without a name"),
    "a list of tensors": (packed([X, X]), "The map of the file is a list"),
    "an empty map": (packed({}), "holds no tensors"),
    "maps of nothing": (packed({"a": {"b": {}}, "c": {}}), "holds no tensors"),
    "params of nothing": (packed({"params": {}}), "holds no tensors"),
    "a name without a value": (packed({"a": X, "b": Raw(b"")}), "It ends at byte … stopped early"),
    "cut in a tensor": (packed({"a": X, "b": X})[:-9], "It ends at byte … a download or copy that stopped early"),
    "cut between tensors": (packed({"a": X, "b": X})[: 1 + len(packed({"a": X})) - 1], "stopped early"),
    "bytes after its map": (packed({"a": X}) + b"\0\0", "goes on for 2 bytes after its map"),
    "two files in one": (packed({"a": X}) * 2, "two files in one"),
    "a byte that msgpack has not": (packed({"a": Raw(b"\xc1")}), "0xc1, which msgpack does not use"),
    "a map of four thousand million": (b"\xdf\xff\xff\xff\xff\xa1a", "have 4294967295 entries, of which 100000"),
    "too many maps": (packed({str(i): {str(j): {} for j in range(400)} for i in range(400)}), "of which 100000"),
    "maps in maps in maps": (packed(nested(40, X)), "lies in 32 maps inside each other"),
    "a hundred thousand maps": (b"\x81\xa1a" * 100_000, "lies in 32 maps inside each other"),
    "a name that is a number": (packed(Pairs(((3, X),))), "has a number as a name; names are texts"),
    "a name that is bytes": (packed({"a": Pairs(((b"b", X),))}), "'a' has plain bytes as a name"),
    "a name that is a tensor": (packed(Pairs(((X, X),))), "has a tensor as a name"),
    "a name that is not text": (packed({"a": Pairs(((Raw(b"\xa1\xff"), X),))}), "A name in 'a' is not UTF-8"),
    "a name that is too long": (packed({"n" * 600: {"m" * 600: X}}), "has 600 bytes: too long"),
    "a name beyond the end": (b"\x81\xdb\xff\xff\xff\xff", "It ends at byte 6"),
    "a name twice": (packed(Pairs((("a", X), ("a", Y)))), "'a' is there twice. Save the model again"),
    "a map twice": (packed({"m": Pairs((("a", {"x": X}), ("a", {"y": Y})))}), "'m/a' is there twice"),
    "two paths of one name": (packed({"a/b": X, "a": {"b": X}}), "'a/b' is there twice, by one name and by maps"),
    "a number": (packed({"a": X, "step": 3}), "'step' is a number, not a tensor"),
    "a negative number": (packed({"a": {"b": -100_000}}), "'a/b' is a number, not a tensor"),
    "a fraction": (packed({"rate": 0.5}), "'rate' is a fraction, not a tensor"),
    "nil": (packed({"a": None}), "'a' is nothing (nil), not a tensor"),
    "true": (packed({"a": True}), "'a' is true or false, not a tensor"),
    "a text": (packed({"a": "text"}), "'a' is a text, not a tensor"),
    "bytes": (packed({"a": bytes(300)}), "'a' is plain bytes, not a tensor"),
    "a list": (packed({"a": {"b": [X]}}), "'a/b' is a list … nested maps of names"),
    "a complex number": (packed({"a": Extension(2, packed([1.0, 2.0]))}), "'a' is a complex number"),
    "a date": (packed({"a": Extension(255, bytes(4))}), "'a' is an extension of type 255"),
    "an array of complex numbers": (packed(of(numbers((2,), "complex64"))), "'w' is of dtype 'complex64'; read are"),
    "an array of texts": (packed(of(dtype="str96")), "'w' is of dtype 'str96'"),
    "a dtype of another kind": (packed(of(dtype=["float32"])), "'w' is of dtype 'a list'"),
    "a dtype that is long": (packed(of(dtype="f" * 99)), "The dtype of 'w' has 99 bytes: too long"),
    "fewer bytes than the shape": (packed(of(shape=[6, 3])), "is declared as F32[6, 3], 72 bytes, but holds 60 bytes"),
    "more bytes than the shape": (packed(of(shape=[])), "is declared as F32[], 4 bytes, but holds 60 bytes"),
    "a text for bytes": (packed(of(content="text")), "60 bytes, but holds a text"),
    "a size below nothing": (packed(of(shape=[-5, -3])), "'w' has a shape that is not a list of sizes"),
    "a size that is a fraction": (packed(of(shape=[5.0, 3])), "'w' has a shape that is not a list of sizes"),
    "a size that is true": (packed(of(shape=[True, 15])), "'w' has a shape that is not a list of sizes"),
    "a size beyond all memory": (packed(of(shape=[0, HUGE], content=b"")), "'w' has a shape that is not a list"),
    "a shape that is a number": (packed(of(shape=15)), "'w' has a number for a shape"),
    "a shape of forty sizes": (packed(of(shape=[1] * 40)), "'w' has a list of 40 sizes for a shape"),
    "a scalar that is none": (packed({"w": Extension(3, parts(X))}), "'w' is a scalar of shape [5, 3]"),
    "a tensor of two parts": (packed({"w": Extension(1, packed([[], "bool"]))}), "not made of a shape, a dtype and"),
    "a tensor that is a map": (packed({"w": Extension(1, packed({}))}), "not made of a shape, a dtype and bytes"),
    "a tensor of nothing": (packed({"w": Extension(1, b""), "x": X}), "A tensor that ends at byte 6 says"),
    "a tensor longer than its parts": (packed({"w": Extension(1, parts(X) + b"\0")}), "1 bytes more than its parts"),
    "a tensor shorter than its parts": (packed({"w": Extension(1, parts(X)[:-1]), "x": X}), "says that its parts end"),
    "a state of training": (packed({"step": 3, "params": {"a": X}, "opt_state": {"0": {}}}),
                            "more than a model: beside params, 'step', 'opt_state' … state.params"),
    "statistics beside params": (packed({"params": {"a": X}, "batch_stats": {"m": X}}), "beside params, 'batch_stats'"),
    "chunks of nothing": (packed({"w": chunked(X, 4, chunks={})}), "'w' is in chunks, of which the description"),
    "chunks without a shape": (packed({"w": {CHUNKED: True, "chunks": {"0": Y}}}), "chunks that are not numbered"),
    "chunks in a list": (packed({"w": chunked(X, 4, chunks=X)}), "'w' is in chunks that are not numbered from 0"),
    "chunks with a gap": (packed({"w": chunked(X, 4, chunks={"0": Y, "2": Y})}), "not numbered from 0"),
    "chunks of two dtypes": (packed({"w": chunked(X, 4, chunks={"0": Y, "1": X[0]})}), "flat arrays of one dtype"),
    "chunks that are not flat": (packed({"w": chunked(X, 4, chunks={"0": X})}), "flat arrays of one dtype"),
    "chunks that are too few": (packed({"w": chunked(X, 4, shape={"0": 6, "1": 3})}),
                                "'w' has the shape [6, 3], but chunks of [4, 4, 4, 3]"),
    "chunks of a strange shape": (packed({"w": chunked(X, 4, shape={"0": X})}), "not a list of sizes"),
    "chunks and more": (packed({"w": chunked(X, 4, extra=X)}), "the description is not whole"),
    "chunks that are none": (packed({"w": chunked(X, 4) | {CHUNKED: False}}), "the description is not whole"),
    "a name with line breaks": (packed({"a\n\x1b[31mb": 3}), r"'a\n\x1b[31mb' is a number"),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_every_malformed_file_says_what_is_wrong(tmp_path, name, unchecked):
    content, says = CASES[name]
    with pytest.raises(MalformedCheckpoint) as caught:
        read_header(written(tmp_path, content))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/flax_model.msgpack: ") and len(message) < 1000 and "\x1b" not in message
    assert all(piece in message for piece in says.split(" … ")), message


def test_every_length_of_a_file_cut_short(tmp_path, unchecked):
    content = packed({"a": {"kernel": X, "step": np.int8(1)}, "e": chunked(Y, 3)})
    for size in range(len(content)):
        with pytest.raises(MalformedCheckpoint):
            read_header(written(tmp_path, content[:size]))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = written(tmp_path, {"a": X})
    with open(path, "rb") as file:
        walker = msgpack_walker.Walker(file, 10_000)
        with pytest.raises(MalformedCheckpoint, match="became shorter"):
            walker.take(5000)


def test_a_chunked_tensor_says_where_its_parts_lie(tmp_path):
    path = written(tmp_path, {"x": chunked(X, 4)})
    spec = read_header(path)[0]["x"]
    assert len(spec.ranges) == 4 and spec.stored == X.nbytes and replace(spec, more=()).stored == 16
    content = path.read_bytes()
    assert b"".join(content[start:end] for start, end in spec.ranges) == X.tobytes()
