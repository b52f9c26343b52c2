"""A safetensors file with something changed gives what the safetensors library reads from it, or a clean error."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from safetensors import safe_open
from safetensors.numpy import save

from converters import MalformedCheckpoint
from converters.containers import SAFETENSORS
from eqx_transformers.tensor_file import mapped, read_tensor

from .mutation import many, mutated


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        "embedding.weight": rng.standard_normal((5, 3)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "brain": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "counter": np.arange(4)[None],
        "flags": np.array([True, False, True]),
        "nothing": np.zeros((0, 3), np.float32),
        "number": np.full((), 2.5, np.float32),
    }


WHOLE = save(arrays(0), {"format": "pt"})
SMALL = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
headers = lambda whole: ((0, 8), (8, 8 + int.from_bytes(whole[:8], "little")))


def ours(path):
    specs, _ = SAFETENSORS.read(path)
    with open(path, "rb", buffering=0) as file:
        for spec in specs.values():
            if spec.numpy_dtype is not None:
                assert read_tensor(file, spec).tobytes() == mapped(path, spec).tobytes()
        return {key: s if s.numpy_dtype is None else read_tensor(file, s) for key, s in specs.items()}


def theirs(path):
    """By torch, which has all dtypes; as bytes, for NaN differs from NaN."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def check(path, content):
    path.write_bytes(content)
    try:
        found = ours(path)
    except MalformedCheckpoint:
        return
    expected = theirs(path)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert tuple(x.shape) == found[key].shape
        if isinstance(found[key], np.ndarray):
            assert bytes(x.contiguous().untyped_storage()) == found[key].tobytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated") / "model.safetensors"


@many
@given(mutated(WHOLE, headers(WHOLE)))
def test_a_mutated_file_of_every_dtype(path, content):
    check(path, content)


@many
@given(mutated(SMALL, headers(SMALL)))
def test_a_mutated_file_of_one_tensor(path, content):
    check(path, content)


def test_the_whole_files_read(path):
    for whole in (WHOLE, SMALL):
        check(path, whole)
        assert ours(path).keys() == theirs(path).keys() != set()


@pytest.mark.parametrize("cut", range(len(SMALL)))
def test_every_length_of_a_file_cut_short_is_refused(path, cut):
    path.write_bytes(SMALL[:cut])
    with pytest.raises(MalformedCheckpoint, match=r"model\.safetensors is not a whole safetensors file"):
        ours(path)


@pytest.mark.parametrize("bit", range(8 * 8))
def test_every_bit_of_the_length_flipped(path, bit):
    whole = bytearray(SMALL)
    whole[bit // 8] ^= 1 << bit % 8
    check(path, bytes(whole))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "F33"), ("dtype", "f32"), ("dtype", None), ("dtype", 7), ("dtype", "F64"), ("dtype", "F16"),
        ("shape", [6]), ("shape", [3, 3]), ("shape", [-2, -3]), ("shape", [2.0, 3]), ("shape", "23"), ("shape", None),
        ("shape", [2**62, 4]), ("shape", [2**64, 1]), ("shape", [True, 6]),
        ("data_offsets", [0, 23]), ("data_offsets", [0, 25]), ("data_offsets", [1, 25]), ("data_offsets", [24, 0]),
        ("data_offsets", [-24, 0]), ("data_offsets", [0, 2**64]), ("data_offsets", [0]), ("data_offsets", [0, 24, 24]),
        ("data_offsets", None), ("extra", 1),
    ],
    ids=repr,
)  # fmt: skip
def test_a_changed_entry_is_what_the_library_reads_or_refused(path, name, value):
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | {name: value}}
    text = json.dumps(header).encode()
    check(path, len(text).to_bytes(8, "little") + text + SMALL[-24:])
    if name != "extra" and value != [6]:
        with pytest.raises(MalformedCheckpoint):
            ours(path)
