"""A directory as FlaxPreTrainedModel of transformers 4 saves it loads to the very tensors of the torch one."""

import functools
import json

import equinox as eqx
import ml_dtypes
import numpy as np
import pytest
from jax.tree_util import tree_leaves
from safetensors.numpy import load_file, save_file

import converters
from converters import flax_names
from converters.families import FAMILIES
from converters.flax_names import Flax
from eqx_transformers import T5, CausalLM, MaskedLM, PreTraining
from eqx_transformers.tensor_file import Spec

from ..reference import make, save
from ..tiny import ROWS, Row
from .packing import packed
from .writers import HEADS_OF_TWO_BIASES as TWICE, flax_key, nest

ROW = {row.id: row for row in ROWS if FAMILIES[row.family].flax is not None}
every = pytest.mark.parametrize("row", ROW.values(), ids=lambda row: row.id)
HALF = ["bert-PreTraining", "roberta-SequenceClassifier", "distilbert-MaskedLM", "electra-Encoder", "gpt2-CausalLM"]


@functools.cache
def state(row) -> dict[str, np.ndarray]:
    """torch's tensors; of a bias that has two names, one value."""
    held = {key: x.detach().numpy().copy() for key, x in make(row).state_dict().items()}
    return held | {f"{head}.bias": held[f"{head}.decoder.bias"] for head in TWICE if f"{head}.decoder.bias" in held}


def flax_parameters(row) -> dict[str, np.ndarray]:
    """What its Flax class has: no decoder where it is tied, and of two biases the head's."""
    held, tied = state(row), row.config.get("tie_word_embeddings", row.family not in ("llama", "mistral"))
    if row.family in ("t5", "mt5"):  # transformers 5 ties whatever it makes; its stacks' tables are others' names
        held, tied = {key: x for key, x in held.items() if "embed_tokens" not in key}, True
    gone = [f"{head}.decoder.bias" for head in TWICE]
    if tied and row.head in (MaskedLM, CausalLM, PreTraining, T5):
        decoders = [f"{head}.decoder" for head in TWICE] + ["vocab_projector", "generator_lm_head", "lm_head"]
        gone += [f"{decoder}.weight" for decoder in decoders]
    names = {key: flax_key(key, x) for key, x in held.items() if key not in gone}
    return {names[k]: held[k].T if names[k].endswith("/kernel") else held[k] for k in names}


