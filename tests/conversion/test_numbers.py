"""What becomes of a file's numbers: kept, narrowed on demand, refused where some would be lost, scanned."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import converters
from converters import ConversionError, MalformedCheckpoint, filling, hf
from eqx_transformers import MaskedLM
from eqx_transformers.surgery import leaves_by_path

from ..reference import reference
from ..tiny import Row
from .breaking import KEY, tensors

PATH = "head.dense.weight"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(reference(Row("roberta", MaskedLM)).directory, tmp_path / "tiny")
    return tmp_path / "tiny"


def holding(*numbers, key=KEY, dtype: type = np.float32):
    """The tensor, in this dtype, with these numbers at its start."""

    def change(held):
        held[key] = held[key].astype(dtype)
        held[key].reshape(-1)[: len(numbers)] = np.asarray(numbers, dtype)

    return tensors(change)


def test_a_mixed_file_keeps_each_tensors_dtype(directory):
    holding(1.5, dtype=np.float16)(directory)
    holding(2.5, key="lm_head.layer_norm.weight", dtype=ml_dtypes.bfloat16)(directory)
    leaves = leaves_by_path(converters.load(directory)[0])
    assert leaves[PATH].dtype == jnp.float16 and leaves[PATH][0, 0] == 1.5
    assert leaves["head.norm.weight"].dtype == jnp.bfloat16 and leaves["head.dense.bias"].dtype == jnp.float32


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("numbers", "own", "dtype"),
    [
        ([65519.0, -65504.0], np.float32, "float16"),  # the first rounds down to the largest of float16
        ([INF, -INF, NAN], np.float32, "float16"),  # was infinite before
        ([3.3e38], np.float32, "bfloat16"),
        ([3e38, -3e38], np.float64, "float32"),
        ([65504.0], np.float16, "bfloat16"),
        ([3e38], ml_dtypes.bfloat16, "float32"),
    ],
)
def test_numbers_within_the_range_are_rounded(directory, numbers, own, dtype, stacked):
    holding(*numbers, dtype=own)(directory)
    found = leaves_by_path(converters.load(directory, dtype=dtype, stacked=stacked)[0])[PATH]
    expected = np.asarray(numbers, own).astype(found.dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found).reshape(-1)[: len(numbers)], expected)


@pytest.mark.parametrize(
    ("numbers", "own", "dtype", "most"),
    [
        ([65520.0, 1e6, -3e9], np.float32, "float16", "3 numbers, up to 3e+09"),
        ([7e4, NAN, INF], np.float32, "float16", "1 numbers, up to 7e+04"),
        ([3.4e38], np.float32, "bfloat16", "1 numbers, up to 3.4e+38"),
        ([1e300], np.float64, "float32", "1 numbers, up to 1e+300"),
        ([1e30], ml_dtypes.bfloat16, "float16", "1 numbers, up to 1e+30"),
    ],
)
def test_numbers_beyond_the_range_are_refused_by_name_or_become_infinite_on_demand(
    directory, numbers, own, dtype, most, tmp_path, capsys
):
    holding(*numbers, dtype=own)(directory)
    with pytest.raises(ConversionError, match="allow_overflow") as caught:
        converters.load(directory, dtype=dtype)
    assert f"{KEY}: {most}" in str(caught.value) and dtype in str(caught.value)
    found = leaves_by_path(converters.load(directory, dtype=dtype, allow_overflow=True)[0])[PATH]
    assert np.isinf(np.asarray(found, np.float32)).any()
    argv = [str(directory), "--dtype", dtype, "--out", str(tmp_path / "out")]
    assert hf.main(argv) == 3 and "--allow-overflow" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert hf.main([*argv, "--allow-overflow"]) == 0 and (tmp_path / "out").is_dir()


def test_all_tensors_beyond_the_range_are_named(directory):
    holding(1e9)(directory)
    holding(-1e9, key="roberta.encoder.layer.1.output.dense.weight")(directory)
    with pytest.raises(ConversionError) as caught:
        converters.load(directory, dtype="float16")
    assert KEY in str(caught.value) and "roberta.encoder.layer.1.output.dense.weight: 1" in str(caught.value)


def test_without_a_cast_nothing_is_beyond_the_range(directory):
    holding(INF, NAN, 3e38)(directory)
    found = leaves_by_path(converters.load(directory)[0])[PATH]
    np.testing.assert_array_equal(np.asarray(found).reshape(-1)[:3], np.asarray([INF, NAN, 3e38], np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.bool_])
@pytest.mark.parametrize("rows", [1, 3, 7, 33])
def test_a_part_of_a_fused_tensor_is_handed_over_in_memory_that_jax_adopts(rows, dtype):
    """Not in that of the whole, which would stay, and not in one that JAX would copy once more."""
    fused = np.random.default_rng(rows).integers(-9, 9, (3 * rows, 67)).astype(dtype)
    part = fused[rows : 2 * rows]
    found = filling._handed(part)
    assert (found.dtype, found.shape) == (part.dtype, part.shape) and not np.shares_memory(found, fused)
    np.testing.assert_array_equal(found, part)
    assert jax.device_put(found, jax.devices("cpu")[0]).unsafe_buffer_pointer() == found.ctypes.data


SCANS = [
    ("nothing", lambda directory: None, {}),
    ("a NaN", holding(NAN), {KEY: (1, 0)}),
    ("both", holding(NAN, INF, -INF, 1.0), {KEY: (1, 2)}),
    ("bfloat16", holding(INF, dtype=ml_dtypes.bfloat16), {KEY: (0, 1)}),
    ("float16", holding(NAN, NAN, dtype=np.float16), {KEY: (2, 0)}),
    ("float64", holding(NAN, dtype=np.float64), {KEY: (1, 0)}),
    (
        "what nothing reads",
        tensors(lambda held: held.__setitem__("roberta.pooler.dense.bias", np.full(21, NAN, np.float32))),
        {"roberta.pooler.dense.bias": (21, 0)},
    ),
    (
        "whole numbers",
        tensors(lambda held: held.__setitem__("roberta.embeddings.position_ids", np.arange(31)[None])),
        {},
    ),
]


@pytest.mark.parametrize(("make", "found"), [row[1:] for row in SCANS], ids=[row[0] for row in SCANS])
def test_a_scan_finds_what_is_not_finite_by_name(directory, make, found, tmp_path, capsys):
    make(directory)
    scan = converters.scan(directory)
    assert isinstance(scan, converters.Scan) and scan.found == found and scan.ok == (not found)
    assert scan.num_tensors == sum(
        x.dtype[0] in "FB" for x in converters.convert.open_directory(directory).specs.values()
    )
    assert all(f"{key}: {nan} NaN, {infinite} infinite" in str(scan) for key, (nan, infinite) in found.items())
    code = hf.main([str(directory), "--scan", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert str(scan) in out and (tmp_path / "out").exists() == (not found)
    assert (code, "NaN or infinities" in err) == ((3, True) if found else (0, False))


def test_a_scans_progress_counts_the_bytes_that_are_looked_at(directory):
    """Of every dtype its own; of whole numbers none."""
    holding(1.5, dtype=np.float16)(directory)
    holding(2.5, key="lm_head.layer_norm.weight", dtype=ml_dtypes.bfloat16)(directory)
    holding(3.5, key="lm_head.layer_norm.bias", dtype=np.float64)(directory)
    tensors(lambda held: held.__setitem__("roberta.embeddings.position_ids", np.arange(31)[None]))(directory)
    seen = []
    scan = converters.scan(directory, progress=lambda *at: seen.append(at))
    held = load_file(directory / "model.safetensors")
    total = sum(x.nbytes for x in held.values() if x.dtype != np.int64)
    assert seen[-1] == (total, total) and {of for _, of in seen} == {total}
    steps = np.diff([0, *(done for done, _ in seen)])
    assert sorted(steps) == sorted(x.nbytes for x in held.values() if x.dtype != np.int64)
    assert len(seen) == scan.num_tensors == len(held) - 1


def test_a_scan_may_come_with_a_dry_run(directory, tmp_path, capsys):
    assert hf.main([str(directory), "--scan", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "finite numbers only" in out and "missing        0" in out and not (tmp_path / "out").exists()


def test_a_scan_of_a_damaged_file_says_so(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MalformedCheckpoint, match="not fully covered"):
        converters.scan(directory)
