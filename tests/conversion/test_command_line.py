"""`python -m converters.hf`: what it prints, writes and returns. `main` runs in this process, in an empty directory."""

import json
import shutil
import sys
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import converters
from converters import convert, hf
from eqx_transformers import Encoder, MaskedLM, SequenceClassifier, load, save
from eqx_transformers.surgery import leaves_by_path

from ..reference import reference
from ..tiny import Row

ROBERTA = Row("roberta", MaskedLM)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a checkpoint called `tiny` beside it (`../tiny`), which is the test's own."""
    shutil.copytree(reference(ROBERTA).directory, tmp_path / "tiny")
    (tmp_path / "tiny" / "vocab.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path()


@pytest.fixture
def run(here, capsys):
    def run(*argv):
        """(exit code, standard output, standard error)"""
        code = hf.main(argv)
        return code, *capsys.readouterr()

    return run


def listing(directory=Path()):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))


def only_json(text):
    """The one object that is all of the output; NaN and Infinity are not JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    value = json.loads(text, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


# ---- what is written


def test_the_name_of_the_source_is_the_name_of_the_result(run, here):
    code, out, err = run("../tiny")
    assert (code, err) == (0, "")
    assert "RobertaForMaskedLM -> MaskedLM" in out and "wrote tiny.eqx" in out
    assert [p.name for p in here.iterdir()] == ["tiny.eqx"]
    model, extras = load("tiny.eqx")
    assert eqx.tree_equal(model, converters.load("../tiny")[0])
    assert extras["origin"]["source"] == "../tiny" and extras["vocab.json"].read_text() == "{}"


@pytest.mark.parametrize(("source", "name"), [("../tiny/", "tiny"), (".", "tiny"), ("inner/..", "tiny")])
def test_a_directory_has_its_name_however_it_is_spelled(run, here, source, name, monkeypatch):
    monkeypatch.chdir("../tiny" if "tiny" not in source else ".")
    Path("inner").mkdir()
    assert run(source)[0] == 0
    assert Path(f"{name}.eqx/model.safetensors").is_file()


def test_out_and_export_say_where(run, here):
    code, out, _ = run("../tiny", "--out", "a/b", "--export", "c")
    assert code == 0 and "wrote a/b" in out and "wrote c" in out
    assert sorted(p.name for p in here.iterdir()) == ["a", "c"]
    assert eqx.tree_equal(load("a/b")[0], converters.load("c")[0])
    given, written = load_file("../tiny/model.safetensors"), load_file("c/model.safetensors")
    assert given.keys() == written.keys() and all((given[k] == written[k]).all() for k in given)
    assert (Path("c") / "vocab.json").is_file()
    _, info = transformers.AutoModelForMaskedLM.from_pretrained("c", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])


def test_a_native_directory_is_exported(run, here):
    assert run("../tiny")[0] == 0
    code, out, _ = run("tiny.eqx", "--export", "back")
    assert code == 0 and "wrote back" in out
    assert listing()[0] == "back" and "tiny.eqx.eqx" not in listing()
    given, written = load_file("../tiny/model.safetensors"), load_file("back/model.safetensors")
    assert given.keys() == written.keys() and all((given[k] == written[k]).all() for k in given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_casts_every_array(run, here, dtype):
    assert run("../tiny", "--dtype", dtype, "--export", "back")[0] == 0
    arrays = leaves_by_path(eqx.filter(load("tiny.eqx")[0], eqx.is_array))
    assert {x.dtype for x in arrays.values()} == {jnp.dtype(dtype)}
    assert json.loads(Path("back/config.json").read_text())["dtype"] == dtype


def test_a_classifier_of_a_masked_lm_has_a_new_head_and_says_so(run, here):
    code, out, _ = run("../tiny", "--head", "SequenceClassifier", "--labels", "7", "--seed", "3")
    assert code == 0
    assert "head.output.weight [7, 21]: drawn from the key" in out and "dropped" in out
    model, extras = load("tiny.eqx")
    assert isinstance(model, SequenceClassifier) and model.config.labels == 7
    assert len(extras["origin"]["config"]["id2label"]) == 7
    assert run("../tiny", "--head", "SequenceClassifier", "--labels", "7", "--seed", "4", "--out", "other")[0] == 0
    assert not eqx.tree_equal(model.head, load("other")[0].head)
    assert eqx.tree_equal(model.backbone, load("other")[0].backbone)


def test_an_encoder_is_read_without_its_head(run, here):
    code, out, _ = run("../tiny", "--head", "Encoder")
    assert code == 0 and "RobertaForMaskedLM -> Encoder" in out
    model, whole = load("tiny.eqx")[0], converters.load("../tiny")[0]
    assert isinstance(model, Encoder)
    ours, theirs = leaves_by_path(eqx.filter((model.embedding, model.stack), eqx.is_array)), whole.backbone
    assert eqx.tree_equal(ours, leaves_by_path(eqx.filter((theirs.embedding, theirs.stack), eqx.is_array)))


def test_again_over_an_earlier_result_keeps_what_is_not_its_own(run, here):
    assert run("../tiny", "--dtype", "bfloat16")[0] == 0
    Path("tiny.eqx/README.md").write_text("mine")
    Path("tiny.eqx/notes").mkdir()
    Path("tiny.eqx/notes/a.txt").write_text("mine too")
    assert run("../tiny")[0] == 0
    assert Path("tiny.eqx/README.md").read_text() == "mine" and Path("tiny.eqx/notes/a.txt").read_text() == "mine too"
    assert [p.name for p in here.iterdir()] == ["tiny.eqx"]
    assert eqx.tree_equal(load("tiny.eqx")[0], converters.load("../tiny")[0])


# ---- what is not written over


def no_model(place):
    place.mkdir()
    (place / "thesis.tex").write_text("x")


def a_file(place):
    place.write_text("x")


def a_checkpoint(place):
    shutil.copytree("../tiny", place)


def a_native_model(place):
    save(converters.load("../tiny")[0], place)


@pytest.mark.parametrize(
    ("make", "option", "words"),
    [
        (no_model, "--out", "not a model directory"),
        (no_model, "--export", "not a model directory"),
        (a_file, "--out", "is a file"),
        (a_file, "--export", "is a file"),
        (a_checkpoint, "--out", "holds a Hugging Face model"),
        (a_native_model, "--export", "holds an Equinox model"),
    ],
)
def test_what_is_no_earlier_result_is_refused_before_the_work_and_untouched(run, make, option, words, monkeypatch):
    make(Path("mine"))
    before = {p: p.read_bytes() for p in [Path("mine"), *Path("mine").rglob("*")] if p.is_file()}
    monkeypatch.setattr(convert, "load", lambda *args, **kwargs: pytest.fail("the work was done first"))
    code, out, err = run("../tiny", option, "mine")
    assert (code, out) == (2, "") and words in err and "mine" in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in Path("mine").parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("option", ["--out", "--export"])
def test_the_source_is_never_written_over(run, option):
    before = {p: p.read_bytes() for p in Path("../tiny").iterdir()}
    code, _, err = run("../tiny", option, "../tiny/../tiny")
    assert code == 2 and "is the source itself" in err
    assert {p: p.read_bytes() for p in Path("../tiny").iterdir()} == before and listing() == []


def test_two_results_do_not_share_a_directory(run):
    code, _, err = run("../tiny", "--out", "a", "--export", "./a")
    assert code == 2 and "one directory" in err and listing() == []


# ---- --dry-run


def test_dry_run_reads_no_tensor_and_writes_nothing(run, monkeypatch):
    monkeypatch.setattr(converters.checkpoint.Checkpoint, "get", lambda *args: pytest.fail("a tensor was read"))
    code, out, err = run("../tiny", "--dry-run")
    assert (code, err) == (0, "") and "missing        0" in out and listing() == []


def test_dry_run_reports_what_is_missing(run):
    edit(Path("../tiny"), lambda tensors: tensors.pop("lm_head.dense.weight"))
    code, out, err = run("../tiny", "--dry-run")
    assert (code, err) == (4, "") and listing() == []
    assert "missing        1" in out and "lm_head.dense.weight, needed by head.dense.weight" in out


def test_a_report_that_is_not_clean_stops_a_conversion(run):
    edit(Path("../tiny"), lambda tensors: tensors.pop("lm_head.dense.weight"))
    code, out, err = run("../tiny")
    assert (code, out) == (4, "") and listing() == []
    assert "lm_head.dense.weight, needed by head.dense.weight" in err


# ---- --json


def break_key(directory):
    edit(directory, lambda tensors: tensors.pop("lm_head.dense.weight"))


def break_config(directory):
    (directory / "config.json").write_text("[")


def break_number(directory):
    edit(directory, lambda tensors: tensors["lm_head.dense.weight"].__setitem__((0, 0), float("nan")))


@pytest.mark.parametrize(
    ("argv", "change", "code", "keys"),
    [
        (["../tiny"], None, 0, {"report", "out"}),
        (["../tiny", "--export", "e"], None, 0, {"report", "out", "export"}),
        (["../tiny", "--dry-run"], None, 0, {"report"}),
        (["../tiny", "--verify"], None, 0, {"report", "out", "verification"}),
        (["../tiny", "--dry-run"], break_key, 4, {"report"}),
        (["../tiny"], break_key, 4, {"report", "error", "message"}),
        (["../tiny"], break_config, 3, {"error", "message"}),
        (["../tiny", "--verify"], break_number, 5, {"report", "verification"}),
        (["../nothing/at/all"], None, 2, {"error", "message"}),
        (["../tiny", "--out", "../tiny"], None, 2, {"error", "message"}),
        (["../tiny", "--labels", "many"], None, 2, {"error", "message"}),
        (["--frobnicate"], None, 2, {"error", "message"}),
        ([], None, 2, {"error", "message"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else getattr(value, "__name__", None),
)
def test_json_is_one_object_whatever_happens(run, argv, change, code, keys):
    if change is not None:
        change(Path("../tiny"))
    got, out, err = run(*argv, "--json")
    said = only_json(out)
    assert got == said["code"] == code
    assert said.keys() == {"source", "code"} | keys
    assert ("error" in keys or code == 5) == err.startswith("error: ")


def test_json_holds_the_whole_report_and_the_verification(run):
    said = only_json(run("../tiny", "--verify", "--gradients", "--json")[1])
    assert said["report"]["ok"] and said["report"]["architecture"] == "RobertaForMaskedLM"
    assert len(said["report"]["links"]) == said["report"]["num_tensors"] == len(load_file("../tiny/model.safetensors"))
    verification = said["verification"]
    assert verification["passed"] and verification["first_divergence"] is None
    assert 0 < verification["max_error"] < 2e-5 and len(verification["layers"]) > 16
    assert 0 < max(verification["gradients"].values()) < 1e-4


# ---- --verify


def test_verify_states_the_largest_error(run, here):
    code, out, err = run("../tiny", "--verify")
    assert (code, err) == (0, "") and "verified: max error" in out
    assert Path("tiny.eqx").is_dir()


def test_what_was_rounded_on_demand_is_verified_as_rounded(run, here):
    code, out, err = run("../tiny", "--verify", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "verified: max error" in out


ALTERED = {
    "backbone.embedding.tokens.weight": "backbone.embedding",
    "backbone.embedding.norm.bias": "backbone.embedding",
    "backbone.stack.blocks.0.attention.key_proj.weight": "backbone.stack.blocks.0.attention.key_proj",
    "backbone.stack.blocks.1.mlp.down_proj.weight": "backbone.stack.blocks.1.mlp",
    "backbone.stack.blocks.1.mlp_norm.weight": "backbone.stack.blocks.1.mlp_norm",
    "head.dense.weight": "head.dense",
    "head.bias": "head",
}


def altered(model, path, by=1e-2):
    """The model with one number changed."""
    where = lambda tree: leaves_by_path(tree)[path]
    leaf = where(model)
    return eqx.tree_at(where, model, leaf.at[(2,) * leaf.ndim].add(by))


@pytest.mark.parametrize("path", ALTERED)
def test_one_wrong_number_in_what_was_converted_is_found_where_it_is(run, path, monkeypatch):
    whole = convert.load

    def wrong(*args, **kwargs):
        model, origin = whole(*args, **kwargs)
        return altered(model, path), origin

    monkeypatch.setattr(convert, "load", wrong)
    code, out, err = run("../tiny", "--verify", "--export", "e")
    assert code == 5 and listing() == []
    assert f"NOT verified: {ALTERED[path]} is the first" in out and path in out
    assert err == "error: verification failed, so nothing was written\n"


def test_one_wrong_number_in_a_native_directory_is_found_where_it_is(run):
    path = "backbone.stack.blocks.1.mlp.down_proj.weight"
    assert run("../tiny")[0] == 0
    code, out, _ = run("tiny.eqx", "--verify")
    assert code == 0 and "verified: max error" in out
    model, extras = load("tiny.eqx")
    save(altered(model, path), "tiny.eqx", extras={"origin": extras["origin"]})
    before = listing()
    code, out, err = run("tiny.eqx", "--verify", "--export", "e")
    assert code == 5 and listing() == before
    assert f"NOT verified: {ALTERED[path]} is the first" in out and "nothing was written" in err


def test_a_native_directory_whose_checkpoint_is_gone_cannot_be_verified(run, here):
    assert run("../tiny")[0] == 0
    shutil.rmtree("../tiny")
    code, _, err = run("tiny.eqx", "--verify")
    assert code == 3 and "not here any more" in err and [p.name for p in here.iterdir()] == ["tiny.eqx"]


def test_without_torch_the_pip_line_comes_before_the_work(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(convert, "load", lambda *args, **kwargs: pytest.fail("the work was done first"))
    code, out, err = run("../tiny", "--verify")
    assert (code, out) == (2, "") and "pip install 'eqx_transformers[verify]'" in err and listing() == []


# ---- usage


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give a SOURCE, or --demo"),
        (["../tiny", "--demo"], "give a SOURCE, or --demo"),
        (["../tiny", "../tiny"], "unrecognized arguments: ../tiny"),
        (["../tiny", "--verifi"], "unrecognized arguments: --verifi"),
        (["../tiny", "--ver"], "unrecognized arguments: --ver"),
        (["../tiny", "--gradients"], "--gradients goes with --verify"),
        (["../tiny", "--dry-run", "--verify"], "nothing to verify"),
        (["../tiny", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["../tiny", "--head", "Tail"], "invalid choice: 'Tail'"),
        (["../tiny", "--labels", "0"], "--labels 0: expected at least 1"),
        (["../tiny", "--labels", "many"], "invalid int value: 'many'"),
        (["../tiny", "--revision", "main"], "--revision is for a hub id"),
        (["../nowhere/at/all"], "no directory '../nowhere/at/all'"),
        (["../tiny/config.json"], "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_code_2_and_one_line(run, argv, words):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and listing() == []
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_labels_without_a_classifier_are_refused(run):
    code, _, err = run("../tiny", "--labels", "3")
    assert code == 3 and "labels=3 is for a classifier, and MaskedLM is none" in err and listing() == []


def test_a_native_directory_is_not_converted_again(run):
    assert run("../tiny")[0] == 0
    for options in (["--out", "other"], ["--dry-run"], ["--head", "Encoder"], ["--dtype", "bfloat16"]):
        code, _, err = run("tiny.eqx", *options)
        assert code in (2, 3) and "native format" in err and [p.name for p in Path().iterdir()] == ["tiny.eqx"]


def test_help_names_every_exit_code(capsys):
    with pytest.raises(SystemExit) as caught:
        hf.main(["--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done; 2 usage," in out and all(f"; {code} " in out for code in (2, 3, 4, 5))


# ---- the main job


def test_the_demo_converts_verifies_and_uses_the_embedded_model(run, here):
    code, out, err = run("--demo")
    assert (code, err) == (0, "")
    assert "verified: max error" in out and "wrote all-MiniLM-L6-v2.eqx" in out
    rows = [line.split() for line in out[out.index("How similar") :].splitlines() if line[:3] in ("A  ", "B  ", "C  ")]
    similarity = {row[0]: [float(x) for x in row[-5:]] for row in rows}
    assert similarity["A"][0] == 1.0 and similarity["A"][1] > 0.4 > max(similarity["A"][2:])
    assert similarity["C"][3] > 0.4 > max(similarity["C"][:2])
    assert float(out.rsplit("largest difference from torch's", 1)[1]) < 1e-5
    assert load("all-MiniLM-L6-v2.eqx")[1]["tokenizer.json"].is_file()
