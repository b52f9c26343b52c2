"""The dictionaries of arrays of golden/haiku_lm and golden/functional_transformer, as formats of `from_arrays`."""

import functools
import re

import equinox as eqx
import jax
import numpy as np
import pytest

import converters
from converters import arrays as from_file, hf
from eqx_transformers import CausalLM, stack

from .folder import config, folder, weights

PLACES = sorted(
    path.parent for name in ("haiku_lm", "functional_transformer") for path in folder(name).glob("*/config.json")
)
EVERY = pytest.mark.parametrize(
    "place", [pytest.param(place, id=f"{place.parent.name}-{place.name}") for place in PLACES]
)
HEAD = {"haiku-lm-tutorial": "key_size", "haiku-lm-example": "attn_size"}


def format_of(place):
    if place.parent.name == "functional_transformer":
        return "functional-transformer"
    return "haiku-lm-tutorial" if "d_model" in config(place) else "haiku-lm-example"


@functools.cache
def tensors(place):
    return weights(place, "params")


def read(place, given=None, facts=None, **options):
    given, facts = tensors(place) if given is None else given, config(place) if facts is None else facts
    return converters.from_arrays(format_of(place), given, facts, **options)[0]


@functools.cache
def model_of(place):
    return read(place)


def inspect(place, given, facts=None):
    return from_file.inspect_arrays(format_of(place), given, config(place) if facts is None else facts)


SIZES = "embed_dim", "num_layers", "num_heads", "head_dim", "mlp_dim", "max_positions", "vocab_size"


@EVERY
def test_the_arrays_tell_the_sizes(place):
    """All of them, but how many heads share Haiku's one matrix; what a config states wrongly is noticed."""
    stated = config(place)
    needed = {k: v for k, v in stated.items() if k == "num_heads"}
    found, wanted = read(place, facts=needed).config, model_of(place).config
    assert all(getattr(found, size) == getattr(wanted, size) for size in SIZES)
    if "num_heads" in stated:
        head = HEAD[format_of(place)]
        assert read(place, facts={head: stated[head]}).config.num_heads == wanted.num_heads
        with pytest.raises(converters.UnsupportedConfig, match=f"num_heads and {head} are missing from the config"):
            read(place, facts={})
    rows = next(key for key in stated if key in ("sequence_length", "max_len"))
    with pytest.raises(converters.Mismatch, match="pos"):
        read(place, facts=stated | {rows: stated[rows] + 1})


@pytest.mark.parametrize("place", [place for place in PLACES if format_of(place) == "haiku-lm-tutorial"])
def test_the_tutorials_heads_are_of_64(place):
    widened = lambda n: 128 * n // config(place)["d_model"] if n % config(place)["d_model"] == 0 else n
    wide = {name: np.zeros([*map(widened, x.shape)], np.float32) for name, x in tensors(place).items()}
    report = inspect(place, wide, {})
    assert report.ok and any("num_heads = 2 was assumed, heads of 64" in note for note in report.notes)


@EVERY
def test_nested_parameters_are_the_same_model(place):
    nested: dict = {}
    for key, x in tensors(place).items():
        module, _, part = key.rpartition("/")
        if module:
            nested.setdefault(module, {})[part] = x
        else:
            nested[part] = x
    assert eqx.tree_equal(read(place, nested), model_of(place))


@EVERY
def test_a_stacked_model_is_the_same(place):
    assert eqx.tree_equal(read(place, stacked=True), stack(model_of(place)))


@EVERY
def test_the_arrays_are_copied(place):
    given = {key: np.array(x) for key, x in tensors(place).items()}
    model = read(place, given)
    for x in given.values():
        x[...] = 0
    assert eqx.tree_equal(model, model_of(place))


def one_of_a_kind(keys):
    """The last key of every kind: all but their numbers alike."""
    return list({re.sub(r"\d+", "*", key): key for key in sorted(keys)}.values())


