"""The native format: bit for bit there and back, by name, and never half of it."""

import json
import os
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from eqx_transformers import Encoder, FormatError, MaskedLM, load, save, tensor_file
from eqx_transformers.nn import kernels, relu
from eqx_transformers.surgery import leaves_by_path, spell

from .ours import HEADS, make


def cast(model, dtype):
    """In one dtype; "mixed" has float32 norms in a bfloat16 model and a float16 bias."""
    mixed = lambda path, x: "bfloat16" if x.ndim > 1 else "float16" if path.endswith("proj.bias") else "float32"
    to = lambda path, x: jnp.dtype(mixed(spell(path), x) if dtype == "mixed" else dtype)
    each = lambda path, x: jnp.asarray(np.asarray(x).astype(to(path, x))) if eqx.is_array(x) else x
    return jax.tree_util.tree_map_with_path(each, model)


def same(a, b):
    """Equal in structure, settings, functions, dtypes and bits."""
    return bool(eqx.tree_equal(a, b, typematch=True))


@pytest.fixture
def saved(tmp_path):
    """(model, its directory)."""
    model = make(MaskedLM, "bert")
    save(model, tmp_path / "model", extras={"note": {"epochs": [1, 2]}})
    return model, tmp_path / "model"


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def rewrite(directory, change):
    """Writes the directory's tensors again, changed, by the safetensors library itself."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    safetensors.numpy.save_file(change(tensors), directory / "model.safetensors")


# ---- there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_save_then_load_is_the_identity_bit_for_bit(tmp_path, head, stacked, dtype):
    model = cast(make(head, "bert", stacked), dtype)
    save(model, tmp_path / "model")
    loaded, extras = load(tmp_path / "model")
    assert same(loaded, model) and extras == {}
    assert loaded.config == model.config


FACTS = [
    ("roberta", {"tied": False, "spare_bias": True, "prediction_activation": "silu"}),
    ("xlm-roberta", {"padding_id": 5, "padding_rows": ("positions",), "dropout": 0.0, "norm_eps": 1e-3}),
    ("bert", {"padding_id": None, "padding_rows": (), "num_layers": 0, "pooler": False}),
]


@pytest.mark.parametrize(("family", "facts"), FACTS, ids=["untied", "padding", "bare"])
def test_the_config_is_rebuilt_from_its_file(tmp_path, family, facts):
    model = make(MaskedLM, family, **facts)
    save(model, tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    assert same(loaded, model)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["format"], written["version"], written["class"]) == ("eqx_transformers", 1, "MaskedLM")
    assert all(written["facts"][name] == (list(v) if isinstance(v, tuple) else v) for name, v in facts.items())


def test_how_a_model_runs_is_not_saved(tmp_path):
    plain = make(Encoder, "bert")
    model = eqx.tree_at(lambda m: m.stack.remat, eqx.nn.inference_mode(plain), True)
    model = eqx.tree_at(lambda m: m.stack.blocks[0].attention.attend, model, kernels.plain)
    save(model, tmp_path / "model")
    assert same(load(tmp_path / "model")[0], plain)


def test_arrays_are_found_by_name_and_never_by_position(saved):
    model, directory = saved
    before = (directory / "model.safetensors").read_bytes()
    specs, _ = tensor_file.read_header(directory / "model.safetensors")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    turned = {name: jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype) for name in reversed(specs)}
    tensor_file.write(directory / "model.safetensors", turned, tensors.get, {})
    assert (directory / "model.safetensors").read_bytes() != before
    assert same(load(directory)[0], model)


def test_arrays_of_numpy_are_saved_too(tmp_path):
    model = make(Encoder, "bert")
    save(jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, model), tmp_path / "model")
    assert same(load(tmp_path / "model")[0], model)


def test_other_libraries_read_the_file(saved):
    model, directory = saved
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    mine = {path: x for path, x in leaves_by_path(model).items() if eqx.is_array(x)}
    assert tensors.keys() == mine.keys()
    assert all(np.array_equal(tensors[path], mine[path]) for path in mine)


# ---- what is refused


def test_an_edited_tree_is_refused_with_names_unless_told(tmp_path):
    model = make(Encoder, "bert")
    edit = lambda m: eqx.tree_at(lambda m: m.stack.blocks[1].mlp.activation, m, relu)
    edited = edit(model)
    with pytest.raises(
        ValueError, match=r"stack\.blocks\.1\.mlp\.activation is relu where the config builds gelu_tanh"
    ):
        save(edited, tmp_path / "model")
    save(edited, tmp_path / "model", edited=True)
    with pytest.raises(FormatError, match=r"holds an edited Encoder; repeat the edits in load\(…, skeleton=…\)"):
        load(tmp_path / "model")
    assert same(load(tmp_path / "model", skeleton=edit)[0], edited)


def test_a_skeleton_may_change_which_arrays_there_are(tmp_path):
    wider = lambda m: eqx.tree_at(lambda m: m.pooler, m, None)
    edited = wider(make(Encoder, "bert"))
    save(edited, tmp_path / "model", edited=True)
    assert same(load(tmp_path / "model", skeleton=wider)[0], edited)
    with pytest.raises(FormatError, match=r"missing: pooler\.dense\.weight"):
        load(tmp_path / "model", skeleton=lambda m: m)


BIAS = "head.bias"
CHANGES = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != BIAS}, [f"missing: {BIAS}"]),
    "unexpected": (lambda t: t | {"head.extra": t[BIAS]}, ["unexpected: head.extra"]),
    "resized": (lambda t: t | {BIAS: t[BIAS][:-1]}, [f"{BIAS}: the file has (60,), the model (61,)"]),
    "renamed": (
        lambda t: {k.replace("head.dense", "head.thick"): v for k, v in t.items()},
        [f"{said}.{x}" for said in ("missing: head.dense", "unexpected: head.thick") for x in ("bias", "weight")],
    ),
    "float64": (lambda t: t | {BIAS: t[BIAS].astype(np.float64)}, [f"{BIAS}: saved in float64", "jax_enable_x64"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_array_that_does_not_fit_is_reported_by_name(saved, case):
    change, said = CHANGES[case]
    rewrite(saved[1], change)
    with pytest.raises(FormatError, match="does not hold this model") as raised:
        load(saved[1])
    assert all(line in str(raised.value) for line in said)
    assert len(str(raised.value).splitlines()) == 1 + (4 if case == "renamed" else 1)


def damage(directory, name, change):
    (directory / name).write_bytes(change((directory / name).read_bytes()))


def facts(directory, **changed):
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(described | changed))


DAMAGE = {
    "cut tensors": (lambda d: damage(d, "model.safetensors", lambda b: b[:-10]), "stopped early"),
    "cut header": (lambda d: damage(d, "model.safetensors", lambda b: b[:20]), "is not a whole safetensors file"),
    "no bytes": (lambda d: damage(d, "model.safetensors", lambda b: b""), "is not a whole safetensors file"),
    "a pointer": (lambda d: damage(d, "model.safetensors", lambda b: b"version https://git-lfs"), "git lfs pull"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), "is missing: the directory is not whole"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "another format": (lambda d: facts(d, format="x"), "converters.load reads Hugging Face directories"),
    "another version": (lambda d: facts(d, version=99), "is of version 99; this library reads 1"),
    "another class": (lambda d: facts(d, **{"class": "GPT"}), "holds a 'GPT'; this library knows Encoder"),
    "a strange fact": (lambda d: facts(d, facts={"x": 1}), "states x, which EncoderConfig does not have"),
    "an extra outside": (
        lambda d: (d / "extras.json").write_text('{"values": {}, "files": ["../secret"]}'),
        "which is not inside the directory",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_directory_that_is_not_whole_is_refused(saved, case):
    change, said = DAMAGE[case]
    change(saved[1])
    with pytest.raises(FormatError, match=said):
        load(saved[1])


NOT_MODELS = {
    "a layer": (lambda m: m.head, TypeError, "A MaskedLMHead could not be loaded again; this library saves Encoder"),
    "a part": (lambda m: m.backbone.embedding, TypeError, "A EncoderEmbedding could not be loaded again"),
    "a skeleton": (lambda m: eqx.filter_eval_shape(lambda: m), ValueError, "this is a skeleton"),
    "a dtype that files do not have": (
        lambda m: eqx.tree_at(lambda m: m.head.bias, m, jnp.zeros(61, jnp.complex64)),
        ValueError,
        r"head\.bias is of dtype complex64",
    ),
}


@pytest.mark.parametrize("case", NOT_MODELS)
def test_what_could_not_be_loaded_again_is_not_saved(unchecked, tmp_path, case):
    change, kind, said = NOT_MODELS[case]
    with pytest.raises(kind, match=said):
        save(change(make(MaskedLM, "bert")), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---- whole or not at all


@pytest.mark.parametrize("step", ["write", "fsync", "exchange"])
def test_a_failing_write_leaves_the_old_directory_whole(saved, monkeypatch, step):
    _, directory = saved
    before = contents(directory)

    def fails(*args, **kwargs):
        raise OSError("no space left on device")

    exchange = "eqx_transformers._swap.exchange"
    target = {"write": "eqx_transformers.tensor_file._bytes", "fsync": "os.fsync", "exchange": exchange}[step]
    with monkeypatch.context() as patch:
        patch.setattr(target, fails)
        with pytest.raises(OSError, match="no space left"):
            save(make(MaskedLM, "roberta"), directory)
    assert contents(directory) == before
    assert [p.name for p in directory.parent.iterdir()] == ["model"]  # nothing half-written lies about


def test_when_the_last_rename_fails_the_old_directory_comes_back(saved, monkeypatch):
    _, directory = saved
    before, rename = contents(directory), os.rename

    def fails(source, target):
        if Path(source).name.endswith(".partial"):
            raise OSError("interrupted")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("eqx_transformers._swap._system_call", lambda: None)  # as where only renames are known
        patch.setattr("os.rename", fails)
        with pytest.raises(OSError, match="interrupted"):
            save(make(MaskedLM, "roberta"), directory)
    assert contents(directory) == before
    assert [p.name for p in directory.parent.iterdir()] == ["model"]


def test_a_model_replaces_an_earlier_one_and_keeps_what_the_user_put_there(saved):
    _, directory = saved
    (directory / "README.md").write_text("mine")
    (directory / "logs").mkdir()
    (directory / "logs" / "loss.txt").write_text("0.1")
    other = make(Encoder, "roberta")
    save(other, directory)
    loaded, extras = load(directory)
    assert same(loaded, other)
    assert extras == {}  # those of the model before are not this one's
    assert (directory / "README.md").read_text() == "mine" and (directory / "logs" / "loss.txt").read_text() == "0.1"


def test_what_is_not_a_model_is_refused_and_untouched(tmp_path):
    precious, file = tmp_path / "thesis", tmp_path / "file"
    precious.mkdir()
    (precious / "chapter.tex").write_text("…")
    file.write_text("…")
    for target, said in ((precious, r"not a model directory .* it has chapter\.tex"), (file, "is a file")):
        with pytest.raises(FileExistsError, match=said):
            save(make(Encoder, "bert"), target)
    assert contents(tmp_path) == {Path("thesis/chapter.tex"): "…".encode(), Path("file"): "…".encode()}
    shutil.rmtree(precious)
    precious.mkdir()
    save(make(Encoder, "bert"), precious)  # an empty one may be filled
    assert (precious / "config.json").is_file()


# ---- what travels along


def test_extras_travel_there_and_back(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(b'{"a": "\xc3\xa4"}')
    values = {"origin": {"repo": "x"}, "labels": ["ä", "b"], "step": 7, "nothing": None, "nested": {"a": [1.5, True]}}
    save(
        make(Encoder, "bert"), tmp_path / "model", extras=values | {"tokenizer.json": tokenizer, "sub/t.txt": tokenizer}
    )
    _, extras = load(tmp_path / "model")
    files = {name: extras.pop(name) for name in ("tokenizer.json", "sub/t.txt")}
    assert extras == values
    assert all(path.read_bytes() == tokenizer.read_bytes() for path in files.values())
    assert files["sub/t.txt"] == tmp_path / "model" / "sub" / "t.txt"
    assert json.loads((tmp_path / "model" / "origin.json").read_text()) == {"repo": "x"}


def test_an_empty_origin_is_an_origin(tmp_path):
    save(make(Encoder, "bert"), tmp_path / "model", extras={"origin": {}})
    assert load(tmp_path / "model")[1] == {"origin": {}}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "extras.json", "origin.json", "../x", "/tmp/x"])
def test_a_file_may_not_take_the_formats_names_or_leave_the_directory(tmp_path, name):
    (tmp_path / "file").write_text("…")
    with pytest.raises(ValueError, match=r"extras: .* cannot name a file"):
        save(make(Encoder, "bert"), tmp_path / "model", extras={name: tmp_path / "file"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_extras_that_are_not_json_are_refused_before_anything_is_replaced(saved):
    before = contents(saved[1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(saved[0], saved[1], extras={"x": object()})
    assert contents(saved[1]) == before


def test_a_loaded_array_does_not_alias_the_file(saved):
    model, directory = saved
    loaded, _ = load(directory)
    with open(directory / "model.safetensors", "r+b") as file:
        size = (directory / "model.safetensors").stat().st_size
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert same(loaded, model)


def test_another_librarys_model_directory_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="another format"):
        save(make(Encoder, "bert"), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
