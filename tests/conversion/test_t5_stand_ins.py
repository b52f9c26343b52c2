"""T5s that everybody starts from, with the key sets and config.json that the hub has, at a small width.

Files of version 1.0 hold the token table up to four times and a bias that nothing reads; those of version 1.1 say that
they are untied; transformers 5 says of all that they are tied, and means that nothing is scaled. All load strictly,
each surplus with its reason, and go back as they came.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import converters
from converters.families import FAMILIES
from eqx_transformers import T5, UMT5 as UMT5_FACTS, T5Encoder, T5Model, stack

from ..full import FULL
from ..reference import forward, run
from ..tiny import GATED

VOCAB, LAYERS = 61, 3
JUNK = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
TASKS = {"summarization": {"early_stopping": True, "length_penalty": 2.0, "num_beams": 4, "prefix": "summarize: "}}
# What the first files say: nothing of ties, of scaling, of a gate or of the decoder's depth.
T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 40,
    "d_kv": 8,
    "d_model": 24,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 4,
    "num_layers": LAYERS,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": TASKS,
    "vocab_size": VOCAB,
}
T5_11B = T5_SMALL | {"architectures": ["T5WithLMHeadModel"], "d_kv": 16, "num_heads": 2}
T5_V1_1 = T5_SMALL | {
    "d_ff": 36,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": LAYERS,
    "num_heads": 2,
    "tie_word_embeddings": False,
    "transformers_version": "4.9.1",
    "use_cache": True,
}
FLAN = T5_V1_1 | {
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_max_distance": 128,
    "transformers_version": "4.23.1",
}
BYT5 = T5_V1_1 | {
    "gradient_checkpointing": False,
    "num_decoder_layers": 1,
    "tokenizer_class": "ByT5Tokenizer",
    "vocab_size": 384,
}
MT5 = T5_V1_1 | {
    "architectures": ["MT5ForConditionalGeneration"],
    "model_type": "mt5",
    "tokenizer_class": "T5Tokenizer",
}
MT5 = {name: said for name, said in MT5.items() if name not in ("n_positions", "task_specific_params")}
UMT5 = {name: said for name, said in FLAN.items() if name not in ("n_positions", "task_specific_params")} | {
    "architectures": ["UMT5ForConditionalGeneration"],
    "classifier_dropout": 0.0,
    "model_type": "umt5",
    "num_decoder_layers": 2,
    "scalable_attention": True,
    "tokenizer_class": "T5Tokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.31.0.dev0",
}
# What transformers 5 writes of the same.
TODAY = {"dtype": "float32", "is_decoder": False, "tie_word_embeddings": True, "transformers_version": "5.23.0"}
TODAY |= {"relative_attention_max_distance": 128, "classifier_dropout": 0.0, "use_cache": True}


def drawer() -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(0, 0.25, shape).astype(np.float32)


def tensors(config: dict[str, Any], *copies: str, output: bool = False, junk: bool = False) -> dict[str, np.ndarray]:
    """All of a file; `copies` are further names of the token table, `output` a matrix of its own."""
    draw, d, inner = drawer(), config["d_model"], config["d_kv"] * config["num_heads"]
    gated = config.get("feed_forward_proj") == "gated-gelu"
    held = {"shared.weight": 2 * draw(config["vocab_size"], d)}
    held |= {name: held["shared.weight"].copy() for name in copies}
    held |= {"lm_head.weight": draw(config["vocab_size"], d)} if output else {}
    depths = {"encoder": config["num_layers"], "decoder": config.get("num_decoder_layers", config["num_layers"])}
    for half, depth in depths.items():
        for i in range(depth):
            layer = f"{half}.block.{i}.layer"
            parts = ["0.SelfAttention", *(["1.EncDecAttention"] if half == "decoder" else [])]
            for part in parts:
                held |= {f"{layer}.{part}.{name}.weight": draw(inner, d) for name in "qkv"}
                held[f"{layer}.{part}.o.weight"] = draw(d, inner)
            if i == 0 or config["model_type"] == "umt5":
                bias = draw(config["relative_attention_num_buckets"], config["num_heads"])
                held[f"{layer}.0.SelfAttention.relative_attention_bias.weight"] = 4 * bias
            mlp = f"{layer}.{len(parts)}.DenseReluDense"
            held |= {
                f"{mlp}.{name}.weight": draw(config["d_ff"], d) for name in (("wi_0", "wi_1") if gated else ("wi",))
            }
            held[f"{mlp}.wo.weight"] = draw(d, config["d_ff"])
            held |= {f"{layer}.{j}.layer_norm.weight": 1 + draw(d) for j in range(len(parts) + 1)}
        held[f"{half}.final_layer_norm.weight"] = 1 + draw(d)
    return held | ({JUNK: draw(config["relative_attention_num_buckets"], config["num_heads"])} if junk else {})


@dataclass(frozen=True)
class StandIn:
    """A file of the hub: what its config says, its tensors, which of them come to nothing, and what it is."""

    config: dict[str, Any]
    make: Callable[[], dict[str, np.ndarray]]
    facts: dict[str, Any]
    tied: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    container: str = "model.safetensors"


FIRST = {"tied": True, "scaled": True, "gated": False, "activation": "relu", "num_layers": LAYERS}
FIRST |= {"decoder_layers": LAYERS, "bias_per_layer": False, "start_id": 0, "end_id": 1}
LATER = FIRST | {"tied": False, "scaled": False, "gated": True, "activation": "gelu_tanh"}
BIN = "pytorch_model.bin"
V5 = {"scale_decoder_outputs": False, "dense_act_fn": "gelu_new", "is_gated_act": True}
STAND_INS = {
    "t5-small.bin": StandIn(
        T5_SMALL, lambda: tensors(T5_SMALL, *TABLES, junk=True), FIRST, TABLES, (JUNK,), container=BIN
    ),
    "t5-small": StandIn(T5_SMALL, lambda: tensors(T5_SMALL, junk=True), FIRST, (), (JUNK,)),
    "t5-small, every table": StandIn(T5_SMALL, lambda: tensors(T5_SMALL, *TABLES), FIRST, TABLES),
    "t5-11b.bin": StandIn(
        T5_11B, lambda: tensors(T5_11B, *TABLES[:2], junk=True), FIRST, TABLES[:2], (JUNK,), container=BIN
    ),
    "t5-v1_1-small.bin": StandIn(
        T5_V1_1, lambda: tensors(T5_V1_1, *TABLES[:2], output=True), LATER, TABLES[:2], container=BIN
    ),
    "flan-t5-small": StandIn(FLAN, lambda: tensors(FLAN, *TABLES[:2], output=True), LATER, TABLES[:2]),
    "byt5-small.bin": StandIn(
        BYT5, lambda: tensors(BYT5, *TABLES[:2], output=True), LATER | {"decoder_layers": 1}, TABLES[:2], container=BIN
    ),
    "mt5-small.bin": StandIn(MT5, lambda: tensors(MT5, *TABLES[:2], output=True), LATER, TABLES[:2], container=BIN),
    "umt5-small": StandIn(
        UMT5, lambda: tensors(UMT5, output=True), LATER | {"decoder_layers": 2, "bias_per_layer": True}
    ),
    "flan-t5-small, saved today": StandIn(FLAN | TODAY | V5, lambda: tensors(FLAN, output=True), LATER),
    "t5-small, saved today": StandIn(
        T5_SMALL | TODAY | {"scale_decoder_outputs": True, "num_decoder_layers": LAYERS},
        lambda: tensors(T5_SMALL),
        FIRST,
    ),
}
every = pytest.mark.parametrize("name", STAND_INS if FULL else [*STAND_INS][::2])


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, one in STAND_INS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(one.config))
        if one.container == BIN:
            torch.save({key: torch.from_numpy(x) for key, x in one.make().items()}, root / name / BIN)
        else:
            save_file(one.make(), root / name / one.container, metadata={"format": "pt"})
    return root


@every
def test_it_loads_strictly_and_every_surplus_has_its_reason(name, directories):
    one, report = STAND_INS[name], converters.inspect(directories / name)
    assert report.ok and not report.new and not report.dropped and report.model == "T5"
    assert report.tied == dict.fromkeys(one.tied, "shared.weight")
    assert list(report.ignored) == list(one.ignored)
    assert all("positions mean nothing between two texts" in why for why in report.ignored.values())
    assert report.num_tensors == len(one.make()) and not report.causes and not report.notes
    model, _ = converters.load(directories / name)
    assert type(model) is T5 and (model.head is None) == one.facts["tied"] and model.scaled == one.facts["scaled"]
    assert {fact: getattr(model.config, fact) for fact in one.facts} == one.facts


def test_the_stand_ins_have_the_keys_of_the_hubs_files():
    """At their depths: 131 tensors of t5-small, its copies and its junk; halves of byt5-small that are not alike."""
    deep = lambda config, **depths: config | {"d_model": 4, "vocab_size": 5} | depths
    assert len(tensors(deep(T5_SMALL, num_layers=6), *TABLES, junk=True)) == 131 + 3 + 1
    bytes_ = tensors(deep(BYT5, num_layers=12, num_decoder_layers=4), output=True)
    assert sum(key.startswith("encoder.block.") for key in bytes_) == 12 * 9 + 1
    assert sum(key.startswith("decoder.block.") for key in bytes_) == 4 * 14 + 1
    every_block = tensors(deep(UMT5, num_layers=8, num_decoder_layers=8), output=True)
    assert sum("relative_attention_bias" in key for key in every_block) == 16


def inputs(vocab: int) -> dict[str, np.ndarray]:
    """Rows padded on the right and on the left, longer than the buckets of one distance each."""
    rng = np.random.default_rng(2)
    ids, mask = rng.integers(2, vocab, (3, 23)), np.ones((3, 23), int)
    mask[1, 15:], mask[2, :6] = 0, 0
    read = rng.integers(2, vocab, (3, 19))
    return {"ids": np.where(mask, ids, 0), "attention_mask": mask, "decoder_token_ids": read}


def reference_of(model: Any, path: Any, **options: Any) -> Any:
    """transformers' model of a directory, which computes what version 4 did: see the test of umt5."""
    reference_class = getattr(transformers, FAMILIES[model.config.family].architecture(type(model)))
    found = reference_class.from_pretrained(path, attn_implementation="eager", **options)
    reference = found[0] if isinstance(found, tuple) else found
    FAMILIES[model.config.family].settle(reference, model)
    reference.eval()
    return found


