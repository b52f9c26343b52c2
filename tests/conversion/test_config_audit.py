"""config.json, field by field: what is called irrelevant changes nothing in the reference, and old spellings mean the
same. That every fact changes the model alone, or is refused, is a law in test_facts.py."""

import json
import shutil

import equinox as eqx
import pytest

import converters
from converters import UnsupportedConfig, convert
from converters.families import FAMILIES
from eqx_transformers import T5, CausalLM, MaskedLM, SequenceClassifier, TokenClassifier

from ..reference import changes_nothing, reference
from ..tiny import ALIKE, Row
from .breaking import config as changed
from .test_facts import other

# The language model of every family, and a classifier, which in Llama's kin is Llama's own.
LANGUAGE = {
    name: next(head for head in (MaskedLM, CausalLM, T5) if head in family.models.values())
    for name, family in FAMILIES.items()
}
CLASSIFIED = [name for name in FAMILIES if name not in ALIKE]
both = pytest.mark.parametrize(
    ("family", "head"),
    [*LANGUAGE.items(), *((name, SequenceClassifier) for name in CLASSIFIED)],
    ids=lambda x: getattr(x, "__name__", x),
)
# How the reference computes attention is chosen by those who run it, and differs in the last digits.
HOW = {"attn_implementation", "_attn_implementation", "_attn_implementation_autoset"}
VALUES = {
    "architectures": ["Another"],
    "chunk_size_feed_forward": 13,  # what is cut in pieces must divide: 13 tokens
    "dtype": "float32",
    "is_encoder_decoder": True,  # else the reference's cache mixes up what its decoder looks at
    "label2id": {"a": 0, "b": 1},
    "model_type": "another",
    "num_labels": 2,  # the length of id2label, which is a fact
    "transformers_version": "4.0.0",
}


def named(family):
    """The fields of config.json that are facts."""
    return {name for fact in family.facts for name in fact.theirs}


def read(directory):
    return json.loads((directory / "config.json").read_bytes())


@both
def test_what_is_irrelevant_changes_no_output_of_the_reference(family, head):
    row, family = Row(family, head), FAMILIES[family]
    fields = read(reference(row).directory)
    cached = {"use_cache"} if head is T5 else set()  # whose decoder lays its keys out otherwise with a cache
    for name in sorted(family.irrelevant - HOW - cached - named(family)):
        value = VALUES.get(name) or other(name, fields.get(name))
        assert changes_nothing(row, fields | {name: value}), (name, value)


@both
def test_every_field_of_the_references_config_is_known(family, head):
    config = reference(Row(family, head)).model.config_class().to_dict()
    one = FAMILIES[family]
    assert not config.keys() - named(one) - one.fixed.keys() - one.irrelevant


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
    "fields of generation": {"num_beams": 4, "max_length": 20, "do_sample": True, "temperature": 0.7},
    "an old version": {"transformers_version": "4.9.1"},
    "no version": {"transformers_version": ...},
    "nothing that is null": {"classifier_dropout": None, "problem_type": None, "pruned_heads": None},
    "no pruned heads": {"pruned_heads": {}},
    "gradient checkpointing": {"gradient_checkpointing": False, "use_cache": True},
}


# Of encoders, which once had positions of several kinds.
POSITIONS = {"positions that are absolute": {"position_embedding_type": "absolute"}}
# Of families whose positions turn: in two fields, where today there is one.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
TURNED = {
    "a base beside it": {"rope_parameters": ..., "rope_theta": 100.0},
    "a base and no scaling": {"rope_parameters": ..., "rope_theta": 100, "rope_scaling": None},
    "a kind that is the default": {"rope_parameters": ..., "rope_theta": 100, "rope_scaling": {"type": "default"}},
    "both, of one mind": {"rope_parameters": ROPE, "rope_theta": 100.0},
    "both, of two minds": {"rope_parameters": ROPE | {"rope_theta": 7.0}, "rope_scaling": ROPE},
    "a base inside and beside": {"rope_parameters": ROPE, "rope_theta": 7.0},
    "what is turned of a head": {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "what a program left": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 2},
}
# Of GPT-2: what the reference's config also answers to.
ALIASES = {
    "other names": {"n_embd": ..., "n_layer": ..., "n_head": ..., "n_positions": ...}
    | {"hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 31},
    "two names, of which the other counts": {"n_layer": 7, "num_hidden_layers": 2},
    "fields of the first files": {"n_ctx": 31, "task_specific_params": {"text-generation": {"do_sample": True}}},
}
SPELLED = [
    *((name, LANGUAGE[name], field) for name in CLASSIFIED for field in OLD.items()),
    *((name, head, field) for name, head in LANGUAGE.items() if head is MaskedLM for field in POSITIONS.items()),
    *(("bert", SequenceClassifier, field) for field in OLD.items()),
    *(("llama", CausalLM, field) for field in TURNED.items()),
    *(("gpt2", CausalLM, field) for field in ALIASES.items()),
]


def id_of(x):
    return x[0] if isinstance(x, tuple) else getattr(x, "__name__", x)


@pytest.mark.parametrize(("family", "head", "named_fields"), SPELLED, ids=id_of)
def test_an_old_spelling_is_the_same_model(family, head, named_fields, tmp_path):
    row, (_, fields) = Row(family, head), named_fields
    source = reference(row).directory
    if family in ("distilbert", "t5") and "classifier_dropout" in fields:
        fields = {name: value for name, value in fields.items() if name != "classifier_dropout"}
    shutil.copytree(source, tmp_path / "old")
    changed(**fields)(tmp_path / "old")
    old, origin = converters.load(tmp_path / "old")
    new, _ = converters.load(source)
    assert old.config == new.config and eqx.tree_equal(old, new)
    assert changes_nothing(row, read(tmp_path / "old"))
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
