"""A Flax file with anything changed gives the arrays that a plain decoder finds in it, or one of our errors."""

import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
from hypothesis import given, strategies as st

from converters.errors import ConversionError
from converters.msgpack_reader import read_header
from eqx_transformers import tensor_file

from .mutation import many, mutated
from .test_msgpack_reader import CHUNKED, chunked, numbers, packed

X, Y = numbers((3, 2)), numbers((4,), "bfloat16", 1)
FILES = [
    packed({"bert": {"0": {"kernel": X, "bias": Y}, "1": {"scale": numbers((3,), "float8_e5m2")}}, "n": np.int32(7)}),
    packed({"e": {"embedding": chunked(X, 4)}, "b": {"mask": numbers((2, 2), "bool")}, "empty": {}}),
    packed({"params": {"a": {"kernel": numbers((0, 3), "int64")}, f"{'n' * 40}": numbers((), "float16")}}),
]


# --- msgpack and flax, decoded in memory in the plainest way


class Tensor(tuple):
    """The payload of an extension: its type and its bytes."""


def decode(data, at):
    """(value, where the next one starts) of what starts at `at`."""
    first = data[at]
    number = lambda width: int.from_bytes(sliced(data, at + 1, width), "big")
    if first < 0x80:
        return first, at + 1
    if first < 0x90:
        return pairs(data, at + 1, first & 15)
    if first < 0xA0:
        return values(data, at + 1, first & 15)
    if first < 0xC0:
        return sliced(data, at + 1, first & 31).decode(), at + 1 + (first & 31)
    if first >= 0xE0:
        return first - 256, at + 1
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at + 1
    if first in (0xC4, 0xC5, 0xC6):
        width = 1 << first - 0xC4
        return sliced(data, at + 1 + width, number(width)), at + 1 + width + number(width)
    if first in (0xC7, 0xC8, 0xC9):
        width = 1 << first - 0xC7
        return extension(data, at + 1 + width, number(width))
    if first in (0xCA, 0xCB):
        width = 4 << first - 0xCA
        return struct.unpack({4: ">f", 8: ">d"}[width], sliced(data, at + 1, width))[0], at + 1 + width
    if 0xCC <= first <= 0xCF:
        width = 1 << first - 0xCC
        return number(width), at + 1 + width
    if 0xD0 <= first <= 0xD3:
        width = 1 << first - 0xD0
        return int.from_bytes(sliced(data, at + 1, width), "big", signed=True), at + 1 + width
    if 0xD4 <= first <= 0xD8:
        return extension(data, at + 1, 1 << first - 0xD4)
    if 0xD9 <= first <= 0xDB:
        width = 1 << first - 0xD9
        return sliced(data, at + 1 + width, number(width)).decode(), at + 1 + width + number(width)
    if first in (0xDC, 0xDD):
        width = 2 << first - 0xDC
        return values(data, at + 1 + width, number(width))
    if first in (0xDE, 0xDF):
        width = 2 << first - 0xDE
        return pairs(data, at + 1 + width, number(width))
    raise ValueError("0xc1")


def sliced(data, at, count):
    if at + count > len(data):
        raise ValueError("the end")
    return data[at : at + count]


def extension(data, at, count):
    return Tensor((data[at], sliced(data, at + 1, count))), at + 1 + count


def values(data, at, count):
    found = []
    for _ in range(count):
        value, at = decode(data, at)
        found.append(value)
    return found, at


def pairs(data, at, count):
    found = {}
    for _ in range(count):
        key, at = decode(data, at)
        found[key], at = decode(data, at)
    return found, at


def whole(data):
    value, at = decode(data, 0)
    if at != len(data):
        raise ValueError("bytes after it")
    return value


def array(tensor):
    shape, dtype, content = whole(tensor[1])
    return np.frombuffer(content, np.dtype(getattr(ml_dtypes, dtype, dtype))).reshape(shape)


def flat(tree, path=()):
    if CHUNKED in tree:
        listed = lambda part: [tree[part][str(i)] for i in range(len(tree[part]))]
        return {"/".join(path): np.concatenate([array(x) for x in listed("chunks")]).reshape(listed("shape"))}
    found = {}
    for name, value in tree.items():
        inner = (*path, name)
        found |= flat(value, inner) if isinstance(value, dict) else {"/".join(inner): array(value)}
    return found


def expected(content):
    tree = whole(content)
    alone = list(tree) == ["params"] and isinstance(tree["params"], dict)
    return flat(tree["params"] if alone else tree)


# --- the law


def read(path):
    specs, _ = read_header(path)
    with open(path, "rb", buffering=0) as file:
        # Of a dtype that NumPy lacks, the bytes.
        return {
            k: tensor_file.read_tensor(file, s if s.numpy_dtype else replace(s, dtype="U8")) for k, s in specs.items()
        }


def assert_same(found, content):
    wanted = expected(content)
    assert list(found) == list(wanted)
    for x, y in zip(found.values(), wanted.values(), strict=True):
        assert (x.shape, x.tobytes()) == (y.shape, y.tobytes())
        assert x.dtype == y.dtype or (x.dtype == np.uint8 and "float8" in y.dtype.name)


def test_unchanged_files_are_what_the_decoder_finds(tmp_path):
    for content in FILES:
        (tmp_path / "file").write_bytes(content)
        assert_same(read(tmp_path / "file"), content)


@many
@given(st.data())
def test_a_changed_file_gives_its_arrays_or_a_clean_error(tmp_path_factory, unchecked, data):
    content = data.draw(st.sampled_from(FILES).flatmap(mutated))
    path = tmp_path_factory.getbasetemp() / "mutated.msgpack"
    path.write_bytes(content)
    try:
        found = read(path)
    except ConversionError:
        return
    assert_same(found, content)
