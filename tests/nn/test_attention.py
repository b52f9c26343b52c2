"""`Attention` against the formula, head by head and query by query, in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn

from ..lazily import Lazily
from .test_layers import f64, filled, linear, random, rms_norm

KEY = jax.random.key(0)
SEQ = 5
call = eqx.filter_jit(lambda attention, x, mask=None, bias=None, key=None: attention(x, mask, bias=bias, key=key))


def turned(x, rotation):
    """Number j of a head and number j + half as one complex number, which the angle turns."""
    half = x.shape[-1] // 2
    y = (x[..., :half] + 1j * x[..., half:]) * (f64(rotation.cos) + 1j * f64(rotation.sin))[:, None]
    return np.concatenate([y.real, y.imag], -1)


def literal(m, x, allowed=None, bias=None, rotation=None, memory=None):
    """softmax(q k^T s + bias) v for one head and one query at a time; x is `seq embed_dim`, as is what it looks at."""
    other = x if memory is None else memory
    split = lambda x, proj, heads: linear(proj, f64(x)).reshape(len(x), heads, -1)
    q, k = split(x, m.query_proj, m.num_heads), split(other, m.key_proj, m.num_kv_heads)
    v = split(other, m.value_proj, m.num_kv_heads)
    q, k = (y if norm is None else rms_norm(norm, y) for norm, y in ((m.query_norm, q), (m.key_norm, k)))
    q, k = (y if rotation is None else turned(y, rotation) for y in (q, k))
    near = True if m.window is None else np.subtract.outer(np.arange(len(x)), np.arange(len(x))) < m.window
    allowed = near if allowed is None else np.logical_and(allowed, near)
    scale = q.shape[-1] ** -0.5 if m.scale is None else m.scale
    out = np.zeros((len(x), m.num_heads, v.shape[-1]))
    for h in range(m.num_heads):
        shared = h // (m.num_heads // m.num_kv_heads)
        for i in range(len(x)):
            seen = np.broadcast_to(allowed, (m.num_heads, len(x), len(other)))[h, i]
            if not seen.any():
                out[i, h] = v[:, shared].mean(0) if m.empty == "uniform" else 0
                continue
            scores = k[seen, shared] @ q[i, h] * scale + (0 if bias is None else f64(bias)[h, i, seen])
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[seen, shared]
    out = out.reshape(len(x), -1)
    return linear(m.output_proj, out) if isinstance(m.output_proj, nn.Linear) else m.output_proj(out)


class Halved(eqx.Module):
    """An output that is no matrix: what two halves of the heads give, added."""

    def __call__(self, x):
        return x.reshape(*x.shape[:-1], 2, -1).sum(-2)


MAKERS = {
    "plain": lambda: nn.Attention(6, 3, key=KEY),
    "grouped heads": lambda: nn.Attention(8, 4, num_kv_heads=2, key=KEY),
    "one key head": lambda: nn.Attention(6, 3, num_kv_heads=1, use_bias=False, key=KEY),
    "own head_dim and scale": lambda: nn.Attention(7, 3, head_dim=4, scale=0.3, key=KEY),
    "own value_dim": lambda: nn.Attention(7, 3, head_dim=4, value_dim=5, key=KEY),
    "window": lambda: nn.Attention(6, 3, window=3, key=KEY),  # a mask's own window may be narrower, and is
    "norms of heads": lambda: nn.Attention(8, 4, num_kv_heads=2, head_dim=6, norm=nn.RMSNorm, key=KEY),
    "output without a bias": lambda: nn.Attention(6, 3, output_bias=False, key=KEY),
    "output given": lambda: nn.Attention(6, 4, head_dim=2, value_dim=3, output_proj=Halved(), key=KEY),
}
MODULES = Lazily({name: lambda make=make: filled(make()) for name, make in MAKERS.items()})
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


REMEMBERED = np.array([False, True, True, True, False, True, False])


@pytest.mark.parametrize(
    "name", ["plain", "grouped heads", "own head_dim and scale", "own value_dim", "norms of heads"]
)
def test_a_memory_gives_the_keys_and_values_and_what_is_remembered_of_it_is_recalled(name):
    m = MODULES[name]
    x, memory = random(SEQ, m.query_proj.in_features), random(7, m.query_proj.in_features, seed=2)
    mask, bias = nn.Mask(keys=jnp.asarray(REMEMBERED)), random(m.num_heads, SEQ, 7, seed=3)

    @eqx.filter_jit
    def run(m, x, memory):
        kept = m.remember(memory, mask.keys)
        calls = m(x, mask, memory=memory), m(x, mask, memory=memory, bias=bias), m(x, memory=memory)
        return calls, (m.recall(x, kept), jnp.concatenate([m.recall(x[:2], kept), m.recall(x[2:], kept)])), kept

    (masked, biased, plain), recalled, kept = run(m, x, memory)
    expected = literal(m, x, REMEMBERED, memory=memory)
    for got in (masked, *recalled):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(biased, literal(m, x, REMEMBERED, bias, memory=memory), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(plain, literal(m, x, memory=memory), rtol=1e-4, atol=2e-5)
    heads, widths = m.num_kv_heads, [p.out_features // m.num_kv_heads for p in (m.key_proj, m.value_proj)]
    assert [kept.keys.shape, kept.values.shape] == [(heads, widths[0], 7), (heads, 7, widths[1])]
    np.testing.assert_array_equal(kept.real, REMEMBERED)


def test_nothing_remembered_is_zeros_before_the_output():
    m, x = MODULES["plain"], random(SEQ, 6)
    got = m.recall(x, m.remember(random(7, 6), jnp.zeros(7, bool)))
    np.testing.assert_allclose(got, np.broadcast_to(f64(m.output_proj.bias), got.shape), rtol=1e-5, atol=1e-6)


def test_options_make_what_they_say():
    norms = MODULES["norms of heads"]
    assert (norms.query_norm.dim, norms.key_norm.dim) == (6, 6)
    assert MODULES["plain"].query_norm is None and MODULES["plain"].key_norm is None
    assert MODULES["own value_dim"].output_proj.in_features == 3 * 5
    assert MODULES["one key head"].key_proj.out_features == 2
    bare = MODULES["output without a bias"]
    assert bare.output_proj.bias is None and bare.query_proj.bias is not None
    drawn = nn.Attention(6, 3, output_init=jax.nn.initializers.constant(0.5), key=KEY)
    assert (drawn.output_proj.weight == 0.5).all() and (drawn.query_proj.weight != 0.5).all()
    drawn = nn.Attention(6, 3, query_init=jax.nn.initializers.constant(0.5), key=KEY)
    assert (drawn.query_proj.weight == 0.5).all() and (drawn.output_proj.weight != 0.5).all()
    assert (drawn.key_proj.weight != 0.5).all() and (drawn.value_proj.weight != 0.5).all()


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


def test_without_a_key_attention_is_inference_and_inference_mode_wins_over_a_key():
    m = filled(nn.Attention(8, 2, dropout=0.5, key=KEY))
    x, same = random(SEQ, 8), eqx.tree_at(lambda m: m.dropout.p, m, 0.0)
    plain = call(m, x)
    np.testing.assert_array_equal(plain, call(same, x))
    np.testing.assert_array_equal(plain, call(eqx.nn.inference_mode(m), x, key=KEY))
    dropped = call(m, x, key=KEY)
    assert not np.allclose(plain, dropped, atol=1e-2)
    np.testing.assert_array_equal(dropped, call(m, x, key=KEY))
    assert not np.allclose(dropped, call(m, x, key=jax.random.key(1)), atol=1e-2)
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


# ---- step by step

LENGTH = 7  # slots: two more than there are tokens
REAL = np.array([False, True, True, False, True])
SPLITS = {"at once": (5,), "one by one": (1, 1, 1, 1, 1), "in chunks": (2, 3)}


@eqx.filter_jit
def in_steps(m, x, real, bias, rotation):
    """The results of tokens that come in groups, by the name of the split, and the last cache of each."""

    def run(splits):
        held, at, out = m.init_cache(LENGTH, x.dtype), 0, []
        for n in splits:
            here = slice(at, at + n)
            mask = nn.Mask(causal=True, offset=at, keys=jnp.zeros(LENGTH, bool).at[: at + n].set(real[: at + n]))
            part = None if rotation is None else nn.Rotation(*(angle[here] for angle in rotation))
            y, held = m.step(x[here], mask, held, at, rotation=part, bias=bias[:, here])
            out, at = [*out, y], at + n
        return jnp.concatenate(out), held

    return {name: run(splits) for name, splits in SPLITS.items()}


@pytest.mark.parametrize("name", ["plain", "grouped heads", "own value_dim", "window", "norms of heads"])
def test_steps_are_the_call_in_any_split(name):
    m = MODULES[name]
    x, bias = random(SEQ, m.query_proj.in_features), random(m.num_heads, SEQ, LENGTH)
    head_dim = m.query_proj.out_features // m.num_heads
    rotation = nn.Rotary(head_dim)(jnp.arange(SEQ)) if name in ("grouped heads", "norms of heads") else None
    mask = nn.Mask(causal=True, keys=jnp.asarray(REAL))
    whole = eqx.filter_jit(lambda m: m(x, mask, rotation=rotation, bias=bias[:, :, :SEQ]))(m)
    expected = literal(m, x, np.tri(SEQ, dtype=bool) & REAL, bias[:, :, :SEQ], rotation)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=2e-5)
    for got, held in in_steps(m, x, jnp.asarray(REAL), bias, rotation).values():
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
        # The spare slots are as they were, and the others hold something.
        assert not held.keys[:, :, SEQ:].any() and held.keys[:, :, :SEQ].any(1).all()


def test_a_rows_index_may_be_traced():
    m, x = MODULES["grouped heads"], random(SEQ, 8)

    @eqx.filter_jit
    def loop(m, x):
        def body(carry, x):
            held, at = carry
            mask = nn.Mask(causal=True, offset=at, keys=jnp.arange(LENGTH) <= at)
            y, held = m.step(x[None], mask, held, at)
            return (held, at + 1), y[0]

        return jax.lax.scan(body, (m.init_cache(LENGTH, x.dtype), jnp.asarray(0)), x)[1]

    np.testing.assert_allclose(loop(m, x), literal(m, x, np.tri(SEQ, dtype=bool)), rtol=1e-4, atol=2e-5)


def test_a_leading_axis_of_the_arrays_is_a_vmap_over_modules():
    some = [filled(MODULES["norms of heads"], seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *some)
    x = random(SEQ, 8)
    together = eqx.filter_jit(eqx.filter_vmap(lambda m, x: m(x, CAUSAL), in_axes=(eqx.if_array(0), None)))(stacked, x)
    apart = [literal(m, x, np.asarray(CAUSAL.allowed(SEQ, SEQ))) for m in some]
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=2e-5)
