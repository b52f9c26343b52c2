"""Writing: shards, a grown vocabulary, edited models, and directories that appear whole or not at all."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import converters
from eqx_transformers import MaskedLM, SentenceEmbedder, SequenceClassifier, reconfigure, stack

from ..reference import forward, reference, run
from ..tiny import Row

LM = Row("roberta", MaskedLM)


def loaded(row=LM, **options):
    return converters.load(reference(row).directory, **options)


@pytest.mark.parametrize("size", [2000, "2KB", "20 KB"])
def test_shards_hold_the_same_tensors_and_the_reference_reads_them(size, tmp_path):
    model, origin = loaded()
    converters.export(model, tmp_path / "out", origin, max_shard_size=size)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    given = load_file(reference(LM).directory / "model.safetensors")
    assert index["weight_map"].keys() == given.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in given.values())
    for key, name in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / "out" / name)[key], given[key])
    _, info = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert eqx.tree_equal(converters.load(tmp_path / "out")[0], model)
    limit = 20_000 if size == "20 KB" else 2000
    sizes = {n: [v.nbytes for v in load_file(tmp_path / "out" / n).values()] for n in index["weight_map"].values()}
    assert len(sizes) > 1 and all(sum(s) <= limit or len(s) == 1 for s in sizes.values())


def test_a_wrong_shard_size_is_refused(tmp_path):
    with pytest.raises(converters.ConversionError, match="max_shard_size"):
        converters.export(loaded()[0], tmp_path / "out", max_shard_size="5 gigabytes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["tuple", "stacked"])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_a_grown_vocabulary_is_saved_loaded_and_exported(family, layout, tmp_path):
    from eqx_transformers import load, save

    row = Row(family, MaskedLM)
    model, origin = loaded(row, stacked=layout == "stacked")
    grow = lambda path, old, new: jnp.full(new.shape, 0.5, old.dtype).at[: len(old)].set(old)
    grown = reconfigure(model, grow, vocab_size=67)
    save(grown, tmp_path / "native", extras={"origin": origin.as_json()})
    assert eqx.tree_equal(load(tmp_path / "native")[0], grown)
    converters.export(grown, tmp_path / "out", origin)
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.config.vocab_size == 67
    ref = reference(row)
    ours, theirs = forward(grown, ref.inputs), run(again.eval(), row, ref.inputs).detach().numpy()
    assert ours.shape[-1] == 67
    np.testing.assert_allclose(ours[..., :61], ref.output, rtol=0, atol=2e-5 * np.abs(ref.output).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


EDITS = {
    "a resized array": (lambda m: m.head.bias, lambda x: jnp.zeros(99), r"head\.bias has shape \(99,\)"),
    "another activation": (lambda m: m.head.activation, lambda x: jax.nn.silu, r"head\.activation is"),
    "another class": (
        lambda m: m.backbone.stack.blocks[1].mlp.up_proj,
        lambda x: eqx.nn.Linear(21, 37, key=jax.random.key(0)),
        r"backbone\.stack\.blocks\.1\.mlp\.up_proj is",
    ),
    "a block too few": (lambda m: m.backbone.stack.blocks, lambda x: x[:1], r"backbone\.stack\.blocks holds 1"),
    "another dropout rate": (lambda m: m.backbone.embedding.dropout.p, lambda x: 0.9, r"embedding\.dropout\.p is 0.9"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_model_that_its_config_does_not_build_is_refused_by_name(name, tmp_path):
    where, change, said = EDITS[name]
    edited = eqx.tree_at(where, loaded()[0], replace_fn=change, is_leaf=lambda x: x is None)
    with pytest.raises(converters.ConversionError, match=said):
        converters.export(edited, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_how_a_model_runs_is_no_difference(tmp_path):
    from eqx_transformers.nn import kernels

    model, origin = loaded()
    model = eqx.tree_at(lambda m: m.backbone.stack.remat, eqx.nn.inference_mode(model), True)
    model = eqx.tree_at(lambda m: m.backbone.stack.blocks[0].attention.attend, model, kernels.plain)
    converters.export(model, tmp_path / "out", origin)
    assert eqx.tree_equal(converters.load(tmp_path / "out")[0], loaded()[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_goes_out_as_it_is(dtype, tmp_path):
    model, origin = loaded(dtype=dtype)
    converters.export(stack(model), tmp_path / "out", origin)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == dtype
    assert eqx.tree_equal(converters.load(tmp_path / "out")[0], model)


@pytest.mark.parametrize("layout", ["tuple", "stacked"])
def test_a_failing_write_leaves_the_old_directory_whole(layout, tmp_path, monkeypatch):
    from eqx_transformers import tensor_file

    model, origin = loaded(stacked=layout == "stacked")
    converters.export(model, tmp_path / "out", origin)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    written = tensor_file.write

    def full(path, specs, get, metadata):
        written(path, dict(list(specs.items())[:3]), get, metadata)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(OSError, match="No space left"):
        converters.export(
            jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, model), tmp_path / "out", origin
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_weights_of_an_earlier_one_and_keeps_what_is_not_its_own(tmp_path):
    model, origin = loaded()
    converters.export(model, tmp_path / "out", origin, max_shard_size=2000)
    (tmp_path / "out" / "README.md").write_text("mine")
    converters.export(model, tmp_path / "out", origin)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}


def test_a_sentence_embedder_is_found_by_sentence_transformers(tmp_path):
    from sentence_transformers import SentenceTransformer

    row = Row("bert", SentenceEmbedder)
    model = SentenceEmbedder(loaded(row)[0].config, key=jax.random.key(0))
    converters.export(model, tmp_path / "out")
    assert converters.load(tmp_path / "out")[0].config == model.config
    (tmp_path / "out" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer(str(tmp_path / "out" / "vocab.txt")).save_pretrained(tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(m).__name__ for m in theirs][1:] == ["Pooling", "Normalize"]
    encoded = theirs.tokenize(["a b a", "b"])
    ours = forward(model, {"ids": encoded["input_ids"].numpy(), "attention_mask": encoded["attention_mask"].numpy()})
    np.testing.assert_allclose(ours, theirs.encode(["a b a", "b"]), rtol=0, atol=2e-5)


def test_label_names_go_out(tmp_path):
    row = Row("bert", SequenceClassifier)
    model, origin = loaded(row, labels=["good", "bad", "ugly"], key=jax.random.key(0))
    converters.export(model, tmp_path / "out", origin)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["id2label"] == {"0": "good", "1": "bad", "2": "ugly"}
    assert config["label2id"] == {"good": 0, "bad": 1, "ugly": 2}
    assert converters.load(tmp_path / "out")[1].labels == ["good", "bad", "ugly"]
