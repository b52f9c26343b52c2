"""A record of the reference: verification without torch finds what verification with it finds."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
from converters import ConversionError, MalformedCheckpoint, SourceNotFound, recording
from eqx_transformers import Encoder, MaskedLM
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.tensor_file import read_header

from .. import kept
from ..reference import make, reference, save
from ..tiny import Row

BERT = Row("bert", Encoder, {"num_hidden_layers": 1})


@functools.cache
def recorded() -> Path:
    """A record of BERT's encoder with gradients, made once; the tests that spoil it copy it."""
    path = kept.directory("record") / "bert.record"
    assert converters.verify(reference(BERT).directory, gradients=True, record=path).passed
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path


@functools.cache
def loaded():
    return converters.load(reference(BERT).directory)


# ---- the same comparison

ALONE = """
import sys
BLOCKED = ("torch", "transformers", "huggingface_hub")
sys.modules.update(dict.fromkeys(BLOCKED))
import jax
jax.config.update("jax_disable_most_optimizations", True)
import converters
found = converters.verify(sys.argv[1], against=sys.argv[2], gradients=True)
assert all(sys.modules[name] is None for name in BLOCKED) and not any(name.startswith("torch.") for name in sys.modules)
assert found.passed and found.gradients, str(found)
print(len(found.layers), len(found.gradients), found)
"""


def test_without_torch_the_record_is_as_good_as_the_reference():
    arguments = [reference(BERT).directory, recorded()]
    found = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    layers, gradients, said = found.stdout.split(" ", 2)
    assert said.startswith("verified: max error") and int(layers) == 2 + 8 * 1 + 1
    assert int(gradients) == len(load_file(reference(BERT).directory / "model.safetensors"))


def test_another_container_and_another_layout_pass(tmp_path):
    """The same tensors in shards, the blocks stacked, other dropout: nothing of that is in the record."""
    shutil.copytree(reference(BERT).directory, tmp_path / "again")
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    (tmp_path / "again" / "model.safetensors").unlink()
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, tmp_path / "again" / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "again" / "model.safetensors.index.json").write_text(json.dumps(index))
    options = {"stacked": True, "override": {"dropout": 0.3, "init_std": 0.5}}
    assert converters.verify(tmp_path / "again", against=recorded(), **options).passed


def changed(path: str, index):
    model, origin = loaded()
    where = lambda tree: leaves_by_path(tree)[path]
    return eqx.tree_at(where, model, where(model).at[index].add(1e-2)), origin


def unused_row() -> int:
    return next(i for i in range(3, 61) if i not in load_file(recorded())["inputs/ids"])


def another_seed():
    directory = kept.directory("reference")
    return converters.load(save(make(BERT, seed=1), BERT, directory))


