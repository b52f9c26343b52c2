"""The hub, from a server on this machine: every way in which fetching a checkpoint goes well, and goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import huggingface_hub
import pytest

import converters
from converters import hf
from eqx_transformers import MaskedLM, SentenceEmbedder, load

from ..reference import reference
from ..tiny import Row
from .hub_server import commit_of

ROOT = Path(__file__).parents[2]
ROBERTA, SENTENCES = Row("roberta", MaskedLM), Row("bert", SentenceEmbedder)


def equal(ours, theirs):
    return bool(eqx.tree_equal(ours, theirs))


def expected(row=ROBERTA):
    return converters.load(reference(row).directory)[0]


def fails(capsys, *argv):
    """(exit code, the one line on the error stream), with nothing left behind."""
    code = hf.main(argv)
    out, err = capsys.readouterr()
    assert list(Path.cwd().iterdir()) == [], "a failed run leaves nothing"
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return code, err


# ---- going well


def test_a_new_process_converts_a_hub_id_and_again_from_the_cache_without_a_network(hub, tmp_path):
    """The one that reads its environment as a user's does."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    run = lambda **more: subprocess.run(
        [sys.executable, "-m", "converters.hf", "roberta-base"], env=environment | more, capture_output=True, text=True
    )
    first = run()
    assert first.returncode == 0, first.stderr
    assert "wrote roberta-base.eqx" in first.stdout
    model, extras = load("roberta-base.eqx")
    assert equal(model, expected())
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == ["hub"]
    assert extras["origin"]["source"] == "roberta-base" and extras["vocab.json"].read_bytes() == b"{}"
    asked = len(hub.asked)
    again = run(HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(hub.asked) == asked
    hub.stop()
    begin, gone = time.monotonic(), run()
    assert gone.returncode == 0, gone.stderr
    assert time.monotonic() - begin < 20 and gone.stderr == ""


@pytest.mark.parametrize("name", ["roberta-base", "owner/name", "owner/sharded"])
def test_load_takes_a_hub_id(hub, name):
    model, origin = converters.load(name)
    assert equal(model, expected())
    assert (origin.source, origin.revision) == (name, None)
    assert Path(origin.directory).is_dir()


def test_a_subfolder_is_read(hub):
    model, origin = converters.load("owner/inside", subfolder="models/tiny")
    assert equal(model, expected())
    assert origin.directory.endswith("models/tiny")


def test_a_sentence_embedder_comes_with_its_pooling(hub):
    model, origin = converters.load("owner/sentences")
    assert isinstance(model, SentenceEmbedder) and equal(model, expected(SENTENCES))
    assert {"modules.json", "1_Pooling/config.json"} <= set(origin.files)


@pytest.mark.parametrize("revision", ["second", commit_of("owner/name", "second"), "refs/pr/1"])
def test_a_revision_picks_its_weights(hub, revision, tmp_path):
    assert hf.main(["owner/name", "--revision", revision, "--out", str(tmp_path / "out")]) == 0
    model, extras = load(tmp_path / "out")
    assert not equal(model, expected()) and extras["origin"]["revision"] == revision
    assert equal(model, converters.load("owner/name", revision="second")[0])
    assert equal(converters.load("owner/name")[0], expected())


def test_all_files_are_of_the_commit_that_the_config_is_of(hub):
    """A branch that moves during the download must not mix two models."""
    hub.during = lambda method, path: hub.moved.update(main="second") if method == "GET" and "config" in path else None
    model, origin = converters.load("owner/name")
    assert hub.moved and equal(model, expected())
    assert Path(origin.directory).name == commit_of("owner/name", "main")
    assert not equal(converters.load("owner/name")[0], expected())


def test_a_mirror_that_knows_branches_only_will_do(hub):
    hub.hashless = True
    assert equal(converters.load("owner/name")[0], expected())
    assert not equal(converters.load("owner/name", revision="second")[0], expected())


def test_a_branch_that_moves_there_is_noticed(hub):
    hub.hashless = True
    hub.during = lambda method, path: hub.moved.update(main="second") if method == "GET" and "config" in path else None
    with pytest.raises(converters.SourceNotFound, match="changed while it was being downloaded"):
        converters.load("owner/name")


def test_the_command_line_asks_for_each_file_once(hub):
    assert hf.main(["owner/name"]) == 0
    gets = [path for method, path in hub.asked if method == "GET"]
    assert len(gets) == len(set(gets)) == 2


def test_a_second_load_downloads_nothing(hub):
    converters.load("owner/sharded")
    hub.asked.clear()
    converters.load("owner/sharded")
    assert not [path for method, path in hub.asked if method == "GET"]


@pytest.mark.parametrize("name", ["roberta-base", "owner/sharded", "owner/sentences"])
@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "unreachable"])
def test_the_cache_is_enough(hub, name, how, monkeypatch):
    online, origin = converters.load(name)
    hub.asked.clear()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if how == "unreachable":
        hub.stop()
    offline, again = converters.load(name, local_files_only=how == "local_files_only")
    assert equal(online, offline) and again == origin and type(online) is type(offline)
    assert hub.asked == []


