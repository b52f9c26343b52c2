"""Functions written inline are found however they are called, in every spelling promised, and nothing else is."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import gelu as bare_gelu

from eqx_transformers import CausalLM, MaskedLM, T5Model, nn
from eqx_transformers.expression import rewrite, trace
from eqx_transformers.expression.recognise import JAX_NN, SPELLINGS, attention, layer_norm, recognisers_of, rms_norm

from ..models import ours
from ..models.test_t5 import make as make_t5, tokens as t5_tokens
from .small import MODELS, ids, states

NEAR = {"rtol": 1e-6, "atol": 1e-6}  # two orders of the same sums in float32
X = jnp.linspace(-2.0, 2.0, 24).reshape(4, 6)


def found(function, *args, functions=JAX_NN):
    """The recognised functions, in the order in which they run."""
    return [node for node in trace(function, functions=functions)(*args).nodes() if node.recognised]


def tags(function, *args, functions=JAX_NN):
    return [node.tag for node in found(function, *args, functions=functions)]


# ---- scenario 7: sixteen ways of calling gelu

REGISTRY = {"gelu": jax.nn.gelu}


class Held(eqx.Module):
    """Functions in fields."""

    dynamic: object
    static: object = eqx.field(static=True)

    def __call__(self, x, which):
        return self.dynamic(x) if which == "dynamic" else self.static(x)


def with_default(x, activation=jax.nn.gelu):
    return activation(x)


def closed_over(activation):
    return lambda x: activation(x)


def looped(x):
    for _ in range(3):
        x = jax.nn.gelu(x)
    return x


WARM = jax.jit(lambda x: jax.nn.gelu(x) + 1)
HELD = Held(jax.nn.gelu, jax.nn.gelu)
STYLES = {
    "attribute": (lambda x: jax.nn.gelu(x), 1),
    "from-import": (lambda x: bare_gelu(x), 1),
    "closure": (closed_over(jax.nn.gelu), 1),
    "default argument": (with_default, 1),
    "partial": (functools.partial(jax.nn.gelu, approximate=True), 1),
    "registry": (lambda x: REGISTRY["gelu"](x), 1),
    "field": (lambda x: HELD(x, "dynamic"), 1),
    "static field": (lambda x: HELD(x, "static"), 1),
    "vmap": (lambda x: jax.vmap(jax.nn.gelu)(x), 1),
    "scan": (lambda x: jax.lax.scan(lambda c, y: (c, jax.nn.gelu(y)), 0.0, x)[1], 1),
    "remat": (lambda x: jax.checkpoint(jax.nn.gelu)(x), 1),
    "warm jit": (lambda x: WARM(x), 1),
    "nested on a line": (lambda x: jax.nn.gelu(jax.nn.gelu(x)), 2),
    "loop": (looped, 3),
    "cond": (lambda x: jax.lax.cond(x[0, 0] < 0, jax.nn.gelu, lambda x: -jax.nn.gelu(x), x), 2),
    "while": (lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jax.nn.gelu(c[1])), (0, x))[1], 1),
}


@pytest.mark.parametrize("style", STYLES)
def test_s07_gelu_is_found_in_every_style_of_calling_it_and_replaced(style, monkeypatch):
    function, count = STYLES[style]
    function(X)  # a jitted function has been traced before
    assert len(STYLES) == 16 and tags(function, X) == ["gelu"] * count
    assert rewrite(function, {jax.nn.gelu: jax.nn.gelu})(X).tolist() == function(X).tolist()
    # In the numbers, sin is seen everywhere and gelu nowhere: a rule's replacement is called as often as gelu is found.
    calls = []
    new = rewrite(function, {"//gelu": lambda x: (calls.append(x.shape), jnp.sin(x))[1]})(X)
    expected = {
        "nested on a line": lambda: jnp.sin(jnp.sin(X)),
        "loop": lambda: jnp.sin(jnp.sin(jnp.sin(X))),
        "while": lambda: jnp.sin(jnp.sin(X)),
        "warm jit": lambda: jnp.sin(X) + 1,
    }.get(style, lambda: jnp.sin(X))()
    np.testing.assert_allclose(new, expected, **NEAR)
    assert calls


def test_s07_every_block_of_every_model_has_its_gelu():
    assert [node.tag for node in found(MODELS["list"], ids()) if node.tag == "gelu"] == ["gelu"] * 2
    for name in ("stacked", "remat"):
        (node,) = [node for node in found(MODELS[name], ids()) if node.tag == "gelu"]
        assert node.inputs[0].shape == (5, 16)


@pytest.mark.parametrize("stacked", [False, True])
def test_s07_our_own_models_hold_their_activations_in_fields_with_paths(stacked):
    model = ours.make(MaskedLM, "roberta", stacked)
    nodes = [n for n in trace(model)(ours.tokens()).nodes() if n.tag == "gelu"]
    blocks = ["blocks"] if stacked else ["blocks.0", "blocks.1"]
    assert [n.path for n in nodes] == [f"backbone.stack.{b}.mlp.activation" for b in blocks] + ["head.activation"]
    assert not any(n.recognised for n in nodes)
    gpt2 = trace(ours.make(CausalLM, "gpt2", stacked))(ours.tokens())
    t5 = trace(make_t5(T5Model, "t5", stacked))(t5_tokens(), t5_tokens(1, 4))
    assert {n.tag for n in gpt2.nodes() if str(n.path).endswith("mlp.activation")} == {"gelu_tanh"}
    assert {n.tag for n in t5.nodes() if str(n.path).endswith("mlp.activation")} == {"relu"}


# ---- what is recognised, and what is not


def test_s07_the_variants_of_gelu_are_told_apart():
    def both(x):
        return jax.nn.gelu(x) + jax.nn.gelu(x, approximate=False) + nn.activations.gelu(x)

    assert [node.config["approximate"] for node in found(both, X)] == [True, False, False]
    new = rewrite(both, {"//gelu[@approximate='false']": jnp.zeros_like})(X)
    np.testing.assert_array_equal(new, jax.nn.gelu(X))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_function_of_one_array_is_found_in_every_dtype(dtype):
    x = X.astype(dtype)
    functions = {
        "gelu": [jax.nn.gelu, lambda x: jax.nn.gelu(x, approximate=False), nn.activations.gelu],
        "softmax": [jax.nn.softmax, lambda x: jax.nn.softmax(x, axis=1), lambda x: jax.vmap(jax.nn.softmax)(x)],
        "sigmoid": [jax.nn.sigmoid],
        "tanh": [jnp.tanh],
    }
    for name, ways in functions.items():
        for way in ways:
            inline = lambda x, way=way: way(x * 2) + 1
            assert tags(inline, x) == [name], name


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_what_has_a_name_in_the_jaxpr_is_a_function_by_that_name(name):
    function = getattr(jax.nn, name)
    nodes = [node for node in trace(function)(X).nodes() if node.tag == name]
    assert nodes and not any(node.recognised for node in nodes)
    np.testing.assert_allclose(rewrite(lambda x: function(x) * 2, {function: jnp.sin})(X), jnp.sin(X) * 2, **NEAR)


def test_nothing_that_is_merely_near_is_recognised():
    near = {
        "another constant": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.044715 * x**3))),
        "another axis": lambda x: jax.nn.softmax(x, axis=0),
        "no maximum taken off": lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
    }
    for name, function in near.items():
        assert "gelu" not in tags(function, X) and "softmax" not in tags(function, X), name


def test_equations_that_look_alike_but_belong_to_something_else_are_no_obstacle():
    """Half of `x` is taken twice, and the first of the two is no part of gelu."""

    def function(x):
        other = 0.5 * x
        return jax.nn.gelu(x, approximate=False) + jnp.sum(other)

    assert tags(function, X) == ["gelu"]
    np.testing.assert_allclose(rewrite(function, {"//gelu": jnp.sin})(X), jnp.sin(X) + (0.5 * X).sum(), **NEAR)


# ---- a function of one's own


def act(x):
    return jnp.sin(x) * x


def mixed(x, y):
    return jnp.sin(x) @ y


def scaled(x, y, z):
    return x * y - z


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_function_of_ones_own_is_recognised_where_a_rule_names_it(wrapped):
    inline = wrapped(lambda x: act(x + 1) + mixed(x, x.T).sum() + scaled(x, x + 1, 2 * x))
    assert tags(inline, X) == []
    new = rewrite(inline, {act: jnp.cos, mixed: lambda x, y: 0 * (x @ y), scaled: lambda x, y, z: z})(X)
    np.testing.assert_allclose(new, jnp.cos(X + 1) + 2 * X, **NEAR)


# ---- formulas of several arrays


def _layer_norms():
    w, b = jnp.linspace(0.5, 2.0, 6), jnp.linspace(-1.0, 1.0, 6)
    std = lambda x, eps: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps)
    rsq = lambda x, eps: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps)

    def by_hand(x):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-5) * w + b

    return {
        "divided": lambda x: std(x, 1e-5) * w + b,
        "rsqrt": lambda x: rsq(x, 1e-5) * w + b,
        "weight first": lambda x: w * std(x, 1e-5) + b,
        "by hand": by_hand,
        "vmap": jax.vmap(lambda x: std(x, 1e-5) * w + b),
        "two vmaps": lambda x: jax.vmap(jax.vmap(lambda x: rsq(x, 1e-5) * w + b))(x[None])[0],
        "the formula": lambda x: layer_norm(x, w, b),
    }


@pytest.fixture
def loose():
    """Code of users who write `x * weight` for arrays of other ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("way", _layer_norms())
