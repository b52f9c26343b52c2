"""The command that pre-trains an encoder, from files to files, with tiny models."""

import contextlib
import io
import json
import re
import shutil

import equinox as eqx
import numpy as np
import pytest
import transformers

from converters.demo import source
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.training.recipes import masked_lm as recipe
from eqx_transformers.training.recipes._masked_lm_options import Options, Shape
from eqx_transformers.training.recipes._options import Training, WrongUsage
from eqx_transformers.training.recipes._run import command
from eqx_transformers.training.recipes.masked_lm import MaskedLMResult, masked_lm, measured

DATA = "tests/data/movie_snippets"
SUBJECTS = {"the cat": "mice", "the dog": "bones", "a bird": "seeds", "my horse": "grass"}
SMALL = ["--batch-size", "16", "--max-shapes", "1", "--no-progress"]
OPTIONS = {"hold_out": 0.2, "whole_words": True, "max_shapes": 1, "max_length": 14}
NEW = ["--from-scratch", "--layers", "1", "--heads", "2", "--embed-dim", "32", "--mlp-dim", "48"]
NEW += ["--vocab-size", "320", "--dropout", "0", "--max-length", "14", "--whole-words"]


def sentences(count, seed=0):
    """What eats what, how often: each food follows from its eater."""
    rng = np.random.default_rng(seed)
    times = [f"{a} {b}" for a in ("on", "by") for b in ("day", "night", "monday", "friday")]
    for _ in range(count):
        eater = rng.choice(list(SUBJECTS))
        yield f"{eater} eats {SUBJECTS[eater]} {rng.choice(times)} {rng.integers(100)}"