@EVERY
def test_a_report_names_exactly_what_is_wrong(place):
    whole = tensors(place)
    assert inspect(place, whole).ok
    output = {key for key in whole if re.fullmatch(r"output(/weight)?|(language_model/)?linear/w", key)}
    for key in one_of_a_kind(whole):
        report = inspect(place, {k: x for k, x in whole.items() if k != key})
        # Without the output's matrix, the dictionary is that of a backbone.
        assert list(report.missing) == ([] if key in output else [key]) and not report.unexpected
        assert list(inspect(place, whole | {key: whole[key][None]}).mismatched) == [key]
    report = inspect(place, whole | {"surprise": np.zeros(3, np.float32)})
    assert list(report.unexpected) == ["surprise"] and not report.ok
    depth = next(key for key in ("num_layers", "n_layers") if key in config(place))
    layers = config(place)[depth]
    report = inspect(place, whole, config(place) | {depth: layers + 1})
    assert any(f"{depth} = {layers + 1}, the arrays are those of {layers} layers" in note for note in report.notes)
    kinds = {re.sub(r"\d+", "*", key) for key in whole}
    assert report.missing and {re.sub(r"\d+", "*", key) for key in report.missing} <= kinds  # in the format's words


@EVERY
def test_what_is_no_such_dictionary_says_so(place):
    with pytest.raises(converters.MalformedCheckpoint, match="None of the 1 arrays has a name of"):
        read(place, {"wte.weight": np.zeros((3, 5), np.float32)})
    with pytest.raises(converters.MalformedCheckpoint, match="None of the 0 arrays"):
        read(place, {})
    with pytest.raises(converters.UnsupportedConfig, match="surprise = 3 is unknown"):
        read(place, facts=config(place) | {"surprise": 3})
    heads = next(key for key in config(place) if key in ("num_heads", "n_heads"))
    for wrong in (None, 0, "2", True):
        with pytest.raises(converters.UnsupportedConfig, match=f"{heads} = {wrong!r}"):
            read(place, facts=config(place) | {heads: wrong})
    with pytest.raises(converters.ConversionError, match="is not a model of"):
        read(place, head=converters.Report)


@EVERY
def test_the_function_needs_the_widths_to_agree(place):
    """The tutorial's attention is as wide as the stream, and so are heads that stand side by side; others are free."""
    stated, model = config(place), model_of(place)
    narrow = next(key for key in ("key_size", "attn_size", "d_k") if key in stated)
    free = model.config.family == "haiku-lm-example" or getattr(model.config, "merge", "") == "sum"
    error, said = (converters.Mismatch, "query") if free else (converters.UnsupportedConfig, "must be num_heads")
    with pytest.raises(error, match=said):
        read(place, facts=stated | {narrow: stated[narrow] + 1})


@EVERY
def test_the_command_line_converts_a_file(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = str(place / "params.safetensors")
    assert hf.main(["--format", format_of(place), file, "--dry-run"]) == 0
    assert "language-model" in capsys.readouterr().out
    assert hf.main(["--format", format_of(place), file]) == 0
    model, origin = converters.load(tmp_path / "params.eqx")
    assert eqx.tree_equal(model, model_of(place)) and origin.family == format_of(place)
    with pytest.raises(converters.ConversionError, match=f"The reference library has no '{format_of(place)}'"):
        converters.export(model, tmp_path / "hf")


@EVERY
def test_an_output_is_drawn_where_a_dictionary_has_none(place):
    bare = {key: x for key, x in tensors(place).items() if not re.match(r"output|(language_model/)?linear/", key)}
    backbone = read(place, bare)
    assert not isinstance(backbone, CausalLM) and eqx.tree_equal(
        jax.tree.leaves(backbone), jax.tree.leaves(model_of(place).backbone)
    )
    whole = read(place, bare, head=CausalLM, key=jax.random.key(0))
    assert eqx.tree_equal(whole.backbone, model_of(place).backbone)
