"""What is wrong with a checkpoint or a request: the exception, its words, the exit code, and nothing left behind.

Each row of `broken` breaks a copy of one tiny checkpoint. A message says what was found, and what was expected or what
to do.
"""

import re
import shutil
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

import converters
from converters import (
    ConversionError,
    MalformedCheckpoint,
    Mismatch,
    SourceNotFound,
    UnsafeCheckpoint,
    UnsupportedConfig,
    hf,
)
from eqx_transformers import Encoder, MaskedLM, SentenceEmbedder

from ..reference import make, reference, save as save_reference
from ..tiny import Row
from .breaking import as_dtype, config, modules, tensors
from .broken import CASES, NATIVE, ON_THE_COMMAND_LINE, SENTENCES, SHARDS, TENSORS

CODES = {SourceNotFound: 2, ConversionError: 3, MalformedCheckpoint: 3, UnsafeCheckpoint: 3, UnsupportedConfig: 3}
CODES |= {Mismatch: 4}


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """The whole checkpoints that the rows break copies of."""
    roberta, embedder = Row("roberta", MaskedLM), Row("bert", SentenceEmbedder)
    sharded = save_reference(make(roberta), roberta, tmp_path_factory.mktemp("shards"), max_shard_size="10KB")
    return {"one": reference(roberta).directory, "shards": sharded, "sentences": reference(embedder).directory}


def start(case):
    return "shards" if case in SHARDS else "sentences" if case in SENTENCES else "one"


@pytest.fixture
def source(request, starts, tmp_path):
    """What the row in `case` makes of its checkpoint."""
    case = request.getfixturevalue("case")
    shutil.copytree(starts[start(case)], tmp_path / "broken")
    made = case.make(tmp_path / "broken")
    return made if isinstance(made, Path) else tmp_path / "broken"


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_load_raises_the_one_class_and_says_what_and_why(case, source):
    before = contents(source.parent)
    with pytest.raises(ConversionError) as caught:
        converters.load(source, **case.options)
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert all(word in message for word in case.words), message
    assert contents(source.parent) == before


@pytest.mark.parametrize("case", ON_THE_COMMAND_LINE, ids=lambda case: case.name)
def test_the_command_line_returns_the_code_and_leaves_nothing(case, source, tmp_path, capsys):
    before = contents(tmp_path)
    written = ["--export" if case in NATIVE else "--out", str(tmp_path / "out")]
    code = hf.main([str(source), *written, *case.argv])
    out, err = capsys.readouterr()
    assert code == CODES[case.error], err
    assert out == "" and err.startswith("error: ") and all(word in err for word in case.words)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "no temporary directory stays"


# What headers and config.json show is known to a dry run; the rest takes numbers, or is not what `inspect` reads.
SEEN = [case for case in CASES if case.error is not Mismatch and not case.options and case not in NATIVE]
UNSEEN = ("a second name with other numbers",)


@pytest.mark.parametrize("case", [case for case in SEEN if case.name not in UNSEEN], ids=lambda case: case.name)
def test_inspect_raises_the_same(case, source):
    with pytest.raises(case.error, match=re.escape(case.words[0])) as caught:
        converters.inspect(source)
    assert type(caught.value) is case.error


@pytest.mark.parametrize("case", [case for case in TENSORS if case.error is Mismatch], ids=lambda case: case.name)
def test_inspect_reports_what_load_refuses(case, source):
    report = converters.inspect(source)
    assert not report.ok and all(word in str(report) for word in case.words)
    with pytest.raises(Mismatch) as caught:
        converters.load(source)
    assert caught.value.report.as_json() == report.as_json()


def test_the_rows_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_start_is_whole(starts):
    """Else a row could pass for a reason that is not its own."""
    for directory in starts.values():
        assert converters.inspect(directory).ok
    assert len(list(starts["shards"].glob("*.safetensors"))) > 2


def test_an_encoder_is_read_under_modules_that_are_not_supported(starts, tmp_path):
    """As the message of the refusal says."""
    shutil.copytree(starts["sentences"], tmp_path / "copy")
    modules("Transformer", "Pooling", "Dense")(tmp_path / "copy")
    model, _ = converters.load(tmp_path / "copy", head=Encoder)
    assert isinstance(model, Encoder)


def test_unknown_facts_pass_where_strict_is_off(starts, tmp_path):
    """As the message of the refusal says."""
    shutil.copytree(starts["one"], tmp_path / "copy")
    config(rope_theta=1e4)(tmp_path / "copy")
    model, _ = converters.load(tmp_path / "copy", strict=False)
    assert eqx.tree_equal(model, converters.load(starts["one"])[0])


def test_float64_is_read_when_it_is_asked_for(starts, tmp_path):
    """As the message of the refusal says."""
    shutil.copytree(starts["one"], tmp_path / "copy")
    as_dtype(np.float64)(tmp_path / "copy")
    model, _ = converters.load(tmp_path / "copy", dtype="float32")
    assert eqx.tree_equal(model, converters.load(starts["one"])[0])


def test_whole_numbers_that_nothing_reads_do_no_harm(starts, tmp_path):
    """Old files carry a counter of positions."""
    shutil.copytree(starts["one"], tmp_path / "copy")
    add = lambda held: held.__setitem__("roberta.embeddings.position_ids", np.arange(31)[None])
    tensors(add)(tmp_path / "copy")
    assert eqx.tree_equal(converters.load(tmp_path / "copy")[0], converters.load(starts["one"])[0])


def test_shards_may_be_links_into_a_cache(starts, tmp_path):
    """As in the hub's cache, whose snapshots are links to `blobs`."""
    (tmp_path / "snapshot").mkdir()
    for path in starts["shards"].iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert eqx.tree_equal(converters.load(tmp_path / "snapshot")[0], converters.load(starts["one"])[0])
