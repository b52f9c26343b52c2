"""config.json, field by field: what is called irrelevant changes nothing in the reference, and old spellings mean the
same. That every fact changes the model alone, or is refused, is a law in test_laws.py."""

import json
import shutil

import equinox as eqx
import pytest
import torch

import converters
from converters import UnsupportedConfig, convert
from converters.families import FAMILIES
from eqx_transformers import MaskedLM, SequenceClassifier, TokenClassifier

from ..reference import reference, run
from ..tiny import Row
from .breaking import config as changed
from .test_laws import other

HEADS = (MaskedLM, SequenceClassifier)
both = pytest.mark.parametrize(
    ("family", "head"), [(f, h) for f in FAMILIES for h in HEADS], ids=lambda x: getattr(x, "__name__", x)
)
# How the reference computes attention is chosen by those who run it, and differs in the last digits.
HOW = {"attn_implementation", "_attn_implementation", "_attn_implementation_autoset"}
VALUES = {
    "architectures": ["Another"],
    "chunk_size_feed_forward": 13,  # what is cut in pieces must divide: 13 tokens
    "dtype": "float32",
    "label2id": {"a": 0, "b": 1},
    "model_type": "another",
    "num_labels": 2,  # the length of id2label, which is a fact
    "transformers_version": "4.0.0",
}


def read(directory):
    return json.loads((directory / "config.json").read_bytes())


@both
def test_what_is_irrelevant_changes_no_output_of_the_reference(family, head):
    row = Row(family, head)
    ref, family = reference(row), FAMILIES[family]
    fields, state = read(ref.directory), ref.model.state_dict()
    for name in sorted(family.irrelevant - HOW - {fact.theirs for fact in family.facts}):
        value = VALUES.get(name) or other(name, fields.get(name))
        config = ref.model.config_class.from_dict(fields | {name: value, "attn_implementation": "eager"})
        model = type(ref.model)(config)
        model.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(run(model.eval(), row, ref.inputs), torch.from_numpy(ref.output)), (name, value)


@both
def test_every_field_of_the_references_config_is_known(family, head):
    config = reference(Row(family, head)).model.config_class().to_dict()
    one = FAMILIES[family]
    assert not config.keys() - {fact.theirs for fact in one.facts} - one.fixed.keys() - one.irrelevant


@both
def test_a_field_that_is_fixed_may_have_no_other_value(family, head, tmp_path):
    source = reference(Row(family, head)).directory
    for name, allowed in FAMILIES[family].fixed.items():
        shutil.copytree(source, tmp_path / name)
        changed(**{name: other(name, allowed[0])})(tmp_path / name)
        with pytest.raises(UnsupportedConfig, match=name):
            converters.inspect(tmp_path / name)
        changed(**{name: allowed[-1]})(tmp_path / name)
        assert converters.inspect(tmp_path / name).ok


# As transformers 4 wrote them; `...` takes a field away.
OLD = {
    "torch_dtype instead of dtype": {"dtype": ..., "torch_dtype": "float32"},
    "both, of one mind": {"torch_dtype": "float32", "dtype": "float32"},
    "no dtype": {"dtype": ...},
    "num_labels instead of names": {"id2label": ..., "label2id": ..., "num_labels": 2},
    "no names at all": {"id2label": ..., "label2id": ...},
    "positions that are absolute": {"position_embedding_type": "absolute"},
    "fields of generation": {"num_beams": 4, "max_length": 20, "do_sample": True, "temperature": 0.7},
    "an old version": {"transformers_version": "4.9.1"},
    "no version": {"transformers_version": ...},
    "nothing that is null": {"classifier_dropout": None, "problem_type": None, "pruned_heads": None},
    "no pruned heads": {"pruned_heads": {}},
    "gradient checkpointing": {"gradient_checkpointing": False, "use_cache": True},
}


@pytest.mark.parametrize(("family", "head"), [*((f, MaskedLM) for f in FAMILIES), ("bert", SequenceClassifier)])
@pytest.mark.parametrize("fields", OLD.values(), ids=OLD)
def test_an_old_spelling_is_the_same_model(family, head, fields, tmp_path):
    source = reference(Row(family, head)).directory
    if family == "distilbert" and "classifier_dropout" in fields:
        fields = {name: value for name, value in fields.items() if name != "classifier_dropout"}
    shutil.copytree(source, tmp_path / "old")
    changed(**fields)(tmp_path / "old")
    old, origin = converters.load(tmp_path / "old")
    new, _ = converters.load(source)
    assert old.config == new.config and eqx.tree_equal(old, new)
    converters.export(old, tmp_path / "again", origin)
    before, after = read(tmp_path / "old"), read(tmp_path / "again")
    spelled = {"torch_dtype", "dtype", "label2id", "id2label", "num_labels"}
    assert {k: v for k, v in after.items() if k not in spelled} == {k: v for k, v in before.items() if k not in spelled}
    assert (
        after.get("torch_dtype", after.get("dtype")) == "float32"
        and not {"torch_dtype", "dtype"} <= after.keys() - before.keys()
    )
    assert eqx.tree_equal(converters.load(tmp_path / "again")[0], new)


def test_the_number_of_labels_is_read_in_every_spelling(tmp_path):
    row = Row("bert", TokenClassifier, {"num_labels": 3})
    shutil.copytree(reference(row).directory, tmp_path / "named")
    changed(id2label={"0": "O", "1": "B", "2": "I"}, label2id={"O": 0, "B": 1, "I": 2})(tmp_path / "named")
    shutil.copytree(reference(row).directory, tmp_path / "counted")
    changed(id2label=..., label2id=..., num_labels=3)(tmp_path / "counted")
    (named, origin), (counted, other_origin) = (converters.load(tmp_path / name) for name in ("named", "counted"))
    assert named.config.labels == counted.config.labels == 3
    assert origin.labels == ["O", "B", "I"] and other_origin.labels is None


def test_what_the_config_calls_the_dtype_is_no_reason_to_cast(tmp_path):
    """Tensors keep their own; a config of another mind is mentioned."""
    source = reference(Row("bert", MaskedLM)).directory
    for name in ("dtype", "torch_dtype"):
        shutil.copytree(source, tmp_path / name)
        changed(**({"dtype": ...} | {name: "float16"}))(tmp_path / name)
        report = converters.inspect(tmp_path / name)
        assert any("config.json says float16, the tensors are F32" in note for note in report.notes)
        assert eqx.tree_equal(converters.load(tmp_path / name)[0], converters.load(source)[0])
    assert converters.inspect(source).notes == ()


def test_facts_are_read_once_for_all_layouts(tmp_path):
    """What a plan says of the config does not depend on the way in."""
    source = reference(Row("roberta", MaskedLM)).directory
    plans = [convert.make_plan(convert.open_directory(source), convert.Request(stacked=s)) for s in (False, True)]
    assert plans[0].config == plans[1].config