def test_a_layer_norm_is_found_with_its_epsilon_and_its_vectors(way, loose):
    function = _layer_norms()[way]
    (node,) = found(function, X, functions=recognisers_of(layer_norm))
    assert node.tag == "layer_norm" and node.config["eps"] == pytest.approx(1e-5)
    assert [x.shape[-1] for x in node.inputs] == [6] * 3 and [len(x.shape) for x in node.inputs[1:]] == [1, 1]
    again = lambda x, w, b: w * jax.nn.standardize(x, epsilon=1e-5) + b
    np.testing.assert_allclose(rewrite(function, {layer_norm: again})(X), function(X), rtol=1e-5, atol=1e-5)
    assert np.abs(rewrite(function, {layer_norm: lambda x, w, b: x})(X) - X).max() == 0


RMS_NORMS = {
    "rsqrt": lambda x, w: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * w,
    "divided": lambda x, w: x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * w,
    "power": lambda x, w: x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * w,
    "weight first": lambda x, w: w * (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)),
    "the formula": rms_norm,
}


@pytest.mark.parametrize("way, mapped", [*itertools.product(RMS_NORMS, [False, True])])
def test_an_rms_norm_is_found(way, mapped, loose):
    w = jnp.linspace(0.5, 2.0, 6)
    one = RMS_NORMS[way]
    function = (lambda x: jax.vmap(one, (0, None))(x, w)) if mapped else (lambda x: one(x, w))
    (node,) = found(function, X, functions=recognisers_of(rms_norm))
    assert node.config["eps"] == pytest.approx(1e-6)
    np.testing.assert_array_equal(rewrite(function, {rms_norm: lambda x, w: x + w[0]})(X), X + w[0])


