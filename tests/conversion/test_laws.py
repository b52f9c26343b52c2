"""The laws of conversion, over every family, head and layout.

forward: 2e-5 of the reference's largest absolute value (at least 1); gradients: 1e-4 of the tensor's own largest, or of
a hundredth of the largest of all (a key's bias has no gradient but noise). All reference parameters are perturbed.
"""

import dataclasses
import functools
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import converters
from converters import convert, reference_names
from converters.families import FAMILIES
from eqx_transformers import (
    CausalLM,
    Encoder,
    MaskedLM,
    SentenceEmbedder,
    SequenceClassifier,
    stack,
)
from eqx_transformers.surgery import leaves_by_path

from ..full import FULL
from ..reference import changes_nothing, forward, make, reference, run, save
from ..tiny import BOTH, COMPILED, LAYERS, MIXED, ROWS, TABLES, Row

FORWARD, GRADIENT = 2e-5, 1e-4
LAYOUTS = ("tuple", "stacked")
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
tables = pytest.mark.parametrize("row", TABLES, ids=lambda row: row.id)
# Stacked blocks compile faster; the tuple's forward pass is what verification runs for every row.
LAID_OUT = [*((row, "stacked") for row in COMPILED if row != MIXED), *((row, "tuple") for row in (*BOTH, MIXED))]
laid_out = pytest.mark.parametrize(("row", "layout"), LAID_OUT, ids=lambda x: x if isinstance(x, str) else x.id)
# A model costs its compilation. Of the heads that share an encoder, every other one is compiled for its gradients and
# the rest for verification, part by part; EQX_TRANSFORMERS_FULL=1 does both for all.
HEADS = [] if FULL else [row for row in COMPILED if row not in BOTH and not row.options and not row.on_decoder]
VERIFIED = [row for row in ROWS if row not in HEADS[::2]]
DERIVED = [(row, layout) for row, layout in LAID_OUT if row not in HEADS[1::2]]
verified = pytest.mark.parametrize("row", VERIFIED, ids=lambda row: row.id)
derived = pytest.mark.parametrize(("row", "layout"), DERIVED, ids=lambda x: x if isinstance(x, str) else x.id)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@functools.cache
def loaded(row: Row, layout: str):
    return converters.load(reference(row).directory, stacked=layout == "stacked")


@eqx.filter_jit
def value_and_gradients(model, inputs, weights):
    """One compilation serves the forward and the gradient law of a row."""

    def loss(model):
        output = forward(model, inputs)
        return (output * weights).sum(), output

    (_, output), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return output, gradient


def computed(row: Row, layout: str):
    ref = reference(row)
    model, _ = loaded(row, layout)
    output, gradient = value_and_gradients(model, ref.inputs, ref.weights)
    _, get = reference_names.tensors(eqx.combine(gradient, model))
    return np.asarray(output), {name: get(name) for name in reference_names.paths(model)}


@derived
def test_forward_and_gradients_are_the_reference(row, layout):
    (output, ours), ref = computed(row, layout), reference(row)
    assert output.shape == ref.output.shape
    np.testing.assert_allclose(output, ref.output, rtol=0, atol=FORWARD * max(1.0, np.abs(ref.output).max()))
    theirs = ref.gradients
    floor = 1e-2 * max(np.abs(g).max() for g in theirs.values())
    unused = set(ours) - set(theirs)
    assert all(not ours[name].any() for name in unused), "torch has no gradient here, so ours must be zero"
    for name in ours.keys() - unused:
        scale = max(np.abs(theirs[name]).max(), floor)
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=GRADIENT * scale, err_msg=name)


@pytest.mark.parametrize("row", BOTH, ids=lambda row: row.id)
def test_the_layouts_hold_the_same_tensors(row):
    tuples, stacked = (reference_names.tensors(loaded(row, layout)[0]) for layout in LAYOUTS)
    assert tuples[0].keys() == stacked[0].keys()
    assert all(np.array_equal(tuples[1](name), stacked[1](name)) for name in tuples[0])
    assert eqx.tree_equal(stack(loaded(row, "tuple")[0]), loaded(row, "stacked")[0])


