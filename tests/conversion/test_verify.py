"""Verification in half precision, of Flax's files, and what it says where there is nothing to compare with."""

import functools
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import converters
from converters import ConversionError, Verification, noise, recording
from converters.noise import Exact, Noise
from eqx_transformers import Encoder, MaskedLM, save as save_native
from eqx_transformers.nn import LayerNorm

from .. import kept
from ..reference import reference
from ..tiny import Row
from .writers import write_flax

BERT, ROBERTA = Row("bert", Encoder), Row("roberta", MaskedLM)


# ---- half precision, in units of the reference's own noise


@functools.cache
def half(row):
    """(what verification found in bfloat16, its record), made once."""
    path = kept.directory("record") / row.id
    return converters.verify(reference(row).directory, dtype="bfloat16", record=path), path


@pytest.mark.parametrize("row", [BERT, ROBERTA], ids=lambda row: row.id)
def test_ours_is_no_noisier_than_the_reference(row):
    found, _ = half(row)
    assert found.passed and found.noise.seeds >= 20, str(found)
    assert 0.3 < found.noise.ratio <= 1.1 and found.noise.path == ""
    assert "; bfloat16: 0." in str(found) and "of the reference's own noise" in str(found)
    assert json.loads(json.dumps(found.as_json()))["noise"]["ratio"] == found.noise.ratio


def test_a_record_measures_the_same_noise():
    found, path = half(BERT)
    again = converters.verify(reference(BERT).directory, dtype="bfloat16", against=path)
    assert again.passed and again.noise.ratio == pytest.approx(found.noise.ratio, rel=1e-3)


class Careless(eqx.Module):
    """A LayerNorm that computes in the dtype of its input."""

    inner: LayerNorm

    def __call__(self, x):
        along = lambda y: jnp.broadcast_to(y, x.shape)
        centred = x - along(x.mean(-1, keepdims=True))
        centred = jax.lax.reduce_precision(centred, 8, 7)
        square = jax.lax.reduce_precision(centred * centred, 8, 7)
        scale = jax.lax.rsqrt(square.mean(-1, keepdims=True) + jnp.asarray(self.inner.eps, x.dtype))
        return jax.lax.reduce_precision(centred * along(scale), 8, 7) * along(self.inner.weight) + along(
            self.inner.bias
        )


def careless(model):
    norms = lambda m: [n for b in m.stack.blocks for n in (b.attention_norm, b.mlp_norm)] + [m.embedding.norm]
    return eqx.tree_at(norms, model, [Careless(norm) for norm in norms(model)])


def off_by_a_digit(model):
    """Every matrix by one unit in its last place."""
    nudge = lambda x: jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint16) + 1, x.dtype)
    return jax.tree.map(lambda x: nudge(x) if eqx.is_inexact_array(x) and x.ndim == 2 else x, model)


@pytest.mark.parametrize("spoil", [careless, off_by_a_digit])
def test_a_noisier_model_is_found(spoil):
    model, _ = converters.load(reference(BERT).directory, dtype="bfloat16")
    found = noise.measure(spoil(model), recording.read(half(BERT)[1]).noise)
    assert not found.passed and found.ratio > noise.LIMIT
    result = Verification(1e-4, (), {}, {}, found)
    assert not result.passed and result.first_divergence == "noise in bfloat16"
    assert "NOT verified: noise in bfloat16" in str(result) and "at most 1.1 is allowed" in str(result)


NAN = float("nan")
RATIOS = [
    (1.0, 1.0, True),
    (1.1, 1.0, True),
    (1.11, 1.0, False),
    (0.0, 0.0, True),
    (1.0, 0.0, False),
    (NAN, 1.0, False),
]


@pytest.mark.parametrize(("ours", "theirs", "passes"), RATIOS)
def test_what_passes(ours, theirs, passes):
    assert Noise("float16", "", ours, theirs, 20).passed is passes


