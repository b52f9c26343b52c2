"""Any file of a family under any head of it: what is shared is read, the rest is drawn or dropped, with the reason."""

import equinox as eqx
import jax
import numpy as np
import pytest

import converters
from converters.families import FAMILIES
from eqx_transformers import (
    GPT2,
    CausalLM,
    Encoder,
    MaskedLM,
    NextSentencePredictor,
    PreTraining,
    QuestionAnswerer,
    SentenceEmbedder,
    SequenceClassifier,
    TokenClassifier,
)
from eqx_transformers.surgery import leaves_by_path

from ..full import FULL
from ..reference import make, reference, save
from ..tiny import ALIKE, Row

# Every file of BERT and GPT-2 under every head of theirs; of the other families the bare file and the language model's.
PAIRS = [
    (Row(name, held), wanted)
    for name, family in FAMILIES.items()
    if name not in ALIKE
    for held in list(family.models.values())[: None if name in ("bert", "gpt2") else 1 + FULL]
    for wanted in family.models.values()
]
KEY = jax.random.key(7)


def encoder(model):
    return getattr(model, "backbone", model)


@pytest.mark.parametrize(("row", "wanted"), PAIRS, ids=lambda x: x.id if isinstance(x, Row) else x.__name__)
def test_the_encoder_is_read_and_only_a_strange_head_is_drawn(row, wanted):
    directory = reference(row).directory
    model, origin = converters.load(directory, head=wanted, key=KEY)
    own, _ = converters.load(directory)
    report = converters.inspect(directory, head=wanted)
    assert type(model) is wanted and report.ok
    for part in ("embedding", "encoder" if row.family == "t5" else "stack"):
        assert eqx.tree_equal(getattr(encoder(model), part), getattr(encoder(own), part))
    bare = {FAMILIES[row.family].bare, SentenceEmbedder}
    in_head = lambda path: FAMILIES[row.family].in_head(wanted, path)
    of_a_head = lambda path: in_head(path) or path.startswith("backbone.pooler.")
    assert not report.new if wanted in bare or wanted is row.head else all(map(of_a_head, report.new))
    heads = {path for path in leaves_by_path(eqx.filter(model, eqx.is_array)) if in_head(path)}
    if wanted not in bare and wanted is not row.head:
        held = HELD.get((row.head, wanted), ())
        assert {path for path in heads if path not in report.new} == {p for p in heads if p.startswith(held or "-")}
    if row.head is wanted:
        assert eqx.tree_equal(model, own) and not report.dropped
    assert origin.dropped == report.dropped


# What a file of the first holds of the second's own arrays; all else is drawn.
HELD = {
    (MaskedLM, CausalLM): ("head.",),
    (CausalLM, MaskedLM): ("head.",),
    (MaskedLM, PreTraining): ("head.",),
    (CausalLM, PreTraining): ("head.",),
    (PreTraining, MaskedLM): ("head.",),
    (PreTraining, CausalLM): ("head.",),
    (PreTraining, NextSentencePredictor): ("head.",),
    (NextSentencePredictor, PreTraining): ("next_sentence.",),
}


def test_a_pooler_that_the_file_has_is_not_drawn():
    row = Row("bert", Encoder)
    model, _ = converters.load(reference(row).directory, head=SequenceClassifier, labels=4, key=KEY)
    own, _ = converters.load(reference(row).directory)
    assert eqx.tree_equal(model.backbone.pooler, own.pooler)
    assert model.head.output.weight.shape == (4, 21)


def test_another_number_of_labels_draws_the_output_layer_alone():
    row = Row("roberta", SequenceClassifier)
    directory = reference(row).directory
    report = converters.inspect(directory, labels=5)
    assert report.new == {"head.output.weight": (5, 21), "head.output.bias": (5,)}
    assert set(report.dropped) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    model, _ = converters.load(directory, labels=5, key=KEY)
    own, _ = converters.load(directory)
    assert eqx.tree_equal(model.head.dense, own.head.dense)
    same, _ = converters.load(directory, labels=2)
    assert eqx.tree_equal(same, own)


def test_a_file_of_both_pretraining_heads_gives_either():
    row = Row("bert", PreTraining)
    directory = reference(row).directory
    held = reference(row).model.state_dict()
    model, _ = converters.load(directory, head=MaskedLM)
    assert set(converters.inspect(directory, head=MaskedLM).dropped) == {
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    }
    assert np.array_equal(model.head.dense.weight, held["cls.predictions.transform.dense.weight"].numpy())
    pairs, _ = converters.load(directory, head=NextSentencePredictor)
    assert np.array_equal(pairs.head.output.weight, held["cls.seq_relationship.weight"].numpy())


def test_a_decoder_that_sees_the_future_is_not_guessed_at():
    row = Row("bert", CausalLM, {"is_decoder": False})
    directory = reference(row).directory
    with pytest.raises(converters.UnsupportedConfig, match=r"BertLMHeadModel but has is_decoder = false.*MaskedLM"):
        converters.load(directory)
    assert converters.load(directory, override={"causal": True})[0].config.causal
    assert not converters.load(directory, head=MaskedLM)[0].config.causal
    masked = reference(Row("bert", MaskedLM)).directory
    assert converters.load(masked, head=CausalLM)[0].backbone.causal  # asked for, a decoder is made of an encoder


