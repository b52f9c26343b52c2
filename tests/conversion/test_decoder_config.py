"""What config.json says of causal models in several fields, or may not say: rotary positions, windows, biases."""

import json
import shutil
from dataclasses import replace

import equinox as eqx
import jax
import pytest
import transformers

import converters
from converters.families import _rope, _window
from eqx_transformers import (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    CausalLM,
    GPT2Config,
    Llama,
    SequenceClassifier,
    reconfigure,
)

from ..reference import reference
from ..tiny import LLAMA3, MIXED, Row
from .breaking import config as changed

KEY = jax.random.key(0)


@pytest.fixture
def llama(tmp_path):
    shutil.copytree(reference(Row("llama", CausalLM)).directory, tmp_path / "tiny")
    return tmp_path / "tiny"


def fields(directory):
    return json.loads((directory / "config.json").read_bytes())


# ---- rotary positions

LINEAR = {"rope_type": "linear", "factor": 2.0}
KINDS = ("dynamic", "yarn", "longrope", "su", "mrope", "proportional")
REFUSED = {
    **{kind: (LINEAR | {"rope_type": kind}, f"of the kind '{kind}' are not had here, only default") for kind in KINDS},
    "an old word for one": ({"type": "yarn", "factor": 2.0}, "of the kind 'yarn' are not had here"),
    "no kind at all": ({"rope_type": 7}, "of the kind 7 are not had here"),
    "no factor": ({"rope_type": "linear"}, "the kind 'linear' needs factor"),
    "half of llama3": ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
    "a band of nothing": (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor"),
    "a factor of nothing": (LINEAR | {"factor": 0}, "expected a number above 0"),
    "a factor that is a word": (LINEAR | {"factor": "2"}, "expected a number"),
    "a base of nothing": (LINEAR | {"rope_theta": -1.0}, "expected a number above 0"),
    "no original": (LLAMA3 | {"original_max_position_embeddings": 0}, "expected 1 or more"),
    "a part of a head": (LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is unknown"),
    "what is of another kind": ({"rope_type": "default", "factor": 2.0}, "factor is unknown of the kind 'default'"),
    "one for each kind of layer": ({"full_attention": LINEAR}, "full_attention is unknown"),
    "no dictionary": ("linear", "expected a dictionary that says how rotary positions turn"),
}


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("value", "says"), REFUSED.values(), ids=REFUSED)
def test_positions_that_are_not_understood_are_refused(value, says, field, llama):
    changed(rope_parameters=..., **({"rope_theta": 100.0} if field == "rope_scaling" else {}))(llama)
    changed(**{field: value})(llama)
    with pytest.raises(converters.UnsupportedConfig, match=f"rope_parameters = .*{says}"):
        converters.inspect(llama)


SAID = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    LLAMA3,
    {name: x for name, x in LLAMA3.items() if name != "original_max_position_embeddings"},
]


@pytest.mark.parametrize("said", SAID, ids=lambda said: f"{said['rope_type']}-{len(said)}")
def test_what_is_read_of_positions_is_written(said):
    assert _rope.write(*_rope.read(said)) == (said,)


def test_a_changed_fact_is_written_in_the_place_of_older_fields_that_would_hide_it(llama, tmp_path):
    """The reference believes `rope_scaling` where it is there."""
    changed(rope_parameters=..., rope_theta=100.0, rope_scaling={"type": "linear", "factor": 2.0})(llama)
    model, origin = converters.load(llama)
    assert (model.config.rope_scaling, model.config.rope_factor, model.config.rope_base) == ("linear", 2.0, 100.0)
    converters.export(reconfigure(model, rope_factor=3.0, labels=2), tmp_path / "out", origin)
    written = fields(tmp_path / "out")
    assert not {"rope_theta", "rope_scaling"} & written.keys()
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert theirs == {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
    assert converters.load(tmp_path / "out")[0].config == replace(model.config, rope_factor=3.0)


# ---- windows

WINDOWS = [
    {"use_sliding_window": used, "sliding_window": window, "max_window_layers": first, "layer_types": kinds}
    for used in (True, False)
    for window in (5, None)
    for first in (0, 1, 3, 28)
    for kinds in (None, [_window.FULL] * 3)
]
WINDOWS += [
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 28, "layer_types": kinds}
    for kinds in ([_window.SLIDING] * 3, [_window.SLIDING, _window.FULL, _window.SLIDING])
]


@pytest.mark.parametrize("said", WINDOWS, ids=lambda said: "-".join(map(str, said.values())))
def test_windows_are_those_of_the_reference(said):
    """Layer by layer, as read, and as written and read again by the reference."""
    theirs = transformers.Qwen2Config(num_hidden_layers=3, **said)
    layers, window, windowed = _window.read(3, *said.values())
    written = dict(zip(_window.FACT.theirs, _window.write(layers, window, windowed), strict=True))
    assert _window.read(*written.values()) == (layers, window, windowed)
    seen = lambda config: [config.sliding_window if k == _window.SLIDING else None for k in config.layer_types]
    ours = [window if windowed is None or windowed[i] else None for i in range(layers)]
    assert ours == seen(theirs) == seen(transformers.Qwen2Config(**written))