@verified
def test_every_part_is_the_reference_and_every_tensor_the_file(row):
    ref = reference(row)
    verification = converters.verify(ref.directory, model=loaded(row, "tuple")[0], origin=loaded(row, "tuple")[1])
    assert verification.passed, str(verification)
    assert verification.max_error <= FORWARD
    # GPT-2's queries, keys and values are one module there, so that they are seen in what becomes of them.
    assert len(verification.layers) >= 1 + (6 if row.family == "gpt2" else 8) * LAYERS


@laid_out
def test_export_is_bitwise_the_file_and_the_reference_loads_it_clean(row, layout, tmp_path):
    ref = reference(row)
    model, origin = loaded(row, layout)
    converters.export(model, tmp_path / "export", origin)
    given, written = (load_file(d / "model.safetensors") for d in (ref.directory, tmp_path / "export"))
    assert given.keys() == written.keys()
    assert all(given[k].dtype == written[k].dtype and np.array_equal(given[k], written[k]) for k in given)
    again, info = type(ref.model).from_pretrained(
        tmp_path / "export", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        assert torch.equal(run(again.eval(), row, ref.inputs), run(ref.model, row, ref.inputs))


@rows
def test_a_config_survives_the_round_trip(row, tmp_path):
    ref = reference(row)
    converters.export(loaded(row, "tuple")[0], tmp_path / "export", loaded(row, "tuple")[1])
    before, after = (json.loads((d / "config.json").read_bytes()) for d in (ref.directory, tmp_path / "export"))
    assert after == before


@pytest.mark.parametrize("row", [row for row in COMPILED if row not in HEADS[::2]], ids=lambda row: row.id)
def test_a_model_made_from_scratch_is_exported_and_comes_back(row, tmp_path):
    config = loaded(row, "tuple")[0].config
    model = row.head(config, key=jax.random.key(3))
    converters.export(model, tmp_path)
    again, info = getattr(transformers, row.architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    back, _ = converters.load(tmp_path)
    assert eqx.tree_equal(model, back) and back.config == model.config
    assert changes_nothing(row, json.loads((tmp_path / "config.json").read_bytes()))
    if row not in BOTH:  # what the tensors and the config say is the same: a few rows show that they mean it too
        return
    ours, theirs = forward(model, reference(row).inputs), run(again.eval(), row, reference(row).inputs).detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FORWARD * max(1.0, np.abs(theirs).max()))


def broken(row: Row, directory: Path, change) -> converters.Report:
    """The report of the row's checkpoint after `change` edited its tensors."""
    source = reference(row).directory
    for name in ("config.json", "modules.json", "1_Pooling/config.json"):
        if (source / name).exists():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes((source / name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return converters.inspect(directory)


def planned(row: Row, **changes) -> convert.Plan:
    """The plan of the row's checkpoint with other specs, or another config, than its files have."""
    checkpoint = convert.open_directory(reference(row).directory)
    return convert.make_plan(dataclasses.replace(checkpoint, **changes), convert.Request())


def by_turns(keys):
    """All of them, or every third one, beginning with the last: heads are at an end."""
    return list(keys) if FULL else list(keys)[::-3]


@tables
def test_any_one_key_deleted_is_reported_exactly(row):
    specs = convert.open_directory(reference(row).directory).specs
    for key in by_turns(specs):
        report = planned(row, specs={k: s for k, s in specs.items() if k != key}).report
        assert (list(report.missing), list(report.unexpected), list(report.mismatched)) == ([key], [], []), key
        assert not report.ok


@tables
def test_any_one_key_resized_is_reported_exactly(row):
    specs = convert.open_directory(reference(row).directory).specs
    for key in by_turns(specs):
        spec = specs[key]
        larger = (spec.shape[0] + 1, *spec.shape[1:])
        report = planned(row, specs=specs | {key: dataclasses.replace(spec, shape=larger)}).report
        assert (list(report.missing), list(report.unexpected)) == ([], []), key
        assert report.mismatched == {key: (spec.shape, larger)}


STRAYS = ("surprise", "bert.encoder.layer.7.output.dense.weight", "encoder.layer.0.extra.weight")
ADDED = [(row, key) for i, row in enumerate(TABLES) for j, key in enumerate(STRAYS) if FULL or i % 3 == j]


@pytest.mark.parametrize(("row", "key"), ADDED, ids=lambda x: x if isinstance(x, str) else x.id)
def test_any_one_key_added_is_reported_exactly(row, key, tmp_path):
    report = broken(row, tmp_path, lambda tensors: tensors.__setitem__(key, np.zeros(3, np.float32)))
    assert (list(report.missing), list(report.unexpected), list(report.mismatched)) == ([], [key], [])
    with pytest.raises(converters.Mismatch, match=key) as caught:
        converters.load(tmp_path)
    assert list(caught.value.report.unexpected) == [key]


@pytest.mark.parametrize("row", [row for row in ROWS if FAMILIES[row.family].legacy], ids=lambda row: row.id)
def test_a_tensor_under_its_old_name_beside_the_new_one_is_unexpected(row, tmp_path):
    """Two spellings of one tensor: neither is believed silently."""
    key = f"{row.prefix}embeddings.LayerNorm.gamma"
    report = broken(row, tmp_path, lambda tensors: tensors.__setitem__(key, np.zeros(21, np.float32)))
    assert (list(report.missing), list(report.unexpected), list(report.mismatched)) == ([], [key], [])


# bfloat16: no further from the float32 reference than 1.1 times the reference's own bfloat16, over these many inputs
SEEDS = 100 if FULL else 20
BFLOAT16_ROWS = [
    Row("bert", MaskedLM),
    Row("roberta", Encoder),
    Row("roberta", SequenceClassifier, {"num_labels": 1, "problem_type": "regression"}),
    Row("xlm-roberta", SentenceEmbedder),
    Row("gpt2", CausalLM),
    Row("llama", CausalLM),
]


HALF = [(row, layout) for row in BFLOAT16_ROWS for layout in LAYOUTS if not row.on_decoder or layout == "stacked"]


@pytest.mark.parametrize(("row", "layout"), HALF, ids=lambda x: x if isinstance(x, str) else x.id)
def test_bfloat16_is_as_near_as_the_references_own(row, layout):
    from ..reference import inputs

    ref = reference(row)
    model, _ = converters.load(ref.directory, dtype="bfloat16", stacked=layout == "stacked")
    assert all(x.dtype == jnp.bfloat16 for x in leaves_by_path(eqx.filter(model, eqx.is_array)).values())
    half = make(row).to(torch.bfloat16)
    ours, theirs = [], []
    jitted = eqx.filter_jit(forward)
    with torch.no_grad():
        for seed in range(SEEDS):
            given = inputs(row, seed)
            truth = run(ref.model, row, given).numpy()
            ours.append(np.asarray(jitted(model, given), np.float32) - truth)
            theirs.append(run(half, row, given).float().numpy() - truth)
    rms = lambda errors: float(np.sqrt(np.mean(np.square(errors))))
    assert rms(ours) <= 1.1 * rms(theirs)


@layouts
def test_one_example_under_jit_is_the_row_of_the_batch(layout):
    row = Row("roberta", MaskedLM)
    ref = reference(row)
    one = {name: x[1] for name, x in ref.inputs.items()}
    call = eqx.filter_jit(lambda model, ids, **kwargs: model(ids, **kwargs))
    ours = call(loaded(row, layout)[0], one.pop("ids"), **one)
    np.testing.assert_allclose(ours, ref.output[1], rtol=0, atol=FORWARD * np.abs(ref.output).max())


def test_save_makes_the_checkpoint_that_the_rows_stand_on(tmp_path):
    """A sharded save of the same model holds the same tensors: `load` reads both alike."""
    row = Row("bert", MaskedLM)
    save(make(row), row, tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = converters.load(tmp_path)
    assert eqx.tree_equal(model, loaded(row, "tuple")[0])
