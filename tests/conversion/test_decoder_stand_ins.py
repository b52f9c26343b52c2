"""Causal models that everybody starts from, with the key sets and config.json that the hub has, at a small width.

The hub's `gpt2` is spelled as a bare model's and holds buffers, the first Llama 2 files hold the frequencies of their
positions, SmolLM's output is tied: all load strictly, each surplus with its reason, and go back under today's names.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import converters
from converters import hf
from eqx_transformers import GPT2, CausalLM, Llama, SequenceClassifier, stack

from ..reference import forward, inputs, run
from ..tiny import Row

VOCAB, ROOM, GPT2_LAYERS, LAYERS = 61, 27, 12, 3
KEY = jax.random.key(0)
GPT2_CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": ROOM,
    "n_embd": 12,
    "n_head": 3,
    "n_layer": GPT2_LAYERS,
    "n_positions": ROOM,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": VOCAB,
}
DISTILGPT2 = GPT2_CONFIG | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 37,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
}
SMOLLM = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_size": 18,
    "is_llama_config": True,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rope_interleaved": False,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
LLAMA_3 = SMOLLM | {
    "eos_token_id": [11, 12, 13],
    "head_dim": 6,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}
QWEN = {name: LLAMA_2[name] for name in LLAMA_2 if name not in ("pretraining_tp", "rope_scaling", "_name_or_path")} | {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
}


def drawer(dtype=np.float32):
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(0, 0.3, shape).astype(dtype)


def gpt2(before: str = "", masked: bool = False) -> dict[str, np.ndarray]:
    """160 tensors at 12 layers, as the hub's file has them; `masked`: with the second buffer of older ones."""
    draw, d = drawer(), 12
    held = {f"{before}wte.weight": draw(VOCAB, d), f"{before}wpe.weight": draw(ROOM, d)}
    dense = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}
    norms = [f"{before}ln_f"]
    for i in range(GPT2_LAYERS):
        layer = f"{before}h.{i}"
        held[f"{layer}.attn.bias"] = np.tril(np.ones((1, 1, ROOM, ROOM), np.float32))
        held |= {f"{layer}.attn.masked_bias": np.full((), -1e4, np.float32)} if masked else {}
        for name, shape in dense.items():
            held |= {f"{layer}.{name}.weight": draw(*shape), f"{layer}.{name}.bias": draw(shape[1])}
        norms += [f"{layer}.ln_1", f"{layer}.ln_2"]
    return held | {f"{norm}.{part}": draw(d) + (part == "weight") for norm in norms for part in ("weight", "bias")}


def distilgpt2() -> dict[str, np.ndarray]:
    held = gpt2("transformer.", masked=True)
    return held | {"lm_head.weight": held["transformer.wte.weight"]}


