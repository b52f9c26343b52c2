"""What is said of an adapter that does not fit, or of a tree that PEFT has no words for."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
from converters import ConversionError, MalformedCheckpoint, Mismatch, SourceNotFound, UnsupportedConfig, peft
from eqx_transformers import GPT2, MaskedLM, SequenceClassifier, Transformer, TransformerConfig, stack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import LoRA, duplicate, remove, select
from eqx_transformers.surgery.adapters import add_adapter
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.merging import merge

from ..tiny import Row
from .test_peft import GPT2 as GPT2_ROW, LLAMA, ROBERTA, SAVED, TIED, base, loaded, made, plain, theirs, written

CONFIG = "adapter_config.json"
Tensors = dict[str, np.ndarray]


def edited(
    name: str, directory: Path, fields: dict[str, Any] | None = None, change: Callable[[Tensors], Any] | None = None
) -> Path:
    """An adapter that PEFT wrote, with other fields in its configuration and other tensors."""
    shutil.copytree(made(name)[0], directory)
    config = json.loads((directory / CONFIG).read_text()) | (fields or {})
    (directory / CONFIG).write_text(json.dumps(config))
    if change is not None:
        tensors = load_file(directory / SAVED)
        change(tensors)
        save_file(tensors, directory / SAVED)
    return directory


def refused(kind: type, directory: Path, row: Row = ROBERTA, stacked: bool = False) -> str:
    model, origin = plain(row, stacked)
    with pytest.raises(kind) as caught:
        peft.load(model, directory, origin)
    return str(caught.value)


OPTIONS = {
    "peft_type": "LOHA",
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.gate"],
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "kasa_config": {"beta": 1},
    "of_tomorrow": 3,
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_not_had_is_named(option, tmp_path):
    said = refused(UnsupportedConfig, edited("plain", tmp_path / "a", {option: OPTIONS[option]}))
    assert option in said and str(OPTIONS[option]) in said and "PEFT" in said


@pytest.mark.parametrize("init", ["loftq", "olora", "corda", "pissa_niter_4", "lora_ga", "mica"])
def test_a_start_that_changed_the_base_belongs_to_that_base(init, tmp_path):
    said = refused(UnsupportedConfig, edited("plain", tmp_path / "a", {"init_lora_weights": init}))
    assert f"init_lora_weights = {init!r}" in said and "path_initial_model_for_weight_conversion" in said


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", True])
def test_a_start_that_did_not_is_none_of_our_business(init, tmp_path):
    directory = edited("plain", tmp_path / "a", {"init_lora_weights": init, "loftq_config": {"loftq_bits": 4}})
    assert eqx.tree_equal(peft.load(plain(ROBERTA)[0], directory), loaded("plain"))


FIELDS = [
    ("r", "8", "a whole number above 0"),
    ("r", 0, "a whole number above 0"),
    ("r", True, "a whole number above 0"),
    ("lora_alpha", [1], "a number"),
    ("bias", "some", "none, all or lora_only"),
    ("use_dora", 1, "true or false"),
    ("target_modules", [1], "a regular expression or a list of names"),
    ("rank_pattern", {"a": "b"}, "ranks by pattern"),
    ("rank_pattern", {"(": 2}, "ranks by pattern"),
    ("target_modules", "query(", "a regular expression or a list of names"),
    ("modules_to_save", ["*"], "a list of names"),
    ("layers_to_transform", ["1"], "a number or a list of numbers"),
]


@pytest.mark.parametrize(("name", "value", "expected"), FIELDS, ids=lambda x: str(x)[:20])
def test_a_field_of_another_kind(name, value, expected, tmp_path):
    said = refused(MalformedCheckpoint, edited("plain", tmp_path / "a", {name: value}))
    assert f"{name} = " in said and said.endswith(f"expected {expected}.")


def test_files_that_are_not_there(tmp_path):
    assert "not a directory of a PEFT adapter" in refused(SourceNotFound, base(ROBERTA))
    assert "no directory" in refused(SourceNotFound, tmp_path / "nowhere")
    directory = edited("plain", tmp_path / "a")
    (directory / SAVED).unlink()
    assert f"no {SAVED} or adapter_model.bin" in refused(SourceNotFound, directory)
    (directory / SAVED).write_bytes(b"<html>")
    assert "web page" in refused(MalformedCheckpoint, directory)


def test_numbers_of_another_kind(tmp_path):
    key = "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight"
    change = lambda tensors: tensors.update({key: tensors[key].astype(np.float64)})
    assert f"{key} is F64" in refused(MalformedCheckpoint, edited("plain", tmp_path / "a", change=change))


def test_another_architecture_is_told_by_its_modules():
    said = refused(Mismatch, made("patterns, stacked")[0])
    assert "an adapter for another architecture: model.layers.0." in said and "do not exist here" in said
    assert "a LlamaForCausalLM" in said and f"This model came from '{base(ROBERTA)}'" in said


def test_another_head_is_told_from_another_architecture():
    model, origin = converters.load(base(GPT2_ROW), head=GPT2)
    with pytest.raises(Mismatch, match=r"of another class than GPT2, with or without 'transformer\.'.*head="):
        peft.load(model, made("dora")[0], origin)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    one = "base_model.model.roberta.encoder.layer.{}.attention.self.query.lora_{}.weight"

    def change(tensors: Tensors) -> None:
        del tensors[one.format(0, "A")]
        tensors[one.format(1, "B")] = np.zeros((21, 5), np.float32)
        tensors[one.format(1, "A").replace("query", "qeury")] = tensors[one.format(1, "A")]
        tensors["of.another.program"] = np.zeros(3, np.float32)

    directory = edited("plain", tmp_path / "a", change=change)
    said = refused(Mismatch, directory)
    assert re.search(r"missing\s+1\n\s+" + re.escape(one.format(0, "A")), said)
    assert re.search(r"mismatched\s+1\n.*lora_B.weight: expected \[21, 4\], found \[21, 5\]", said)
    assert re.search(r"unexpected\s+2\n.*qeury.*nearest known: .*query", said) and "of.another.program" in said
    assert "PEFT's tensors begin with 'base_model.model.'" in said
    with pytest.raises(Mismatch) as caught:
        peft.load(plain(ROBERTA)[0], directory)
    report = pickle.loads(pickle.dumps(caught.value)).report
    assert len(report.missing) == len(report.mismatched) == 1 and len(report.unexpected) == 2


def test_a_layer_that_the_settings_mean_and_the_file_has_not(tmp_path):
    said = refused(Mismatch, edited("plain", tmp_path / "a", {"target_modules": ["query", "value", "key"]}))
    assert re.search(r"missing\s+4\n", said) and "attention.self.key.lora_A.weight" in said
    said = refused(Mismatch, edited("plain", tmp_path / "b", {"target_modules": ["query"]}))
    assert re.search(r"unexpected\s+4\n", said)
    said = refused(Mismatch, edited("plain", tmp_path / "c", {"rank_pattern": {"value": 2}}))
    assert re.search(r"mismatched\s+4\n", said)


def test_another_number_of_labels_is_told():
    said = refused(Mismatch, made("rslora and a head")[0], Row("bert", SequenceClassifier))
    assert "the vocabulary or the labels were resized to 5" in said
    assert "classifier.weight: expected [2, 21], found [5, 21]" in said


def test_another_width_and_depth_are_told_with_both_sizes():
    config = plain(ROBERTA)[0].config
    for depth in (1, 3):
        other = skeleton(MaskedLM, replace(config, num_layers=depth, embed_dim=24))
        with pytest.raises(Mismatch) as caught:
            peft.load(other, made("plain")[0])
        assert f"roberta.encoder.layer has 2 layers there and {depth} here." in str(caught.value)
        assert re.search(r"of another base: .*self\.\w+ has 21 numbers there and 24 here; ", str(caught.value))


def test_a_file_without_tensors(tmp_path):
    directory = edited("plain", tmp_path / "a", {"target_modules": None}, lambda tensors: tensors.clear())
    assert "holds no tensors of an adapter" in refused(ConversionError, directory)


def test_a_name_that_is_there_already():
    with pytest.raises(ConversionError, match=r"adapter named 'default' at .*query_proj already.*name="):
        peft.load(loaded("plain"), made("plain")[0])
    with pytest.raises(ConversionError, match=r"There is an IA3 at .* already"):
        peft.load(loaded("ia3"), made("ia3")[0])


def test_stacked_blocks_are_all_alike(tmp_path):
    tensors = lambda options: written(theirs(ROBERTA, {"target_modules": ["query"], "r": 2} | options), tmp_path)
    for options in ({"layers_to_transform": [1]}, {"rank_pattern": {"layer.1.*query": 3}}):
        assert "load it on unstack(model)" in refused(ConversionError, tensors(options), stacked=True)


def test_one_end_of_a_tie(tmp_path):
    trained = theirs(GPT2_ROW, {"r": 2, "target_modules": ["c_fc"], "modules_to_save": ["lm_head"]})
    said = refused(ConversionError, written(trained, tmp_path / "a"), GPT2_ROW)
    assert "lm_head.weight is not its transformer.wte.weight" in said and "reconfigure(" in said
    options = {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}
    said = refused(ConversionError, written(theirs(TIED, options), tmp_path / "b"), TIED)
    assert "lm_head otherwise than model.embed_tokens" in said
    said = refused(UnsupportedConfig, written(theirs(TIED, options | {"use_dora": True}), tmp_path / "c"), TIED)
    assert "use_dora on lm_head" in said


def test_rows_that_a_table_has_not(tmp_path):
    options = {"r": 2, "target_modules": ["c_fc"], "trainable_token_indices": [3, 5]}
    directory = written(theirs(GPT2_ROW, options), tmp_path / "a")
    for value, expected in (([3, 61], "61 is no row of transformer.wte"), ({"c_fc": [3, 5]}, "none of this model's")):
        config = json.loads((directory / CONFIG).read_text()) | {"trainable_token_indices": value}
        (directory / CONFIG).write_text(json.dumps(config))
        assert expected in refused(UnsupportedConfig, directory, GPT2_ROW)


def test_models_that_the_reference_has_not():
    config = TransformerConfig(family="haiku-lm-tutorial", vocab_size=11, embed_dim=6, num_heads=2, head_dim=3)
    with pytest.raises(ConversionError, match=r"has no .* edited=True"):
        peft.load(Transformer(config, key=jax.random.key(0)), made("plain")[0])


def test_what_is_merged_is_not_adapted():
    merged = merge(loaded("plain"), keep=True)
    with pytest.raises(ValueError, match=r"peft\.load: .* unmerge\(model\) first"):
        peft.load(merged, made("plain")[0], name="other")


def not_saved(model: Any, directory: Path, match: str, kind: type = ConversionError, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        peft.save(model, directory, **options)
    assert not directory.exists()


def test_trees_that_have_no_adapter_or_several(tmp_path):
    out, plain_model = tmp_path / "out", plain(ROBERTA)[0]
    not_saved(plain_model, out, "no LoRA and no IA3 in this MaskedLM")
    not_saved(loaded("plain"), out, "no adapter named 'x'; there are default", name="x")
    not_saved(loaded("ia3"), out, "this model has IA3, which has no name", name="x")
    two = peft.load(loaded("plain"), made("biases of adapted layers")[0], name="other")
    not_saved(two, out, r"adapters named default, other|adapters named other, default")
    place = select("Linear", under="**.blocks.*.attention.key_proj").on(plain_model)
    both = eqx.tree_at(place, loaded("plain"), place.each(loaded("plain"), IA3.adapter()))
    not_saved(both, out, "LoRA and IA3 in this model")
    not_saved(merge(loaded("plain"), keep=True), out, "merged", ValueError)
    not_saved(loaded("plain"), out, "bias = 'b' is not one of", bias="b")


def test_what_else_is_to_be_saved(tmp_path):
    out = tmp_path / "out"
    not_saved(loaded("plain"), out, "no parameters at 'haed'. There are", modules_to_save=("haed",))
    part = ("backbone.stack.blocks.0.attention",)
    not_saved(loaded("plain"), out, "query has an adapter and is to be saved whole", modules_to_save=part)
    not_saved(
        loaded("plain"), out, "'head.bias' is a part of the reference's 'lm_head'", modules_to_save=("head.bias",)
    )


def test_settings_that_are_one_for_all(tmp_path):
    out, model = tmp_path / "out", plain(ROBERTA)[0]
    add = lambda model, under, **options: add_adapter(
        model, select("Linear", under=under), rank=2, key=jax.random.key(0), **options
    )
    one = add(model, "**.key_proj", dropout=0.1)
    not_saved(add(one, "**.value_proj"), out, "differ in dropout .*: 0.1, .*: 0.0")
    not_saved(add(one, "**.value_proj", dropout=0.1, dora=True), out, "differ in magnitude")
    gpt2 = add(add(plain(GPT2_ROW)[0], "**.key_proj"), "**.value_proj", dora=True)
    not_saved(gpt2, out, r"are one layer \(transformer\.h\.0\.attn\.c_attn\).*a magnitude and some have none")


def test_tables_and_vectors_that_peft_has_not(tmp_path):
    out, model = tmp_path / "out", plain(LLAMA)[0]
    tied = plain(TIED)[0]
    table = select("Embedding")
    not_saved(
        add_adapter(tied, table, rank=2, dora=True, key=jax.random.key(0)), out, "DoRA adapter and is tied to lm_head"
    )
    not_saved(eqx.tree_at(table, model, table.each(model, IA3.adapter())), out, "a table with an IA3")
    gpt2 = plain(GPT2_ROW)[0]
    of = lambda under, on: (lambda where: lambda tree: eqx.tree_at(where, tree, where.each(tree, IA3.adapter(on))))(
        select("Linear", under=under).on(gpt2)
    )
    not_saved(of("**.query_proj", "input")(gpt2), out, "on='input' must be equal")
    not_saved(
        of("**.key_proj", "output")(of("**.query_proj", "input")(gpt2)), out, "its inputs or its outputs, not both"
    )


def test_nothing_else_is_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="not an adapter directory"):
        peft.save(loaded("plain"), base(ROBERTA))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        peft.save(loaded("plain"), tmp_path / "file")
    with pytest.raises(FileExistsError, match="it has file"):
        peft.save(loaded("plain"), tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


# ---- what could not be written without losing something


QUERIES = select("Linear", under="**.attention.query_proj")


def adapted_twice(model):
    for seed in range(2):
        where = select("Linear", under="**.query_proj").on(model)
        model = eqx.tree_at(where, model, where.each(model, LoRA.adapter(2, init="random"), key=jax.random.key(seed)))
    return model


@pytest.mark.parametrize(
    "make_it, said",
    [
        (lambda m: adapted_twice(m), "one LoRA within another, and a directory has one adapter a layer"),
        (
            lambda m: add_adapter(m, QUERIES, rank=2, init="pissa", key=jax.random.key(0)),
            "init='pissa' or 'olora' left of it",
        ),
        (
            lambda m: add_adapter(
                duplicate(stack(m), "backbone.stack.blocks.1"), QUERIES, rank=2, key=jax.random.key(0)
            ),
            "has 3 blocks, and the config says 2",
        ),
    ],
    ids=["nested", "pissa", "deeper"],
)
def test_an_adapter_that_would_be_lost_or_wrong_is_not_written(make_it, said, tmp_path):
    with pytest.raises(converters.ConversionError, match=said):
        peft.save(make_it(plain(ROBERTA)[0]), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_model_of_other_depth_is_told_so_before_anything_is_loaded(tmp_path):
    peft.save(add_adapter(plain(ROBERTA)[0], QUERIES, rank=2, key=jax.random.key(0)), tmp_path / "adapter")
    with pytest.raises(converters.ConversionError, match="has 1 blocks, and the config says 2"):
        peft.load(remove(plain(ROBERTA)[0], "backbone.stack.blocks.1"), tmp_path / "adapter")


def test_an_adapters_directory_is_no_model(tmp_path):
    peft.save(add_adapter(plain(ROBERTA)[0], QUERIES, rank=2, key=jax.random.key(0)), tmp_path / "adapter")
    with pytest.raises(converters.ConversionError, match="is a PEFT adapter, not a model"):
        converters.load(tmp_path / "adapter")
    with pytest.raises(converters.SourceNotFound, match="Pass the directory that the file is in"):
        peft.load(plain(ROBERTA)[0], tmp_path / "adapter" / "adapter_model.safetensors")
