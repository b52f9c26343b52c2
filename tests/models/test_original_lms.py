"""The causal models of Haiku and the functional transformer, beside what the originals' own numbers prove."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformers
from eqx_transformers import (
    FUNCTIONAL_2022,
    FUNCTIONAL_HEAD,
    HAIKU_EXAMPLE,
    HAIKU_TUTORIAL,
    CausalLM,
    FunctionalConfig,
    FunctionalTransformer,
    SequenceClassifier,
    Transformer,
    TransformerConfig,
    reconfigure,
    stack,
    unstack,
)
from eqx_transformers.models.functional import HeadSum, Standardize, standardize
from eqx_transformers.nn import Mask, kernels
from eqx_transformers.skeletons import skeleton

from .ours import KEY, call, filled

SIZES = {"vocab_size": 29, "num_layers": 2, "num_heads": 3, "max_positions": 17}
CONFIGS = {
    "tutorial": replace(HAIKU_TUTORIAL, **SIZES, embed_dim=21, head_dim=7, dropout=0.5),
    "example": replace(HAIKU_EXAMPLE, **SIZES, embed_dim=14, head_dim=5, widening_factor=3, padding_id=2, dropout=0.5),
    "2022": replace(FUNCTIONAL_2022, **SIZES, embed_dim=13, head_dim=4, mlp_dim=20, tau=0.3, lambda_pe=0.7),
    "head": replace(FUNCTIONAL_HEAD, **SIZES, embed_dim=12, head_dim=4, mlp_dim=20, lambda_e=1.9),
}
BACKBONES = {
    "tutorial": (TransformerConfig, Transformer),
    "example": (TransformerConfig, Transformer),
    "2022": (FunctionalConfig, FunctionalTransformer),
    "head": (FunctionalConfig, FunctionalTransformer),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
IDS = np.random.default_rng(0).integers(3, 29, 11).astype(np.int32)  # no padding


@functools.cache
def make(name):
    return filled(skeleton(CausalLM, CONFIGS[name]))


@functools.cache
def scores(name):
    return call(make(name), IDS)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@EVERY
def test_a_config_makes_its_backbone(name):
    config, backbone = BACKBONES[name]
    model = make(name)
    assert type(model.config) is config and type(model.backbone) is backbone
    assert scores(name).shape == (11, 29)
    bias = model.head.decoder.bias
    assert (bias is None) == (name == "head")
    assert all((x.bias is None) == (name == "head") for x in layers(model))


def layers(model):
    block = model.backbone.stack.blocks[0]
    attention = block.attention
    return [block.attention_norm, attention.query_proj, attention.value_proj, block.mlp.up_proj, block.mlp.down_proj]


@EVERY
def test_a_shorter_sequence_takes_the_first_rows_and_a_longer_one_is_refused(name):
    model = make(name)
    close(call(model, IDS[:7]), scores(name)[:7])  # nor does a token see what follows it
    with pytest.raises(
        ValueError, match="a sequence of 18 tokens is longer than the position table allows, which is 17"
    ):
        model(jnp.ones(18, jnp.int32))


@EVERY
def test_steps_with_a_cache_are_the_call(name):
    model = make(name)
    step = eqx.filter_jit(lambda model, ids, cache: model.step(ids, cache))
    first, cache = step(model, IDS[:6], model.init_cache(13))
    second, _ = step(model, IDS[6:], cache)
    close(jnp.concatenate([first, second]), scores(name))


@EVERY
def test_blocks_are_stacked_and_unstacked(name):
    stacked = stack(make(name))
    close(call(stacked, IDS), scores(name))
    assert eqx.tree_equal(unstack(stacked), make(name))


@functools.cache
def backbone(name):
    return filled(skeleton(BACKBONES[name][1], CONFIGS[name]))


@EVERY
def test_a_model_is_saved_and_loaded(name, tmp_path):
    for model in (make(name), stack(backbone(name))):
        place = tmp_path / type(model).__name__
        eqx_transformers.save(model, place)
        loaded, _ = eqx_transformers.load(place)
        assert eqx.tree_equal(loaded, model) and loaded.config == CONFIGS[name]


CHANGED = {
    "tutorial": {"norm_eps": 0.1},
    "example": {"padding_id": None, "activation": "relu"},
    "2022": {"lambda_e": 0.5},
    "head": {"tau": 0.9},
}


@EVERY
def test_a_fact_is_changed(name):
    model = reconfigure(make(name), **CHANGED[name])
    assert all(getattr(model.config, fact) == value for fact, value in CHANGED[name].items())
    assert np.abs(call(model, IDS) - scores(name)).max() > 1e-3
    bigger = lambda path, old, new: jnp.zeros(new.shape, new.dtype).at[: len(old)].set(old)
    grown = reconfigure(make(name), bigger, vocab_size=31, max_positions=19)
    assert grown.backbone.room == 19
    assert grown.head.decoder.weight.shape == (31, CONFIGS[name].embed_dim)


@EVERY
def test_a_head_is_put_on_a_backbone(name):
    body = backbone(name)
    whole = CausalLM.of(body, key=KEY)
    assert eqx.tree_equal(whole.backbone.stack, body.stack)
    assert eqx.tree_equal(whole, CausalLM(CONFIGS[name], key=KEY, encoder=body))
    classifier = SequenceClassifier.of(body, 5, key=KEY)
    assert eqx.filter_eval_shape(classifier, IDS).shape == (5,)


@pytest.mark.parametrize("name", ["tutorial", "example"])
def test_padding_is_hidden_by_its_id_and_counts_as_a_position(name):
    model, padding = make(name), CONFIGS[name].padding_id
    ids = IDS.copy()
    ids[[0, 1, 5]] = padding
    given = call(model, ids)
    close(given, call(model, ids, attention_mask=ids != padding))
    behind = call(model, ids[2:], position_ids=np.arange(2, 11))
    close(given[2:], behind)
    assert np.abs(given - call(model, ids, attention_mask=np.ones(11, np.int32))).max() > 1e-3


@pytest.mark.parametrize("name", ["tutorial", "example"])
def test_a_token_that_sees_nothing_gets_the_mean_of_all_values(name):
    attention = make(name).backbone.stack.blocks[0].attention
    x = jax.random.normal(KEY, (5, CONFIGS[name].embed_dim))
    mask = Mask(causal=True, keys=jnp.array([False, False, True, True, True]))
    wanted = attention.output_proj(attention.value_proj(x).mean(0))
    close(attention(x, mask)[:2], jnp.stack([wanted, wanted]))


def test_dropout_acts_behind_the_attention_and_the_network_alone():
    model = make("tutorial")
    assert np.abs(call(model, IDS, KEY) - scores("tutorial")).max() > 1e-2
    off = lambda m: [d for b in m.backbone.stack.blocks for d in (b.attention_output_dropout, b.mlp_output_dropout)]
    without = eqx.tree_at(off, model, replace_fn=lambda d: eqx.tree_at(lambda d: d.p, d, 0.0))
    np.testing.assert_array_equal(call(without, IDS, KEY), call(without, IDS))


@pytest.mark.parametrize("name", ["2022", "head"])
def test_the_functional_transformer_drops_nothing(name):
    np.testing.assert_array_equal(call(make(name), IDS, KEY), scores(name))


# ---- the parts of the functional transformer


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_standardize_is_its_formula(dtype):
    x = jax.random.normal(KEY, (3, 5, 7)).astype(dtype)
    norm = filled(Standardize(7, eps=0.1))
    wide = np.asarray(x, np.float64)
    wanted = (wide - wide.mean(-1, keepdims=True)) / (wide.std(-1, keepdims=True) + 0.1)
    y = norm(x)
    assert y.dtype == dtype and norm.dim == 7
    close(
        np.asarray(y, np.float64),
        wanted * np.asarray(norm.weight) + np.asarray(norm.bias),
        1e-6 if dtype == jnp.float32 else 0.02,
    )
    close(standardize(x.astype(jnp.float32), 0.1), wanted, 1e-6)
    assert Standardize(7, use_bias=False).bias is None


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30])
def test_standardize_has_finite_gradients_at_a_constant_row(value):
    """At a constant row the deviation's derivative counts as zero: what is left is (v - mean(v)) / eps."""
    x, v = jnp.full(5, value), jnp.arange(5.0)
    gradient = jax.grad(lambda x: (standardize(x, 1e-5) * v).sum())(x)
    close(gradient, (v - v.mean()) / 1e-5, 1.0)


