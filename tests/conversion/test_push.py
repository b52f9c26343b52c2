"""Pushing a directory to a hub on this machine: what arrives, byte for byte, and every way in which nothing does."""

import errno
import sys
import time

import equinox as eqx
import huggingface_hub
import pytest

import converters
import eqx_transformers
from converters.push import push
from eqx_transformers import MaskedLM

from ..reference import make, reference, save
from ..tiny import Row
from .hub_server import files, running

# huggingface_hub hands a file to the HTTP library in a way that this one calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROBERTA = Row("roberta", MaskedLM)
HIDDEN = [".git/config", ".cache/huggingface/x", ".DS_Store", "model.safetensors.partial", "__pycache__/a.pyc", "a~"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub without repositories, an empty cache, and a user who is logged in."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the retries of huggingface_hub
    with running(tmp_path / "cache", monkeypatch) as server:
        server.token, server.spaces = "hf_mine", {"me", "team"}
        yield server


@pytest.fixture(scope="module")
def model():
    return reference(ROBERTA).directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save(make(ROBERTA, seed=7), ROBERTA, tmp_path_factory.mktemp("sharded"), max_shard_size="10KB")


def held(hub, name="me/model", revision="main"):
    """What the repository holds, but for what it was made with."""
    return {k: v for k, v in hub.look(name, revision)[1].items() if k != ".gitattributes"}


def same(directory, name):
    return bool(eqx.tree_equal(converters.load(directory)[0], converters.load(name)[0]))


# ---- what arrives


@pytest.mark.parametrize("name", ["model", "sharded"])
def test_the_hub_holds_the_directory_byte_for_byte_and_gives_the_model_back(hub, request, name):
    directory = request.getfixturevalue(name)
    address = push(directory, "me/model")
    assert address == f"{hub.url}/me/model/commit/{hub.look('me/model', 'main')[0]}"
    assert held(hub) == files(directory) and len(hub.commits) == 1
    large = {k for k, v in files(directory).items() if k.endswith(".safetensors") or len(v) >= hub.large}
    assert {line["value"]["path"] for line in hub.commits[0] if line["key"] == "lfsFile"} == large
    assert len(hub.verified) == len(hub.stored) == len(large)
    assert same(directory, "me/model")


def test_files_beside_the_weights_go_too_and_hidden_and_temporary_ones_do_not(hub, model, tmp_path):
    (tmp_path / "out" / "1_Pooling").mkdir(parents=True)
    for name, content in files(model).items():
        (tmp_path / "out" / name).write_bytes(content)
    for name in ["README.md", "1_Pooling/config.json", "empty.txt", "vocab.json"]:
        (tmp_path / "out" / name).write_text("{}" if "." in name and name != "empty.txt" else "")
    whole = files(tmp_path / "out")
    for name in HIDDEN:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("not to be seen")
    push(tmp_path / "out", "me/model", commit_message="The first")
    assert held(hub) == whole and held(hub)["empty.txt"] == b""
    assert hub.commits[0][0]["value"]["summary"] == "The first"


def test_a_name_without_an_owner_is_the_users(hub, model):
    assert push(model, "mine").startswith(f"{hub.url}/me/mine/commit/")
    assert held(hub, "me/mine") == files(model)


@pytest.mark.parametrize("private", [None, False, True])
def test_a_repository_is_made_as_private_as_wished(hub, model, private):
    push(model, "me/model", private=private)
    assert ("me/model" in hub.private) == bool(private)
    push(model, "me/model", private=private)
    assert held(hub) == files(model)


def test_the_weights_of_an_earlier_model_go_and_other_files_stay(hub, model, sharded):
    """One file is preferred to shards: left there, it would be loaded in their place."""
    push(model, "me/model")
    hub.look("me/model", "main")[1].update({
        "README.md": b"# Mine", "pytorch_model.bin": b"old", "training_args.bin": b"", "onnx/model.safetensors": b"",
        "flax_model-00001-of-00002.msgpack": b"old", "adapter_model.safetensors": b"another's",
    })  # fmt: skip
    push(sharded, "me/model")
    stay = {"README.md", "training_args.bin", "onnx/model.safetensors", "adapter_model.safetensors"}
    assert held(hub).keys() == {*files(sharded), *stay} and len(hub.commits) == 2
    assert same(sharded, "me/model")
    push(model, "me/model")
    assert held(hub).keys() == {*files(model), *stay}
    assert same(model, "me/model")


def test_what_is_there_already_is_not_sent_twice(hub, model):
    first = push(model, "me/model")
    hub.asked.clear()
    assert push(model, "me/model") == first
    assert len(hub.commits) == 1 and not [path for method, path in hub.asked if method == "PUT"]


def test_a_branch_can_be_pushed_to(hub, model, sharded):
    push(model, "team/model")
    hub.repositories["team/model"]["next"] = dict(hub.repositories["team/model"]["main"])
    push(sharded, "team/model", revision="next")
    assert held(hub, "team/model") == files(model)
    assert held(hub, "team/model", "next") == files(sharded)


def test_the_token_that_is_passed_is_used(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent/token")
    push(model, "me/model", token="hf_mine")
    assert held(hub) == files(model)


def test_an_export_goes_out_and_comes_back(hub, model, tmp_path):
    ours, origin = converters.load(model)
    converters.export(ours, tmp_path / "out", origin, max_shard_size="20KB")
    push(str(tmp_path / "out"), "me/model")
    assert eqx.tree_equal(converters.load("me/model")[0], ours)


# ---- what is no whole model is not sent


def cut(directory):
    weights = next(directory.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-5])


BROKEN = {
    "a shard is missing": (lambda d: next(d.glob("model-00002*")).unlink(), ["is missing", "index names it"]),
    "a shard is cut off": (cut, ["not a whole safetensors file"]),
    "no config.json": (lambda d: (d / "config.json").unlink(), ["no config.json"]),
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], ["has no weights"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_directory_that_is_not_whole_is_refused_before_the_hub_is_asked(hub, sharded, tmp_path, name):
    for file, content in files(sharded).items():
        (tmp_path / file).write_bytes(content)
    damage, words = BROKEN[name]
    damage(tmp_path)
    with pytest.raises(converters.MalformedCheckpoint) as caught:
        push(tmp_path, "me/model")
    assert all(word in str(caught.value) for word in words), caught.value
    assert hub.asked == []


def test_a_native_directory_is_refused_with_the_way_out(hub, model, tmp_path):
    eqx_transformers.save(converters.load(model)[0], tmp_path / "native")
    with pytest.raises(converters.MalformedCheckpoint, match=r"native format[\s\S]*--export DIR"):
        push(tmp_path / "native", "me/model")
    assert hub.asked == []


def test_what_a_killed_export_left_is_refused(hub, model, tmp_path):
    left = tmp_path / ".model.a1b2.partial"
    left.mkdir()
    for name, content in files(model).items():
        (left / name).write_bytes(content)
    with pytest.raises(converters.MalformedCheckpoint, match="killed"):
        push(left, "me/model")
    assert hub.asked == []


def test_a_directory_that_is_not_there_is_named(hub, tmp_path):
    with pytest.raises(converters.SourceNotFound, match="nothing is not a directory"):
        push(tmp_path / "nothing", "me/model")


# ---- what the hub does not take


def fails(hub, directory, name="me/model", **options):
    with pytest.raises(converters.NotPushed) as caught:
        push(directory, name, **options)
    assert hub.commits == [], "nothing is committed"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("me/model", {"token": "hf_other"}, ["does not know you", "me/model", "401", "HF_TOKEN", "write access"]),
        ("you/model", {}, ["does not let you write you/model", "403", "namespace you", "organization", "write access"]),
        ("me/model", {"revision": "third"}, ["me/model has no branch 'third'", "create_branch"]),
        ("me/a--b", {}, ["'me/a--b' is not a hub id"]),
        ("me/a/b", {}, ["'me/a/b' is not a hub id"]),
    ],
    ids=["a wrong token", "a namespace of others", "no such branch", "two dashes", "two slashes"],
)
def test_who_may_not_write_is_told_why(hub, model, name, options, words):
    said = fails(hub, model, name, **options)
    assert all(word in said for word in words), said