def test_labels_are_for_heads_that_have_them():
    directory = reference(Row("bert", Encoder)).directory
    with pytest.raises(converters.ConversionError, match="labels=3 is for a classifier, and PreTraining is none"):
        converters.load(directory, head=PreTraining, labels=3, key=KEY)
    assert converters.load(directory, head=TokenClassifier, labels=3, key=KEY)[0].head.output.weight.shape == (3, 21)


def test_missing_arrays_may_be_drawn_by_name_and_strange_keys_passed_by_glob(tmp_path):
    from safetensors.numpy import load_file, save_file

    row = Row("bert", SequenceClassifier)
    save(make(row), row, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held.pop("classifier.weight")
    held["extra.one"] = np.zeros(3, np.float32)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(converters.Mismatch) as caught:
        converters.load(tmp_path, key=KEY)
    assert list(caught.value.report.missing) == ["classifier.weight"]
    assert list(caught.value.report.unexpected) == ["extra.one"]
    model, origin = converters.load(tmp_path, allow_missing=["head.output.*"], allow_unexpected=["extra.*"], key=KEY)
    assert origin.ignored == {"extra.one": "allowed by allow_unexpected"}
    assert np.array_equal(model.head.output.bias, held["classifier.bias"])
    loose, _ = converters.load(tmp_path, strict=False, key=KEY)
    assert eqx.tree_equal(loose, model)


def test_facts_are_overridden_by_our_names():
    row = Row("roberta", MaskedLM)
    model, _ = converters.load(reference(row).directory, override={"dropout": 0.0, "activation": "silu"})
    own, _ = converters.load(reference(row).directory)
    assert model.config.dropout == 0.0 and model.backbone.embedding.dropout.p == 0.0
    assert model.backbone.stack.blocks[0].mlp.activation is not own.backbone.stack.blocks[0].mlp.activation
    arrays = lambda tree: leaves_by_path(eqx.filter(tree, eqx.is_array))
    assert all(np.array_equal(x, arrays(own)[path]) for path, x in arrays(model).items())


def test_the_report_is_said_before_a_tensor_is_read(monkeypatch):
    from converters.checkpoint import Checkpoint

    said, get = [], Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, key: said.append(key) or get(self, key))
    directory = reference(Row("bert", Encoder)).directory
    converters.load(directory, announce=said.append)
    assert said[0] == converters.inspect(directory)
    assert len(said) > 1 and all(isinstance(key, str) for key in said[1:])


VERIFIED = [
    (Row("bert", Encoder), MaskedLM),  # a drawn head has a tied name that the file lacks
    (Row("roberta", Encoder), CausalLM),
    (Row("bert", TokenClassifier), SequenceClassifier),  # the file's own classifier has our head's name and shape
    (Row("distilbert", TokenClassifier), SequenceClassifier),
    (Row("bert", CausalLM), SequenceClassifier),  # a causal model whose output has no tokens
    (Row("roberta", CausalLM), SentenceEmbedder),
    (Row("llama", CausalLM), SequenceClassifier),  # a sequence is read where it ends
    (Row("gpt2", GPT2, {"pad_token_id": None}), SequenceClassifier),  # and it ends where the row does
]


@pytest.mark.parametrize(
    ("row", "wanted"), VERIFIED if FULL else VERIFIED[::2], ids=lambda x: x.id if isinstance(x, Row) else x.__name__
)
def test_what_is_drawn_is_verified_too(row, wanted):
    verification = converters.verify(reference(row).directory, gradients=True, head=wanted, key=KEY)
    assert verification.passed, str(verification)


def test_a_head_that_the_reference_does_not_have_is_not_exported(tmp_path):
    encoder, _ = converters.load(reference(Row("roberta", Encoder)).directory)
    with pytest.raises(converters.ConversionError, match="There is no PreTraining of roberta: that has Encoder, Mask"):
        converters.export(PreTraining.of(encoder, key=KEY), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_sentence_embedder_may_name_the_class_that_its_encoder_was_taken_from(tmp_path):
    import json
    import shutil

    shutil.copytree(reference(Row("roberta", SentenceEmbedder)).directory, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_bytes()) | {"architectures": ["RobertaForMaskedLM"]}
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    assert type(converters.load(tmp_path / "one")[0]) is SentenceEmbedder
    (tmp_path / "one" / "modules.json").unlink()
    with pytest.raises(
        converters.Mismatch, match=r"the file holds the bare Encoder alone: head=Encoder \(--head Encoder\)"
    ):
        converters.load(tmp_path / "one")
    assert "  read          37\n" in str(converters.inspect(tmp_path / "one"))  # what is missing is not read


def test_a_config_of_another_number_of_answers_is_refused(tmp_path):
    row = Row("bert", QuestionAnswerer)
    with pytest.raises(converters.ConversionError, match="labels=3 is for a classifier, and QuestionAnswerer is none"):
        converters.load(reference(row).directory, labels=3)
    with pytest.raises(converters.ConversionError, match="labels = True: expected how many"):
        converters.load(reference(Row("bert", SequenceClassifier)).directory, labels=True)