def near(ours: Any, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1, np.abs(theirs).max()))


@every
def test_it_is_the_reference_is_verified_and_goes_back_bit_for_bit(name, directories, tmp_path):
    one, source, export = STAND_INS[name], directories / name, tmp_path / "export"
    model, origin = converters.load(source)
    reference, given = reference_of(model, source), inputs(one.config["vocab_size"])
    with torch.no_grad():
        theirs = run(reference, GATED, given).numpy()
    near(eqx.filter_jit(forward)(stack(model), given), theirs)
    assert converters.verify(source, model=model, origin=origin).passed

    converters.export(model, export, origin)
    again, info = reference_of(model, export, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        np.testing.assert_array_equal(run(again, GATED, given).numpy(), theirs)
    held, written = one.make(), load_file(export / "model.safetensors")
    assert held.keys() - written.keys() == {*one.tied, *one.ignored} and written.keys() <= held.keys()
    assert all(np.array_equal(x, held[key]) for key, x in written.items())
    said = lambda fields: {k: v for k, v in fields.items() if k not in ("dtype", "torch_dtype", "architectures")}
    config = json.loads((export / "config.json").read_bytes())
    assert said(config) == said(one.config) and config["architectures"] == [type(reference).__name__]
    assert eqx.tree_equal(converters.load(export)[0], model)


def test_transformers_5_scales_what_version_4_of_umt5_did_not(directories):
    """Version 4 scaled where config.json said tied; version 5 takes every one for tied, and scales them all.

    The files were trained and published without. Ours is their function: transformers 5's times the root of the width.
    """
    source, given = directories / "umt5-small", inputs(VOCAB)
    model, _ = converters.load(source)
    today = transformers.UMT5ForConditionalGeneration.from_pretrained(source, attn_implementation="eager").eval()
    assert UMT5["tie_word_embeddings"] is False and today.config.tie_word_embeddings is True
    with torch.no_grad():
        scaled = run(today, GATED, given).numpy()
    ours = eqx.filter_jit(forward)(model, given)
    near(ours, scaled * UMT5["d_model"] ** 0.5)
    assert np.abs(ours - scaled).max() > 1


# ---- halves and bare models of the same files


@pytest.mark.parametrize("name", ["t5-small.bin", "byt5-small.bin", "umt5-small"])
@pytest.mark.parametrize("kind", [T5Encoder, T5Model], ids=lambda kind: kind.__name__)
def test_what_a_part_does_not_use_is_dropped_with_its_reason(kind, name, directories, tmp_path):
    one, source = STAND_INS[name], directories / name
    whole, _ = converters.load(source)
    report = converters.inspect(source, head=kind)
    assert report.ok and not report.new
    reasons = set(report.dropped.values())
    decoder = {"the decoder is not part of this model"} if kind is T5Encoder else set()
    assert reasons == decoder | {"the language-model head is not part of this model"}
    part, origin = converters.load(source, head=kind)
    halves = ("embedding", "encoder") if kind is T5Encoder else ("embedding", "encoder", "decoder")
    assert all(eqx.tree_equal(getattr(part, half), getattr(whole, half)) for half in halves)
    given = inputs(one.config["vocab_size"])
    given = {key: x for key, x in given.items() if kind is T5Model or key != "decoder_token_ids"}
    with torch.no_grad():
        theirs = run(reference_of(part, source), GATED, given).numpy()
    near(eqx.filter_jit(forward)(part, given), theirs)
    converters.export(part, tmp_path / "export", origin)
    _, info = reference_of(part, tmp_path / "export", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert eqx.tree_equal(converters.load(tmp_path / "export")[0], part)


def put(directory: Any, config: dict[str, Any], held: dict[str, np.ndarray]) -> Any:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_file_of_an_encoder_alone_is_one_and_its_config_may_say_more(tmp_path):
    held = {key: x for key, x in tensors(UMT5).items() if not key.startswith("decoder.")}
    source = put(tmp_path, UMT5 | {"architectures": ["UMT5EncoderModel"]}, held)
    report = converters.inspect(source)
    assert report.ok and report.model == "T5Encoder" and not report.dropped and not report.ignored
    assert type(converters.load(source)[0]) is T5Encoder and converters.verify(source).passed


# ---- files that are not what they say


def test_an_output_that_differs_from_the_table_unties_a_model_that_scales(tmp_path):
    """As transformers 5 does: what is scaled is said by config.json, and the matrix is the file's."""
    reports = []
    source = put(tmp_path, T5_SMALL, tensors(T5_SMALL, *TABLES[:2], output=True))
    model, origin = converters.load(source, announce=reports.append)
    assert not model.config.tied and model.config.scaled and model.head is not None
    assert any("the model is untied" in note for note in reports[0].notes)
    given = inputs(VOCAB)
    with torch.no_grad():
        near(eqx.filter_jit(forward)(model, given), run(reference_of(model, source), GATED, given).numpy())
    converters.export(model, tmp_path / "export", origin)
    assert eqx.tree_equal(converters.load(tmp_path / "export")[0], model)


@pytest.mark.parametrize("key", TABLES[:2])
def test_a_table_of_one_half_that_differs_is_refused(key, tmp_path):
    held = tensors(T5_SMALL, *TABLES)
    held[key] = held[key] + np.eye(VOCAB, 24, dtype=np.float32)
    with pytest.raises(converters.MalformedCheckpoint, match=f"{key} and shared.weight are two names of one tensor"):
        converters.load(put(tmp_path, T5_SMALL, held))


UNTIED = "tie_word_embeddings = false, but the file has no output"
LACKING = {
    "flan without its output": (FLAN, tensors(FLAN), UNTIED),
    "umt5 without its output": (UMT5, tensors(UMT5), UNTIED),
    "a resized vocabulary": (FLAN | {"vocab_size": 60}, tensors(FLAN, output=True), "override={'vocab_size': 61}"),
    "more layers": (T5_SMALL | {"num_layers": 4}, tensors(T5_SMALL), "config.json says 4 layers, the file has 3"),
    "unlike halves unsaid": (
        {name: said for name, said in BYT5.items() if name != "num_decoder_layers"},
        tensors(BYT5, output=True),
        "config.json says 3 layers, the file has 1",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_the_likely_cause_of_a_config_of_another_model_is_said(case, tmp_path):
    config, held, says = LACKING[case]
    report = converters.inspect(put(tmp_path, config, held))
    assert not report.ok and len(report.causes) == 1 and says in report.causes[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"feed_forward_proj": "gated-swishy"}, "feed_forward_proj = 'gated-swishy'.*the activation is not one of"),
        ({"feed_forward_proj": "gelu-gated"}, "expected an activation, or gated-ACTIVATION"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        (
            {"scalable_attention": True},
            "scalable_attention = True is unknown",
        ),  # said of umt5 alone, where it is nothing
        ({"num_heads": 0}, "num_heads = 0: expected 1 or more"),
    ],
)
def test_a_fact_that_is_not_understood_is_refused(fields, said, tmp_path):
    with pytest.raises(converters.UnsupportedConfig, match=said):
        converters.inspect(put(tmp_path, T5_SMALL | fields, tensors(T5_SMALL)))


def test_a_tied_umt5_that_does_not_scale_cannot_be_said(tmp_path):
    """One field says both there: it would be read as a model whose output is missing."""
    sizes = {"vocab_size": 31, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
    for tied, scaled in ((True, True), (False, False), (False, True)):
        model = T5(replace(UMT5_FACTS, **sizes, tied=tied, scaled=scaled), key=jax.random.key(0))
        converters.export(model, tmp_path / f"{tied}{scaled}")
        again, _ = converters.load(tmp_path / f"{tied}{scaled}")
        assert eqx.tree_equal(again, model) and again.config == model.config
    model = T5(replace(UMT5_FACTS, **sizes, tied=True, scaled=False), key=jax.random.key(0))
    with pytest.raises(converters.ConversionError, match="tied = True"):
        converters.export(model, tmp_path / "out")