def written(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of texts."""
    out = tmp_path_factory.mktemp("masked_lm")
    written(out / "a.txt", sentences(90))
    written(out / "b.tsv", ["number\ttext", *(f"{i}\t{text}" for i, text in enumerate(sentences(70, 1)))])
    return out


def argv(folder, out, *more):
    return [str(folder / "a.txt"), str(folder / "b.tsv"), "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def whole(folder):
    """Where a new model is, trained by the command."""
    more = [*NEW, "--hold-out", "0.2", "--steps", "80", "--learning-rate", "0.01", "--evaluate-every", "40"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert command(recipe.main, argv(folder, folder / "new", *more)) == 0
    found = json.loads((folder / "new" / "metrics.json").read_text())
    assert said.getvalue().splitlines()[-2:] == last_lines(found)
    return folder / "new"


def last_lines(found):
    """What the command says of them at its end."""
    said = [f"held-out {name}: {found['after'][name]:.3f} (was {found['before'][name]:.3f})" for name in found["after"]]
    assert len(said) == 2 and said[1].startswith("held-out accuracy: ")
    return said


def test_a_new_model_restores_tokens_of_texts_that_it_has_not_seen(whole):
    found = json.loads((whole / "metrics.json").read_text())
    assert found["steps"] == 80 and found["before"]["accuracy"] < 0.1
    assert found["after"]["accuracy"] > 0.4 and found["after"]["loss"] < 0.5 * found["before"]["loss"]
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "held_out_loss" in record]
    assert min(record["held_out_loss"] for record in evaluations) == pytest.approx(found["after"]["loss"], rel=1e-5)
    assert (whole / "curves.png").is_file()


def test_transformers_says_the_same_with_what_is_written(whole):
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    model = transformers.AutoModelForMaskedLM.from_pretrained(whole / "model").eval()
    inputs = tokenizer("the dog eats<mask> on friday 7", return_tensors="pt")
    logits = model(**inputs).logits[0].detach().numpy()
    import converters

    ours = eqx.filter_jit(converters.load(whole / "model")[0])(inputs["input_ids"][0].numpy())
    np.testing.assert_allclose(ours, logits, atol=1e-4)
    assert tokenizer.model_max_length == 14
    assert tokenizer.mask_token == "<mask>" and tokenizer.pad_token_id == model.config.pad_token_id == 1


@pytest.mark.full
def test_going_on_with_it_begins_where_it_ended(folder, whole, tmp_path, capsys):
    """The same tokens of the same texts are hidden, of what was written and of what is read."""
    first = json.loads((whole / "metrics.json").read_text())["after"]
    texts = [folder / "a.txt", folder / "b.tsv"]
    training = Training(batch_size=16, steps=1, learning_rate=1e-4, progress=False)
    result = masked_lm(texts, model=whole / "model", out=tmp_path, training=training, options=Options(**OPTIONS))
    assert isinstance(result, MaskedLMResult) and result.stopped == "steps" and result.path == tmp_path / "model"
    assert result.before == pytest.approx(first, rel=1e-5)
    assert (result.path / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    again = masked_lm(texts, model=whole / "model", out=tmp_path, training=training, options=Options(**OPTIONS))
    for path, x in leaves_by_path(result.model).items():
        np.testing.assert_array_equal(leaves_by_path(again.model)[path], x, err_msg=path)
    with pytest.raises(WrongUsage, match=r"--mask-rate was 0\.15 and is 0\.3"):
        changed = Options(**OPTIONS, mask_rate=0.3)
        masked_lm(texts, model=whole / "model", out=tmp_path, training=training, options=changed)


@pytest.mark.full
def test_packed_texts(folder, whole, tmp_path, capsys):
    more = ["--model", str(whole / "model"), "--pack", "--hold-out", "0.3", "--steps", "1", "--mesh", "data=1"]
    assert command(recipe.main, argv(folder, tmp_path, *more)) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert capsys.readouterr().out.splitlines()[-2:] == last_lines(found) and np.isfinite(found["after"]["loss"])


def test_measures_are_means_over_tokens():
    """Of two batches with 1 and 3 hidden tokens, by a model whose scores are always the same."""
    logits = np.array([0.0, 0.0, np.log(2.0)], np.float32)
    model = lambda ids, *, key=None, **_: np.broadcast_to(logits, (len(ids), 3))
    row = lambda *targets: {
        "token_ids": np.zeros((1, 3), np.int32),
        "attention_mask": np.ones((1, 3), np.int32),
        "weights": np.ones(1, np.float32),
        "targets": np.array([targets], np.int32),
    }
    found = measured(model, [row(2, -100, -100), row(0, 1, 2)])
    assert found == pytest.approx({"loss": np.log(4) - np.log(2) / 2, "accuracy": 0.5}, rel=1e-6)


BAD = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "no text"),
    "one": (b"a text\n", "--hold-out"),
    "utf-8": (b"a text\nb\xffd\n", "line 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_with_the_reason(tmp_path, capsys, name):
    content, said = BAD[name]
    (tmp_path / "bad.txt").write_bytes(content)
    assert command(recipe.main, [str(tmp_path / "bad.txt"), "--out", str(tmp_path / "out"), *NEW]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.startswith("error: ") and not (tmp_path / "out").exists()


WRONG = {
    "column": (["--from-scratch", "--text", "sentence"], "'sentence'"),
    "no model": (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    "neither": ([], "--from-scratch"),
    "both": (["--model", "x", "--from-scratch"], "either"),
    "shape": (["--model", "x", "--layers", "2"], "need --from-scratch"),
    "heads": (["--from-scratch", "--heads", "3"], "multiple of --heads 3"),
    "layers": (["--from-scratch", "--layers", "0"], "--layers 0"),
    "dropout": (["--from-scratch", "--dropout", "1"], "below 1"),
    "rate": (["--from-scratch", "--mask-rate", "15"], "--mask-rate 15.0"),
    "share": (["--from-scratch", "--hold-out", "0"], "--hold-out"),
    "length": (["--from-scratch", "--max-length", "2"], "--max-length 2"),
    "packed": (["--from-scratch", "--pack", "--max-shapes", "3"], "--pack has one length"),
    "vocabulary": (["--from-scratch", "--vocab-size", "100"], "vocab_size = 100 is too small"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line_with_the_reason(folder, tmp_path, capsys, unchecked, name):
    more, said = WRONG[name]
    assert command(recipe.main, argv(folder, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_that_do_not_fit(folder, whole, tmp_path, capsys):
    """Too little room, no tokenizer, and one without a mask."""
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    more = argv(folder, tmp_path / "out", "--model", str(model))
    assert command(recipe.main, [*more, "--max-length", "15"]) == 2 and "has room for" in capsys.readouterr().err
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer.replace("<mask>", "<hidden>"))
    assert command(recipe.main, more) == 2 and "<mask>, [MASK]" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert command(recipe.main, more) == 2 and "tokenizer.json" in capsys.readouterr().err


def test_a_new_models_room_is_the_length_that_is_asked_for(whole):
    assert json.loads((whole / "model" / "config.json").read_text())["max_position_embeddings"] == 14 + 2
    assert Shape().vocab_size == 8000


@pytest.mark.full
def test_minilm_learns_to_restore_tokens(tmp_path):
    """It has no masked-LM head: a new one, tied to its table, begins at nothing."""
    training = Training(batch_size=16, steps=70, learning_rate=5e-4, progress=False)
    options = Options(max_length=32, max_shapes=1)
    result = masked_lm(f"{DATA}/train.tsv", model=source(), out=tmp_path, training=training, options=options)
    print(f"{result.before} -> {result.after}")
    assert result.before["accuracy"] < 0.05 and result.after["accuracy"] > result.before["accuracy"] + 0.05
    assert result.after["loss"] < result.before["loss"] - 1
