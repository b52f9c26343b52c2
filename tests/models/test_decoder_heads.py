"""What stands on decoders, how they are drawn, and what else is done with models: files, changed facts, a corpus."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from eqx_transformers import (
    GPT2,
    LLAMA,
    CausalLM,
    Encoder,
    GPT2Config,
    Llama,
    LlamaConfig,
    MaskedLM,
    SequenceClassifier,
    encode,
    load,
    reconfigure,
    save,
    stack,
    summary,
    unstack,
)
from eqx_transformers.models.backbones import BACKBONES
from eqx_transformers.models.heads import HEADS
from eqx_transformers.skeletons import differences, skeleton
from eqx_transformers.summary import num_parameters
from eqx_transformers.surgery import leaves_by_path

from .ours import DECODERS, KEY, LENGTH, SIZES, call, filled, make, tokens

NEAR = {"rtol": 0, "atol": 3e-5}
EVERY = pytest.mark.parametrize("family", DECODERS)
ON_DECODERS = (CausalLM, SequenceClassifier)
kind = lambda family: BACKBONES[type(DECODERS[family])]
arrays = lambda tree: {path: x for path, x in leaves_by_path(tree).items() if eqx.is_array(x)}


# ---- heads


@EVERY
@pytest.mark.parametrize("head", ON_DECODERS, ids=lambda head: head.__name__)
def test_a_head_from_a_config_and_one_put_on_a_decoder_are_what_the_config_builds(head, family):
    labels = 5 if head is SequenceClassifier else None
    decoder = make(kind(family), family)
    model = head.of(decoder, labels, key=KEY)
    made = eqx.filter_eval_shape(head, replace(DECODERS[family], labels=labels or DECODERS[family].labels), key=KEY)
    assert differences(model) == [] == differences(made)
    assert model.config == made.config and model.backbone.config is None
    mine, theirs = arrays(model.backbone), arrays(decoder)
    assert mine.keys() == theirs.keys() and all(mine[path] is theirs[path] for path in mine)
    output = eqx.filter_eval_shape(lambda m, ids: m(ids), model, tokens())
    assert output.shape == ((5,) if labels else (LENGTH, 61))


@pytest.mark.parametrize("head", [head for head in HEADS.values() if head not in ON_DECODERS], ids=lambda h: h.__name__)
def test_an_encoders_head_on_a_decoder_is_one_clear_error(unchecked, head):
    config = DECODERS["gpt2"]
    said = f"{head.__name__}.* expected an Encoder.*GPT2.* On a GPT2 stand CausalLM, SequenceClassifier"
    with pytest.raises(ValueError, match=said):
        head(config, key=KEY)
    with pytest.raises(ValueError, match=said):
        head.of(make(GPT2, "gpt2"), 5 if head.takes_labels else None, key=KEY)


def test_what_is_no_config_and_no_backbone_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"CausalLM: expected an EncoderConfig or .*, but the config is a dict\.$"):
        CausalLM({}, key=KEY)
    with pytest.raises(ValueError, match=r"MaskedLM: expected an EncoderConfig, but the config is a dict\.$"):
        MaskedLM({}, key=KEY)
    with pytest.raises(ValueError, match=r"expected an Encoder or GPT2 or Llama.* but it is CausalLM"):
        CausalLM.of(make(CausalLM, "gpt2"), key=KEY)


@EVERY
def test_scores_are_those_against_the_token_table_where_it_is_tied_and_of_an_output_else(family):
    model = make(CausalLM, family)
    hidden = np.float64(call(model.backbone, tokens()))
    assert (model.head.decoder is None) == DECODERS[family].tied == (family in ("gpt2", "qwen3"))
    output = model.backbone.embedding.tokens if model.head.decoder is None else model.head.decoder
    bias = getattr(output, "bias", None)
    expected = hidden @ np.float64(output.weight).T + (0 if bias is None else np.float64(bias))
    np.testing.assert_allclose(call(model, tokens()), expected, rtol=1e-4, atol=1e-4)
    factors = model.factors(call(model.backbone, tokens()))
    assert factors.weight is output.weight and factors.bias is bias


@functools.cache
def classifier(family, **facts):
    return make(SequenceClassifier, family, **facts)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifier_reads_the_last_token_that_is_not_padding(family):
    model, real = classifier(family), tokens(3, 9)
    literal = lambda ids: np.float64(call(model.backbone, ids)[-1]) @ np.float64(model.head.output.weight).T
    expected = literal(real)
    assert model.head.output.bias is None and expected.shape == (3,)
    near = functools.partial(np.testing.assert_allclose, desired=expected, rtol=1e-4, atol=1e-4)
    near(call(model, real))
    right, left = (np.pad(real, pads, constant_values=1) for pads in ((0, 4), (4, 0)))
    for ids in (right, left):
        near(call(model, ids, attention_mask=(ids != 1).astype(int)))
    near(call(model, right))  # without a mask, the config's padding_id says where the text ends
    other = np.where(right == 1, 7, right)  # the id says what padding is: transformers does not look at the mask
    assert not np.allclose(call(model, other, attention_mask=right != 1), expected, atol=1e-2)
    near(call(model, np.append(real, 1)))  # an end of text that is padding's id too
    assert np.isfinite(call(model, np.ones(LENGTH, int))).all()  # nothing but padding


def test_without_a_padding_id_and_a_mask_a_classifier_reads_the_last_token():
    model, ids = classifier("mistral"), np.pad(tokens(3, 9), (0, 4), constant_values=1)
    expected = np.float64(call(model.backbone, ids)[-1]) @ np.float64(model.head.output.weight).T
    np.testing.assert_allclose(call(model, ids), expected, rtol=1e-4, atol=1e-4)
    short = np.float64(call(model.backbone, ids[:9])[-1]) @ np.float64(model.head.output.weight).T
    masked = call(model, ids, attention_mask=(np.arange(13) < 9).astype(int))
    np.testing.assert_allclose(masked, short, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="attention_mask must be 'seq' here"):
        model(ids, attention_mask=np.ones((LENGTH, LENGTH), int))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_used_as_a_decoder_steps_as_it_is_called(family):
    model, ids = make(CausalLM, family), tokens()

    @eqx.filter_jit
    def run(model):
        first, cache = model.step(ids[:4], model.init_cache(LENGTH))
        last, cache = model.step(ids[4:], cache)
        return first, last

    assert model.config.causal and model.backbone.causal
    np.testing.assert_allclose(np.concatenate(run(model)), call(model, ids), **NEAR)


# ---- drawn


def deviations(model):
    matrices = {path: x for path, x in arrays(model).items() if x.ndim == 2}
    assert len({np.asarray(x).tobytes() for x in matrices.values()}) == len(matrices)  # no key serves twice
    return {path: float(np.std(x)) for path, x in matrices.items()}


def test_gpt2_draws_what_writes_to_the_stream_narrower():
    config = GPT2Config(vocab_size=997, embed_dim=64, num_layers=2, num_heads=2, max_positions=97, init_std=0.5)
    found = deviations(eqx.filter_jit(CausalLM)(config, key=KEY))
    narrow = [path for path in found if path.endswith(("output_proj.weight", "down_proj.weight"))]
    assert len(narrow) == 4 and len(found) == 2 + 2 * 6  # tied: no output of its own
    for path, deviation in found.items():
        np.testing.assert_allclose(deviation, 0.25 if path in narrow else 0.5, rtol=0.05)  # 0.5 / sqrt(2 * 2)
    assert config.mlp_dim is None and skeleton(GPT2, config).stack.blocks[0].mlp.up_proj.out_features == 256


def test_llama_draws_every_matrix_alike_and_starts_with_plain_norms():
    config = replace(LLAMA, vocab_size=997, embed_dim=64, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=96)
    model = eqx.filter_jit(CausalLM)(replace(config, init_std=0.5, padding_id=3), key=KEY)
    found = deviations(model)
    assert len(found) == 1 + 4 + 3 + 1
    for deviation in found.values():
        np.testing.assert_allclose(deviation, 0.5, rtol=0.05)
    assert not model.backbone.embedding.tokens.weight[3].any()
    assert all((x == 1).all() for path, x in arrays(model).items() if path.endswith("norm.weight"))
    assert not any(path.endswith("bias") for path in arrays(model))


# ---- configs

WRONG = {
    "heads": ("gpt2", {"num_heads": 4}, "embed_dim = 21 is not a multiple of num_heads = 4"),
    "an activation": ("gpt2", {"activation": "swish"}, "activation = 'swish' is not one of"),
    "a rate": ("gpt2", {"embedding_dropout": 1.5}, "embedding_dropout = 1.5 is not a probability"),
    "labels": ("gpt2", {"labels": 0}, "labels = 0 must be at least 1"),
    "depth": ("gpt2", {"num_layers": -1}, "num_layers = -1 must not be negative"),
    "no width": ("llama", {"mlp_dim": 0}, "mlp_dim = 0 must be at least 1"),
    "groups": ("llama", {"num_kv_heads": 3}, "num_heads = 4 is not a multiple of num_kv_heads = 3"),
    "an odd head": ("llama", {"head_dim": 7}, "heads of 7 cannot be turned in pairs"),
    "no head width": ("llama", {"head_dim": None}, "embed_dim = 21 is not a multiple of num_heads = 4"),
    "a scaling": ("llama", {"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is not one of default, linear, llama3"),
    "a family": ("llama", {"family": "gemma"}, "family = 'gemma' is not one of llama, mistral, qwen2, qwen3"),
    "windows": ("qwen2", {"windowed": (True,)}, "windowed is said of 1 layers, but there are 2"),
    "no window": ("mistral", {"window": 0}, "window = 0 must be at least 1"),
    "padding": ("llama", {"padding_id": 61}, "padding_id = 61 is not one of the 61 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_facts_that_make_no_model_are_refused(unchecked, case):
    family, facts, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        replace(DECODERS[family], **facts)


def test_facts_that_are_not_said_follow_from_others():
    config = replace(LLAMA, embed_dim=24, num_heads=4)
    assert (config.kv_heads, config.head_width) == (4, 6)
    assert replace(config, num_kv_heads=2, head_dim=10).head_width == 10
    assert isinstance(config, LlamaConfig) and config.causal and not config.tied
    rotary = skeleton(Llama, replace(config, num_layers=0, max_positions=99)).rotary
    assert (rotary.dim, rotary.original_positions, rotary.scaling) == (6, 99, "default")
    assert make(Llama, "llama").rotary.original_positions == 8


# ---- files, changed facts, tables, a corpus


@EVERY
@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_a_decoder_is_saved_and_loaded_bit_for_bit(tmp_path, family, stacked):
    facts = {"windowed": None} if family == "qwen2" and stacked else {}
    for i, head in enumerate((kind(family), *ON_DECODERS)):
        model = make(head, family, stacked, **facts)
        save(model, tmp_path / str(i))
        assert eqx.tree_equal(load(tmp_path / str(i))[0], model, typematch=True)
        assert not stacked or eqx.tree_equal(stack(unstack(model)), model, typematch=True)


@EVERY
def test_a_vocabulary_grows(family):
    bigger = lambda path, old, new: np.zeros(new.shape, new.dtype) if old is None else grown_rows(old, new)
    model = make(CausalLM, family)
    grown = reconfigure(model, bigger, vocab_size=70)
    assert grown.config == replace(model.config, vocab_size=70) and differences(grown) == []
    changed = {path for path, x in arrays(model).items() if arrays(grown)[path] is not x}
    output = {f"head.decoder.{name}" for name in ("weight", "bias")} & arrays(model).keys()
    assert changed == {"backbone.embedding.tokens.weight"} | output
    np.testing.assert_allclose(call(grown, tokens())[:, :61], call(model, tokens()), **NEAR)


def grown_rows(old, new):
    return jax.numpy.zeros(new.shape, new.dtype).at[: len(old)].set(old)


def test_facts_change_and_the_arrays_stay():
    model = make(CausalLM, "llama")
    changed = reconfigure(model, rope_base=99.0, window=3, attention_dropout=0.7)
    assert changed.backbone.rotary.base == 99.0
    assert [(b.attention.window, b.attention.dropout.p) for b in changed.backbone.stack.blocks] == [(3, 0.7)] * 2
    assert all(arrays(changed)[path] is x for path, x in arrays(model).items())
    untied = reconfigure(make(CausalLM, "qwen3"), lambda path, old, new: jax.numpy.ones(new.shape), tied=False)
    assert (untied.head.decoder.weight == 1).all()


def test_a_summary_counts_a_tied_matrix_once():
    model = make(CausalLM, "gpt2")
    block = 4 * 22 * 21 + (22 * 37 + 38 * 21) + 4 * 21
    assert num_parameters(model) == 21 * (61 + 31) + 2 * block + 2 * 21
    assert f"{num_parameters(model):,}" in summary(model) and "backbone.stack" in summary(model)
    head = num_parameters(make(CausalLM, "llama")) - num_parameters(make(Llama, "llama"))
    assert head == 21 * SIZES["vocab_size"]


def words():
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    return made


def corpus(*lengths):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(3, 61, n)) for n in lengths]


@pytest.mark.parametrize(("head", "family"), [(SequenceClassifier, "gpt2"), (CausalLM, "llama"), (Llama, "qwen3")])
def test_encode_gives_what_a_decoder_makes_of_each_text_alone(head, family):
    model, texts = make(head, family, **({} if family == "qwen3" else {"num_layers": 1})), corpus(4, 2, 9, 4)
    for got, text in zip(encode(model, words(), texts, max_shapes=2), texts, strict=True):
        np.testing.assert_allclose(got, call(model, np.array(words().encode(text).ids)), rtol=1e-4, atol=1e-4)


def test_encode_asks_a_decoder_for_its_room():
    gpt2, llama = (make(SequenceClassifier, family, num_layers=0) for family in ("gpt2", "llama"))
    long = corpus(32)
    for model in (gpt2, llama):  # by itself, a rotary model is held to its config's context
        with pytest.raises(ValueError, match="1 of 1 texts have more than 31 tokens"):
            encode(model, words(), long)
        assert encode(model, words(), long, truncate=True).shape == (1, 3)
    with pytest.raises(ValueError, match="max_length = 40 is more than the model has positions for, which is 31"):
        encode(gpt2, words(), long, max_length=40)
    got = encode(llama, words(), long, max_length=40)
    np.testing.assert_allclose(got[0], call(llama, np.array(words().encode(long[0]).ids)), rtol=1e-4, atol=1e-4)
    assert make(Encoder, "roberta").room == 29 and filled(skeleton(GPT2, DECODERS["gpt2"])).room == 31
