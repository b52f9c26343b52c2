"""T5-VAEs out again: to the directories of their own program, to safetensors, and to the native format."""

import json
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from converters import ConversionError, msgpack_writer
from converters.msgpack_reader import read_header
from eqx_transformers import (
    FLAX_T5_VAE,
    T5,
    T5_V1,
    T5_V1_1,
    T5VAE,
    TORCH_T5_VAE,
    CausalLM,
    GPT2Config,
    T5VAEConfig,
    load,
    reconfigure,
    save,
    stack,
)
from eqx_transformers.tensor_file import read_tensor

GOLDEN = Path(__file__).parent.parent / "golden" / "t5_vae_flax" / "checkpoint"
KEY = jax.random.key(0)
SIZES = {"vocab_size": 31, "embed_dim": 21, "num_layers": 1, "num_heads": 3, "head_dim": 5, "mlp_dim": 17}
TINY = replace(T5_V1, **SIZES, num_decoder_layers=2)


def tensors(directory):
    specs, _ = read_header(directory / "flax_model.msgpack")
    with open(directory / "flax_model.msgpack", "rb", buffering=0) as file:
        return {name: read_tensor(file, spec) for name, spec in specs.items()}


def test_the_golden_directory_is_written_as_it_was(tmp_path):
    model, origin = converters.load(GOLDEN)
    converters.export(model, tmp_path / "again", origin)
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", "flax_model.msgpack"]
    before, after = tensors(GOLDEN), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all((x.dtype, x.tobytes()) == (after[k].dtype, after[k].tobytes()) for k, x in before.items())
    said = [json.loads((d / "config.json").read_bytes()) for d in (GOLDEN, tmp_path / "again")]
    assert said[0] == said[1]
    assert eqx.tree_equal(model, converters.load(tmp_path / "again")[0])


@pytest.mark.parametrize("container", ["safetensors", "flax", None])
@pytest.mark.parametrize("t5", [TINY, replace(TINY, tied=False, scaled=False, gated=True)], ids=["tied", "untied"])
@pytest.mark.parametrize("codes", [4, -1])
def test_a_model_made_from_scratch_comes_back(container, t5, codes, tmp_path):
    model = T5VAE(replace(FLAX_T5_VAE, t5=t5, latent_tokens=codes, latent_dim=7), key=KEY)
    converters.export(model, tmp_path / "out", container=container)
    assert (tmp_path / "out" / "model.safetensors").exists() == (container == "safetensors")
    again, _ = converters.load(tmp_path / "out")
    assert again.config == model.config and eqx.tree_equal(again, model)


def test_only_its_own_program_reads_flax(tmp_path):
    tiny = GPT2Config(vocab_size=11, embed_dim=6, num_heads=2, num_layers=1)
    with pytest.raises(ConversionError, match="container='flax' is for transformer_vae: transformers 5 reads no Flax"):
        converters.export(CausalLM(tiny, key=KEY), tmp_path / "out", container="flax")
    with pytest.raises(ConversionError, match="container = 'pickle' is not one of safetensors, flax"):
        converters.export(CausalLM(tiny, key=KEY), tmp_path / "out", container="pickle")  # pyright: ignore
    assert not (tmp_path / "out").exists()


def test_what_the_published_config_cannot_say_is_not_exported(tmp_path):
    """Another pooling is another model: it is saved in the native format."""
    model = T5VAE(T5VAEConfig(t5=TINY, latent_dim=7), key=KEY)
    with pytest.raises(ConversionError, match=r"The reference library has no 't5_vae'.*eqx_transformers\.save"):
        converters.export(model, tmp_path / "out")
    older = T5VAE(replace(TORCH_T5_VAE, t5=TINY, max_tokens=6), key=KEY)
    with pytest.raises(ConversionError, match="The reference library has no 't5_vae_torch'"):
        converters.export(older, tmp_path / "out")
    odd = T5VAE(replace(FLAX_T5_VAE, t5=TINY, as_published=False), key=KEY)
    with pytest.raises(ConversionError, match="as_published = False"):
        converters.export(odd, tmp_path / "out")


def test_there_is_nothing_to_verify_against():
    with pytest.raises(ConversionError, match="transformer_vae is no format of the reference library"):
        converters.verify(GOLDEN)


CONFIGS = {
    "mean": T5VAEConfig(t5=TINY, latent_dim=7),
    "tokens": T5VAEConfig(t5=TINY, latent_dim=7, pooling="first", latent_tokens=3, variational=False),
    "flat": T5VAEConfig(t5=TINY, latent_dim=7, pooling="flat", max_tokens=6, inner_dim=20),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load_is_the_identity(name, tmp_path):
    model = stack(T5VAE(CONFIGS[name], key=KEY))
    save(model, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert again.config == model.config and eqx.tree_equal(again, model)


def test_a_grown_vocabulary_is_a_changed_t5(tmp_path):
    model = T5VAE(CONFIGS["mean"], key=KEY)
    grow = lambda path, old, new: jnp.zeros(new.shape, new.dtype).at[: len(old)].set(old)
    bigger = reconfigure(model, grow, t5=replace(TINY, vocab_size=40))
    assert bigger.t5.embedding.vocab_size == 40
    assert np.array_equal(bigger.t5.embedding.weight[:31], model.t5.embedding.weight)
    save(bigger, tmp_path / "out")
    assert eqx.tree_equal(load(tmp_path / "out")[0], bigger)


def test_it_is_put_into_a_t5_that_is_there():
    t5 = T5(replace(TINY, **{k: getattr(T5_V1_1, k) for k in ("gated", "activation", "tied", "scaled")}), key=KEY)
    model = T5VAE.from_t5(t5, T5VAEConfig(latent_dim=7), key=jax.random.key(1))
    assert model.config.t5 == t5.config and model.t5.config is None
    ours, theirs = (jax.tree.leaves(eqx.filter(part, eqx.is_array)) for part in (model.t5, t5))
    assert len(ours) == len(theirs) and all(x is y for x, y in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="a part of another model"):
        T5VAE.from_t5(model.t5, T5VAEConfig(latent_dim=7), key=KEY)


# ---- the file

SHAPES = [(), (7,), (3, 5), (2, 3, 4)]


def test_arrays_of_every_rank_and_in_chunks(tmp_path, monkeypatch):
    """An array of more than 2^30 bytes is cut: here, of more than 40."""
    monkeypatch.setattr(msgpack_writer, "CHUNK", 40)
    rng = np.random.default_rng(0)
    given = {f"a/x{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(SHAPES)}
    given |= {f"b/{'n' * 40}/{i}": np.full(200 if i else 3, i, np.int16) for i in range(20)}
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in given.items()}
    msgpack_writer.write(tmp_path / "flax_model.msgpack", specs, given.__getitem__)
    found = tensors(tmp_path)
    assert found.keys() == given.keys()
    for name, x in given.items():
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype) and np.array_equal(found[name], x)
