"""The command that fine-tunes a classifier, from files to files, with tiny models."""

import json
import re
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
import transformers

import converters
from converters.demo import source
from eqx_transformers import SequenceClassifier, encode, save
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.training.recipes import _labelled, classify as recipe
from eqx_transformers.training.recipes._options import Training, WrongUsage
from eqx_transformers.training.recipes._run import command
from eqx_transformers.training.recipes._tuned import ready
from eqx_transformers.training.recipes.classify import Adapter, Classified, Options, classify
from eqx_transformers.training.text import DataError
from eqx_transformers.training.vocabularies import train_tokenizer

from .. import kept
from ..full import FULL
from ..reference import make
from ..tiny import Row

DATA = "tests/data/movie_snippets"
WORDS = ["a", "film", "an", "actor", "the", "plot", "of", "this", "scene", "was", "and", "with", "it", "ends", "here"]
OPINIONS = {"fine": ["good", "great", "warm"], "poor": ["bad", "dull", "cold"]}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SMALL = ["--batch-size", "8", "--no-buckets", "--no-progress", "--learning-rate", "0.01"]


def snippets(count, seed):
    """Texts that one word makes fine or poor."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = sorted(OPINIONS)[i % 2]
        words = [*rng.choice(WORDS, rng.integers(2, 9)), rng.choice(OPINIONS[label])]
        yield label, " ".join(rng.permutation(words))


def written(path, rows, header="label\tnumber\ttext"):
    lines = [header, *(f"{label}\t{i}\t{text}" for i, (label, text) in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder():
    """Files of texts, and directories of models with a tokenizer."""
    directory = kept.directory("classify")
    written(directory / "train.tsv", snippets(40, 0))
    written(directory / "test.tsv", snippets(14, 1))
    words = [" ".join(WORDS), *(" ".join(x) for x in OPINIONS.values())]
    options = {"special_tokens": SPECIAL, "unknown": "<unk>", "begin": "<s>", "end": "</s>"}
    tokenizer = train_tokenizer(words, "wordlevel", vocab_size=61, **options)
    for name, padding in {"bert": 0, "roberta": 0, "gpt2": 0, "t5": 0}.items():
        ends = {"eos_token_id": 2, "bos_token_id": 1} if name != "bert" else {}
        sizes = {"num_hidden_layers": 1} if "bert" in name else {}
        row = Row(name, SequenceClassifier, {"pad_token_id": padding, "num_labels": 3} | ends | sizes)
        make(row).save_pretrained(directory / name)
        tokenizer.save(str(directory / name / "tokenizer.json"))
    return directory


def argv(folder, out, *more, model="bert"):
    files = [x for name in ("train", "test") for x in (f"--{name}", str(folder / f"{name}.tsv"))]
    return ["--model", str(folder / model), *files, "--out", str(out), *SMALL, *more]


def answers(path):
    """(predicted label, text) of predictions.tsv."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["label", "predicted", "probability", "text"]
    return [row[1] for row in rows[1:]], [row[3] for row in rows[1:]]


def theirs(model, tokenizer, texts):
    """torch's logits of every text alone."""
    with torch.no_grad():
        ids = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
        return np.concatenate([model.eval()(x).logits.numpy() for x in ids])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of two epochs, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    result = run(folder, out)
    return out, result


def run(folder, out, **more):
    training = Training(epochs=2, batch_size=8, learning_rate=0.01, progress=False)
    options = Options(hold_out=0.2, max_shapes=1)
    given = {"model": folder / "bert", "training": training, "options": options} | more
    return classify(folder / "train.tsv", folder / "test.tsv", out=out, **given)


def test_transformers_predicts_the_same_with_what_is_exported(folder, whole):
    from tokenizers import Tokenizer

    out, result = whole
    assert isinstance(result, Classified) and result.path == out / "model" and result.stopped == "steps"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model")
    tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    assert model.config.id2label == {0: "fine", 1: "poor"} == dict(enumerate(result.labels))
    said, texts = answers(out / "predictions.tsv")
    found = theirs(model, tokenizer, texts)
    assert [model.config.id2label[i] for i in found.argmax(-1)] == said
    np.testing.assert_allclose(found, encode(result.model, tokenizer, texts, max_shapes=1), atol=1e-4)