def test_without_a_login_it_says_how(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent/token")
    said = fails(hub, model)
    assert "hf auth login" in said and "401" in said


STEPS = ["create", "preupload", "batch", "lfs", "verify", "commit"]


@pytest.mark.parametrize(
    "status, words",
    [(403, ["does not let you write", "403"]), (418, ["418", "Run again"]), (409, ["at the same time", "Run again"])],
    ids=str,
)
@pytest.mark.parametrize("step", STEPS)
def test_a_refusal_at_any_step_is_explained_and_commits_nothing(hub, model, step, status, words):
    if step == "create" and status == 409:
        words = ["418"]  # a 409 there is: it exists already
        status = 418
    hub.fail[f"/{step}"] = status
    said = fails(hub, model)
    assert all(word in said for word in ["me/model", *words]), said
    hub.fail.clear()
    push(model, "me/model")
    assert held(hub) == files(model)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, model):
    push(model, "me/model")
    hub.asked.clear()
    with pytest.raises(converters.ConversionError, match=r"is public.*nothing was pushed"):
        push(model, "me/model", private=True)
    assert len(hub.commits) == 1 and not [path for _, path in hub.asked if "preupload" in path]


@pytest.mark.parametrize("step", STEPS)
def test_a_connection_that_breaks_off_is_named(hub, model, step):
    def drop(method, path):
        if method in ("POST", "PUT") and f"/{step}" in path:
            raise ConnectionAbortedError

    hub.during, hub.server.handle_error = drop, lambda *request: None
    said = fails(hub, model)
    assert all(word in said for word in ["me/model", "Run again"]), said


def test_an_unreachable_hub_is_named(hub, model):
    hub.stop()
    said = fails(hub, model)
    assert all(word in said for word in ["me/model", hub.url, "connection", "HF_ENDPOINT"]), said


def test_offline_says_so(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()
    assert "HF_HUB_OFFLINE is set" in fails(hub, model)


def test_an_error_of_the_disk_stays_one(hub, model, monkeypatch):
    def unreadable(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", unreadable)
    with pytest.raises(OSError, match=r"Input/output error: 'model\.safetensors'"):
        push(model, "me/model")


def test_without_huggingface_hub_the_pip_line_is_given(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'eqx_transformers\[hub\]'"):
        push(model, "me/model")


def test_a_card_that_the_hub_refuses_is_named(hub, model, tmp_path):
    for name, content in files(model).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    hub.fail["validate-yaml"] = 400
    said = fails(hub, tmp_path)
    assert all(word in said for word in ["README.md", "no validate-yaml today", "Nothing was committed"]), said
