"""What a person is told before a tensor is read: every key in a line, and what stands behind a report that is not
clean."""

import shutil

import numpy as np
import pytest

import converters
from converters import diagnosis, hf
from converters.ops import SAME
from converters.report import Report
from eqx_transformers import Encoder, MaskedLM, SequenceClassifier

from ..reference import make, reference, save
from ..tiny import ROWS, Row
from .breaking import KEY, config, tensors

MASKED = Row("roberta", MaskedLM)


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(reference(MASKED).directory, tmp_path / "tiny")
    return tmp_path / "tiny"


def lines(report):
    """The listing by its first column; of what is drawn, by the path."""
    rows = [line.split("  ") for line in converters.listing(report).splitlines()[1:-1]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_key_of_the_file_has_its_line(row):
    report = converters.inspect(reference(row).directory)
    found = lines(report)
    checkpoint = converters.convert.open_directory(reference(row).directory)
    assert list(found) == list(checkpoint.specs)
    for link in report.links:
        path, by, shape, dtype, size = found[report.spelled[link.keys[0]]]
        assert (path, by) == (", ".join(link.ours), "as it is" if link.op is SAME else link.op.name)
        spec = checkpoint.specs[report.spelled[link.keys[0]]]
        assert (shape, dtype, size) == (str(list(spec.shape)), "F32", f"{spec.stored:,}")


def test_the_last_line_says_what_is_read_and_what_it_takes(directory):
    report = converters.inspect(directory)
    whole = sum(x.nbytes for x in load_arrays(directory))
    assert report.num_read == report.memory[0] == whole
    assert report.memory[0] == 2 * converters.inspect(directory, dtype="bfloat16").memory[0]
    last = converters.listing(report).splitlines()[-1]
    assert f"{whole / 1e6:,.1f} MB are read. The model takes {whole / 1e6:,.1f} MB" in last


def load_arrays(directory):
    import equinox as eqx
    import jax

    return jax.tree.leaves(eqx.filter(converters.load(directory)[0], eqx.is_array))


def test_ties_and_what_is_left_out_are_listed_with_their_reasons(directory):
    def change(held):
        held["lm_head.decoder.bias"] = held["lm_head.bias"].copy()
        held["roberta.embeddings.position_ids"] = np.arange(31)[None]
        held["roberta.pooler.dense.bias"] = np.zeros(21, np.float32)
        held["surprise"] = np.zeros(3, np.float32)

    tensors(change)(directory)
    found = lines(converters.inspect(directory))
    assert found["lm_head.decoder.bias"][:2] == ["= lm_head.bias", "tied"]
    assert found["roberta.embeddings.position_ids"][:2] == [
        "nothing: a counter 0, 1, 2, …: positions are computed",
        "ignored",
    ]
    assert found["roberta.pooler.dense.bias"][:2] == ["nothing: the pooler: this head does not read it", "dropped"]
    assert found["surprise"][:2] == ["nothing", "UNEXPECTED"]


def test_what_is_missing_mismatched_or_drawn_is_listed(directory):
    def change(held):
        del held[KEY]
        held["lm_head.bias"] = np.zeros(60, np.float32)

    tensors(change)(directory)
    found = lines(converters.inspect(directory))
    assert found[KEY] == ["head.dense.weight", "MISSING"]
    assert found["lm_head.bias"][:3] == ["head.bias", "MISMATCHED", "[60]"]
    drawn = lines(converters.inspect(directory, head=SequenceClassifier))
    assert drawn["head.dense.weight"] == ["drawn", "[21, 21]"]


def test_old_names_are_listed_as_the_file_has_them(directory):
    def old(held):
        for key in [key for key in held if "LayerNorm" in key]:
            held[key.replace("weight", "gamma").replace("bias", "beta")] = held.pop(key)

    tensors(old)(directory)
    found = lines(converters.inspect(directory))
    assert found["roberta.embeddings.LayerNorm.gamma"][0] == "backbone.embedding.norm.weight"


def test_rows_of_stacked_layers_have_their_number(directory, monkeypatch):
    """`inspect` shows the model as a tuple; the report of a stacked load names the layer."""
    reports = []
    converters.load(directory, stacked=True, announce=reports.append)
    found = lines(reports[0])
    assert found["roberta.encoder.layer.1.output.dense.weight"][0] == "backbone.stack.blocks.mlp.down_proj.weight[1]"


def test_a_dry_run_prints_the_lines_and_the_summary(directory, capsys):
    assert hf.main([str(directory), "--dry-run"]) == 0
    out = capsys.readouterr().out
    report = converters.inspect(directory)
    assert out == f"{converters.listing(report)}\n\n{report}\n"


def test_json_has_the_same(directory):
    plain = converters.inspect(directory).as_json()
    assert plain["tensors"][KEY] == ("F32", (21, 21), 4 * 21 * 21)
    assert {"keys": [KEY], "paths": ["head.dense.weight"], "op": "same"} in plain["links"]
    assert plain["memory"][0] == plain["num_read"]


def renamed(before):
    def change(held):
        for key in list(held):
            held[before + key] = held.pop(key)

    return tensors(change)


def layers(count):
    """The file of a model with so many layers."""

    def edit(directory):
        save(make(Row("roberta", MaskedLM, {"num_hidden_layers": count})), MASKED, directory)
        config(num_hidden_layers=2)(directory)

    return edit


def resized(held):
    key = "roberta.embeddings.word_embeddings.weight"
    held[key] = np.zeros((64, 21), np.float32)
    held["lm_head.bias"] = np.zeros(64, np.float32)


CAUSES = [
    ("a wrapper of torch", renamed("module."), "right without 'module.' before them, which torch's DataParallel puts"),
    ("a compiled model", renamed("_orig_mod."), "right without '_orig_mod.' before them, which torch.compile puts"),
    ("another wrapper", renamed("net."), "right without 'net.' before them, which some wrapper"),
    ("fewer layers", layers(1), "config.json says 2 layers, the file has 1"),
    ("more layers", layers(4), "config.json says 2 layers, the file has 4"),
    ("a grown vocabulary", tensors(resized), "a vocabulary of 61, the file has 64 rows: override={'vocab_size': 64}"),
    ("an untied config", config(tie_word_embeddings=False), "tie_word_embeddings = false, but the file has no output"),
]


@pytest.mark.parametrize(("make_it", "says"), [row[1:] for row in CAUSES], ids=[row[0] for row in CAUSES])
def test_the_likely_cause_is_said_once(directory, make_it, says):
    make_it(directory)
    report = converters.inspect(directory)
    assert not report.ok and len(report.causes) == 1 and says in report.causes[0]
    assert f"likely cause: {report.causes[0]}" in str(report)
    with pytest.raises(converters.Mismatch, match="likely cause"):
        converters.load(directory)


@pytest.mark.parametrize(
    ("make_it", "options"),
    [
        (tensors(resized), {"override": {"vocab_size": 64}}),
        (config(tie_word_embeddings=False), {"override": {"tied": True}}),
    ],
    ids=["a grown vocabulary", "an untied config"],
)
def test_what_a_cause_advises_helps(directory, make_it, options):
    make_it(directory)
    assert converters.inspect(directory, **options).ok
    converters.load(directory, **options)


@pytest.mark.parametrize("change", [lambda held: held.pop(KEY), lambda held: held.update(x=held[KEY])])
def test_where_nothing_is_known_no_cause_is_invented(directory, change):
    tensors(change)(directory)
    assert converters.inspect(directory).causes == ()


def test_a_missing_key_comes_with_the_nearest_of_the_file(directory):
    tensors(lambda held: held.__setitem__("lm_head.dense.wieght", held.pop(KEY)))(directory)
    assert f"{KEY}, needed by head.dense.weight (nearest known: lm_head.dense.wieght)" in str(
        converters.inspect(directory)
    )


def test_a_clean_report_has_no_causes():
    for row in (MASKED, Row("bert", Encoder)):
        assert converters.inspect(reference(row).directory).causes == ()
    assert diagnosis.causes([], [], {}, None) == () == Report("a", "b").causes
