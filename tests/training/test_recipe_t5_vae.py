"""The command that makes codes of lines, from a file to files, with a tiny model."""

import json

import jax
import numpy as np
import pytest

import converters
from eqx_transformers import T5VAE, load
from eqx_transformers.training import load_tokenizer
from eqx_transformers.training.recipes import _python_lines, t5_vae as recipe
from eqx_transformers.training.recipes._reconstruction import agreement, unigram_accuracy
from eqx_transformers.training.recipes._run import command
from eqx_transformers.training.recipes._vae_options import Objective, Samples

LINES = [f"{verb} {name}{i % 5} = {i}" for i in range(12) for verb, name in (("let", "a"), ("set", "bb"))]
LONG = " ".join(str(7919 * i) for i in range(99))
TINY = "--length 12 --hold-out 0.3 --evaluate-lines 4 --vocab-size 300 --embed-dim 8 --layers 1 --heads 2 --mlp-dim 8"
TINY += " --latent-tokens 3 --latent-size 4 --batch-size 8 --pairs 1 --points 3 --no-progress --evaluate-every 2"


def run(path, out, *more):
    return command(recipe.main, [str(path), "--out", str(out), *TINY.split(), *more])


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([*LINES, "", f"  {LINES[0]}  ", LONG]) + "\n")
    return path


def test_lines_become_a_model_its_measures_tables_and_pictures(lines, tmp_path, capsys):
    out = tmp_path / "vae"
    assert run(lines, out, "--steps", "4", "--check", "python") == 0
    said = capsys.readouterr().out
    assert "24 lines" in said and "1 repetitions and 1 lines with more than 12 tokens" in said
    assert said.splitlines()[-1].startswith("free-running reconstruction accuracy: 0.")
    found = json.loads((out / "metrics.json").read_text())
    assert {"accuracy", "shuffled_accuracy", "unigram_accuracy", "exact_match", "valid", "regulariser"} <= set(found)
    assert (found["skipped"], found["repeated"]) == (1, 1)
    for name in ("latents.png", "curves.png", "interpolations.txt", "log.jsonl", "settings.json"):
        assert (out / name).stat().st_size, name
    assert (out / "interpolations.txt").read_text().count("\n") >= 6
    model, _ = load(out / "model")
    again, _ = converters.load(out / "exported")
    assert isinstance(model, T5VAE) and isinstance(again, T5VAE)
    same = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
    assert all(map(same, jax.tree.leaves(model), jax.tree.leaves(again)))
    assert load_tokenizer(out / "model").encode("let a1 = 1").ids
    capsys.readouterr()
    assert run(lines, out, "--steps", "4", "--check", "python", "--latent-size", "5") == 2
    assert "--latent-size was 4 and is 5" in capsys.readouterr().err


@pytest.mark.full
def test_a_second_start_has_nothing_left_to_do(lines, tmp_path):
    out = tmp_path / "vae"
    assert run(lines, out, "--steps", "2") == 0
    first, log = json.loads((out / "metrics.json").read_text()), (out / "log.jsonl").read_text()
    assert run(lines, out, "--steps", "2") == 0
    assert json.loads((out / "metrics.json").read_text()) == first and (out / "log.jsonl").read_text() == log


def test_what_it_is_measured_by():
    texts = np.array([[5, 6, 1, 0], [5, 7, 1, 0]])
    assert agreement(np.array([[5, 6, 1, 9], [7, 5, 7, 1]]), texts, 0) == 0.5
    # Place by place: 5, then 6 or 7, then 1: better than one token for all.
    assert unigram_accuracy(np.array([[5, 6, 1, 0], [5, 6, 1, 0], [5, 7, 1, 0]]), texts, 0) == 5 / 6


def test_the_options_of_the_loss_are_the_originals(monkeypatch):
    made = lambda **given: lambda: given
    monkeypatch.setattr("eqx_transformers.training.recipes._vae_options.autoencoder_loss", made)
    curve = Objective(regulariser_slope=0.5, regulariser_offset=2.0).loss()()
    assert float(curve["weight"](4)) == pytest.approx(0.5) and not curve["reconstruct"]
    constant = Objective(regulariser_weight=0.25, reconstruct=True, regulariser="none").loss()()
    assert (constant["weight"], constant["reconstruct"], constant["regulariser"]) == (0.25, True, "none")
    assert float(Objective().loss()()["weight"](2500)) == pytest.approx(0.5)  # k = 0.0025, b = 6.25


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"", "is empty"),
        (b"\n \n", "has no text"),
        (b"fine\n\xff bad\n", "line 2"),
        (f"{LONG}\n1 {LONG}\n".encode(), "more than"),
    ],
)
def test_bad_lines_are_one_clear_error(written, said, tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_bytes(written)
    assert run(path, tmp_path / "vae", "--steps", "1") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--length", "1"], "--length 1 must be at least 2"),
        (["--hold-out", "1"], "between 0 and 1"),
        (["--heads", "3"], "must be a multiple of --heads 3"),
        (["--pooling", "mean"], "needs --pooling first"),
        (["--t5", "nowhere"], "nowhere"),
        (["--check", "perl"], "perl"),
    ],
)
def test_wrong_options_are_one_clear_error(options, said, lines, tmp_path, capsys):
    assert run(lines, tmp_path / "vae", "--steps", "1", *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told


def test_valid_is_what_python_compiles():
    valid = _python_lines.checker("python")
    assert valid("x = 1") and valid("if x:") and valid("return x") and not valid("x = = 1")
    assert {_python_lines.kind_of(x) for x in ("import os", "x = 1", "def f():")} == {
        "import",
        "assignment",
        "def, class",
    }


@pytest.mark.full
def test_codes_of_the_standard_library_say_its_lines(tmp_path):
    """What the defaults give: twice a unigram's accuracy at least, which shuffled codes lose half of at least."""
    found = recipe.t5_vae(out=tmp_path, samples=Samples(check="python")).metrics
    gain = found["accuracy"] - found["unigram_accuracy"]
    assert found["accuracy"] > 2 * found["unigram_accuracy"], found
    assert found["accuracy"] - found["shuffled_accuracy"] > gain / 2, found