MASK = jnp.tril(jnp.ones((4, 4), bool))
SCORES = {
    "times a scale": lambda q, k: q @ k.swapaxes(-1, -2) * 0.4,
    "divided": lambda q, k: q @ k.swapaxes(-1, -2) / np.sqrt(6).astype("float32"),
    "divided by a root": lambda q, k: q @ k.swapaxes(-1, -2) / jnp.sqrt(6.0),
    "a scaled query": lambda q, k: (q * 0.4) @ k.swapaxes(-1, -2),
    "einsum": lambda q, k: jnp.einsum("...qd,...kd->...qk", q, k) * 0.4,
}


@pytest.mark.parametrize("way, masked, mapped", [*itertools.product(SCORES, [False, True], [False, True])])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_found_with_what_it_looks_at(way, masked, mapped, batch, loose):
    def one(q, k, v):
        scores = SCORES[way](q, k)
        scores = jnp.where(MASK, scores, -1e9) if masked else scores
        return jax.nn.softmax(scores, axis=-1) @ v

    q, k, v = (jnp.stack([states(4, i)[:, :6]] * batch) for i in range(3))
    function = jax.vmap(one) if mapped else one
    (node,) = found(function, q, k, v, functions=recognisers_of(attention))
    assert [x.shape for x in node.inputs[:3]] == [(batch, 4, 6)] * 3 and len(node.inputs) == 3 + masked
    assert masked == ("fill" in node.config) and node.config.get("fill", -1e9) == -1e9
    new = rewrite(lambda *x: function(*x) + 1, {attention: lambda q, k, v, *mask: q - v})(q, k, v)
    np.testing.assert_allclose(new, q - v + 1, **NEAR)


def test_jaxs_attention_is_found_causal_or_not():
    q, k, v = (states(4, i).reshape(1, 4, 2, 4) for i in range(3))
    for causal in (False, True):
        function = lambda q, k, v, causal=causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal) * 2
        new = rewrite(function, {jax.nn.dot_product_attention: lambda q, k, v: q + k + v})(q, k, v)
        np.testing.assert_allclose(new, (q + k + v) * 2, **NEAR)


def test_a_formula_is_a_function_and_says_what_it_computes(loose):
    w, b = jnp.linspace(0.5, 2.0, 6), jnp.linspace(-1.0, 1.0, 6)
    loop = np.stack([(r - r.mean()) / np.sqrt(r.var() + 1e-5) * w + b for r in np.asarray(X, np.float64)])
    np.testing.assert_allclose(layer_norm(X, w, b), loop, rtol=0, atol=1e-5)
    root = np.stack([r / np.sqrt((r * r).mean() + 1e-6) * w for r in np.asarray(X, np.float64)])
    np.testing.assert_allclose(rms_norm(X, w), root, rtol=0, atol=1e-5)
    rows = [[np.exp(a @ b * 0.3) for b in np.asarray(X)] for a in np.asarray(X)]
    weights = np.array(rows) / np.sum(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(attention(X, X, X, scale=0.3), weights @ X, rtol=0, atol=1e-5)
    assert all(recognisers_of(f) == SPELLINGS[f] for f in (layer_norm, rms_norm, attention))
