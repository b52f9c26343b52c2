"""The command that trains sentence embeddings, from files to files, with tiny models."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import transformers

from converters.demo import source
from eqx_transformers import SentenceEmbedder
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.training.history import History
from eqx_transformers.training.loop import Fitted
from eqx_transformers.training.recipes import embed as recipe
from eqx_transformers.training.recipes._options import Training, WrongUsage
from eqx_transformers.training.recipes._pairs import halves, ranks, rivals
from eqx_transformers.training.recipes._run import command
from eqx_transformers.training.recipes.embed import Embedded, Options, embed
from eqx_transformers.training.text import read_texts
from eqx_transformers.training.vocabularies import train_tokenizer

from .. import kept
from ..full import FULL
from ..reference import make, save
from ..tiny import Row

DATA = "tests/data/movie_snippets"
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = 16  # of each of two languages: the words a0, a1, ... mean b0, b1, ...
OPTIONS = {"hold_out": 0.25, "max_shapes": 1}
SMALL = ["--batch-size", "32", "--max-shapes", "1", "--hold-out", "0.25", "--no-progress"]


def sentences(count, seed=0):
    """Three words, and what they mean, in another order."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        words = rng.choice(WORDS, 3, replace=False)
        yield " ".join(f"a{i}" for i in words), " ".join(f"b{i}" for i in rng.permutation(words))