def llama(config: dict, dtype: Any = np.float32, buffers: bool = False, bias: bool = False) -> dict[str, np.ndarray]:
    draw, d = drawer(dtype), config["hidden_size"]
    width = d // config["num_attention_heads"]
    kv, inner = width * config["num_key_value_heads"], config["intermediate_size"]
    dense = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    dense |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d)}
    held, norms = {"model.embed_tokens.weight": draw(VOCAB, d)}, ["model.norm"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        held |= {f"{layer}.{name}.weight": draw(*shape) for name, shape in dense.items()}
        held[f"{layer}.mlp.down_proj.weight"] = draw(d, inner)
        held |= {f"{layer}.self_attn.{x}_proj.bias": draw(d if x == "q" else kv) for x in "qkv" if bias}
        held |= {f"{layer}.self_attn.rotary_emb.inv_freq": draw(width // 2) for _ in range(buffers)}
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    held |= {} if config["tie_word_embeddings"] else {"lm_head.weight": draw(VOCAB, d)}
    return held | {f"{norm}.weight": 1 + draw(d) for norm in norms}


@dataclass(frozen=True)
class StandIn:
    """A file of the hub: what its config says, its tensors, and which of these come to nothing, by their ending."""

    config: dict[str, Any]
    make: Callable[[], dict[str, np.ndarray]]
    ignored: tuple[tuple[str, int], ...] = ()
    tied: tuple[str, ...] = ()
    note: str | None = None


ATTENTION_MASK = (".attn.bias", GPT2_LAYERS)
BARE = (
    "config.json names GPT2LMHeadModel, and the keys are a bare GPT2's, without 'transformer.' before them; no head"
    " is lacking, for its output is the token embedding"
)
STAND_INS = {
    "gpt2": StandIn(GPT2_CONFIG, gpt2, (ATTENTION_MASK,), note=BARE),
    "an older gpt2": StandIn(
        GPT2_CONFIG, lambda: gpt2(masked=True), (ATTENTION_MASK, (".attn.masked_bias", GPT2_LAYERS)), note=BARE
    ),
    "distilgpt2": StandIn(
        DISTILGPT2, distilgpt2, (ATTENTION_MASK, (".attn.masked_bias", GPT2_LAYERS)), ("lm_head.weight",)
    ),
    "Llama-2": StandIn(
        LLAMA_2, lambda: llama(LLAMA_2, np.float16, buffers=True), ((".self_attn.rotary_emb.inv_freq", LAYERS),)
    ),
    "SmolLM": StandIn(SMOLLM, lambda: llama(SMOLLM)),
    "Llama-3.2": StandIn(LLAMA_3, lambda: llama(LLAMA_3)),
    "Qwen2.5": StandIn(QWEN, lambda: llama(QWEN, bias=True)),
}
COMPARED = ["gpt2", "Llama-2", "Llama-3.2", "Qwen2.5"]
every = pytest.mark.parametrize("name", STAND_INS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, one in STAND_INS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(one.config))
        save_file(one.make(), root / name / "model.safetensors")
    return root


@every
def test_it_loads_strictly_and_every_surplus_has_its_reason(name, directories):
    one, report = STAND_INS[name], converters.inspect(directories / name)
    assert report.ok and not report.new and not report.dropped and report.model == "CausalLM"
    found = {end: sum(key.endswith(end) for key in report.ignored) for end, _ in one.ignored}
    assert found == dict(one.ignored) and len(report.ignored) == sum(found.values())
    assert all("buffer" in why and "computed" in why for why in report.ignored.values())
    assert tuple(report.tied) == one.tied
    assert [note for note in report.notes if "config.json says" not in note] == [x for x in (one.note,) if x]
    assert report.num_tensors == len(one.make()) and str(report).count("buffer") == min(12, len(report.ignored))
    model, _ = converters.load(directories / name)
    assert type(model) is CausalLM and (model.head.decoder is None) == (name != "Llama-2")


def test_the_stand_in_has_the_keys_of_the_hubs_gpt2(directories):
    held = gpt2()
    assert len(held) == 160 and not any(key.startswith(("transformer.", "lm_head.")) for key in held)


@pytest.mark.parametrize("name", COMPARED)
def test_it_is_the_reference_and_round_trips_under_todays_names(name, directories, tmp_path):
    one, row = STAND_INS[name], Row(STAND_INS[name].config["model_type"], CausalLM)
    model, origin = converters.load(directories / name, dtype="float32")
    reference_class = getattr(transformers, row.architecture)
    load = lambda path, **options: reference_class.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32, **options
    )
    reference, given = load(directories / name).eval(), inputs(row)
    theirs = run(reference, row, given).detach().numpy()
    ours = np.asarray(eqx.filter_jit(forward)(stack(model), given))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1, np.abs(theirs).max()))
    converters.export(model, tmp_path / "export", origin)
    again, info = load(tmp_path / "export", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(run(again.eval(), row, given), run(reference, row, given))
    written, state = load_file(tmp_path / "export" / "model.safetensors"), reference.state_dict()
    assert all(np.array_equal(x, state[key].numpy()) for key, x in written.items())
    reference_class(reference.config).save_pretrained(tmp_path / "theirs")
    assert written.keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    config = json.loads((tmp_path / "export" / "config.json").read_bytes())
    said = lambda fields: {k: v for k, v in fields.items() if k not in ("torch_dtype", "dtype")}
    assert said(config) == said(one.config)
    assert eqx.tree_equal(converters.load(tmp_path / "export")[0], model)


@pytest.mark.parametrize(
    ("name", "bare"), [("gpt2", GPT2), ("distilgpt2", GPT2), ("SmolLM", Llama), ("Llama-2", Llama)]
)
def test_any_head_stands_on_it(name, bare, directories, capsys, tmp_path):
    own, _ = converters.load(directories / name)
    backbone, origin = converters.load(directories / name, head=bare)
    assert type(backbone) is bare and eqx.tree_equal(backbone.stack, own.backbone.stack)
    assert set(origin.dropped) == ({"lm_head.weight"} if name in ("distilgpt2", "Llama-2") else set())
    again, _ = converters.load(directories / name, head=CausalLM)
    assert eqx.tree_equal(again, own)
    classifier, origin = converters.load(
        directories / name, head=SequenceClassifier, labels=["no", "yes", "so"], key=KEY
    )
    report = converters.inspect(directories / name, head=SequenceClassifier, labels=3)
    assert report.ok and list(report.new) == ["head.output.weight"] and origin.labels == ["no", "yes", "so"]
    assert eqx.tree_equal(classifier.backbone.stack, own.backbone.stack)
    assert hf.main([str(directories / name), "--head", bare.__name__, "--out", str(tmp_path / "out")]) == 0
    assert f"-> {bare.__name__}:" in capsys.readouterr().out


def test_an_output_that_differs_from_the_embedding_unties_the_model(directories, tmp_path):
    held = distilgpt2()
    held["lm_head.weight"] = held["lm_head.weight"] + 1
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DISTILGPT2))
    reports = []
    model, origin = converters.load(tmp_path, announce=reports.append)
    assert not model.config.tied and np.array_equal(model.head.decoder.weight, held["lm_head.weight"])
    assert any("the model is untied" in note for note in reports[0].notes)
    converters.export(model, tmp_path / "export", origin)
    assert json.loads((tmp_path / "export" / "config.json").read_bytes())["tie_word_embeddings"] is False
    assert eqx.tree_equal(converters.load(tmp_path / "export")[0], model)


