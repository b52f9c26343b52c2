"""config.json and the model that it describes: every field that is a fact changes that fact alone, or is refused, and
every dropout rate is where the reference has it. That the other fields change nothing is in test_config_audit.py."""

import dataclasses
import json

import pytest

import converters
from converters.families import FAMILIES
from eqx_transformers import MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier

from ..full import FULL
from ..reference import changes_nothing, make, reference, save
from ..tiny import CONFIGS, Row
from .test_laws import loaded, planned

OTHERS = {
    "hidden_act": "tanh",
    "activation": "tanh",
    "summary_type": "last",
    "summary_activation": "tanh",
    "id2label": {str(i): f"L{i}" for i in range(9)},
    "position_embedding_type": "relative_key",
    "classifier_dropout": 0.25,
    "pruned_heads": {"0": [1]},
    "adapters": {"adapters": {"x": {}}},
    "activation_function": "tanh",
    "head_dim": 8,
    "rope_type": "yarn",
    "feed_forward_proj": "gated-silu",
    "dense_act_fn": "tanh",
    "layer_types": ["sliding_attention", "full_attention"],
}


def other(name, value):
    """Another value of a field, and a possible one."""
    if name in OTHERS or isinstance(value, bool) or value is None:
        return OTHERS.get(name, 7 if value is None else not value)
    return value / 2 + 0.01 if isinstance(value, float) else value + 1


def others(name, value):
    """Other values of a field; of a dictionary of facts, with another value of each."""
    if not isinstance(value, dict) or name in OTHERS:
        return [other(name, value)]
    return [value | {inner: other(inner, x)} for inner, x in value.items()]


@pytest.mark.parametrize("row", [row for i, row in enumerate(CONFIGS) if FULL or i % 2 == 0], ids=lambda row: row.id)
def test_every_fact_perturbed_changes_it_alone_or_is_refused(row):
    """Of several fields that say something together, one may be shadowed by another: in the reference too, then."""
    ref, family = reference(row), FAMILIES[row.family]
    config = json.loads((ref.directory / "config.json").read_bytes())
    base = loaded(row, "tuple")[0].config
    facts = {name: one for one in family.facts for name in one.theirs}
    fields = {name: config.get(name) for name in facts} | {name: allowed[0] for name, allowed in family.fixed.items()}
    for name, another in ((n, x) for n, value in fields.items() for x in others(n, value)):
        try:
            plan = planned(row, config=config | {name: another})
        except converters.UnsupportedConfig as error:
            assert name in str(error) or "num_heads" in str(error)
            continue
        changed = {f.name for f in dataclasses.fields(base) if getattr(plan.config, f.name) != getattr(base, f.name)}
        assert changed - {"spare_bias"} <= set(facts[name].ours), name
        assert changed or (len(facts[name].theirs) > 1 and changes_nothing(row, config | {name: another})), name


# Distinct rates for all fields, and where the reference's modules drop: in the backbone (embedding, attention weights,
# what attention gives, what the feed-forward network gives), and in the heads.
RATES = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.13, "classifier_dropout": 0.17}
BERT_LAYER = "encoder.layer.1"
BERT_RATES = (
    RATES,
    (
        "embeddings.dropout",
        f"{BERT_LAYER}.attention.self.dropout",
        f"{BERT_LAYER}.attention.output.dropout",
        f"{BERT_LAYER}.output.dropout",
    ),
)
DROPPING = {
    "bert": BERT_RATES,
    "roberta": BERT_RATES,
    "xlm-roberta": BERT_RATES,
    "electra": (RATES | {"summary_last_dropout": 0.19}, BERT_RATES[1]),
    "distilbert": (
        {"dropout": 0.11, "attention_dropout": 0.13, "seq_classif_dropout": 0.17, "qa_dropout": 0.19},
        (
            "embeddings.dropout",
            "transformer.layer.1.attention.dropout",
            None,
            "transformer.layer.1.ffn.dropout",
        ),
    ),
    "gpt2": (
        {"resid_pdrop": 0.11, "embd_pdrop": 0.19, "attn_pdrop": 0.13},
        ("drop", "h.1.attn.attn_dropout", "h.1.attn.resid_dropout", "h.1.mlp.dropout"),
    ),
    "qwen3": ({"attention_dropout": 0.13}, (None, "layers.1.self_attn.attention_dropout", None, None)),
}
IN_HEADS = {
    SequenceClassifier: {
        "roberta": "classifier.dropout",
        "xlm-roberta": "classifier.dropout",
        "electra": "classifier.dropout",
        "gpt2": None,
        "qwen3": None,
    },
    MultipleChoice: {"electra": "sequence_summary.last_dropout"},
    TokenClassifier: {},
    QuestionAnswerer: {"bert": None, "roberta": None, "xlm-roberta": None, "electra": None},
}


def rate(model, path):
    """Of a dropout module of torch, or a rate that its parent keeps itself."""
    if path is None:
        return 0.0
    parent, _, last = path.rpartition(".")
    found = getattr(model.get_submodule(parent), last)
    return found if isinstance(found, float) else found.p


@pytest.mark.parametrize(
    ("family", "head"),
    [(f, head) for f in DROPPING for head in IN_HEADS if head in FAMILIES[f].models.values()],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_every_site_drops_at_the_references_rate(family, head, tmp_path):
    options, places = DROPPING[family]
    row = Row(family, head, options)
    theirs = make(row)
    model, _ = converters.load(save(theirs, row, tmp_path))
    block = model.backbone.stack.blocks[1]
    ours = [block.attention.dropout, block.attention_output_dropout, block.mlp_output_dropout]
    wanted = [rate(theirs, None if place is None else f"{row.prefix}{place}") for place in places]
    assert [model.backbone.embedding.dropout.p, *(site.p for site in ours)] == wanted
    assert model.head.dropout.p == rate(theirs, IN_HEADS[head].get(family, "dropout"))
    twice = head is SequenceClassifier and family in IN_HEADS[SequenceClassifier]  # before the dense layer too
    assert model.head.input_dropout.p == (model.head.dropout.p if twice else 0.0)
