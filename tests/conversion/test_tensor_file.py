"""Where a `Spec` says that a tensor lies, there it is read: whole, as a view, turned, in several pieces."""

import ml_dtypes
import numpy as np
import pytest

from eqx_transformers.tensor_file import NAMES, SIDE_BY_SIDE, STRIP, Spec, mapped, read_tensor


def place(path, content, **fields):
    """A file with the bytes somewhere in it."""
    path.write_bytes(b"\x07" * 5 + content + b"\x07" * 3)
    return Spec(**({"start": 5, "end": 5 + len(content)} | fields))


def read(path, spec):
    with open(path, "rb", buffering=0) as file:
        return read_tensor(file, spec)


# Rows and columns in the file: fewer than stand side by side, as many, more than a strip has, and left-over rows.
MANY = STRIP // (SIDE_BY_SIDE * 4)
SHAPES = [(1, 1), (1, 9), (9, 1), (SIDE_BY_SIDE, 3), (SIDE_BY_SIDE + 1, 5), (3 * SIDE_BY_SIDE + 7, MANY + 1)]
SHAPES += [(2 * MANY + 3, 2), (5, 2 * MANY + 1), (1000, 300)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_turned(tmp_path, shape, dtype):
    x = np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)
    whole = place(tmp_path / "x", x.tobytes(), shape=shape, dtype=NAMES[x.dtype])
    assert whole.transposed.is_transposed and not whole.is_transposed
    found = read(tmp_path / "x", whole.transposed)
    assert found.flags.c_contiguous and found.ctypes.data % 64 == 0
    for y in (found, mapped(tmp_path / "x", whole.transposed)):
        assert y.shape == shape[::-1] and y.dtype == x.dtype and y.tobytes() == x.T.tobytes()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_is_turned_of_nothing(tmp_path, shape):
    spec = place(tmp_path / "x", b"", shape=shape, dtype="F32")
    assert read(tmp_path / "x", spec.transposed).shape == shape[::-1] == mapped(tmp_path / "x", spec.transposed).shape


def test_a_file_that_ends_in_a_matrix_says_where(tmp_path):
    x = np.ones((100, MANY), np.float32)
    spec = place(tmp_path / "x", x.tobytes(), shape=x.shape, dtype="F32")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[: 5 + 4 * MANY * 50])
    for one in (spec, spec.transposed):
        with pytest.raises(EOFError, match=r"expected \d+ bytes at"):
            read(tmp_path / "x", one)


def test_pieces_are_one_tensor_and_cannot_be_mapped(tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(12, 5)
    content = x.tobytes()
    (tmp_path / "x").write_bytes(content[:100] + b"between" + content[100:])
    spec = Spec(x.shape, "F32", 0, 100, more=((107, 107 + 140),))
    assert spec.stored == 240
    np.testing.assert_array_equal(read(tmp_path / "x", spec), x)
    np.testing.assert_array_equal(read(tmp_path / "x", spec.transposed), x.T)
    with pytest.raises(ValueError, match="several ranges"):
        mapped(tmp_path / "x", spec)


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 4), (0, 1)), ((2, 3), (1, 4)), ((4,), (5,)), ((2, 2, 3), (12, 1, 3))]
)
def test_a_view_is_what_its_strides_say(tmp_path, shape, strides):
    x = np.arange(24, dtype=np.float32)
    spec = place(tmp_path / "x", x.tobytes(), shape=shape, dtype="F32", strides=strides)
    expected = np.lib.stride_tricks.as_strided(x, shape, [4 * s for s in strides])
    np.testing.assert_array_equal(read(tmp_path / "x", spec), expected)
    np.testing.assert_array_equal(mapped(tmp_path / "x", spec), expected)