WRONG = {
    "windows without one": ({"layer_types": [_window.SLIDING, _window.FULL]}, "there is none"),
    "too few": ({"layer_types": [_window.FULL]}, "for each of 2 layers"),
    "a kind of another model": ({"layer_types": ["chunked_attention"] * 2}, "expected full_attention or sliding_"),
    "a window of nothing": ({"use_sliding_window": True, "sliding_window": 0}, "expected 1 or more"),
    "a word": ({"use_sliding_window": "yes"}, "expected true or false"),
}


@pytest.mark.parametrize(("said", "says"), WRONG.values(), ids=WRONG)
def test_windows_that_contradict_each_other_are_refused(said, says, tmp_path):
    shutil.copytree(reference(Row("qwen2", CausalLM)).directory, tmp_path / "tiny")
    changed(**said)(tmp_path / "tiny")
    with pytest.raises(converters.UnsupportedConfig, match=rf"use_sliding_window = .*{says}"):
        converters.inspect(tmp_path / "tiny")


def test_layers_that_differ_are_not_stacked():
    with pytest.raises(converters.ConversionError, match=r"stacked=True.*blocks\.1\.attention\.window is.*without"):
        converters.load(reference(MIXED).directory, stacked=True)
    model, _ = converters.load(reference(MIXED).directory)
    assert [block.attention.window for block in model.backbone.stack.blocks] == [None, 5]


# ---- what cannot be said

UNSAID = [
    (replace(LLAMA, window=5), "window = 5"),
    (replace(LLAMA, attention_bias=True), "attention_bias = True"),
    (replace(LLAMA, head_norm=True), "head_norm = True"),
    (replace(LLAMA, rope_factor=2.0), "rope_factor = 2.0"),
    (replace(MISTRAL, mlp_bias=True, num_kv_heads=2), "mlp_bias = True"),
    (replace(QWEN2, attention_bias=False), "attention_bias = False"),
    (replace(QWEN2, window=5, windowed=(True, True), num_layers=2), r"windowed = \(True, True\)"),
    (replace(QWEN3, head_dim=None), r"head_dim = None \(expected a whole number"),
]
SIZES = {"vocab_size": 61, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "mlp_dim": 37}


@pytest.mark.parametrize(("config", "says"), UNSAID, ids=lambda x: x if isinstance(x, str) else x.family)
def test_a_fact_that_the_family_has_no_words_for_is_not_exported(config, says, tmp_path):
    model = CausalLM(replace(config, **SIZES), key=KEY)
    with pytest.raises(converters.ConversionError, match=says):
        converters.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padding_outside_the_vocabulary_is_refused_where_it_is_a_row(llama):
    changed(pad_token_id=61)(llama)
    with pytest.raises(converters.UnsupportedConfig, match="padding_id = 61 is not one of the 61 tokens"):
        converters.inspect(llama)


def test_padding_that_older_conversions_call_minus_one_is_none_and_goes_back(llama, tmp_path):
    changed(pad_token_id=-1)(llama)
    model, origin = converters.load(llama)
    assert model.config.padding_id is None
    converters.export(model, tmp_path / "out", origin)
    assert fields(tmp_path / "out")["pad_token_id"] == -1


# ---- heads


def test_a_backbone_is_a_head_like_any_other(llama):
    model, origin = converters.load(llama, head=Llama)
    assert type(model) is Llama and list(origin.dropped) == ["lm_head.weight"]
    assert eqx.tree_equal(model.stack, converters.load(llama)[0].backbone.stack)
    with pytest.raises(converters.ConversionError, match="head=GPT2Config is not a model of llama"):
        converters.load(llama, head=GPT2Config)


def test_a_tied_language_model_is_whole_in_a_bare_file_and_an_untied_one_is_not():
    tied, untied = (reference(Row(*row)).directory for row in (("gpt2", GPT2), ("llama", Llama)))
    model, _ = converters.load(tied, head=CausalLM)  # nothing is drawn, so that no key is needed
    assert converters.inspect(tied, head=CausalLM).new == {} and model.head.decoder is None
    assert converters.inspect(untied, head=CausalLM).new == {"head.decoder.weight": (61, 28)}
    with pytest.raises(converters.ConversionError, match=r"head\.decoder\.weight: not in the file.*key="):
        converters.load(untied, head=CausalLM)
    assert converters.inspect(untied, head=CausalLM).ok


def test_a_sentence_embedder_of_a_decoder_is_not_taken_for_its_language_model(llama):
    (llama / "modules.json").write_text("[]")
    with pytest.raises(converters.UnsupportedConfig, match=r"a sentence embedder of a llama.*head=Llama loads"):
        converters.load(llama)
    assert type(converters.load(llama, head=Llama)[0]) is Llama
    assert type(converters.load(llama, head=SequenceClassifier, labels=2, key=KEY)[0]) is SequenceClassifier
