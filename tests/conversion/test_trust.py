"""Ways in which a checkpoint, a directory or a moment could deceive: each is refused, or does no harm."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save, save_file

import converters
from converters import ConversionError, MalformedCheckpoint, Mismatch, containers, hf, sharded
from eqx_transformers import Encoder, MaskedLM, SentenceEmbedder, save as save_native
from eqx_transformers.surgery import leaves_by_path

from ..reference import reference
from ..tiny import Row
from .breaking import KEY, config, tensors

MASKED, BARE = Row("roberta", MaskedLM), Row("bert", Encoder)
TOKENS = "embeddings.word_embeddings.weight"


def copy(row, place):
    shutil.copytree(reference(row).directory, place)
    return place


@pytest.fixture
def directory(tmp_path):
    return copy(MASKED, tmp_path / "tiny")


@pytest.mark.parametrize("first", [True, False])
def test_a_stray_key_never_takes_a_tensors_place(tmp_path, first):
    """In a bare encoder's file, one key as a file with a head spells it; whichever comes first."""
    source = copy(BARE, tmp_path / "bare")
    held = {k: torch.from_numpy(x) for k, x in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    stray = {f"bert.{TOKENS}": torch.full_like(held[TOKENS], 7.0)}
    torch.save(stray | held if first else held | stray, source / "pytorch_model.bin")
    with pytest.raises(Mismatch, match=f"unexpected     1\n *bert.{TOKENS}"):
        converters.load(source)
    model, origin = converters.load(source, allow_unexpected=[f"bert.{TOKENS}"])
    np.testing.assert_array_equal(np.asarray(model.embedding.tokens.weight), held[TOKENS].numpy())
    assert origin.ignored == {f"bert.{TOKENS}": "allowed by allow_unexpected"}


def test_an_origin_names_no_other_files(directory, tmp_path):
    """A native directory may come from anybody; what it lists is neither read nor written elsewhere."""
    model, origin = converters.load(directory)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("secret")
    (tmp_path / "home" / "vocab.txt").write_text("words")
    said = origin.as_json() | {"directory": str(tmp_path / "home"), "files": ["id_rsa", "../pwn", "/pwn", "vocab.txt"]}
    save_native(model, tmp_path / "native", extras={"origin": said})
    again, hostile = converters.load(tmp_path / "native")
    converters.export(again, tmp_path / "deep" / "out", hostile)
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


@pytest.mark.parametrize(
    "change", [{"files": "vocab.txt"}, {"files": [1]}, {"directory": 7}, {"config": []}, {"tied": 1}]
)
def test_an_origin_of_other_types_is_refused(directory, tmp_path, change):
    model, origin = converters.load(directory)
    save_native(model, tmp_path / "native", extras={"origin": origin.as_json() | change})
    with pytest.raises(MalformedCheckpoint, match=r"origin\.json does not say"):
        converters.load(tmp_path / "native")


@pytest.mark.parametrize(
    "options", [{}, {"sharding": SingleDeviceSharding(jax.devices()[0])}], ids=["whole", "sharded"]
)
def test_a_file_that_is_replaced_after_its_header_was_read_is_noticed(directory, options):
    """Offsets of one file in another would give plausible garbage."""
    path = directory / "model.safetensors"
    held = {key: x + 1 for key, x in load_file(path).items()}

    def replace(report):
        save_file(held, directory / "other")
        os.replace(directory / "other", path)

    with pytest.raises(MalformedCheckpoint, match="changed after its header was read"):
        converters.load(directory, announce=replace, **options)


def test_a_file_that_shrinks_before_it_is_mapped_is_noticed(directory):
    """A map of bytes that are no longer there would kill the process."""
    path, place = directory / "model.safetensors", SingleDeviceSharding(jax.devices()[0])

    def shrink(at, like):
        os.truncate(path, 4096)
        return place

    with pytest.raises(MalformedCheckpoint, match="changed after its header was read"):
        converters.load(directory, sharding=shrink)


def test_an_export_over_another_model_is_the_new_model(tmp_path):
    """What is left of a sentence embedder would make one of an encoder."""
    embedder, origin = converters.load(reference(Row("bert", SentenceEmbedder)).directory)
    target = tmp_path / "out"
    converters.export(embedder, target, origin)
    (target / "tokenizer.json").write_text("{}")
    kept = ("training_args.bin", "adapter_model.safetensors", "data.bin", "README.md")
    for name in kept:
        (target / name).write_text("mine")
    encoder, bare = converters.load(reference(BARE).directory)
    converters.export(encoder, target, bare)
    again, _ = converters.load(target)
    assert isinstance(again, Encoder) and eqx.tree_equal(again, encoder)
    assert sorted(p.name for p in target.iterdir()) == sorted(("config.json", "model.safetensors", *kept))


def test_where_a_preferred_file_is_a_broken_link_no_other_is_read(directory):
    held = load_file(directory / "model.safetensors")
    torch.save({key: torch.zeros(x.shape) for key, x in held.items()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(directory / "blobs" / "gone")
    with pytest.raises(MalformedCheckpoint, match=r"model\.safetensors is a link to nothing"):
        converters.load(directory)


def test_a_total_may_count_shared_memory_once_in_each_shard(tmp_path):
    row = Row("bert", MaskedLM)
    source = copy(row, tmp_path / "tiny")
    held = {k: torch.from_numpy(x) for k, x in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    tied = {"cls.predictions.decoder.bias": held["cls.predictions.bias"]}
    first = dict(list(held.items())[:5]) | {"cls.predictions.bias": held["cls.predictions.bias"]} | tied
    parts = {"pytorch_model-1.bin": first, "pytorch_model-2.bin": {k: x for k, x in held.items() if k not in first}}
    for name, part in parts.items():
        torch.save(part, source / name)
    total = sum(x.numel() * 4 for x in held.values())
    index = {"metadata": {"total_size": total}, "weight_map": {k: name for name, part in parts.items() for k in part}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert eqx.tree_equal(converters.load(source)[0], converters.load(reference(row).directory)[0])


def test_an_index_is_read_once(tmp_path, monkeypatch):
    """Of two readings, the second could be of another index: what was checked is what is used."""
    torch_model, seen, read = reference(MASKED).model, [], containers.read_json
    torch_model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(containers, "read_json", lambda path: seen.append(path.name) or read(path))
    assert converters.inspect(tmp_path).ok and seen == ["model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["x\x1b[2Jy", "two\nlines", "x" * 1001])
def test_a_name_that_would_forge_a_report_is_refused(directory, name):
    tensors(lambda held: held.__setitem__(name, np.zeros(1, np.float32)))(directory)
    with pytest.raises(MalformedCheckpoint, match="holds a tensor with the name") as caught:
        converters.inspect(directory)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_of_thousands_of_strange_keys_a_few_come_with_the_nearest_name(directory):
    tensors(lambda held: held.update({f"{KEY}.{i:04}": np.zeros(0, np.float32) for i in range(3000)}))(directory)
    report = converters.inspect(directory)
    assert len(report.unexpected) == 3000 and sum(map(bool, report.unexpected.values())) == 20


def test_a_parameter_of_thousands_of_attributes_is_refused(directory):
    parameter = torch.nn.Parameter(torch.zeros(2))
    for i in range(65):
        setattr(parameter, f"a{i}", i)
    (directory / "model.safetensors").unlink()
    torch.save({"x": parameter}, directory / "pytorch_model.bin")
    with pytest.raises(MalformedCheckpoint, match="or more than 64"):
        converters.inspect(directory)


def test_a_program_of_torch_is_called_one(directory):
    (directory / "model.safetensors").unlink()
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:  # as torch.jit.save
        for name in ("x/data.pkl", "x/code/__torch__.py", "x/constants.pkl", "x/version"):
            archive.writestr(name, b"abc" * 100)
    with pytest.raises(MalformedCheckpoint, match="TorchScript archive"):
        converters.inspect(directory)


def test_a_truncated_file_is_not_taken_for_a_pickle(directory):
    """The length of its header may begin as a pickle does."""
    held, pad = load_file(directory / "model.safetensors"), 0
    while (whole := save(held, {"pad": "x" * pad}))[0] != 0x80:
        pad += 1
    (directory / "model.safetensors").write_bytes(whole)
    assert converters.inspect(directory).ok
    (directory / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(MalformedCheckpoint, match="stopped early"):
        converters.inspect(directory)


def test_a_place_is_asked_for_with_the_dtype_that_comes(directory):
    place, seen = SingleDeviceSharding(jax.devices()[0]), {}

    def sharding(path, like):
        seen[path] = like.dtype
        return place

    tensors(lambda held: held.__setitem__(KEY, held[KEY].astype(ml_dtypes.bfloat16)))(directory)
    model, _ = converters.load(directory, sharding=sharding)
    assert seen == {path: x.dtype for path, x in leaves_by_path(model).items() if eqx.is_array(x)}
    assert seen["head.dense.weight"] == jnp.bfloat16
    converters.load(directory, sharding=sharding, dtype="float16")
    assert set(seen.values()) == {jnp.dtype("float16")}


def test_overflow_is_counted_over_all_parts(directory, monkeypatch):
    tensors(lambda held: held[KEY].reshape(-1).__setitem__(slice(0, 5), 1e9))(directory)
    make = jax.make_array_from_callback

    def in_parts(shape, sharding, part):  # as for two devices, one after the other
        whole = part(tuple(slice(None) for _ in shape))
        part(tuple(slice(None) for _ in shape))
        return make(shape, sharding, lambda index: whole[index])

    monkeypatch.setattr(sharded.jax, "make_array_from_callback", in_parts)
    with pytest.raises(ConversionError, match=f"{KEY}: 10 numbers, up to 1e\\+09"):
        converters.load(directory, dtype="float16", sharding=SingleDeviceSharding(jax.devices()[0]))


def test_verification_is_of_the_directory_that_is_named(directory, tmp_path):
    model, origin = converters.load(directory)
    other = copy(MASKED, tmp_path / "other")
    with pytest.raises(ConversionError, match="other was named, but the origin"):
        converters.verify(other, model=model, origin=origin)


def test_where_nothing_would_be_read_nothing_is_drawn_instead(directory):
    def wrap(held):
        for key in list(held):
            held[f"module.{key}"] = held.pop(key)

    tensors(wrap)(directory)
    with pytest.raises(Mismatch, match="Nothing of the file would be read"):
        converters.load(directory, strict=False, key=jax.random.key(0))


def test_fields_that_are_passed_over_are_named(directory):
    config(frobnicate=3)(directory)
    assert any("frobnicate" in note for note in converters.inspect(directory, strict=False).notes)


def test_numbers_that_a_load_refuses_are_refused_by_a_dry_run_too(directory, capsys):
    tensors(lambda held: held.__setitem__(KEY, held[KEY].astype(np.float64)))(directory)
    assert hf.main([str(directory), "--dry-run"]) == 3 and "--dtype float32" in capsys.readouterr().err
    assert hf.main([str(directory), "--dry-run", "--dtype", "float32"]) == 0


def test_a_file_without_any_float_is_refused_and_not_stumbled_over(directory):
    """What a config says of the dtype is then compared with nothing."""
    tensors(lambda held: held.update({key: x.astype(np.int8) for key, x in held.items()}))(directory)
    with pytest.raises(MalformedCheckpoint, match="expected F32, F16, BF16"):
        converters.inspect(directory)


def test_a_mismatch_travels_to_another_process(directory):
    tensors(lambda held: held.pop(KEY))(directory)
    with pytest.raises(Mismatch) as caught:
        converters.load(directory)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.report.missing == caught.value.report.missing


STRANGE = {
    "half of a pair of surrogates": ("config.json", '{"id2label": {"0": "\\ud800"}}', "config.json is not JSON"),
    "a NUL in a path": (
        "modules.json",
        '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "a\\u0000b"}]',
        "modules.json",
    ),
    "the directory above": (
        "modules.json",
        '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": ".."}]',
        "modules.json",
    ),
}


@pytest.mark.parametrize(("name", "content", "says"), STRANGE.values(), ids=STRANGE)
def test_strange_texts_in_small_files_are_refused(directory, name, content, says):
    (directory / name).write_text(content)
    with pytest.raises(ConversionError, match=says):
        converters.inspect(directory)


def test_float8_in_a_file_of_arrays_is_refused(tmp_path, capsys):
    save_file({"x": np.zeros(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    argv = ["--format", "roberta-tf", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "out")]
    assert hf.main(argv) == 3 and "x is F8_E4M3" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999", "x"])
def test_a_seed_that_is_none_is_a_usage_error(directory, seed, capsys):
    assert hf.main([str(directory), "--seed", seed]) == 2 and "--seed" in capsys.readouterr().err


def test_a_reader_that_goes_away_gets_no_traceback(directory):
    command = [sys.executable, "-m", "converters.hf", str(directory), "--dry-run", "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert "Traceback" not in said and running.wait() in (0, 141)