def test_standardize_has_the_gradient_of_its_formula():
    x, v = jax.random.normal(KEY, (7,)), jnp.arange(7.0)
    plain = lambda x: ((x - x.mean()) / (x.std() + 0.01) * v).sum()
    close(jax.grad(lambda x: (standardize(x, 0.01) * v).sum())(x), jax.grad(plain)(x), 1e-4)


@pytest.mark.parametrize(("name", "path"), [("2022", "plain: value_dim 13 is more"), ("head", "blocked")])
def test_wide_values_are_not_blocked(name, path):
    attention = make(name).backbone.stack.blocks[0].attention
    shape = lambda layer: jax.ShapeDtypeStruct((11, 3, layer.out_features // 3), jnp.float32)
    q, k, v = map(shape, (attention.query_proj, attention.key_proj, attention.value_proj))
    assert kernels.explain(q, k, v, Mask(causal=True)).startswith(path)


def test_heads_are_added_up():
    x = jax.random.normal(KEY, (2, 5, 3 * 7))
    close(HeadSum(3)(x), x[..., :7] + x[..., 7:14] + x[..., 14:], 1e-6)


# ---- configs that cannot be

WRONG = [
    (
        HAIKU_TUTORIAL,
        {"head_dim": 32},
        r"embed_dim = 256 must be num_heads \* head_dim = 4 \* 32 in the tutorial's model",
    ),
    (HAIKU_TUTORIAL, {"family": "haiku"}, "family = 'haiku' is not one of haiku-lm-tutorial, haiku-lm-example"),
    (HAIKU_EXAMPLE, {"activation": "swish"}, "activation = 'swish' is not one of"),
    (HAIKU_EXAMPLE, {"widening_factor": 0}, "widening_factor = 0 must be at least 1"),
    (HAIKU_EXAMPLE, {"dropout": 1.5}, "dropout = 1.5 is not a probability"),
    (
        FUNCTIONAL_HEAD,
        {"head_dim": 63},
        r"embed_dim = 512 must be num_heads \* head_dim = 8 \* 63 where heads stand side",
    ),
    (FUNCTIONAL_2022, {"merge": "mean"}, "merge = 'mean' is not one of sum, concatenate"),
    (FUNCTIONAL_2022, {"num_heads": 0}, "num_heads = 0 must be at least 1"),
]


@pytest.mark.parametrize(("facts", "changed", "said"), WRONG)
def test_a_config_that_cannot_be_says_why(unchecked, facts, changed, said):
    with pytest.raises(ValueError, match=said):
        replace(facts, **changed)


def test_the_published_facts():
    """The tutorial's heads are of 64; the example's attention is twice as wide as its stream."""
    assert HAIKU_TUTORIAL.head_dim == 64 and HAIKU_TUTORIAL.mlp_dim == 1024
    assert HAIKU_EXAMPLE.num_heads * HAIKU_EXAMPLE.head_dim == 2 * HAIKU_EXAMPLE.embed_dim
    assert replace(FUNCTIONAL_2022, use_bias=False, merge="concatenate") == FUNCTIONAL_HEAD
    assert skeleton(Transformer, replace(HAIKU_TUTORIAL, num_layers=0)).room == 128
