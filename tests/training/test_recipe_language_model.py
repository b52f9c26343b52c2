"""The command that trains a language model on a text, with tiny models; and what its sizes reach on real texts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import eqx_transformers
from eqx_transformers import CausalLM, GPT2Config
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.training import train_tokenizer
from eqx_transformers.training.entropy import bigram_entropy, bits_per_character, unigram_entropy
from eqx_transformers.training.recipes import _language_setup as setup, language_model as recipe
from eqx_transformers.training.recipes._dump import FILES
from eqx_transformers.training.recipes._language_models import MODELS, ORIGINAL, QUICK, SMALL, Shape, config_of, preset
from eqx_transformers.training.recipes._options import Settled, Training, WrongUsage
from eqx_transformers.training.recipes._run import command
from eqx_transformers.training.recipes._samples import continued
from eqx_transformers.training.recipes.language_model import LanguageModelled, Options, language_model

from ..examples import run_examples

TINY = ["--layers", "1", "--heads", "2", "--embed-dim", "16", "--mlp-dim", "32", "--length", "8", "--batch-size", "16"]
TINY += ["--sample-tokens", "6", "--no-progress"]


def rhyme(count):
    """Lines in which every letter follows from the two before it."""
    return "".join("abcabd ace\n" for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("language_model")
    (out / "text.txt").write_text(rhyme(150))
    return out


def argv(folder, out, *more):
    return [str(folder / "text.txt"), "--out", str(out), *TINY, *more]


@pytest.fixture(scope="module")
def trained(folder):
    """A GPT-2, in two halves: the second start goes on where the first one stopped."""
    out = folder / "gpt2"
    more = ["--model", "gpt2", "--steps", "60", "--learning-rate", "0.02", "--evaluate-every", "30"]
    more += ["--sample-every", "2", "--dump", str(folder / "dump"), "--prompt", "abc"]
    assert command(recipe.main, argv(folder, out, *more)) == 0
    return out


# What a text says of itself.


def test_entropies_of_a_text_that_is_counted_by_hand():
    train, held = np.array([0, 1, 0, 1, 0, 2]), np.array([2, 0, 1])
    # The held-out 0 and 1: (3 + 1) / (6 + 3) and (2 + 1) / (6 + 3); after 2 and 0: (0 + 1) / (0 + 3), (2 + 1) / (3 + 3)
    assert unigram_entropy(train, held, 3) == pytest.approx(-(math.log(4 / 9) + math.log(3 / 9)) / 2)
    assert bigram_entropy(train, held, 3) == pytest.approx(-(math.log(1 / 3) + math.log(3 / 6)) / 2)
    assert bigram_entropy(train, held, 3, smoothing=0) == math.inf
    own = bigram_entropy(train, train, 3, smoothing=0)
    assert own == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 5)  # after 1 always 0: nothing to say
    assert bits_per_character(math.log(2), tokens=10, characters=20) == pytest.approx(0.5)


def test_entropies_of_tokens_that_are_drawn_are_those_they_were_drawn_by():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, 200_000)
    for found in (unigram_entropy(ids[:100_000], ids[100_000:], 5), bigram_entropy(ids[:100_000], ids[100_000:], 5)):
        assert found == pytest.approx(math.log(5), rel=1e-3)


@pytest.mark.parametrize(
    ("train", "held", "options", "said"),
    [([0], [0, 1], {}, "two tokens"), ([0, 7], [0, 1], {}, "the token 7"), ([0, 1], [0, 1], {"smoothing": -1}, "-1")],
)
def test_entropies_of_what_is_no_text(train, held, options, said):
    with pytest.raises(ValueError, match=said):
        bigram_entropy(np.array(train), np.array(held), 3, **options)


# The command.


def test_the_loss_falls_below_the_bigram_entropy_of_what_is_held_out(trained):
    found = json.loads((trained / "metrics.json").read_text())
    assert found["steps"] == 60 and found["held_out_tokens"] > 100
    assert found["loss"] < 0.5 * found["bigram_entropy"] < found["unigram_entropy"]
    assert found["bits_per_character"] == pytest.approx(found["loss"] / math.log(2))  # a character is a token
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    held = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert min(held) == pytest.approx(found["loss"], rel=1e-5) and len(held) == 2
    assert found["sample"] == "abd ac"


def test_the_step_is_dumped_as_the_compiler_sees_it(trained, folder):
    jaxpr, stable, compiled = ((folder / "dump" / name).read_text() for name in FILES)
    assert "dot_general" in jaxpr and "stablehlo.dot_general" in stable and "HloModule" in compiled


def test_a_second_start_goes_on_and_other_settings_are_refused(folder, trained, capsys):
    more = ["--model", "gpt2", "--learning-rate", "0.02", "--evaluate-every", "30", "--prompt", "bca"]
    before = leaves_by_path(eqx_transformers.load(trained / "model")[0])
    assert command(recipe.main, argv(folder, trained, *more, "--steps", "60")) == 0
    said = capsys.readouterr().out
    for path, x in leaves_by_path(eqx_transformers.load(trained / "model")[0]).items():
        np.testing.assert_array_equal(before[path], x, err_msg=path)
    assert re.search(r"^held-out loss: \d.\d{4} nats a token, below the bigram entropy\n\Z", said, re.MULTILINE)
    assert command(recipe.main, argv(folder, trained, *more, "--steps", "61")) == 2
    assert "--steps was 60 and is 61" in capsys.readouterr().err


def test_transformers_says_the_same_with_what_is_exported(trained):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "exported")
    ids = tokenizer("abcab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    ours, extras = eqx_transformers.load(trained / "model")
    np.testing.assert_allclose(eqx.filter_jit(ours)(ids[0].numpy()), logits, atol=1e-4)
    assert model.config.eos_token_id is None and model.generation_config.eos_token_id is None
    assert extras["tokenizer.json"].is_file() and tokenizer.decode(ids[0]).replace(" ", "") == "abcab"


def test_a_model_goes_on_with_no_tokenizer_but_its_own(folder, trained, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(trained / "exported", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    go_on = lambda *more: command(recipe.main, [str(folder / "text.txt"), "--out", str(tmp_path / "out"), *more])
    assert go_on("--from", str(bare), "--steps", "1") == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert go_on("--from", str(bare), "--steps", "1", "--tokenizer", "char") == 2
    assert "needs the tokenizer that it was made with" in capsys.readouterr().err
    assert go_on("--from", str(trained / "model"), "--model", "gpt2") == 2
    assert "leave out --model" in capsys.readouterr().err


def test_tokens_that_the_tokenizer_does_not_know_are_counted(trained, tmp_path):
    (tmp_path / "strange.txt").write_text("abcab\nzzz\n" * 40)
    training = setup.training_for(Options(), trained / "model", Training(batch_size=2))
    work = setup.prepared([tmp_path / "strange.txt"], trained / "model", Shape(), Options(), training, tmp_path)
    assert any("120 tokens are unknown" in line for line in work.said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--warmup", "0.5"], "--warmup and --weight-decay are AdamW's"),
        (["--optimizer", "functional-sgd", "--beta1", "0.5"], "--beta1 and --beta2 are Adam's"),
    ],
)
def test_what_an_optimizer_has_not_is_refused(folder, tmp_path, capsys, options, said):
    more = ["--quick", "--no-progress", *options]
    assert command(recipe.main, [str(folder / "text.txt"), "--out", str(tmp_path / "out"), *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["model", "exported"])
def test_a_model_goes_on_with_its_tokenizer(folder, trained, tmp_path, kind, capsys):
    training = Training(steps=1, batch_size=16, learning_rate=1e-5, progress=False)
    options = Options(sample_tokens=0, rows="shuffled")
    found = language_model(folder / "text.txt", out=tmp_path, source=trained / kind, options=options, training=training)
    first = json.loads((trained / "metrics.json").read_text())
    assert isinstance(found, LanguageModelled) and found.metrics["loss"] == pytest.approx(first["loss"], rel=0.02)
    assert found.sample == "" and found.stopped == "steps" and found.path == tmp_path / "model"
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].keys() >= set("abcde")


def test_the_default_is_the_functional_transformers_own(folder, tmp_path):
    own = preset("functional-head", "original")
    assert (own.batch_size, own.length, own.epochs, own.learning_rate, own.rows) == (128, 32, 32, 1e-3, "shuffled")
    options = Options()
    assert setup.training_for(options).steps == SMALL["functional-head"].steps and setup.MODEL == "functional-head"
    assert setup.training_for(options).patience == setup.PATIENCE
    assert setup.training_for(Options(original=True)).patience == 0
    said = setup.training_for(options, None, Training(epochs=2, batch_size=7))
    assert (said.epochs, said.steps, said.batch_size, said.learning_rate) == (2, None, 7, 1e-3)
    quick = Options(quick=True, tokenizer="bpe:270", hold_out=0.3)
    training = setup.training_for(quick)
    work = setup.prepared([folder / "text.txt"], None, Shape(), quick, training, tmp_path)
    config = work.model.config
    assert (config.embed_dim, config.head_dim, config.mlp_dim, training.steps) == (91, 13, 111, 50)
    assert 258 <= config.vocab_size <= 270 and work.batches[0]["token_ids"].shape == (128, 32)
    text = work.tokenizer.decode(np.concatenate([work.train_ids, work.held_ids]).tolist())
    assert text == rhyme(150) and len(work.held_ids) > 2 and work.train_ids[0] != work.held_ids[-1]


def test_a_tokenizer_is_of_the_run_only_where_there_is_one_to_go_on_with(folder, tmp_path):
    train_tokenizer(["xyz"], "char", special_tokens=setup.SPECIAL).save(str(tmp_path / "tokenizer.json"))
    of = lambda: setup._tokenizer(Options(), "abc", 2, tmp_path, None).get_vocab().keys()
    assert {"a", "b", "c"} <= of() and not of() & set("xyz")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert {"x", "y", "z"} <= of() and not of() & set("abc")
    with pytest.raises(WrongUsage, match="--tokenizer words is none of char, bpe and bpe:SIZE"):
        setup._tokenizer(Options(tokenizer="words"), "abc", 2, tmp_path, None)


def test_the_width_of_a_gpt2_is_that_of_its_heads():
    config = config_of("gpt2", Shape(heads=3, head_dim=5), SMALL["gpt2"], vocab_size=50, length=8, padding_id=0)
    assert (config.num_heads, config.embed_dim) == (3, 15)
    with pytest.raises(WrongUsage, match="--embed-dim 16 must be --heads 3 times --head-dim 5"):
        shape = Shape(heads=3, head_dim=5, embed_dim=16)
        config_of("gpt2", shape, SMALL["gpt2"], vocab_size=50, length=8, padding_id=0)


@pytest.mark.parametrize("size", ["small", "quick", "original"])
def test_every_size_of_every_model_can_be_made(size):
    sizes = {"small": SMALL, "quick": QUICK, "original": ORIGINAL}[size]
    assert set(sizes) == (set(MODELS) if size != "original" else set(MODELS) - {"gpt2", "llama"})
    for name, own in sizes.items():
        config = config_of(name, Shape(), own, vocab_size=50, length=own.length, padding_id=0)
        shapes = eqx.filter_eval_shape(lambda config=config: CausalLM(config, key=jax.random.key(0)))
        assert shapes.config.embed_dim == own.embed_dim and shapes.config.mlp_dim == own.mlp_dim
        wider = Shape(embed_dim=2 * own.embed_dim)
        config = config_of(name, wider, own, vocab_size=50, length=own.length, padding_id=0)
        assert config.num_heads == own.heads and config.mlp_dim == 2 * own.mlp_dim


def test_the_originals_optimizers(folder):
    """One step of each from the same gradient: what its formula says."""
    gradient, start = {"w": np.array([3.0, -4.0], np.float32)}, {"w": np.zeros(2, np.float32)}
    training = Settled(learning_rate=0.1, clip_norm=1.0, steps=10)
    expected = {
        "haiku-tutorial": [-0.1, 0.1],
        "functional": [-0.1, 0.1],
        "functional-sgd": [-0.3, 0.4],
        "functional-sign": [-0.1, 0.1],
        "adamw": [-0.1, 0.1],
    }
    for name, wanted in expected.items():
        told = replace(training, warmup=0.0) if name == "adamw" else training
        tuned = setup.optimizer_of(Options(optimizer=name), told, 10)
        updates, _ = tuned.optimizer.update(gradient, tuned.optimizer.init(start), start)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-4, err_msg=name)
        assert tuned.clips == (name == "haiku-tutorial") and float(tuned.schedule(0)) == pytest.approx(0.1)


@pytest.mark.parametrize("rows", ["shuffled", "crops", "offsets"])
def test_rows_are_cut_as_is_said_and_every_held_out_token_is_predicted_once(folder, tmp_path, rows):
    options = Options(rows=rows, length=8)
    training = Settled(batch_size=4)
    shape = Shape(layers=1, heads=1, embed_dim=4)
    work = setup.prepared([folder / "text.txt"], None, shape, options, training, tmp_path)
    width = 8 + (rows == "crops")
    starts = lambda epoch: [
        row.tolist()
        for i in range(work.batches.per_epoch)
        for batch in [work.batches[epoch * work.batches.per_epoch + i]]
        for row in batch["token_ids"][batch["weights"] > 0]
    ]
    assert work.batches.shapes == [(4, width)] and work.row_length == width
    cut = lambda at: sorted(
        work.train_ids[at:][i : i + width].tolist() for i in range(0, len(starts(0)) * width, width)
    )
    if rows == "offsets":
        assert sorted(starts(0)) in map(cut, range(width)) and sorted(starts(0)) != sorted(starts(1))
    else:
        assert sorted(starts(0)) == sorted(starts(1)) == cut(0) and starts(0) != starts(1)
    predicted = sum(
        (batch["attention_mask"][:, 1:] * batch["weights"][:, None]).sum() for batch in work.evaluated(None)
    )
    assert predicted == len(work.held_ids) - 1 and len(work.evaluated(2)) == 2


# Samples.


def test_samples_beyond_the_rows_are_said_from_the_last_of_them():
    """By windows and by the cache the same, where both can; and behind the rows as a loop of forward passes says."""
    config = GPT2Config(vocab_size=11, num_layers=1, embed_dim=16, num_heads=2, max_positions=8)
    model = jax.tree.map(lambda x: 8 * x if eqx.is_array(x) else x, CausalLM(config, key=jax.random.key(0)))
    prompt = np.array([3, 1, 4], np.int32)
    call, said = eqx.filter_jit(model), list(prompt)
    for _ in range(9):
        last = np.array(said[-8:], np.int32)
        row = np.zeros(8, np.int32)
        row[: len(last)] = last
        said.append(int(np.argmax(call(row)[len(last) - 1])))
    found = continued(model, prompt, new=9, length=8)
    assert found.tolist() == said[3:] and len(set(said[3:])) > 1
    assert continued(model, prompt, new=5, length=8).tolist() == said[3:8]  # by `generate`
    warm = [continued(model, prompt, new=9, length=8, temperature=5.0, key=jax.random.key(i)) for i in (0, 0, 1)]
    assert warm[0].tolist() == warm[1].tolist() != warm[2].tolist()
    cold = continued(model, prompt, new=9, length=8, temperature=1e-4, key=jax.random.key(0))
    assert cold.tolist() == found.tolist()


# Texts.


def test_a_long_text_is_tokenized_in_pieces_that_end_with_lines(monkeypatch):
    text = "one two\n" * 9 + "x" * 70 + "\nend"
    tokenizer = train_tokenizer([text], "bpe", vocab_size=270, special_tokens=setup.SPECIAL)
    whole = setup.encoded(text, tokenizer)
    monkeypatch.setattr(setup, "PIECE", 20)
    pieces = setup.encoded(text, tokenizer)
    assert tokenizer.decode(pieces.tolist()) == tokenizer.decode(whole.tolist()) == text
    assert len(setup.encoded("", tokenizer)) == 0


BAD = {
    "empty": (b"", [], "is empty"),
    "short": (b"a b\n", [], "few"),
    "utf-8": (b"a text\nb\xffd\n", [], "line 2"),
    "hold-out": (b"text\n" * 99, ["--hold-out", "1"], "--hold-out"),
    "both": (b"text\n" * 99, ["--quick", "--original"], "two sizes"),
    "original": (b"text\n" * 99, ["--original", "--model", "gpt2"], "has no original"),
    "heads": (b"text\n" * 99, ["--heads", "3", "--embed-dim", "16"], "embed_dim"),
    "dropout": (b"text\n" * 99, ["--dropout", "0.1"], "drops nothing"),
    "mlp": (b"text\n" * 99, ["--model", "haiku-example", "--mlp-dim", "100"], "multiple"),
    "positions": (b"text\n" * 99, ["--max-positions", "4"], "--max-positions 4"),
    "tokenizer": (b"text\n" * 99, ["--tokenizer", "nowhere"], "nowhere"),
    "small bpe": (b"text\n" * 99, ["--tokenizer", "bpe:100"], "too small"),
    "temperature": (b"text\n" * 99, ["--temperature", "0"], "--temperature"),
    "prompt": (b"text\n" * 99, ["--prompt", ""], "no token"),
    "from": (b"text\n" * 99, ["--from", "nowhere", "--layers", "2"], "leave out"),
    "beta": (b"text\n" * 99, ["--beta1", "1"], "--beta1"),
    "length": (b"text\n" * 99, ["--length", "2000"], "too few for one row"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_one_line_and_exit_2(tmp_path, name, capsys, unchecked):
    content, more, said = BAD[name]
    (tmp_path / "text.txt").write_bytes(content)
    assert (
        command(recipe.main, [str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--no-progress", *more]) == 2
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "out" / "settings.json").exists()


def test_no_such_file_and_no_such_option(tmp_path, capsys):
    assert command(recipe.main, [str(tmp_path / "nothing.txt")]) == 2
    assert command(recipe.main, [str(tmp_path), "--lenght", "3"]) == 2
    assert "nothing.txt" in (said := capsys.readouterr().err) and "--lenght" in said
    with pytest.raises(WrongUsage, match="at least 2"):
        Options(length=1)


# The page, and real texts.


def test_every_example_of_the_page_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count, names = run_examples("docs/training.md")
    assert count == 4 and int(names["state"].step) == 8 and float(names["metrics"]["loss"]) < 1
    assert names["fitted"].stopped == "steps" and int(names["longer"].state.step) == 12
    assert names["best"].metrics["loss"] == min(r["loss"] for r in names["longer"].history.evaluations)
    assert 0 < names["found"].metrics["loss"] < 5 and len(names["found"].sample) == 8


def real_text(name):
    """Texts that lie on every machine with Python: its licence, and its own reference of the language."""
    if name == "licence":
        return (Path(os.__file__).parent / "LICENSE.txt").read_text()
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


@pytest.mark.full
@pytest.mark.parametrize("name", ["licence", "topics"])
def test_the_default_command_is_below_the_bigram_entropy_of_real_texts(tmp_path, name):
    (tmp_path / "text.txt").write_text(real_text(name))
    # As users run it: here, programs are compiled in haste.
    arguments = [str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--no-progress"]
    run = [sys.executable, "-m", recipe.__name__, *arguments]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    print({name: x for name, x in found.items() if name != "sample"})
    assert found["loss"] < found["bigram_entropy"] < found["unigram_entropy"]
    if name == "topics":
        assert found["loss"] < found["own_bigram_entropy"]
    assert said.endswith(f"held-out loss: {found['loss']:.4f} nats a token, below the bigram entropy\n")
