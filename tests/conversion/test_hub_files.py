"""Which files of a repository are fetched: those of one container, what travels with it, or the headers alone."""

import json
from pathlib import Path
from urllib.parse import unquote

import equinox as eqx
import numpy as np
import pytest
import safetensors.numpy

import converters
from converters import hub_headers
from converters.checkpoint import open_directory
from converters.hub import COMPANIONS, fetch
from converters.hub_headers import fetch_headers

from ..reference import MODULES, reference
from .conftest import SENTENCES
from .hub_server import files


def same(name, row):
    return bool(eqx.tree_equal(converters.load(name)[0], converters.load(reference(row).directory)[0]))


# ---- which files are fetched


def weights(stem, ending, shards=0):
    """The names of a container's files, the index first, with what a repository may hold of them."""
    if not shards:
        return {f"{stem}{ending}": b"weights"}
    names = [f"{stem}-{i:05d}-of-{shards:05d}{ending}" for i in range(1, shards + 1)]
    index = {"weight_map": {f"key{i}": name for i, name in enumerate(names)}}
    return {f"{stem}{ending}.index.json": json.dumps(index).encode()} | dict.fromkeys(names, b"weights")


SAFE, TORCH, FLAX = ("model", ".safetensors"), ("pytorch_model", ".bin"), ("flax_model", ".msgpack")
CONTAINERS = {
    f"{name[0]}{name[1]} {'in shards' if shards else 'in one file'}": weights(*name, shards)
    for name in (SAFE, TORCH, FLAX)
    for shards in (0, 3)
}
NEVER = dict.fromkeys(
    ["README.md", "tf_model.h5", "rust_model.ot", "training_args.bin", "optimizer.pt", "onnx/model.onnx", "a.bin",
     "model-00009-of-00009.safetensors", "pytorch_model-00009-of-00009.bin", "openvino/openvino_model.bin"],
    b"never asked for",
)  # fmt: skip


@pytest.mark.parametrize("silent", [False, True], ids=["a hub", "a mirror without paths-info"])
@pytest.mark.parametrize("worse", range(len(CONTAINERS)))
def test_the_preferred_container_is_fetched_and_nothing_else(hub, worse, silent):
    """Of all containers from this one on, in the order of preference, in one repository with much else."""
    hub.silent = silent
    names = list(CONTAINERS)[worse:]
    there = {"config.json": b"{}", "vocab.txt": b"", **NEVER}
    hub.repositories["owner/many"] = {"main": there.copy()}
    for name in names:
        hub.repositories["owner/many"]["main"] |= CONTAINERS[name]
    directory = fetch("owner/many")
    assert files(directory).keys() == {"config.json", "vocab.txt", *CONTAINERS[names[0]]}
    assert not {path.rpartition("/main/")[2] for _, path in hub.asked} & NEVER.keys()
    hub.asked.clear()
    assert fetch("owner/many", local_files_only=True) == directory and hub.asked == []


def test_everything_that_travels_is_fetched_with_few_requests(hub):
    there = {name: name.encode() for name in COMPANIONS} | {"modules.json": json.dumps(MODULES).encode()}
    there |= {"config.json": b"{}", "model.safetensors": b"", "2_Normalize/config.json": b"{}", "README.md": b"# Mine"}
    hub.repositories["owner/all"] = {"main": there}
    assert files(fetch("owner/all")).keys() == there.keys() - {"README.md"}
    hub.asked.clear()
    fetch("owner/all")
    assert len(hub.asked) <= 8, hub.asked


@pytest.mark.parametrize("name, most", [("owner/name", 8), ("owner/sharded", 100)])
def test_what_is_not_there_is_not_asked_for(hub, name, most):
    fetch(name)
    absent = [path for _, path in hub.asked if "/resolve/" in path and unquote(path).rpartition("/")[2] not in
              {Path(file).name for file in hub.repositories[name]["main"]}]  # fmt: skip
    assert absent == [] and len(hub.asked) <= most, hub.asked


def test_a_module_may_be_at_another_place(hub):
    there = hub.repositories["owner/sentences"]["main"]
    modules = json.loads(there["modules.json"])
    modules[1]["path"] = "pool"
    there |= {"modules.json": json.dumps(modules).encode(), "pool/config.json": there.pop("1_Pooling/config.json")}
    assert same("owner/sentences", SENTENCES)


@pytest.mark.parametrize("place", ["..", "../other", "/etc", "", ".", 7, None, "a/b"])
def test_modules_cannot_make_us_ask_for_other_files(hub, place):
    there = hub.repositories["owner/sentences"]["main"]
    there["modules.json"] = json.dumps([{"type": "x.Transformer", "path": place}, 7]).encode()
    fetch("owner/sentences")
    asked = {unquote(path).partition("/resolve/")[2].partition("/")[2] for _, path in hub.asked}
    assert asked <= {*there, ""}