def write(directory, flat, shards=1):
    """As save_pretrained does: one file, or shards with an index."""
    if shards == 1:
        (directory / "flax_model.msgpack").write_bytes(packed(nest(flat)))
        return directory
    weight_map = {}
    for i in range(shards):
        name, part = f"flax_model-{i + 1:05d}-of-{shards:05d}.msgpack", dict(list(flat.items())[i::shards])
        (directory / name).write_bytes(packed(nest(part)))
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in flat.values())}, "weight_map": weight_map}
    (directory / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    return directory


def both(row, tmp_path, dtype=np.float32, shards=1, version="4.57.1", change=lambda flat: flat):
    """The torch directory and the Flax one, of one config."""
    torch, flax = tmp_path / "torch", tmp_path / "flax"
    save(make(row), row, torch)
    config = json.loads((torch / "config.json").read_text()) | {"transformers_version": version}
    (torch / "config.json").write_text(json.dumps(config))
    held = load_file(torch / "model.safetensors")
    save_file({key: state(row)[key].astype(dtype) for key in held}, torch / "model.safetensors")
    flax.mkdir()
    for path in torch.rglob("*.json"):
        (flax / path.relative_to(torch)).parent.mkdir(exist_ok=True)
        (flax / path.relative_to(torch)).write_bytes(path.read_bytes())
    return torch, write(flax, change({name: x.astype(dtype) for name, x in flax_parameters(row).items()}), shards)


def assert_same(torch, flax, **options):
    wanted, _ = converters.load(torch, **options)
    found, _ = converters.load(flax, **options)
    assert eqx.tree_equal(found, wanted)
    return found


@every
def test_every_family_and_head(row, tmp_path):
    torch, flax = both(row, tmp_path)
    assert_same(torch, flax)
    report = converters.inspect(flax)
    assert report.ok and not (report.dropped or report.ignored or report.new)


def test_a_family_that_never_had_flax_models_is_refused(tmp_path):
    """What such a file calls its tensors would be guessed."""
    row = Row("qwen2", CausalLM)
    _, flax = both(row, tmp_path)
    with pytest.raises(converters.UnsupportedConfig, match="transformers never had qwen2 in Flax"):
        converters.inspect(flax)


@pytest.mark.parametrize("row", HALF)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision(row, dtype, tmp_path):
    model = assert_same(*both(ROW[row], tmp_path, dtype))
    assert {x.dtype for x in tree_leaves(eqx.filter(model, eqx.is_array))} == {np.dtype(dtype)}


@pytest.mark.parametrize("row", HALF)
@pytest.mark.parametrize("shards", [2, 3])
def test_sharded(row, shards, tmp_path):
    assert_same(*both(ROW[row], tmp_path, shards=shards))


@pytest.mark.parametrize("version", ["4.44.2", "5.0.0"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("row", ["bert-MaskedLM", "roberta-MaskedLM", "electra-MaskedLM", "distilbert-MaskedLM"])
def test_an_untied_decoder_and_what_the_config_says_of_it(row, version, tied, tmp_path):
    """Tensors are believed where the config says that two are one, as of a safetensors file."""
    untied = ROW[f"{row}-tie_word_embeddings=False"]
    torch, flax = both(untied, tmp_path, version=version)
    for directory in (torch, flax):
        config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": tied}
        (directory / "config.json").write_text(json.dumps(config))
    assert assert_same(torch, flax).head.decoder is not None


def test_stacked_and_cast(tmp_path):
    torch, flax = both(ROW["roberta-MaskedLM"], tmp_path)
    assert_same(torch, flax, stacked=True, dtype="bfloat16")


def test_a_bare_encoder_in_the_place_of_a_head_and_old_endings(tmp_path):
    """gamma and beta are what the first Flax models called a LayerNorm's parameters."""
    older = {"LayerNorm/scale": "LayerNorm/gamma", "LayerNorm/bias": "LayerNorm/beta"}

    def change(flat):
        return {functools.reduce(lambda k, old: k.replace(old, older[old]), older, key): x for key, x in flat.items()}

    torch, flax = both(ROW["bert-MaskedLM"], tmp_path, change=change)
    assert_same(torch, flax, head=FAMILIES["bert"].models["Encoder"])
    report = converters.inspect(write(flax, change(flax_parameters(ROW["bert-Encoder"]))))
    assert list(report.missing) and all("/" in key for key in report.missing)


def edited(directory, change):
    path = directory / "flax_model.msgpack.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


SHARD, KEY = "flax_model-00002-of-00002.msgpack", "pooler/dense/kernel"
BROKEN = {
    "a shard that is cut off": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]), "stopped early"),
    "a shard that is not there": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing"),
    "a shard of another model": (lambda d: (d / SHARD).write_bytes(packed({"x": np.zeros(3)})), "but it does not"),
    "a key that is in no shard": (lambda d: edited(d, lambda i: i["weight_map"].update({"a/b": SHARD})), "holds a/b"),
    "a key that is not listed": (lambda d: edited(d, lambda i: i["weight_map"].pop(KEY)), f"holds {KEY}, which"),
    "another total": (lambda d: edited(d, lambda i: i["metadata"].update(total_size=3)), "total_size of 3 bytes"),
    "a shard elsewhere": (lambda d: edited(d, lambda i: i["weight_map"].update({KEY: "../x.msgpack"})), "beside it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_shards_that_do_not_fit_together(name, tmp_path):
    _, flax = both(ROW["bert-Encoder"], tmp_path, shards=2)
    change, says = BROKEN[name]
    change(flax)
    with pytest.raises(converters.ConversionError) as caught:
        converters.load(flax)
    assert says in str(caught.value) and str(flax) in str(caught.value)


# --- the report speaks of keys as the file spells them


@pytest.mark.parametrize("row", ["bert-PreTraining", "roberta-SequenceClassifier"])
def test_any_key_that_is_missing_added_or_of_another_shape(row, tmp_path, unchecked):
    flat = flax_parameters(ROW[row])
    _, flax = both(ROW[row], tmp_path)
    for key in [key for key in flat if "/layer/1/" not in key]:
        rest = {k: x for k, x in flat.items() if k != key}
        report = converters.inspect(write(flax, rest | {"surprise/kernel": np.zeros((2, 3), np.float32)}))
        assert list(report.missing) == [key] and list(report.unexpected) == ["surprise/kernel"]
        resized = converters.inspect(write(flax, flat | {key: np.zeros((3, *flat[key].shape), np.float32)}))
        assert list(resized.mismatched) == [key]


def test_the_report_says_once_how_flax_names_tensors(tmp_path):
    report = converters.inspect(both(ROW["roberta-MaskedLM"], tmp_path)[1])
    lines = [line.strip() for line in str(report).splitlines()]
    renamed = [line for line in lines if line.endswith("is …weight today")]
    assert sorted(line.split()[0] for line in renamed) == ["…embedding", "…kernel", "…scale"]
    assert f"note: {flax_names.NOTE}" in lines and not any("Encoder alone" in line for line in lines)
    assert report.num_tensors == len(flax_parameters(ROW["roberta-MaskedLM"]))


def test_an_untied_head_has_as_many_tensors_as_its_file_and_no_ties(tmp_path):
    row = ROW["bert-MaskedLM-tie_word_embeddings=False"]
    report = converters.inspect(both(row, tmp_path)[1])
    assert report.ok and report.tied == {} and report.num_tensors == len(flax_parameters(row))
    assert report.num_bytes == sum(x.nbytes for x in flax_parameters(row).values())


def test_a_file_without_the_head_that_its_config_names(tmp_path):
    _, flax = both(ROW["bert-Encoder"], tmp_path)
    config = json.loads((flax / "config.json").read_text()) | {"architectures": ["BertForTokenClassification"]}
    (flax / "config.json").write_text(json.dumps(config))
    report = converters.inspect(flax)
    assert any("the file holds the bare Encoder alone" in note for note in report.notes)
    assert sorted(report.missing) == ["classifier/bias", "classifier/kernel"]


def test_the_causal_head_that_only_flax_calls_so(tmp_path):
    """torch's is BertLMHeadModel; save_pretrained of FlaxBertForCausalLM names its own class without Flax."""
    torch, flax = both(ROW["bert-CausalLM"], tmp_path)
    config = json.loads((flax / "config.json").read_text()) | {"architectures": ["BertForCausalLM"]}
    (flax / "config.json").write_text(json.dumps(config))
    assert_same(torch, flax)


def test_two_flax_names_of_one_tensor_are_not_believed_silently(tmp_path):
    flat = flax_parameters(ROW["bert-Encoder"])
    _, flax = both(ROW["bert-Encoder"], tmp_path)
    twice = {key.rsplit("/", 1)[0] + "/weight": x for key, x in flat.items() if not key.endswith("bias")}
    report = converters.inspect(write(flax, flat | twice))
    assert sorted(report.unexpected) == sorted(twice) and not report.missing


# --- names and strides alone


def test_two_keys_of_one_dotted_name_the_second_stands_for_itself():
    family = FAMILIES["bert"]
    keys = ["pooler/dense/kernel", "pooler/dense/scale", "pooler.dense.weight", "kernel", "weight"]
    names = Flax.of(keys, family).names(keys)
    assert sorted(names.values()) == sorted(keys)
    assert names["bert.pooler.dense.weight"] == "pooler.dense.weight"
    assert names["pooler/dense/kernel"] == "pooler/dense/kernel" and names["weight"] == "weight"


@every
def test_a_missing_key_is_spelled_as_the_file_would(row):
    flat = flax_parameters(row)
    spelling = Flax.of(list(flat), FAMILIES[row.family])
    for name, key in spelling.names(list(flat)).items():
        assert spelling.old(name) == key


def test_only_kernels_that_are_matrices_are_turned():
    spec = lambda *shape: Spec(shape, "F32", 0, 4 * int(np.prod(shape)))
    specs = {
        "a/kernel": spec(2, 3),
        "kernel": spec(5, 1),
        "b/kernel": spec(2, 3, 4),
        "c/kernels": spec(2, 3),
        "d": spec(2),
    }
    found = flax_names.turned(specs)
    assert {k for k in specs if found[k] != specs[k]} == {"a/kernel", "kernel"}
    assert found["a/kernel"].shape == (3, 2) and found["a/kernel"].strides == (1, 3)
    assert found["kernel"].shape == (1, 5) and found["kernel"].ranges == specs["kernel"].ranges