def test_what_is_measured_is_what_is_predicted(whole):
    out, result = whole
    lines = [line.split("\t") for line in (out / "predictions.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    said = json.loads((out / "metrics.json").read_text())
    assert (
        said["test"] == result.test and said["validation"] == result.validation and said["labels"] == ["fine", "poor"]
    )
    assert said["test"]["accuracy"] == pytest.approx(np.mean([row[0] == row[1] for row in lines]))
    assert len(lines) == 14 and sum(map(sum, said["validation"]["confusion"])) == 8
    assert (out / "confusion.png").read_bytes()[:4] == b"\x89PNG" and (out / "curves.png").is_file()


def test_the_final_model_is_the_one_that_is_best_on_what_is_held_out(whole):
    _, result = whole
    assert len(result.history.evaluations) == 2
    best = max(record["accuracy"] for record in result.history.evaluations)
    assert result.validation is not None and result.validation["accuracy"] == best


def test_a_second_start_goes_on_and_other_settings_are_refused(folder, whole):
    out, result = whole
    again = run(folder, out)
    for path, x in leaves_by_path(result.model).items():
        np.testing.assert_array_equal(leaves_by_path(again.model)[path], x, err_msg=path)
    with pytest.raises(WrongUsage, match=r"other settings: --max-length was 31 and is 17\. Give these"):
        run(folder, out, options=Options(hold_out=0.2, max_shapes=1, max_length=17))


@pytest.mark.full
def test_ctrl_c_and_a_second_start_give_the_same_numbers(folder, whole, tmp_path, monkeypatch):
    first, told = whole[1], _labelled.told
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return told(*args)

    monkeypatch.setattr(_labelled, "told", interrupted)

    def start(_):
        run(folder, tmp_path)

    assert command(start) == 130
    second = run(folder, tmp_path)
    assert second.test == first.test
    for path, x in leaves_by_path(first.model).items():
        np.testing.assert_array_equal(leaves_by_path(second.model)[path], x, err_msg=path)


def test_the_adapter_predicts_the_same_in_peft(folder, tmp_path):
    import peft
    from tokenizers import Tokenizer

    training = Training(steps=4, batch_size=8, learning_rate=0.01, progress=False)
    result = run(folder, tmp_path, training=training, options=Options(lora=Adapter(2, 3.0), max_shapes=1))
    assert result.path == tmp_path / "adapter" and not (tmp_path / "model").exists()
    said, texts = answers(tmp_path / "predictions.tsv")
    options = {"num_labels": 2, "ignore_mismatched_sizes": True}  # its own head has three
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT asks transformers
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokenizer = Tokenizer.from_file(str(folder / "bert" / "tokenizer.json"))
    found = theirs(adapted, tokenizer, texts)
    assert [result.labels[i] for i in found.argmax(-1)] == said
    np.testing.assert_allclose(found, encode(result.model, tokenizer, texts, max_shapes=1), atol=1e-4)
    trained = {
        path for path, x in leaves_by_path(result.model).items() if path.endswith(".b") and np.any(np.asarray(x))
    }
    assert trained  # B was zero


@pytest.mark.full
@pytest.mark.parametrize("model", ["roberta", "gpt2", "t5"] if FULL else ["gpt2"])
def test_other_families(folder, tmp_path, capsys, model):
    """Rows that only fill a batch (5 texts in batches of 8) make nothing infinite."""
    files = ["--train", written(tmp_path / "five.tsv", snippets(5, 2))]
    options = ["--steps", "2", "--freeze", "head", "--mesh", "data=1"]
    assert command(recipe.main, argv(folder, tmp_path / "out", *options, *files, model=model)) == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]
    assert np.isfinite(result["loss"])
    assert capsys.readouterr().out.splitlines()[-1] == f"test accuracy: {result['accuracy']:.3f}"
    before = ready(folder / model, ("fine", "poor"), 0, None, (), {}).model
    after = converters.load(tmp_path / "out" / "model")[0]
    changed = {
        path for path, x in leaves_by_path(before).items() if np.any(np.asarray(x != leaves_by_path(after)[path]))
    }
    assert changed and not any(path.startswith("head") for path in changed)


@pytest.mark.parametrize("option", ["--original", "--layer-decay"] if FULL else ["--original"])
def test_rates_are_those_of_the_option(folder, tmp_path, option):
    more = [option] if option == "--original" else [option, "0.5"]
    command(recipe.main, argv(folder, tmp_path, "--steps", "2", "--warmup", "0.5", *more))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert rates == pytest.approx([0.0, 0.005] if option == "--original" else [0.0, 0.01])


LABELS = "label\ttext\n"
BAD = {
    "empty": ("", "no text|is empty"),
    "header": (LABELS, "no text|header"),
    "one class": (LABELS + "1\tgood\n1\twarm\n", "at least 2 classes"),
    "column": ("sentiment\ttext\n1\tgood\n0\tbad\n", "no column 'label'"),
    "utf-8": (b"label\ttext\n1\tgood\n0\tb\xffd\n", "line 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_with_the_reason(folder, tmp_path, capsys, name):
    content, said = BAD[name]
    bad = tmp_path / "bad.tsv"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command(recipe.main, argv(folder, tmp_path / "out", "--train", str(bad))) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "bad.tsv" in error and error.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_label_that_training_lacks(folder, tmp_path, capsys):
    other = written(tmp_path / "test.tsv", [("fine", "a film"), ("middling", "the plot")])
    assert command(recipe.main, argv(folder, tmp_path / "out", "--test", other)) == 2
    error = capsys.readouterr().err
    assert "line 3" in error and "'middling'" in error and "'fine', 'poor'" in error


WRONG = {
    "no model": (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    "both": (["--validation", "x.tsv", "--hold-out", "0.1"], "give one of them"),
    "out": (["--out", "README.md"], "README.md is a file"),
    "patience": (["--patience", "2"], "needs texts that are held out"),
    "share": (["--hold-out", "2"], "between 0 and 1"),
    "too long": (["--max-length", "1000"], "has room for"),
    "alpha": (["--lora-alpha", "2"], "need --lora"),
    "frozen lora": (["--lora", "2", "--freeze", "head"], "nothing to --freeze"),
    "target": (["--lora", "2", "--lora-targets", "**.querry_proj"], "query_proj"),
    "one length": (["--max-shapes", "4"], "--no-buckets is --max-shapes 1: give one of them"),
    "rank": (["--lora", "0"], "--lora 0 must be at least 1"),
    "slower": (["--layer-decay", "1.5"], "--layer-decay 1.5 must be above 0 and at most 1"),
    "seed": (["--seed", "-1"], "--seed -1 must be at least 0"),
    "large seed": (["--seed", str(2**32)], f"must be below {2**32}"),
    "endless": (["--learning-rate", "inf"], "must be above 0, and finite"),
    "override": (["--override", "dropout"], "NAME=NUMBER"),
    "fact": (["--override", "droput=0.1"], "droput"),
    "hold-out": (["--hold-out", "0.001"], "cannot be held out"),
    "decay": (["--original", "--layer-decay", "0.9"], "one rate for all"),
    "text": (["--text", "a", "b", "c"], "one column or two"),
    "nothing": (["--freeze", "backbone", "head"], "Nothing is left to train"),
    "mesh": (["--mesh", "rows=two"], "--mesh rows=two"),
    "length": (["--max-length", "0"], "at least 1"),
    "no data": (["--mesh", "model=1"], "--mesh model=1: A mesh for training has the axes"),
    "alone": (["--coordinator", "localhost:1", "--processes", "2", "--process", "0"], "on a --mesh over all"),
    "nowhere": (["--processes", "2", "--process", "0"], "need --coordinator"),
    "spread": (["--fully-sharded"], "give --mesh data=N too"),
    "address": (["--coordinator", "here", "--mesh", "data=1"], "must be"),
    "warm": (["--warmup", "1"], "must be below 1"),
    "rate": (["--learning-rate", "0"], "--learning-rate 0 must be above 0"),
    "long": (["--epochs", "1", "--steps", "2"], "--epochs 1 and --steps 2"),
    "its own": (["--original", "--weight-decay", "0.1"], "it is AdamW's"),
    "column": (["--label", "sentiment"], "--label names another column"),
    "texts": (["--text", "review"], "--text names another column"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line_with_the_reason(folder, tmp_path, capsys, unchecked, name):
    more, said = WRONG[name]
    assert command(recipe.main, argv(folder, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_model_of_no_numbers_is_not_written(folder, tmp_path, capsys):
    options = ["--steps", "3", "--learning-rate", "1e30", "--validation", str(folder / "test.tsv")]
    assert command(recipe.main, argv(folder, tmp_path, *options)) == 2
    assert "of the final model is nan: was the learning rate too high?" in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not (tmp_path / "metrics.json").exists()
    told = _labelled.told(np.array([[0.0, np.inf], [1.0, 0.0]]), np.array([0, 1]))
    assert all(map(np.isnan, told.values()))


def test_what_is_only_evaluated_can_be_said_later_and_settings_must_be_there(folder, tmp_path, capsys):
    train = ["--model", str(folder / "bert"), "--train", str(folder / "train.tsv"), "--out", str(tmp_path), *SMALL]
    start = lambda *more: command(recipe.main, [*train, "--steps", "2", *more])
    assert start() == 0 and start("--test", str(folder / "test.tsv")) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["test"]["accuracy"] >= 0 and found["step"] == found["steps"] == 2
    for text, said in (("{", "settings.json is damaged"), (None, "has checkpoints, but no settings.json")):
        (tmp_path / "settings.json").unlink()
        if text is not None:
            (tmp_path / "settings.json").write_text(text)
        capsys.readouterr()
        assert start() == 2 and said in capsys.readouterr().err


def test_settings_can_be_corrected_until_something_was_trained(folder, tmp_path, capsys):
    start = lambda *more: command(recipe.main, argv(folder, tmp_path, "--steps", "1", *more))
    assert start("--original", "--weight-decay", "0.1") == 2 and (tmp_path / "settings.json").exists()
    assert start() == 0
    assert start("--layer-decay", "0.9") == 2
    assert "--layer-decay was None and is 0.9" in capsys.readouterr().err


def test_what_is_cut_is_said_of_held_out_texts_too(folder, tmp_path, capsys):
    start = argv(folder, tmp_path, "--steps", "1", "--max-length", "4", "--hold-out", "0.5")
    assert command(recipe.main, [x for x in start if x != "--no-progress"]) == 0
    assert "texts are cut to 4 tokens" in capsys.readouterr().out


def test_labels_are_words_without_the_space_around_them(tmp_path):
    path = written(tmp_path / "spaced.tsv", [("good ", "a film"), ("good", "the plot"), ("bad", "an actor")])
    assert _labelled.read(path, text="text", label="label").names == ("bad", "good")


def test_a_directory_of_this_library_is_refused_with_what_to_do(folder, tmp_path, capsys):
    save(converters.load(folder / "bert")[0], tmp_path / "own")
    assert command(recipe.main, argv(folder, tmp_path / "out", "--model", str(tmp_path / "own"))) == 2
    assert "--export DIR" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_and_one_with_anothers(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(folder / "bert", bare, ignore=shutil.ignore_patterns("tokenizer.json"))
    assert command(recipe.main, argv(folder, tmp_path / "out", "--model", str(bare))) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    train_tokenizer([str(n) for n in range(90)], "wordlevel").save(str(bare / "tokenizer.json"))
    numbers = written(tmp_path / "numbers.tsv", [(str(n % 2), str(n)) for n in range(90)])
    assert (
        command(
            recipe.main, argv(folder, tmp_path / "out", "--model", str(bare), "--train", numbers, "--test", numbers)
        )
        == 2
    )
    assert "of another model" in capsys.readouterr().err


def test_a_share_of_every_class_is_held_out():
    labels = np.array([0] * 30 + [1] * 10, np.int32)
    kept_, held = _labelled.split(labels, 0.2, 0)
    assert np.bincount(labels[held]).tolist() == [6, 2]
    np.testing.assert_array_equal(np.sort(np.concatenate([kept_, held])), np.arange(40))
    np.testing.assert_array_equal(_labelled.split(labels, 0.2, 0)[1], held)
    assert _labelled.split(labels, 0.2, 1)[1].tolist() != held.tolist()
    with pytest.raises(DataError, match="cannot be held out"):
        _labelled.split(labels, 0.99, 0)


@pytest.mark.full
def test_lora_is_within_two_hundredths_of_full_fine_tuning(tmp_path):
    given = {"model": source(), "train": f"{DATA}/train.tsv", "test": f"{DATA}/test.tsv"}
    rate = lambda rate: Training(epochs=4, learning_rate=rate, progress=False)
    full = classify(**given, out=tmp_path / "full", training=rate(1e-4))
    lora = classify(**given, out=tmp_path / "lora", training=rate(1e-3), options=Options(lora=8))
    assert full.test is not None and lora.test is not None
    print(f"full {full.test['accuracy']:.3f}, LoRA {lora.test['accuracy']:.3f}")
    assert full.test["accuracy"] > 0.75
    assert lora.test["accuracy"] >= full.test["accuracy"] - 0.02