def written(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder():
    """Files of pairs and of texts, and a model with a tokenizer."""
    directory = kept.directory("embed")
    pairs = list(sentences(160))
    written(directory / "pairs.tsv", ["first\tnumber\tsecond", *(f"{a}\t{i}\t{b}" for i, (a, b) in enumerate(pairs))])
    written(directory / "texts.txt", [f"{a} {b}" for a, b in pairs[:40]])
    options = {"special_tokens": SPECIAL, "unknown": "[UNK]", "begin": "[CLS]", "end": "[SEP]"}
    words = [f"{name}{i}" for name in "ab" for i in range(WORDS)]
    tokenizer = train_tokenizer(words, "wordlevel", vocab_size=61, **options)
    row = Row("bert", SentenceEmbedder, {"num_hidden_layers": 1})
    save(make(row), row, directory / "bert")
    tokenizer.save(str(directory / "bert" / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run on pairs."""
    return run(folder, tmp_path_factory.mktemp("whole"))


def run(folder, out, **more):
    training = Training(steps=80, batch_size=32, learning_rate=0.01, evaluate_every=40, progress=False)
    given = {"training": training, "options": Options(**OPTIONS)} | more
    return embed(folder / "pairs.tsv", model=folder / "bert", out=out, **given)


def argv(folder, out, *more, pairs="pairs.tsv"):
    return [str(folder / pairs), "--model", str(folder / "bert"), "--out", str(out), *SMALL, *more]


def test_partners_that_it_has_not_seen_come_nearer(whole):
    assert isinstance(whole, Embedded) and whole.stopped == "steps"
    assert whole.before["accuracy"] < 0.15
    assert whole.after["accuracy"] > whole.before["accuracy"] + 0.2
    assert whole.after["mean_reciprocal_rank"] > whole.before["mean_reciprocal_rank"] + 0.2
    best = max(record["mean_reciprocal_rank"] for record in whole.history.evaluations)
    assert whole.after["mean_reciprocal_rank"] == best
    assert json.loads((whole.path.parent / "metrics.json").read_text())["after"] == whole.after


def test_transformers_finds_the_same_vectors_with_what_is_exported(whole):
    from tokenizers import Tokenizer

    import converters

    read = converters.load(whole.path)[0]
    assert isinstance(read, SentenceEmbedder)
    for path, x in leaves_by_path(whole.model).items():
        np.testing.assert_array_equal(leaves_by_path(read)[path], x, err_msg=path)
    ids = np.array(Tokenizer.from_file(str(whole.path / "tokenizer.json")).encode("a1 a2 a3").ids)
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(whole.path).eval()
        vector = model(torch.tensor(ids)[None]).last_hidden_state[0].mean(0)
    theirs = (vector / vector.norm()).numpy()
    np.testing.assert_allclose(eqx.filter_jit(read)(ids), theirs, atol=1e-5)


def test_a_second_start_goes_on_and_other_settings_are_refused(folder, whole):
    again = run(folder, whole.path.parent)
    assert (again.before, again.after) == (whole.before, whole.after)
    for path, x in leaves_by_path(whole.model).items():
        np.testing.assert_array_equal(leaves_by_path(again.model)[path], x, err_msg=path)
    with pytest.raises(WrongUsage, match=r"--temperature was 0\.05 and is 0\.1"):
        run(folder, whole.path.parent, options=Options(**OPTIONS, temperature=0.1))


def nudged(model, loss, batches, training, out, *, trains, **_):
    """In the place of a training: what would be trained is another."""
    assert set(batches[0]) == {"token_ids", "attention_mask", "weights"}  # no partners: a text is its own
    model = jax.tree.map(lambda trained, x: x + 0.1 if trained else x, trains, model)
    state: Any = SimpleNamespace(model=model, step=training.steps)
    return Fitted(state, History(), "steps")


@pytest.mark.full
def test_single_texts_and_adapters(folder, tmp_path, capsys, monkeypatch):
    """SimCSE, on the queries and values alone: all else is written as it was read."""
    import converters

    if not FULL:
        monkeypatch.setattr(recipe, "train", nudged)
        monkeypatch.setattr(recipe, "final", lambda fitted, *_: fitted.state.model)
    # Evaluated once: after one step, whose rate is 0, nothing has changed, and of equal models the first is kept.
    more = ["--steps", "2", "--evaluate-every", "2", "--lora", "2"]
    assert command(recipe.main, argv(folder, tmp_path, *more, pairs="texts.txt")) == 0
    found, said = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out.splitlines()
    assert said[-1] == f"held-out accuracy: {found['after']['accuracy']:.3f} (was {found['before']['accuracy']:.3f})"
    assert "the halves of texts" in said[0]
    before, after = (leaves_by_path(converters.load(x)[0]) for x in (folder / "bert", tmp_path / "model"))
    changed = {path for path, x in after.items() if not np.array_equal(x, before[path])}
    assert len(changed) == 2 and all(re.search(r"(query|value)_proj\.weight$", path) for path in changed)


def test_ranks():
    first = np.eye(3, dtype=np.float32)
    second = np.array([[2.0, 0, 0], [0.1, 0.1, 0], [1.0, 0, 0.2]], np.float32)
    wrong = ~np.eye(3, dtype=bool)
    assert ranks(first, second, wrong).tolist() == [1, 1, 1]
    assert ranks(first[[0, 0, 2]], second, wrong).tolist() == [1, 3, 1]
    assert ranks(first[[0, 0, 2]], second, wrong & [[True], [False], [True]]).tolist() == [1, 1, 1]
    assert ranks(np.ones_like(first), np.ones_like(first), wrong).tolist() == [
        3,
        3,
        3,
    ]  # all the same: nothing is found
    assert ranks(np.zeros_like(first), second, wrong).tolist() == [3, 3, 3]


def test_halves():
    assert halves("one two  three") == ("one", "two three") and halves("one") is None


def test_equal_texts_are_no_wrong_answers():
    found = rivals([("a", "x"), ("a", "y"), ("b", "x"), ("c", "z")])
    assert found.astype(int).tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]
    with pytest.raises(WrongUsage, match="no wrong answer"):
        rivals([("a", "x"), ("a", "y")])


HEADER = "first\tsecond\n"
BAD = {
    "empty": ("", "is empty"),
    "header": (HEADER, "no line of data"),
    "column": ("one\tsecond\na1\tb1\n", "no column 'first'"),
    "field": (HEADER + "a1\tb1\na2\t\n", "line 3"),
    "utf-8": (b"first\tsecond\na1\tb1\na2\tb\xff\n", "line 3"),
    "few": (HEADER + "a1\tb1\na2\tb2\n", "--hold-out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_with_the_reason(folder, tmp_path, capsys, name):
    content, said = BAD[name]
    bad = tmp_path / "bad.tsv"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command(recipe.main, [str(bad), *argv(folder, tmp_path / "out")[1:]]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and not (tmp_path / "out").exists()


WRONG = {
    "no file": (["--model", "/nowhere"], "pears.tsv", "There is no file"),
    "no model": (["--model", "/nowhere/at/all"], "pairs.tsv", "/nowhere/at/all"),
    "column": (["--second", "secnd"], "pairs.tsv", "The nearest is 'second'"),
    "text": (["--text", "third"], "pairs.tsv", "no column 'third'"),
    "temperature": (["--temperature", "0"], "pairs.tsv", "--temperature"),
    "lora": (["--lora", "0"], "pairs.tsv", "--lora 0"),
    "both": (["--text", "first", "--second", "third"], "pairs.tsv", "are those of pairs: one or the other"),
    "no columns": (["--first", "second"], "texts.txt", "texts.txt has lines, not columns"),
    "nowhere": (["--out", ""], "pairs.tsv", "argument --out: it is empty"),
    "alone": (["--batch-size", "4", "--accumulate", "4"], "pairs.tsv", "two at least are needed"),
    "share": (["--hold-out", "1"], "pairs.tsv", "--hold-out 1.0"),
    "length": (["--max-length", "100"], "pairs.tsv", "has room for"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line_with_the_reason(folder, tmp_path, capsys, unchecked, name):
    more, pairs, said = WRONG[name]
    assert command(recipe.main, argv(folder, tmp_path / "out", *more, pairs=pairs)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_texts_and_models_that_make_no_pairs(folder, tmp_path, capsys):
    words = written(tmp_path / "words.txt", [f"a{i}" for i in range(60)])
    assert command(recipe.main, [words, *argv(folder, tmp_path / "out")[1:]]) == 2
    assert "have two words" in capsys.readouterr().err
    model = tmp_path / "bert"
    shutil.copytree(folder / "bert", model)
    config = json.loads((model / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config | still))
    more = argv(folder, tmp_path / "out", "--model", str(model), pairs="texts.txt")
    assert command(recipe.main, more) == 2 and "no dropout" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert command(recipe.main, more) == 2 and "tokenizer.json" in capsys.readouterr().err


@pytest.mark.full
def test_minilm_finds_the_second_half_of_a_sentence(tmp_path):
    """Which of all held-out second halves belongs to a first half of a review's sentence."""
    pairs = [pair for text in read_texts(f"{DATA}/train.tsv").texts if (pair := halves(text)) is not None]
    lines = [json.dumps({"first": first, "second": second}) for first, second in pairs]
    (tmp_path / "halves.jsonl").write_text("\n".join(lines), encoding="utf-8")
    training = Training(batch_size=32, epochs=3, learning_rate=5e-5, progress=False)
    options = Options(hold_out=0.3, max_length=24, max_shapes=2)
    result = embed(tmp_path / "halves.jsonl", model=source(), out=tmp_path / "out", training=training, options=options)
    print(f"{result.before} -> {result.after}")
    assert result.after["accuracy"] > result.before["accuracy"]
    assert result.after["mean_reciprocal_rank"] > result.before["mean_reciprocal_rank"]