# ---- going wrong


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["owner/nothing"], 2, ["'owner/nothing'", "no repository"]),
        (["nothing"], 2, ["'nothing'", "no repository", "no directory"]),
        (["owner/name", "--revision", "third"], 2, ["owner/name", "no revision 'third'"]),
        (["owner/empty"], 2, ["owner/empty", "no config.json"]),
        (["owner/keras"], 3, ["owner/keras", "pytorch_model.bin", "only tf_model.h5", "not read", "--revision"]),
        (["owner/weightless"], 3, ["owner/weightless", "model.safetensors", "no weights"]),
        (["owner/name--x"], 2, ["owner/name--x", "nor a hub id"]),
        (["owner/na me"], 2, ["owner/na me", "not a hub id"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_the_hub_does_not_have_is_named(hub, capsys, argv, code, words):
    got, line = fails(capsys, *argv)
    assert got == code
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "GatedRepo"), ["is gated", "accept its terms", "HF_TOKEN"]),
        ((403, "GatedRepo"), ["is gated", "accept its terms", "HF_TOKEN"]),
        ((401, "RepoNotFound"), ["no repository", "private", "HF_TOKEN"]),
        ((401, ""), ["refuses access", "401", "HF_TOKEN"]),
        ((403, ""), ["refuses access", "403", "HF_TOKEN"]),
        ((418, ""), ["answered 418"]),
    ],
    ids=str,
)
def test_a_refusal_says_what_to_do(hub, capsys, refusal, words):
    hub.refuse["owner/name"] = refusal
    code, line = fails(capsys, "owner/name")
    assert code == 2
    assert all(word in line for word in ["owner/name", *words]), line


def test_a_busy_hub_is_asked_again_and_then_named(hub, capsys, monkeypatch):
    hub.refuse["owner/name"] = (503, "")
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(converters.SourceNotFound, match=r"answered 503 for config\.json of owner/name"):
        converters.load("owner/name")
    assert len(waited) >= 3


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
def test_what_is_cached_outlasts_outages_limits_and_refusals(hub, status):
    model, _ = converters.load("owner/sharded")
    hub.refuse["owner/sharded"] = (status, "")
    assert equal(converters.load("owner/sharded")[0], model)


def test_a_server_without_error_codes_serves_and_its_404_is_explained(hub, capsys):
    hub.plain = True
    assert equal(converters.load("owner/sharded")[0], expected())
    for argv in (["owner/nothing"], ["owner/name", "--revision", "third"], ["owner/empty"]):
        code, line = fails(capsys, *argv)
        assert code == 2
        assert all(word in line for word in [hub.url, argv[0], argv[-1], "config.json", "does not say which"]), line


def test_a_server_that_is_no_hub_is_told_apart(hub, capsys):
    hub.headless = True
    code, line = fails(capsys, "owner/name")
    assert code == 2
    assert "does not answer as the hub does" in line and "HF_ENDPOINT" in line and hub.url in line


def test_an_unreachable_hub_is_named_within_seconds(hub, capsys):
    hub.stop()
    begin = time.monotonic()
    code, line = fails(capsys, "owner/name")
    assert code == 2 and time.monotonic() - begin < 5
    assert all(word in line for word in ["owner/name", hub.url, "cannot be reached", "local cache", "HF_ENDPOINT"]), (
        line
    )


def test_an_address_that_is_none_is_an_unreachable_hub(hub, capsys, monkeypatch):
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "localhost")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "localhost" + template)
    code, line = fails(capsys, "owner/name")
    assert code == 2
    assert "localhost cannot be reached" in line


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_without_the_cache_says_so(hub, how, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    with pytest.raises(converters.SourceNotFound) as caught:
        converters.load("owner/name", local_files_only=how == "local_files_only")
    assert type(caught.value) is converters.SourceNotFound
    assert all(word in str(caught.value) for word in ["owner/name: config.json is not in the local cache", how])
    assert hub.asked == []


@pytest.mark.parametrize("lost", ["model.safetensors.index.json", "model-00002-of-*.safetensors"])
def test_offline_with_half_a_model_says_what_is_lacking(hub, lost):
    """A part that is not in the cache is no statement about the repository."""
    _, origin = converters.load("owner/sharded")
    (file,) = Path(origin.directory).glob(lost)
    file.unlink()
    name = file.name if "index" not in lost else "model.safetensors"
    with pytest.raises(converters.SourceNotFound, match=f"owner/sharded: {name} is not in the local cache"):
        converters.load("owner/sharded", local_files_only=True)


def test_a_shard_that_the_repository_lacks_is_named(hub, capsys):
    files = hub.repositories["owner/sharded"]["main"]
    shard = next(name for name in files if name.startswith("model-00002"))
    del files[shard]
    code, line = fails(capsys, "owner/sharded")
    assert code == 3
    assert f"names {shard}, which the repository does not have" in line


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_cannot_make_us_ask_for_other_files(hub, capsys, shard):
    files = hub.repositories["owner/sharded"]["main"]
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.bias"] = shard
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    code, line = fails(capsys, "owner/sharded")
    assert code == 3
    assert repr(shard) in line and "beside it" in line
    assert not [path for _, path in hub.asked if "passwd" in path or "other" in path or "b.safetensors" in path]


def test_a_download_that_breaks_off_is_named_and_the_next_run_succeeds(hub, capsys, monkeypatch):
    hub.cut["model.safetensors"] = 1000
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the retries of huggingface_hub
    with pytest.raises(converters.SourceNotFound) as caught:
        converters.load("owner/name")
    assert all(w in str(caught.value) for w in ["owner/name", "model.safetensors broke off", "Run again"]), caught.value
    assert hf.main(["owner/name"]) == 2
    assert list(Path.cwd().iterdir()) == []
    capsys.readouterr()
    hub.cut.clear()
    assert hf.main(["owner/name"]) == 0
    assert equal(load("name.eqx")[0], expected())


def test_without_huggingface_hub_the_pip_line_is_given(hub, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, line = fails(capsys, "owner/name")
    assert code == 2
    assert "pip install 'eqx_transformers[hub]'" in line