@pytest.mark.parametrize(
    "answer", [(200, []), (200, {}), (200, [{"path": "config.json"}]), (500, {}), (403, {})], ids=str
)
def test_an_answer_to_another_question_is_not_believed(hub, monkeypatch, answer):
    monkeypatch.setattr(hub, "paths_info", lambda path, asked: answer)
    assert same("owner/sentences", SENTENCES)


# ---- headers alone


def known(directory):
    found = open_directory(directory)
    return found.config, found.specs, found.layout, found.metadata, found.container


@pytest.fixture
def large(hub):
    """A checkpoint of two megabytes, as one file and in shards; how many bytes of which file are of the header."""
    specs = {f"layer.{i}": np.zeros((64, 257), np.float32) for i in range(32)}
    halves = [dict(list(specs.items())[:16]), dict(list(specs.items())[16:])]
    small = {"config.json": b"{}", "vocab.txt": b"a"}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    shards = {name: safetensors.numpy.save(half) for name, half in zip(names, halves, strict=True)}
    hub.repositories["owner/large"] = {"main": small | {"model.safetensors": safetensors.numpy.save(specs)}}
    hub.repositories["owner/large-sharded"] = {
        "main": small | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    }
    content = hub.repositories["owner/large"]["main"] | shards
    return {k: 8 + int.from_bytes(v[:8], "little") for k, v in content.items() if k.endswith(".safetensors")}


@pytest.mark.parametrize("first", [16, 500, 2**16], ids=["far too little", "too little", "enough"])
@pytest.mark.parametrize("name", ["owner/large", "owner/large-sharded"])
def test_of_safetensors_only_the_header_is_sent(hub, large, monkeypatch, tmp_path, name, first):
    monkeypatch.setattr(hub_headers, "AT_FIRST", first)
    directory = fetch_headers(name)
    sent = {file: count for file, count in hub.sent.items() if file.endswith(".safetensors")}
    assert sent == {file: max(first, large[file]) for file in sent} and sent
    assert sum(hub.sent.values()) < sum(map(len, hub.repositories[name]["main"].values())) // 4
    whole = tmp_path / "whole"
    whole.mkdir()
    for file, content in hub.repositories[name]["main"].items():
        (whole / file).write_bytes(content)
    assert known(directory) == known(whole)
    assert files(directory).keys() == files(whole).keys()
    assert all(path.stat().st_size == (whole / path.name).stat().st_size for path in directory.iterdir())


def test_a_server_without_ranges_will_do(hub, large):
    hub.rangeless, hub.server.handle_error = True, lambda *request: None
    assert known(fetch_headers("owner/large"))[1].keys() == {f"layer.{i}" for i in range(32)}


@pytest.mark.parametrize("name", ["roberta-base", "owner/sharded", "owner/sentences"])
def test_a_report_from_headers_is_that_of_the_whole(hub, name):
    said = converters.inspect(fetch_headers(name)).as_json()
    expected = converters.inspect(fetch(name)).as_json()
    assert {k: v for k, v in said.items() if k != "source"} == {k: v for k, v in expected.items() if k != "source"}


@pytest.mark.parametrize("name", ["owner/name", "owner/sharded"])
def test_weights_that_are_cached_are_taken_from_there(hub, name):
    directory = fetch(name)
    hub.sent.clear()
    assert fetch_headers(name) == directory == fetch_headers(name, local_files_only=True)
    assert hub.sent == {}


@pytest.mark.parametrize("container", [name for name in CONTAINERS if "safetensors" not in name])
def test_weights_in_other_containers_are_fetched_whole(hub, container):
    hub.repositories["owner/other"] = {"main": {"config.json": b"{}", **CONTAINERS[container]}}
    assert files(fetch_headers("owner/other")).keys() == {"config.json", *CONTAINERS[container]}


@pytest.mark.parametrize("content", [b"", b"1234", b"version https://git-lfs.github.com/spec/v1\n", b"<html>" * 9])
def test_what_is_no_safetensors_is_explained_as_ever(hub, content):
    hub.repositories["owner/name"]["main"]["model.safetensors"] = content
    with pytest.raises(converters.MalformedCheckpoint) as whole:
        open_directory(fetch("owner/name", revision="main"))
    with pytest.raises(converters.MalformedCheckpoint) as headers:
        hub.repositories["owner/again"] = hub.repositories["owner/name"]
        open_directory(fetch_headers("owner/again"))
    strip = lambda caught: str(caught.value).partition("model.safetensors")[2]
    assert strip(whole) == strip(headers)


@pytest.mark.parametrize("status, words", [(403, "refuses access"), (500, "answered 500"), (404, "names model-00002")])
def test_a_header_that_is_refused_is_named(hub, status, words):
    answer = hub.find
    hub.find = lambda path: (status, "", b"", "") if "model-00002" in path else answer(path)
    with pytest.raises(converters.ConversionError, match=words):
        fetch_headers("owner/sharded")


def test_headers_of_what_is_not_there(hub):
    with pytest.raises(converters.SourceNotFound, match="no repository 'owner/nothing'"):
        fetch_headers("owner/nothing")
    with pytest.raises(converters.MalformedCheckpoint, match="no weights"):
        fetch_headers("owner/weightless")
