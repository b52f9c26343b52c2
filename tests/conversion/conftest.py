"""A hub on this machine, with one tiny checkpoint in every shape in which repositories come."""

import pytest

from eqx_transformers import MaskedLM, SentenceEmbedder

from ..tiny import Row
from .hub_server import files, running

ROBERTA, SENTENCES = Row("roberta", MaskedLM), Row("bert", SentenceEmbedder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One tiny RoBERTa in every shape in which repositories come."""
    from ..reference import make, reference, save  # imports torch, which few of the tests here need

    one, other = reference(ROBERTA).directory, tmp_path_factory.mktemp("other")
    save(make(ROBERTA, seed=5), ROBERTA, other)
    sharded = save(make(ROBERTA), ROBERTA, tmp_path_factory.mktemp("sharded"), max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    config = {"config.json": (one / "config.json").read_bytes()}
    return {
        "roberta-base": {"main": files(one) | {"vocab.json": b"{}", "merges.txt": b""}},
        "owner/name": {"main": files(one), "second": files(other), "refs/pr/1": files(other)},
        "owner/sharded": {"main": files(sharded)},
        "owner/inside": {"main": files(one, "models/tiny/")},
        "owner/keras": {"main": config | {"tf_model.h5": b"HDF"}},
        "owner/empty": {"main": {"README.md": b""}},
        "owner/weightless": {"main": config},
        "owner/sentences": {"main": files(reference(SENTENCES).directory)},
    }


@pytest.fixture
def hub(checkpoints, tmp_path, monkeypatch):
    """It runs, its cache is empty, and this is an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with running(tmp_path / "cache", monkeypatch) as server:
        server.repositories = {
            name: {r: dict(f) for r, f in revisions.items()} for name, revisions in checkpoints.items()
        }
        yield server
