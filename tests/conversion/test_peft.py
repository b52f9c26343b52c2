"""Adapters of the PEFT library, against that library: what it writes computes here what it computes there, and back.

Logits: 2e-5 of the largest. B is never zero (`init_lora_weights=False`), and an adapter must change what it computes.
"""

import functools
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft as reference_library
import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_file

import converters
from converters import peft
from eqx_transformers import T5, CausalLM, MaskedLM, SequenceClassifier, reconfigure, unstack
from eqx_transformers.surgery import leaves_by_path, select
from eqx_transformers.surgery.adapters import add_adapter, set_adapters
from eqx_transformers.surgery.lora import LoRA

from .. import kept
from ..reference import forward, inputs, make, run, save
from ..tiny import Row

FORWARD = 2e-5
SAVED = "adapter_model.safetensors"

ROBERTA, BERT = Row("roberta", MaskedLM), Row("bert", SequenceClassifier, {"num_labels": 5})
GPT2, LLAMA, T5_ROW = Row("gpt2", CausalLM), Row("llama", CausalLM), Row("t5", T5)
UNTIED, TIED = (
    Row("roberta", MaskedLM, {"tie_word_embeddings": False}),
    Row("llama", CausalLM, {"tie_word_embeddings": True}),
)


@dataclass(frozen=True, eq=False)
class Case:
    """A base, the configuration of an adapter on it as PEFT takes it, and what `peft.save` must be told."""

    row: Row
    options: dict[str, Any]
    stacked: bool = False
    kind: type = LoraConfig
    saving: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(ROBERTA, {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"], "lora_dropout": 0.1}),
    "stacked": Case(ROBERTA, {"r": 4, "target_modules": ["query", "dense"]}, stacked=True),
    "rslora and a head": Case(
        BERT,
        {"r": 4, "target_modules": r".*\d\.(intermediate|output)\.dense", "use_rslora": True, "task_type": "SEQ_CLS"},
        saving={"modules_to_save": ("head",)},
    ),
    "some layers": Case(
        BERT,
        {
            "r": 2,
            "target_modules": ["dense"],
            "layers_to_transform": [1],
            "exclude_modules": ["pooler.dense", "output.dense"],
        },
    ),
    "dora": Case(
        GPT2, {"r": 3, "target_modules": ["c_attn", "c_fc", "c_proj"], "use_dora": True, "fan_in_fan_out": True}
    ),
    "dora, stacked": Case(LLAMA, {"r": 3, "target_modules": ["q_proj", "down_proj"], "use_dora": True}, stacked=True),
    "biases": Case(
        GPT2,
        {
            "r": 3,
            "target_modules": ["c_attn"],
            "bias": "all",
            "lora_bias": True,
            "modules_to_save": ["ln_f"],
            "fan_in_fan_out": True,
        },
        saving={"bias": "all", "modules_to_save": ("backbone.norm",)},
    ),
    "biases of adapted layers": Case(
        ROBERTA, {"r": 3, "target_modules": ["key"], "bias": "lora_only"}, saving={"bias": "lora_only"}
    ),
    "patterns": Case(
        T5_ROW,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q", "v", "wo"],
            "rank_pattern": {"encoder.*wo": 5, "block.1.*q": 2},
            "alpha_pattern": {"decoder.*v": 7},
        },
    ),
    "patterns, stacked": Case(
        LLAMA,
        {"r": 3, "target_modules": "all-linear", "rank_pattern": {"mlp.up_proj": 5}, "alpha_pattern": {"q_proj": 1}},
        stacked=True,
    ),
    "embeddings": Case(UNTIED, {"r": 4, "target_modules": ["word_embeddings", "position_embeddings", "key"]}),
    "embeddings with dora": Case(
        Row("gpt2", CausalLM, {"tie_word_embeddings": False}),
        {"r": 4, "target_modules": ["wte", "wpe"], "use_dora": True},
    ),
    "tied embeddings": Case(TIED, {"r": 4, "target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}),
    "a whole head": Case(
        ROBERTA,
        {"r": 2, "target_modules": ["query"], "modules_to_save": ["lm_head.dense"]},
        saving={"modules_to_save": ("head.dense",)},
    ),
    "ia3": Case(
        GPT2,
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        kind=IA3Config,
    ),
    "ia3, stacked": Case(
        T5_ROW, {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}, stacked=True, kind=IA3Config
    ),
}
cases = pytest.mark.parametrize("name", CASES)


@functools.cache
def base(row: Row) -> Path:
    return save(make(row), row, kept.directory("base"))


@functools.cache
def plain(row: Row, stacked: bool = False):
    return converters.load(base(row), stacked=stacked)


def written(model: Any, directory: Path) -> Path:
    """As PEFT saves it; its warnings are of what is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


def theirs(row: Row, options: dict[str, Any], kind: type = LoraConfig) -> Any:
    """The reference's model with a random adapter."""
    torch.manual_seed(1)
    random = {"init_lora_weights": False} if kind is LoraConfig else {"init_ia3_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference_library.get_peft_model(make(row), kind(**(random | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def made(name: str) -> tuple[Path, np.ndarray]:
    """The directory that PEFT writes of a case, and the logits that its model gives."""
    case = CASES[name]
    model = theirs(case.row, case.options, case.kind)
    return written(model, kept.directory("adapter")), logits(model, case.row)


def logits(model: Any, row: Row) -> np.ndarray:
    with torch.no_grad():
        return run(model, row, inputs(row)).numpy()


def close(ours: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=FORWARD * max(1.0, np.abs(expected).max()))


@functools.cache
def loaded(name: str):
    case = CASES[name]
    model, origin = plain(case.row, case.stacked)
    return peft.load(model, made(name)[0], origin)


def again_there(row: Row, directory: Path) -> Any:
    """The reference's model with the adapter of a directory, nothing missing and nothing unexpected."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = reference_library.PeftModel.from_pretrained(make(row), directory)
        result = reference_library.set_peft_model_state_dict(model, torch_file(directory / SAVED))
    assert not [str(one.message) for one in said if "missing" in str(one.message).lower()]
    assert not result.unexpected_keys
    return model.eval()


@cases
def test_what_peft_wrote_computes_the_same_here(name):
    case, (_, expected) = CASES[name], made(name)
    given = inputs(case.row)
    close(eqx.filter_jit(forward)(loaded(name), given), expected)
    assert np.abs(logits(make(case.row), case.row) - expected).max() > 1e-2


@cases
def test_what_is_written_here_is_read_there_and_here_again(name, tmp_path):
    case = CASES[name]
    model, origin = plain(case.row, case.stacked)
    peft.save(loaded(name), tmp_path / "out", origin, **case.saving)
    close(logits(again_there(case.row, tmp_path / "out"), case.row), made(name)[1])
    again = peft.load(model, tmp_path / "out", origin)
    assert eqx.tree_equal(eqx.filter(again, eqx.is_array), eqx.filter(loaded(name), eqx.is_array))


def ours(row: Row, under: str, **options: Any) -> tuple[Any, Any]:
    """(model, origin) with random adapters of our own."""
    model, origin = plain(row)
    wide = {"rank": 3, "alpha": 7.0, "init": "random", "key": jax.random.key(2)}
    return add_adapter(model, select("Linear", under=under), **(wide | options)), origin


def back_and_forth(model: Any, row: Row, directory: Path, **options: Any) -> Any:
    """What PEFT makes of what is written computes what ours does; and what is read of it here."""
    base_model, origin = plain(row)
    peft.save(model, directory, origin, **options)
    close(eqx.filter_jit(forward)(model, inputs(row)), logits(again_there(row, directory), row))
    return peft.load(base_model, directory, origin)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"alpha": 0.3, "use_bias": True}], ids=str)
def test_our_own_adapters_come_back_to_the_bit(options, tmp_path):
    model, origin = ours(BERT, "**.{query_proj,down_proj}", **options)
    peft.save(model, tmp_path / "out", origin)
    again = peft.load(plain(BERT)[0], tmp_path / "out", origin)
    strip = lambda tree: {k: x for k, x in leaves_by_path(tree).items() if not k.endswith("salt") and eqx.is_array(x)}
    before, after = strip(model), strip(again)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base(BERT))
    alpha = options.get("alpha", 7)
    assert told["use_rslora"] == ("rslora" in options) and told["lora_alpha"] == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize("under", ["**.attention", "**.{query,value}_proj"])
@pytest.mark.parametrize("dora", [False, True])
def test_three_layers_of_ours_become_one_of_theirs(under, dora, tmp_path):
    """Each has an A of its own: the ranks add up, B is block-diagonal; one has none; and all are one DoRA."""
    model, _ = ours(GPT2, under, dora=dora, alpha_pattern={"**.value_proj": 5.0})
    back_and_forth(model, GPT2, tmp_path / "out")
    held = load_file(tmp_path / "out" / SAVED)
    rank = 9 if under == "**.attention" else 6
    assert held["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (rank, 21)
    assert held["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (63, rank)


def test_a_fused_layer_of_ours_with_parts_of_its_own(tmp_path):
    model, _ = ours(ROBERTA, "**.down_proj", rank=2, parts=3)
    back_and_forth(model, ROBERTA, tmp_path / "out")
    assert load_file(tmp_path / "out" / SAVED)[
        "base_model.model.roberta.encoder.layer.0.output.dense.lora_A.weight"
    ].shape == (6, 37)


@pytest.mark.parametrize("row", [Row("gpt2", CausalLM), ROBERTA, T5_ROW], ids=lambda row: row.id)
def test_a_tied_table_is_written_for_both_its_ends(row, tmp_path):
    """As PEFT has it for names that it does not know to be tied: every module of the table is adapted on its own."""
    model, _ = plain(row)
    place = select("Embedding", where=lambda path, node: node.vocab_size == 61)
    model = add_adapter(model, place, rank=3, init="random", key=jax.random.key(0))
    again = back_and_forth(model, row, tmp_path / "out")
    (path,) = place.paths(plain(row)[0])
    for one in ("a", "b", "scale"):
        own, read = (leaves_by_path(tree)[f"{path}.adapters.0.{one}"] for tree in (model, again))
        assert np.array_equal(own, read)


def test_a_tied_table_that_is_adapted_alone_asks_for_an_array_of_its_own(tmp_path):
    options = {"r": 3, "target_modules": ["wte"]}
    there = theirs(GPT2, options)
    directory = written(there, tmp_path / "adapter")
    model, origin = plain(GPT2)
    with pytest.raises(converters.ConversionError, match=r"changes transformer\.wte but not lm_head.*tied=False"):
        peft.load(model, directory, origin)
    table = model.backbone.embedding.tokens.weight
    untied = reconfigure(model, lambda path, old, new: table, tied=False)
    adapted = peft.load(untied, directory, origin)
    close(eqx.filter_jit(forward)(adapted, inputs(GPT2)), logits(there, GPT2))


def test_rows_of_a_table(tmp_path):
    there = theirs(
        GPT2, {"r": 3, "target_modules": ["c_fc"], "trainable_token_indices": [3, 5], "fan_in_fan_out": True}
    )
    model, origin = plain(GPT2)
    adapted = peft.load(model, written(there, tmp_path / "adapter"), origin)
    before, after = (np.asarray(one.backbone.embedding.tokens.weight) for one in (model, adapted))
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [3, 5]
    close(eqx.filter_jit(forward)(adapted, inputs(GPT2)), logits(there, GPT2))
    peft.save(adapted, tmp_path / "out", origin, modules_to_save=("backbone.embedding.tokens",))
    close(logits(again_there(GPT2, tmp_path / "out"), GPT2), logits(there, GPT2))


def test_a_file_of_torch(tmp_path):
    directory, _ = made("plain")
    (tmp_path / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    torch.save(torch_file(directory / SAVED), tmp_path / "adapter_model.bin")
    model, origin = plain(ROBERTA)
    assert eqx.tree_equal(peft.load(model, tmp_path, origin), loaded("plain"))


def test_several_adapters_by_name(tmp_path):
    model, origin = plain(ROBERTA)
    one = loaded("plain")
    two = peft.load(one, made("biases of adapted layers")[0], origin, name="other")
    both = peft.load(two, made("plain")[0], origin, name="again")
    node = both.backbone.stack.blocks[0].attention.query_proj
    assert isinstance(node, LoRA) and node.names == ("default", "again")
    peft.save(set_adapters(both, "other"), tmp_path / "out", origin, name="again")
    assert eqx.tree_equal(peft.load(model, tmp_path / "out", origin), one)


def test_merged_it_computes_the_same_in_plain_layers():
    model, origin = plain(ROBERTA)
    directory, expected = made("plain")
    merged = peft.adapted(model, origin, directory, merge=True)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    close(eqx.filter_jit(forward)(merged, inputs(ROBERTA)), expected)
    assert eqx.tree_equal(peft.adapted(model, origin, directory, merge=False), loaded("plain"))


def test_stacked_is_the_tuple():
    model, origin = plain(ROBERTA)
    assert eqx.tree_equal(unstack(loaded("stacked")), peft.load(model, made("stacked")[0], origin))


def test_half_precision_keeps_the_numbers_of_the_file():
    model, origin = converters.load(base(ROBERTA), dtype="bfloat16")
    adapted = peft.load(model, made("a whole head")[0], origin)
    node = adapted.backbone.stack.blocks[0].attention.query_proj
    assert node.adapters[0].a.dtype == jnp.float32 and adapted.head.dense.weight.dtype == jnp.bfloat16


def test_an_earlier_adapter_is_replaced_and_what_lies_beside_it_stays(tmp_path):
    _, origin = plain(ROBERTA)
    peft.save(loaded("plain"), tmp_path / "out", origin)
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "adapter_model.bin").write_text("old")
    peft.save(loaded("stacked"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "adapter_config.json", SAVED]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