UNTIED = "tie_word_embeddings = false, but the file has no output"
LACKING = [
    ("gpt2", {"tie_word_embeddings": False}, UNTIED),
    ("SmolLM", {"tie_word_embeddings": False}, UNTIED),
    ("gpt2", {"vocab_size": 60}, "a vocabulary of 60, the file has 61 rows: override={'vocab_size': 61}"),
    ("SmolLM", {"vocab_size": 60}, "a vocabulary of 60, the file has 61 rows: override={'vocab_size': 61}"),
    ("gpt2", {"n_layer": 13}, "config.json says 13 layers, the file has 12"),
    ("SmolLM", {"num_hidden_layers": 2}, "config.json says 2 layers, the file has 3"),
]


@pytest.mark.parametrize(("name", "fields", "says"), LACKING)
def test_the_likely_cause_of_a_config_of_another_model_is_said(name, fields, says, directories, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(STAND_INS[name].config | fields))
    save_file(STAND_INS[name].make(), tmp_path / "model.safetensors")
    report = converters.inspect(tmp_path)
    assert not report.ok and len(report.causes) == 1 and says in report.causes[0]


def test_a_bare_file_that_lacks_the_head_is_said_to(directories, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(GPT2_CONFIG | {"architectures": ["GPT2ForSequenceClassification"]})
    )
    save_file(gpt2(), tmp_path / "model.safetensors")
    with pytest.raises(converters.Mismatch, match=r"the file holds the bare GPT2 alone: head=GPT2 \(--head GPT2\)"):
        converters.load(tmp_path)
