"""The two files that everybody starts from, with the key sets that the hub has, at a small width.

Old spellings, buffers, tied copies and the remains of pre-training must load strictly, each surplus with its reason,
and go back under today's names.
"""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import converters
from eqx_transformers import Encoder, MaskedLM, SentenceEmbedder, SequenceClassifier, stack

from ..reference import forward, inputs, run
from ..tiny import Row

LAYERS, DIM, MLP = 12, 12, 20
COMMON = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": DIM,
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "num_attention_heads": 3,
    "num_hidden_layers": LAYERS,
    "vocab_size": 61,
}
ROBERTA = COMMON | {
    "architectures": ["RobertaForMaskedLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 29,
    "model_type": "roberta",
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
BERT = COMMON | {
    "architectures": ["BertForMaskedLM"],
    "gradient_checkpointing": False,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 27,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
}


def tensors(prefix: str, config: dict, norm: tuple[str, str], rng) -> dict[str, np.ndarray]:
    """The encoder's keys, its norms spelled as `norm` says."""
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    held = {
        f"{prefix}.embeddings.word_embeddings.weight": draw(config["vocab_size"], DIM),
        f"{prefix}.embeddings.position_embeddings.weight": draw(config["max_position_embeddings"], DIM),
        f"{prefix}.embeddings.token_type_embeddings.weight": draw(config["type_vocab_size"], DIM),
        f"{prefix}.pooler.dense.weight": draw(DIM, DIM),
        f"{prefix}.pooler.dense.bias": draw(DIM),
    }
    dense = {"attention.self.query": (DIM, DIM), "attention.self.key": (DIM, DIM), "attention.self.value": (DIM, DIM)}
    dense |= {"attention.output.dense": (DIM, DIM), "intermediate.dense": (MLP, DIM), "output.dense": (DIM, MLP)}
    norms = [f"{prefix}.embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"{prefix}.encoder.layer.{i}"
        for name, shape in dense.items():
            held |= {f"{layer}.{name}.weight": draw(*shape), f"{layer}.{name}.bias": draw(shape[0])}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    return held | {f"{n}.{word}": 1 + draw(DIM) for n in norms for word in norm}


def roberta_base(rng) -> dict[str, np.ndarray]:
    held = tensors("roberta", ROBERTA, ("weight", "bias"), rng)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    return held | {
        "roberta.embeddings.position_ids": np.arange(29, dtype=np.int64)[None],
        "lm_head.bias": draw(61),
        "lm_head.dense.weight": draw(DIM, DIM),
        "lm_head.dense.bias": draw(DIM),
        "lm_head.layer_norm.weight": draw(DIM),
        "lm_head.layer_norm.bias": draw(DIM),
        "lm_head.decoder.weight": held["roberta.embeddings.word_embeddings.weight"],
    }


def bert_base_uncased(rng) -> dict[str, np.ndarray]:
    held = tensors("bert", BERT, ("gamma", "beta"), rng)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    return held | {
        "cls.predictions.bias": draw(61),
        "cls.predictions.transform.dense.weight": draw(DIM, DIM),
        "cls.predictions.transform.dense.bias": draw(DIM),
        "cls.predictions.transform.LayerNorm.gamma": draw(DIM),
        "cls.predictions.transform.LayerNorm.beta": draw(DIM),
        "cls.predictions.decoder.weight": held["bert.embeddings.word_embeddings.weight"],
        "cls.seq_relationship.weight": draw(2, DIM),
        "cls.seq_relationship.bias": draw(2),
    }


STAND_INS = {"roberta-base": (ROBERTA, roberta_base), "bert-base-uncased": (BERT, bert_base_uncased)}
both = pytest.mark.parametrize("name", STAND_INS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, (config, make) in STAND_INS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        save_file(make(np.random.default_rng(0)), root / name / "model.safetensors")
    return root


EXPLAINED = {
    "roberta-base": {
        "tied": {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
        "ignored": ["roberta.embeddings.position_ids"],
        "dropped": ["roberta.pooler.dense.bias", "roberta.pooler.dense.weight"],
        "renamed": 0,
    },
    "bert-base-uncased": {
        "tied": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
        "ignored": [],
        "dropped": [
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
            "cls.seq_relationship.bias",
            "cls.seq_relationship.weight",
        ],
        "renamed": 2 * (2 * LAYERS + 2),
    },
}


@both
def test_it_loads_strictly_and_every_surplus_has_its_reason(name, directories):
    report = converters.inspect(directories / name)
    explained = EXPLAINED[name]
    assert report.ok and not report.new
    assert report.tied == explained["tied"]
    assert list(report.ignored) == explained["ignored"] and list(report.dropped) == explained["dropped"]
    assert len(report.renamed) == explained["renamed"]
    assert all(len(why) > 20 for why in (report.ignored | report.dropped).values())
    assert all(key in str(report) for key in explained["dropped"] + explained["ignored"] + list(explained["tied"]))
    model, origin = converters.load(directories / name)
    assert type(model) is MaskedLM and model.head.decoder is None
    assert origin.tied == report.tied and origin.dropped == report.dropped


@both
def test_the_masked_lm_is_the_reference_and_round_trips_under_todays_names(name, directories, tmp_path):
    config, _ = STAND_INS[name]
    row = Row(config["model_type"], MaskedLM)
    model, origin = converters.load(directories / name)
    reference_class = getattr(transformers, config["architectures"][0])
    reference = reference_class.from_pretrained(directories / name, attn_implementation="eager").eval()
    given = inputs(row)
    theirs = run(reference, row, given).detach().numpy()
    ours = np.asarray(eqx.filter_jit(forward)(stack(model), given))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1, np.abs(theirs).max()))
    converters.export(model, tmp_path / "export", origin)
    again, info = reference_class.from_pretrained(
        tmp_path / "export", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(run(again.eval(), row, given), run(reference, row, given))
    written, state = load_file(tmp_path / "export" / "model.safetensors"), reference.state_dict()
    assert all(np.array_equal(x, state[key].numpy()) for key, x in written.items())
    reference_class(reference.config).save_pretrained(tmp_path / "theirs")  # a fresh one: no memory of old names
    assert written.keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    back, _ = converters.load(tmp_path / "export")
    assert eqx.tree_equal(back, model)


@both
def test_any_head_stands_on_it(name, directories, tmp_path):
    key = jax.random.key(0)
    bare, _ = converters.load(directories / name, head=Encoder)
    assert bare.pooler is not None
    classifier, origin = converters.load(
        directories / name, head=SequenceClassifier, labels=["no", "yes", "so"], key=key
    )
    report = converters.inspect(directories / name, head=SequenceClassifier, labels=3)
    assert report.ok and all(path.startswith("head.") for path in report.new)
    assert any("masked-LM head" in why for why in report.dropped.values())
    assert origin.labels == ["no", "yes", "so"] and classifier.config.labels == 3
    assert eqx.tree_equal(classifier.backbone.stack, bare.stack)
    assert (classifier.backbone.pooler is None) == (name == "roberta-base")
    embedder, _ = converters.load(directories / name, head=SentenceEmbedder)
    assert eqx.tree_equal(embedder.backbone.stack, bare.stack)
    converters.export(classifier, tmp_path, origin)
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.config.id2label == {0: "no", 1: "yes", 2: "so"}


def test_a_drawn_head_differs_with_the_key_and_needs_one(directories):
    load = lambda seed: converters.load(
        directories / "roberta-base", head=SequenceClassifier, labels=2, key=jax.random.key(seed)
    )[0]
    assert not np.array_equal(load(0).head.output.weight, load(1).head.output.weight)
    assert np.array_equal(load(0).head.output.weight, load(0).head.output.weight)
    with pytest.raises(converters.ConversionError, match=r"head\.output\.weight.*key="):
        converters.load(directories / "roberta-base", head=SequenceClassifier, labels=2)


def test_a_decoder_that_differs_from_the_embedding_unties_the_model_as_transformers_5_does(directories, tmp_path):
    held = roberta_base(np.random.default_rng(0))
    held["lm_head.decoder.weight"] = held["lm_head.decoder.weight"] + 1
    held["lm_head.decoder.bias"] = held["lm_head.bias"]
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ROBERTA))
    model, origin = converters.load(tmp_path)
    assert model.head.decoder is not None and not model.config.tied
    converters.export(model, tmp_path / "export", origin)
    assert json.loads((tmp_path / "export" / "config.json").read_bytes())["tie_word_embeddings"] is False
    again = converters.load(tmp_path / "export")[0]
    assert np.array_equal(again.head.decoder.weight, held["lm_head.decoder.weight"])


def test_two_names_of_one_bias_that_differ_are_refused(directories, tmp_path):
    held = roberta_base(np.random.default_rng(0))
    held["lm_head.decoder.bias"] = held["lm_head.bias"] + 1
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ROBERTA))
    with pytest.raises(converters.MalformedCheckpoint, match=r"lm_head\.decoder\.bias and lm_head\.bias"):
        converters.load(tmp_path)
