"""`python -m converters.hf BASE --adapter DIR`: proven with PEFT beside it, kept beside the base, or merged into it."""

import json
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import converters
from converters import hf, peft
from eqx_transformers import SequenceClassifier, load
from eqx_transformers.surgery import LoRA, select

from ..reference import make
from ..tiny import Row

ROW = Row("roberta", SequenceClassifier)
IDS = np.random.default_rng(5).integers(3, 61, (2, 9))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint, an adapter of it, and the reference's logits with the adapter."""
    place = tmp_path_factory.mktemp("base")
    reference = make(ROW)
    reference.save_pretrained(place / "roberta")
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["query", "value", "intermediate.dense"], task_type="SEQ_CLS",
        init_lora_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(reference, config).eval()
        adapted.save_pretrained(place / "adapter")
    with torch.no_grad():
        logits = adapted(torch.from_numpy(IDS)).logits.numpy()
    return place, logits


def close(model, logits):
    found = jax.vmap(model)(jnp.asarray(IDS, jnp.int32))
    assert np.abs(found - logits).max() <= 2e-5 * max(1.0, np.abs(logits).max())


def run(*argv, capsys):
    code = hf.main([*map(str, argv)])
    return code, capsys.readouterr()


def test_an_adapter_is_verified_and_kept_beside_the_base(base, tmp_path, capsys):
    place, logits = base
    code, said = run(
        place / "roberta", "--adapter", place / "adapter", "--verify", "--out", tmp_path / "out", capsys=capsys
    )
    assert code == 0 and "verified: max error" in said.out and "belongs to it" in said.out
    model, extras = load(tmp_path / "out")
    assert eqx.tree_equal(model, converters.load(place / "roberta")[0])
    directory = extras["adapter/adapter_config.json"].parent
    assert str(directory) in said.out and directory == tmp_path / "out" / "adapter"
    close(peft.load(model, directory), logits)


def test_an_adapter_is_merged_and_exported(base, tmp_path, capsys):
    place, logits = base
    code, said = run(
        place / "roberta", "--adapter", place / "adapter", "--merge", "--verify", "--out", tmp_path / "out",
        "--export", tmp_path / "hf", capsys=capsys,
    )  # fmt: skip
    assert code == 0 and "is merged into it" in said.out
    for model in (load(tmp_path / "out")[0], converters.load(tmp_path / "hf")[0]):
        assert not any(isinstance(x, LoRA) for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, LoRA)))
        close(model, logits)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_wrong_number_in_an_adapter_fails_the_verification(base, tmp_path, monkeypatch):
    place, _ = base
    adapted = peft.load

    def wrong(*args, **kwargs):
        model = adapted(*args, **kwargs)
        where = select(LoRA, under="**.blocks.1.attention.value_proj").one()
        return eqx.tree_at(lambda m: where(m).adapters[0].scale, model, replace_fn=lambda x: 1.01 * x)

    monkeypatch.setattr(peft, "load", wrong)
    verification = converters.verify(place / "roberta", adapter=place / "adapter")
    assert not verification.passed and "blocks.1.attention" in verification.first_divergence


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["--merge"], 2, "--merge goes with --adapter"),
        (["--adapter", "ADAPTER", "--export", "OUT"], 2, "--merge"),
        (["--adapter", "ADAPTER", "--dry-run"], 2, "--adapter is for a checkpoint that is read"),
        (["--adapter", "ADAPTER", "--verify", "--gradients"], 2, "compares outputs alone"),
        (["--adapter", "NOWHERE"], 2, "nowhere"),
        (["--adapter", "EMPTY"], 2, "adapter_config.json"),
    ],
)
def test_what_makes_no_sense_is_said_before_the_work(argv, code, said, base, tmp_path, capsys):
    place, _ = base
    (tmp_path / "empty").mkdir()
    names = {
        "ADAPTER": place / "adapter",
        "NOWHERE": tmp_path / "nowhere",
        "EMPTY": tmp_path / "empty",
        "OUT": tmp_path / "hf",
    }
    argv = [names.get(x, x) for x in argv]
    found, printed = run(place / "roberta", *argv, "--out", tmp_path / "out", capsys=capsys)
    assert (found, said in printed.err) == (code, True), printed.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_architecture_is_refused_and_nothing_is_written(base, tmp_path, capsys):
    place, _ = base
    make(Row("gpt2", converters.families.FAMILIES["gpt2"].models["CausalLM"])).save_pretrained(tmp_path / "gpt2")
    code, said = run(
        tmp_path / "gpt2", "--adapter", place / "adapter", "--out", tmp_path / "out", "--json", capsys=capsys
    )
    assert code == 4 and "query" in json.loads(said.out)["message"] and not (tmp_path / "out").exists()