DIFFERENT = {
    "a row that no input uses": (lambda: changed("embedding.tokens.weight", (unused_row(), 4)), None),
    "a bias": (lambda: changed("stack.blocks.0.attention.value_proj.bias", 4), "stack.blocks.0.attention.value_proj"),
    "another seed's model": (another_seed, "embedding"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_is_found_where_it_is(name):
    make_model, layer = DIFFERENT[name]
    model, origin = make_model()
    found = converters.verify("", model=model, origin=origin, against=recorded())
    assert not found.passed and found.weights
    if layer is None:
        assert found.max_error < 1e-5 and found.first_divergence == "embedding.tokens.weight"
        assert list(found.weights) == ["embeddings.word_embeddings.weight"]
    else:
        assert found.first_divergence == layer


# ---- not this model's record

OTHERS = {
    "another class": (lambda: converters.load(reference(Row("bert", MaskedLM)).directory), "another model, Encoder"),
    "another family": (lambda: converters.load(reference(Row("roberta", Encoder)).directory), "another family, bert"),
    "another config": (
        lambda: converters.load(reference(BERT).directory, override={"activation": "relu", "norm_eps": 1e-3}),
        "norm_eps is 1e-05 there and 0.001 here; activation is 'gelu_tanh' there and 'relu' here",
    ),
    "another dtype": (
        lambda: converters.load(reference(BERT).directory, dtype="bfloat16"),
        "recorded of a model in float32, but this one is in bfloat16",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_record(name):
    load, words = OTHERS[name]
    model, origin = load()
    with pytest.raises(ConversionError, match=words):
        converters.verify("", model=model, origin=origin, against=recorded())


# ---- not a record


def edited(change, *, honest=True, **metadata):
    """Spoils by a `change` of what a record says and holds; an honest one lists the arrays that it then has."""

    def spoil(path):
        arrays, (_, header) = load_file(path), read_header(path)
        said = json.loads(header["record"])
        change(said, arrays)
        if honest:
            said["arrays"] = {name: recording.digest(x) for name, x in arrays.items()}
        text = metadata.get("record", json.dumps(said))
        digest = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        save_file(arrays, path, header | {"record": text} | digest | metadata)

    return spoil


def described(**metadata):
    return edited(lambda said, arrays: None, **metadata)


def out_of(place, name):
    return edited(lambda said, arrays: {"said": said, "arrays": arrays}[place].pop(name))


def dishonestly(change):
    return edited(change, honest=False)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def as_weights(path):
    shutil.copy(reference(BERT).directory / "model.safetensors", path)


def becomes(content):
    return lambda path: path.write_bytes(content)


def directory(path):
    path.unlink()
    path.mkdir()


HALF_A_NOISE = {"noise": {"dtype": "bfloat16"}}
FLOATS = lambda said, arrays: arrays.update({"inputs/ids": arrays["inputs/ids"].astype("f4")})
SHORTER = lambda said, arrays: arrays.update({"inputs/ids": arrays["inputs/ids"][:2].copy()})
BROKEN = {
    "not there": (Path.unlink, SourceNotFound, "is not there"),
    "a directory": (directory, SourceNotFound, "is a directory"),
    "cut": (cut, MalformedCheckpoint, "not a whole safetensors file"),
    "empty": (becomes(b""), MalformedCheckpoint, "not a whole safetensors file"),
    "a web page": (becomes(b"<html></html>"), MalformedCheckpoint, "web page"),
    "JSON": (becomes(b'{"a": 1}'), MalformedCheckpoint, "not a whole safetensors file"),
    "a checkpoint": (as_weights, MalformedCheckpoint, "no record of a reference"),
    "another version": (described(version="2"), ConversionError, "version 2.*reads 1"),
    "not JSON": (described(record="{"), MalformedCheckpoint, "not JSON"),
    "nested deeply": (described(record="[" * 100_000), MalformedCheckpoint, "not JSON"),
    "a list": (described(record="[]"), MalformedCheckpoint, "does not say family"),
    "no facts": (out_of("said", "facts"), MalformedCheckpoint, "does not say facts"),
    "facts that are text": (edited(lambda said, arrays: said.update(facts="x")), MalformedCheckpoint, "say facts"),
    "an array less": (dishonestly(lambda said, arrays: arrays.pop("layers/")), MalformedCheckpoint,
                      r"not those that it lists \(layers/\)"),
    "an array more": (dishonestly(lambda said, arrays: arrays.update(x=np.ones(2))), MalformedCheckpoint, r"\(x\)"),
    "a number changed": (dishonestly(lambda said, arrays: arrays["layers/"].__setitem__((0, 0, 0), 9)),
                         MalformedCheckpoint, "layers/ was changed"),
    "an array of another dtype": (dishonestly(FLOATS), MalformedCheckpoint, "inputs/ids was changed"),
    "a tensor half described": (edited(lambda said, arrays: said["tensors"].update(x=["float32"])),
                                MalformedCheckpoint, "not a whole record"),
    "a noise half there": (edited(lambda said, arrays: said.update(HALF_A_NOISE)), MalformedCheckpoint,
                           "not a whole record"),
    "ids that are no integers": (edited(FLOATS), MalformedCheckpoint, "the inputs of a model"),
    "inputs of two lengths": (edited(SHORTER), MalformedCheckpoint, "the inputs of a model"),
    "no mask": (out_of("arrays", "inputs/attention_mask"), MalformedCheckpoint, "the inputs of a model"),
    "no output": (out_of("arrays", "layers/"), ConversionError, "at other places"),
    "no layer": (out_of("arrays", "layers/embedding"), ConversionError, "at other places"),
    "no gradients": (out_of("arrays", "cotangent"), ConversionError, "holds no gradients"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_said_to_be_one(name, tmp_path):
    spoil, error, words = BROKEN[name]
    path = Path(shutil.copy(recorded(), tmp_path / "r"))
    spoil(path)
    model, origin = loaded()
    with pytest.raises(ConversionError, match=words) as raised:
        converters.verify("", model=model, origin=origin, against=path, gradients=True)
    assert type(raised.value) is error


# ---- where a record goes


def test_no_place_for_a_record_is_said_before_the_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for error, words, options in [
        (SourceNotFound, "nowhere is not a directory", {"record": tmp_path / "nowhere" / "r"}),
        (FileExistsError, "is no record, so it stays", {"record": tmp_path / "notes.txt"}),
        (FileExistsError, "is a directory", {"record": tmp_path}),
        (ConversionError, "choose one", {"record": tmp_path / "r", "against": recorded()}),
    ]:
        with pytest.raises(error, match=words):
            converters.verify("no/such/source/at/all", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_record_is_read_as_it_was_written_and_takes_another_records_place(tmp_path):
    record = recording.read(recorded())
    recording.write(tmp_path / "r", record)
    recording.expect_writable(tmp_path / "r")
    recording.write(tmp_path / "r", record)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r").read_bytes() == recorded().read_bytes()
    assert record.versions.keys() == {"torch", "transformers"} and record.architecture == "BertModel"


NAN = np.array([np.nan, 1], np.float32)
SAME = [
    (NAN, -NAN * np.array([1, -1], np.float32), True),  # another NaN
    (NAN, NAN[::-1], False),
    (np.float32([0.0]), np.float32([-0.0]), False),
    (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), False),
    (np.zeros(2, np.float16), np.zeros(2, jnp.bfloat16), False),
    (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), True),
]


@pytest.mark.parametrize(("a", "b", "same"), SAME)
def test_tensors_are_the_same_bit_for_bit(a, b, same):
    assert (recording.Tensor.of(a) == recording.Tensor.of(b)) is same