def test_padding_and_most_of_a_vocabulary_are_not_counted():
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    x = np.arange(2 * 3 * 5000, dtype=np.float32).reshape(2, 3, 5000)
    assert np.array_equal(noise.counted(x, {"attention_mask": mask}), x[mask == 1][:, ::5])
    assert np.array_equal(noise.counted(x[:, 0, :8], {"attention_mask": mask}), x[:, 0, :8])


MIXED = [("float32", "float32", None), ("bfloat16", "bfloat16", "bfloat16"), ("float16", "float16", "float16")]


@pytest.mark.parametrize(("a", "b", "found"), [*MIXED, ("bfloat16", "float32", None), ("bfloat16", "float16", None)])
def test_only_what_is_all_in_half_precision_is_measured(a, b, found):
    assert noise.dtype_of([jnp.ones(2, a), jnp.ones(2, b), jnp.ones(2, int)]) == found


SHAPES = {"embedding": (2, 3, 4), "head.dense": (2, 3, 5), "pooler": (2, 4)}
PLACES = [((2, 3, 7), ""), ((2, 3), "head.dense"), ((2, 21), "head.dense")]  # three labels are not three tokens


@pytest.mark.parametrize(("output", "place"), PLACES)
def test_noise_is_measured_where_every_token_has_something(output, place):
    layers = {path: np.zeros(shape) for path, shape in (SHAPES | {"": output}).items()}
    assert noise.place(None, layers, {"attention_mask": np.ones((2, 3), int)}) == place


# ---- Flax's files


def flax(directory: Path) -> Path:
    shutil.copytree(reference(BERT).directory, directory)
    held = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write_flax(directory, held, 1)
    return directory


def test_what_flax_wrote_is_verified(tmp_path):
    """The reference is made of the file by a rule of its own, not by our tables."""
    directory = flax(tmp_path / "flax")
    found = converters.verify(directory)
    assert found.passed and not found.weights and found.max_error > 0, str(found)


# ---- nothing to compare with


def moved(tmp_path):
    shutil.rmtree(tmp_path / "tiny")


def another(tmp_path):
    shutil.rmtree(tmp_path / "tiny")
    shutil.copytree(reference(Row("bert", MaskedLM)).directory, tmp_path / "tiny")


def without(field):
    def drop(tmp_path):
        path = tmp_path / "native" / "origin.json"
        said = json.loads(path.read_text())
        del said[field]
        path.write_text(json.dumps(said))

    return drop


GONE = {
    "moved away": (moved, "tiny, is not here any more.*Put it back.*against=FILE"),
    "another checkpoint in its place": (another, "does not hold the checkpoint any more.*Convert it again"),
    "a conversion that did not note where": (without("directory"), "no checkpoint is known.*against=FILE"),
    "a conversion that did not note what": (without("architecture"), "does not say where the model came from"),
}


@pytest.mark.parametrize("name", GONE)
def test_a_native_directory_that_has_no_reference_any_more(name, tmp_path):
    spoil, words = GONE[name]
    shutil.copytree(reference(BERT).directory, tmp_path / "tiny")
    model, origin = converters.load(tmp_path / "tiny")
    save_native(model, tmp_path / "native", extras={"origin": origin.as_json()})
    spoil(tmp_path)
    with pytest.raises(ConversionError, match=words):
        converters.verify(tmp_path / "native")


def test_a_model_of_nobody_knows_what():
    with pytest.raises(ConversionError, match=r"without its origin.*against=FILE"):
        converters.verify("it", model=converters.load(reference(BERT).directory)[0])


def test_the_exact_numbers_are_of_every_seed():
    exact = recording.read(half(BERT)[1]).noise
    assert isinstance(exact, Exact) and len(exact.outputs) == len(exact.inputs["ids"]) == len(noise.SEEDS)
    assert len({x.tobytes() for x in exact.inputs["ids"]}) == len(noise.SEEDS)
