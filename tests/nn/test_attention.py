"""`Attention` against the formula, head by head and query by query, in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn

from .test_layers import f64, filled, linear, random

KEY = jax.random.key(0)
SEQ = 5
call = eqx.filter_jit(lambda attention, x, mask=None, bias=None, key=None: attention(x, mask, bias=bias, key=key))


def literal(m, x, allowed=None, bias=None):
    """softmax(q k^T s + bias) v for one head and one query at a time; x is `seq embed_dim`."""
    split = lambda proj, heads: linear(proj, f64(x)).reshape(len(x), heads, -1)
    q, k, v = split(m.query_proj, m.num_heads), split(m.key_proj, m.num_kv_heads), split(m.value_proj, m.num_kv_heads)
    scale = q.shape[-1] ** -0.5 if m.scale is None else m.scale
    out = np.zeros((len(x), m.num_heads, v.shape[-1]))
    for h in range(m.num_heads):
        shared = h // (m.num_heads // m.num_kv_heads)
        for i in range(len(x)):
            seen = np.ones(len(x), bool) if allowed is None else np.broadcast_to(allowed, (m.num_heads, SEQ, SEQ))[h, i]
            if not seen.any():
                out[i, h] = v[:, shared].mean(0) if m.empty == "uniform" else 0
                continue
            scores = k[seen, shared] @ q[i, h] * scale + (0 if bias is None else f64(bias)[h, i, seen])
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[seen, shared]
    return linear(m.output_proj, out.reshape(len(x), -1))


MODULES = {
    "plain": nn.Attention(6, 3, key=KEY),
    "grouped heads": nn.Attention(8, 4, num_kv_heads=2, key=KEY),
    "one key head": nn.Attention(6, 3, num_kv_heads=1, use_bias=False, key=KEY),
    "own head_dim and scale": nn.Attention(7, 3, head_dim=4, scale=0.3, key=KEY),
}
MODULES = {name: filled(m) for name, m in MODULES.items()}
PADDED = nn.Mask(keys=jnp.array([True, True, False, True, False]))
CAUSAL = nn.Mask(causal=True, window=2)
rng = np.random.default_rng(3)


@pytest.mark.parametrize("name", MODULES)
def test_attention_is_its_formula(name):
    m = MODULES[name]
    x, bias = random(SEQ, m.query_proj.in_features), random(m.num_heads, SEQ, SEQ)
    per_head = nn.Mask(dense=jnp.asarray(rng.random((m.num_heads, SEQ, SEQ)) < 0.7) | jnp.eye(SEQ, dtype=bool)[None])
    cases = [(None, None), (PADDED, None), (CAUSAL, bias), (per_head, bias)]
    results = eqx.filter_jit(lambda m, x, cases: [m(x, mask, bias=b) for mask, b in cases])(m, x, cases)
    for (mask, b), got in zip(cases, results, strict=True):
        allowed = None if mask is None else np.asarray(mask.allowed(SEQ, SEQ))
        assert got.shape == x.shape and got.dtype == x.dtype
        np.testing.assert_allclose(got, literal(m, x, allowed, b), rtol=1e-4, atol=2e-5)


def test_leading_axes_are_examples_that_share_the_mask():
    m, x = MODULES["grouped heads"], random(2, 3, SEQ, 8)
    together = call(m, x, PADDED)
    one_by_one = np.stack([[literal(m, e, np.asarray(PADDED.allowed(SEQ, SEQ))) for e in row] for row in x])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("empty", ["zeros", "uniform"])
def test_a_query_that_sees_nothing_gives_zeros_or_the_mean_of_all_values(empty):
    m, x = filled(nn.Attention(6, 3, empty=empty, key=KEY)), random(SEQ, 6)
    nothing = nn.Mask(dense=jnp.ones((SEQ, SEQ), bool).at[2].set(False))
    mean = linear(m.value_proj, f64(x)).mean(0) if empty == "uniform" else np.zeros(6)
    got = call(m, x, nothing)
    np.testing.assert_allclose(got[2], linear(m.output_proj, mean), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(got, literal(m, x, np.asarray(nothing.dense)), rtol=1e-4, atol=2e-5)


def test_how_it_runs_is_a_field_that_tree_at_changes():
    m, x = MODULES["grouped heads"], random(SEQ, 8)
    assert m.attend is nn.kernels.attend
    as_the_formula = eqx.tree_at(lambda m: m.attend, m, nn.kernels.plain)
    np.testing.assert_allclose(call(as_the_formula, x, CAUSAL), call(m, x, CAUSAL), rtol=1e-5, atol=1e-5)
    # That it is the field which runs: one that returns the values instead.
    m, x = MODULES["plain"], random(SEQ, 6)
    values = eqx.tree_at(lambda m: m.attend, m, lambda q, k, v, mask, **rest: v)
    np.testing.assert_allclose(
        call(values, x), linear(m.output_proj, linear(m.value_proj, f64(x))), rtol=1e-4, atol=2e-5
    )


DROPPING = filled(nn.Attention(8, 2, dropout=0.5, key=KEY))


def test_without_a_key_attention_is_inference_and_inference_mode_wins_over_a_key():
    x, same = random(SEQ, 8), eqx.tree_at(lambda m: m.dropout.p, DROPPING, 0.0)
    plain = call(DROPPING, x)
    np.testing.assert_array_equal(plain, call(same, x))
    np.testing.assert_array_equal(plain, call(eqx.nn.inference_mode(DROPPING), x, key=KEY))
    dropped = call(DROPPING, x, key=KEY)
    assert not np.allclose(plain, dropped, atol=1e-2)
    np.testing.assert_array_equal(dropped, call(DROPPING, x, key=KEY))
    assert not np.allclose(dropped, call(DROPPING, x, key=jax.random.key(1)), atol=1e-2)
    np.testing.assert_array_equal(plain, call(same, x, key=KEY))


def test_dropout_drops_weights_at_its_rate_and_scales_the_rest():
    # Queries of zero make every weight 1/16, values of one-hot rows make them visible: out[i, j] is the weight itself.
    n, rate = 16, 0.25
    m = nn.Attention(n, 1, dropout=rate, use_bias=False, key=KEY)
    identity = lambda m: [m.value_proj.weight, m.output_proj.weight, m.query_proj.weight]
    m = eqx.tree_at(identity, m, [jnp.eye(n), jnp.eye(n), jnp.zeros((n, n))])
    weights = np.asarray(call(m, jnp.eye(n), key=KEY))
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / n / (1 - rate), rtol=1e-5)
    assert abs((~kept).mean() - rate) < 0.1  # 256 draws: four standard deviations
    assert len({row.tobytes() for row in kept}) > n // 2  # rows are drawn apart


def test_gradients_reach_every_projection():
    m, x = MODULES["grouped heads"], random(SEQ, 8)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m, x: jnp.square(m(x, CAUSAL)).sum()))(m, x)
    for name in ("query_proj", "key_proj", "value_proj", "output_proj"):
        assert np.abs(getattr(gradient, name).weight).max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_heads": 4}, "embed_dim = 6 is not a multiple of num_heads = 4"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads = 3 is not a multiple of num_kv_heads = 2"),
    ],
    ids=["embed_dim", "num_kv_heads"],
)
def test_heads_that_do_not_divide_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        nn.Attention(6, **arguments, key=KEY)


def test_a_wrong_width_carries_the_projections_path(unchecked):
    with pytest.raises(ValueError, match="in_features = 8, but the input is") as raised:
        MODULES["grouped heads"](jnp.ones((SEQ, 7)))
    assert raised.value.__notes__ == ["at query_proj"]
