"""Laws of `attend`: it is the formula, in every composition, whatever is masked, and however it is cut into blocks."""

import functools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers.nn import Mask, _blocked, kernels

SEQ, KEYS, HEADS, HEAD_DIM, VALUE_DIM = 6, 7, 6, 4, 3
SCALE = 0.3

_dense = jnp.asarray(np.random.default_rng(0).random((HEADS, SEQ, KEYS)) < 0.5)
MASKS = {
    "none": Mask(),
    "keys": Mask(keys=jnp.array([True, True, False, True, False, True, True])),
    "causal": Mask(causal=True),
    "offset": Mask(causal=True, offset=1),
    "traced offset": Mask(causal=True, offset=jnp.array(1)),
    "window": Mask(causal=True, window=2, offset=1),
    "segments": Mask(segments=jnp.array([0, 0, 0, 1, 1, 2, 2]), offset=1),
    "dense": Mask(dense=_dense[0].at[2].set(False)),
    "dense per head": Mask(dense=_dense.at[1, 3].set(False)),
    "nothing": Mask(keys=jnp.zeros(KEYS, bool)),
    "several": Mask(causal=True, offset=1, keys=jnp.arange(KEYS) > 1, dense=_dense),
}


def operands(kv_heads=2, batch=(), dtype=jnp.float32):
    shapes = (SEQ, HEADS, HEAD_DIM), (KEYS, kv_heads, HEAD_DIM), (KEYS, kv_heads, VALUE_DIM), (SEQ, HEADS, VALUE_DIM)
    keys = jax.random.split(jax.random.key(1), 4)
    return [jax.random.normal(key, (*batch, *shape), dtype) for key, shape in zip(keys, shapes, strict=True)]


def some_bias(batch=()):
    return jax.random.normal(jax.random.key(2), (*batch, HEADS, SEQ, KEYS))


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """A head's table has 168 bytes: all loops run, over examples, over heads and over rows of one head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocked, "BLOCK", 200)
        jax.clear_caches()
        yield
    jax.clear_caches()


def same(found, expected, atol=2e-6):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol)


# ---- the formula


def literal(q, k, v, mask, bias, empty):
    """Attention in float64 NumPy, one row at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (seq, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    allowed = mask.allowed(seq, keys)
    allowed = np.broadcast_to(True if allowed is None else allowed, (heads, seq, keys))
    out = np.zeros((seq, heads, v.shape[-1]))
    for h in range(heads):
        for i in range(seq):
            scores = SCALE * k[:, h // (heads // kv_heads)] @ q[i, h]
            scores += 0 if bias is None else np.asarray(bias[h, i], np.float64)
            weights = np.exp(scores) * allowed[h, i]
            if not allowed[h, i].any():
                weights = np.full(keys, float(empty == "uniform"))
            out[i, h] = weights @ v[:, h // (heads // kv_heads)] / max(weights.sum(), 1e-300)
    return out


@pytest.mark.parametrize("name", MASKS)
def test_plain_is_the_formula(name):
    q, k, v, _ = operands()
    cases = [(bias, empty) for bias in (None, some_bias()) for empty in ("zeros", "uniform")]
    run = lambda: [kernels.plain(q, k, v, MASKS[name], bias=b, scale=SCALE, empty=e) for b, e in cases]
    for found, (bias, empty) in zip(jax.jit(run)(), cases, strict=True):
        np.testing.assert_allclose(found, literal(q, k, v, MASKS[name], bias, empty), atol=2e-6)


@functools.partial(jax.jit, static_argnames=("path", "empty"))
def pull(path, mask, bias, key, q, k, v, g, empty="zeros"):
    """The output, and the gradients of `sum(output * g)`."""
    call = lambda q, k, v, bias: path(q, k, v, mask, bias=bias, scale=SCALE, rate=0.4, key=key, empty=empty)
    out, vjp = jax.vjp(call, q, k, v, bias)
    return out, vjp(g)


def agree(mask, biased, dropped, kv_heads, empty):
    bias, key = some_bias() if biased else None, jax.random.key(3) if dropped else None
    found, expected = (pull(f, mask, bias, key, *operands(kv_heads), empty) for f in (kernels.attend, kernels.plain))
    same(found, expected)


@pytest.mark.parametrize("number", range(len(MASKS)), ids=MASKS)
def test_attend_is_plain_for_every_mask(number):
    choices = number % 2 == 0, number // 2 % 2 == 0, (2, 6)[number // 4 % 2], ("zeros", "uniform")[number // 2 % 2]
    agree(list(MASKS.values())[number], *choices)


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attend_is_plain_with_every_option(biased, dropped, kv_heads):
    agree(MASKS["several" if dropped else "keys"], biased, dropped, kv_heads, "zeros" if biased else "uniform")


# ---- dropout


def test_dropout_has_ends_and_is_off_without_a_key():
    q, k, v, _ = operands()
    call = jax.jit(functools.partial(kernels.attend, q, k, v, Mask(), scale=SCALE))
    key = jax.random.key(0)
    same(call(rate=0.5), call())
    same(call(rate=0.0, key=key), call())
    same(call(rate=jnp.array(0.0), key=key), call())
    same(call(rate=1.0, key=key), jnp.zeros((SEQ, HEADS, VALUE_DIM)))
    assert not np.allclose(call(rate=0.5, key=key), call(rate=0.5, key=jax.random.key(1)))
    same(call(rate=0.5, key=jax.random.key_data(key)), call(rate=0.5, key=key))


def test_leading_axes_share_the_mask_and_draw_their_own_dropout():
    q, k, v, _ = (jnp.stack([x, x]) for x in operands())
    mask, key = MASKS["causal"], jax.random.key(0)
    run = lambda path, *some, **rest: jax.jit(functools.partial(path, scale=SCALE))(*some, mask, **rest)
    first, second = run(kernels.attend, q, k, v)
    same(first, second)
    same(first, run(kernels.plain, q[0], k[0], v[0]))
    first, second = run(kernels.attend, q, k, v, rate=0.5, key=key)
    assert not np.allclose(first, second)
    same(jnp.stack([first, second]), run(kernels.plain, q, k, v, rate=0.5, key=key))


# ---- compositions

BATCH = 4


def loss(path, q, k, v, keys, bias, key=None):
    return jnp.sum(jnp.sin(path(q, k, v, Mask(keys=keys), bias=bias, scale=SCALE, rate=0.3, key=key)))


def grads(path):
    return jax.grad(functools.partial(loss, path), (0, 1, 2, 4))


plain_grads = jax.jit(grads(kernels.plain))


def batched_operands():
    q, k, v, _ = operands(batch=(BATCH,))
    keys = jnp.arange(KEYS)[None] < jnp.array([[7], [4], [0], [1]])  # the third example sees nothing
    return q, k, v, keys, some_bias((BATCH,)), jax.random.split(jax.random.key(5), BATCH)


def alone(some, axes):
    """The gradients of each example on its own, by `plain`: what every composition must give."""
    pick = lambda i: [x if axis is None else x[i] for x, axis in zip(some, axes, strict=True)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(plain_grads(*pick(i)) for i in range(BATCH)))


AXES = {
    "all batched": (0, 0, 0, 0, 0, 0),
    "bias and key shared": (0, 0, 0, 0, None, None),
    "k, v and their mask shared": (0, None, None, None, 0, 0),
    "q and mask": (0, None, None, 0, None, None),
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_vmap_of_grad(axes):
    some = [x if axis == 0 else x[0] for x, axis in zip(batched_operands(), axes, strict=True)]
    same(jax.jit(jax.vmap(grads(kernels.attend), axes))(*some), alone(some, axes))


def test_grad_of_vmap_sums_over_what_is_shared():
    axes = (0, 0, None, 0, None, 0)
    some = [x if axis == 0 else x[0] for x, axis in zip(batched_operands(), axes, strict=True)]
    total = lambda *some: jnp.sum(jax.vmap(functools.partial(loss, kernels.attend), axes)(*some))
    expected = [x if axes[i] == 0 else x.sum(0) for i, x in zip((0, 1, 2, 4), alone(some, axes), strict=True)]
    same(jax.jit(jax.grad(total, (0, 1, 2, 4)))(*some), tuple(expected), atol=5e-6)


def test_two_levels_of_vmap_are_one():
    some = batched_operands()
    nest = lambda x: x.reshape(2, 2, *x.shape[1:])
    found = jax.jit(jax.vmap(jax.vmap(grads(kernels.attend))))(*map(nest, some))
    same(jax.tree.map(lambda x: x.reshape(BATCH, *x.shape[2:]), found), alone(some, (0,) * 6))


def deep(path, remat, weight, x, keys):
    """Three layers of attention in a scan."""

    def layer(x, weight):
        heads = (x @ weight).reshape(SEQ, HEADS, HEAD_DIM)
        kv = heads[:, :2]
        return x + path(heads, kv, kv, Mask(causal=True, keys=keys), scale=SCALE).reshape(SEQ, -1), None

    return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weight)[0]))


@pytest.mark.parametrize("remat", [False, True])
def test_scan_under_vmap_of_grad_and_grad_of_vmap(remat):
    width = HEADS * HEAD_DIM
    weight = jax.random.normal(jax.random.key(0), (3, width, width)) / 9
    x = jax.random.normal(jax.random.key(1), (BATCH, SEQ, width))
    keys = jnp.arange(SEQ)[None] < jnp.array([[6], [4], [0], [1]])
    grad = lambda path: jax.jit(jax.vmap(jax.grad(functools.partial(deep, path, remat)), (None, 0, 0)))(weight, x, keys)
    found, expected = grad(kernels.attend), grad(kernels.plain)
    same(found, expected)
    total = lambda weight: jnp.sum(jax.vmap(functools.partial(deep, kernels.attend, remat, weight))(x, keys))
    same(jax.jit(jax.grad(total))(weight), expected.sum(0), atol=1e-5)


@pytest.mark.parametrize("outer", [False, True], ids=["one example", "of vmap"])
def test_gradients_of_gradients(outer):
    some = batched_operands()
    some = some if outer else [x[0] for x in some]

    def norm(path, *some):
        inner = jax.vmap(grads(path)) if outer else grads(path)
        return sum(jnp.sum(jnp.sin(g)) for g in inner(*some))

    found, expected = (
        jax.jit(jax.grad(functools.partial(norm, path), (0, 4)))(*some) for path in (kernels.attend, kernels.plain)
    )
    assert max(jnp.abs(x).max() for x in expected) > 0.1
    same(found, expected, atol=1e-5)


def test_forward_mode_of_plain_and_its_hessian_is_the_one_of_attend():
    q, k, v, _ = operands()
    call = jax.jit(lambda q: jnp.sum(jnp.sin(kernels.plain(q, k, v, MASKS["several"], bias=some_bias(), scale=SCALE))))
    step = jax.random.normal(jax.random.key(9), q.shape)
    _, slope = jax.jvp(call, (q,), (step,))
    np.testing.assert_allclose(slope, jnp.vdot(jax.grad(call)(q), step), rtol=1e-4)
    np.testing.assert_allclose(slope, (call(q + 1e-2 * step) - call(q - 1e-2 * step)) / 2e-2, rtol=1e-2)
    last = lambda path, x: jnp.sum(jnp.sin(path(x, k, v, Mask(), scale=SCALE)))
    hessian = jax.jit(jax.hessian(functools.partial(last, kernels.plain)))(q[-1:])
    assert jnp.abs(hessian).max() > 1e-3
    same(jax.jit(jax.jacrev(jax.grad(functools.partial(last, kernels.attend))))(q[-1:]), hessian, atol=1e-5)


def test_the_scale_may_be_an_array_and_has_a_gradient():
    q, k, v, g = operands()
    total = lambda path, s: jnp.sum(g * path(q, k, v, Mask(), scale=s))
    run = lambda path: jax.jit(jax.value_and_grad(functools.partial(total, path)))(jnp.array(SCALE))
    found, expected = run(kernels.attend), run(kernels.plain)
    same(found, expected)
    same(found[0], total(kernels.plain, SCALE))
    assert abs(expected[1]) > 1e-2


# ---- rows that see nothing


@pytest.mark.parametrize("path", [kernels.attend, kernels.plain])
def test_an_empty_row_gives_zeros_or_the_mean_and_finite_gradients(path):
    q, k, v, g = operands()
    mask = Mask(dense=jnp.ones((SEQ, KEYS), bool).at[1].set(False))
    bias = some_bias().at[:, 4].set(-jnp.inf)  # a bias may say so, too
    out, (dq, dk, dv, dbias) = pull(path, mask, bias, None, q, k, v, g)
    assert (out[jnp.array([1, 4])] == 0).all()
    assert all(jnp.isfinite(x).all() for x in (dq, dk, dv, dbias))
    assert (dq[jnp.array([1, 4])] == 0).all()
    assert (dbias[:, jnp.array([1, 4])] == 0).all()
    out, uniform = pull(path, mask, bias, None, q, k, v, g, empty="uniform")
    mean = jnp.repeat(v.mean(0), HEADS // v.shape[1], axis=0)
    same(out[1], mean)
    same(out[4], mean)
    assert all(jnp.isfinite(x).all() for x in uniform)
    same(uniform[0], dq)  # only the values have gradients from such rows
    share = g[jnp.array([1, 4])].sum(0).reshape(v.shape[1], -1, VALUE_DIM).sum(1) / KEYS
    same(uniform[2], dv + share[None])


# ---- precision


def test_bfloat16_is_as_close_as_torch():
    torch = pytest.importorskip("torch")
    seq, heads, dim = 33, 4, 16
    errors = {"torch": 0.0, "attend": 0.0, "plain": 0.0}
    run = {
        path.__name__: jax.jit(lambda q, k, v, keys, path=path: path(q, k, v, Mask(keys=keys), scale=dim**-0.5))
        for path in (kernels.attend, kernels.plain)
    }
    for seed in range(20):
        rng = np.random.default_rng(seed)
        q, k, v = (jnp.asarray(2 * rng.standard_normal((seq, heads, dim)), jnp.bfloat16) for _ in range(3))
        keys = jnp.asarray(rng.random(seq) < 0.8)
        exact = _softmax_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), np.asarray(keys))
        t = [torch.tensor(np.asarray(x, np.float32)).bfloat16().transpose(0, 1)[None] for x in (q, k, v)]
        theirs = torch.nn.functional.scaled_dot_product_attention(*t, attn_mask=torch.tensor(np.asarray(keys))[None])
        errors["torch"] += np.mean((theirs[0].transpose(0, 1).double().numpy() - exact) ** 2)
        for name, f in run.items():
            ours = f(q, k, v, keys)
            assert ours.dtype == jnp.bfloat16
            errors[name] += np.mean((np.asarray(ours, np.float64) - exact) ** 2)
    assert errors["torch"] > 0, errors
    assert math.sqrt(errors["attend"] / errors["torch"]) <= 1.1
    assert math.sqrt(errors["plain"] / errors["torch"]) <= 1.1


def _softmax_attention(q, k, v, keys):
    weights = np.exp(np.einsum("shd,thd->hst", q, k) * q.shape[-1] ** -0.5) * keys
    return np.einsum("hst,thd->shd", weights / weights.sum(-1, keepdims=True), v)


def test_half_types_have_their_own_gradients_and_float32_arithmetic():
    dtype = jnp.float16
    half, exact = operands(dtype=dtype), [x.astype(jnp.float32) for x in operands(dtype=dtype)]
    bias = some_bias()
    out, grads = pull(kernels.attend, MASKS["keys"], bias, None, *half)
    expected, slopes = pull(kernels.attend, MASKS["keys"], bias, None, *exact)
    same(out, expected.astype(dtype), atol=0)  # rounded once
    assert [x.dtype for x in grads] == [dtype] * 3 + [jnp.float32]
    for found, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), slope, rtol=2e-2, atol=1e-3)


def test_scores_of_hundreds_neither_overflow_nor_vanish():
    q, k, v, _ = operands()
    for path in (kernels.attend, kernels.plain):
        out = path(300 * q, 300 * k, v, MASKS["causal"], scale=1.0)
        assert jnp.isfinite(out).all()
        assert (jnp.abs(out).max(axis=(1, 2)) > 1e-2).all()


# ---- what runs


def largest(jaxpr):
    """Bytes of the largest array that a computation makes, in loops, too."""
    inner = [
        x for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    ]
    inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    sizes = [o.aval.size * o.aval.dtype.itemsize for e in jaxpr.eqns for o in e.outvars if o.aval.dtype == jnp.float32]
    return max([0, *sizes, *map(largest, inner)])


@pytest.mark.parametrize("batch, heads, seq", [(3, 12, 256), (16, 12, 128), (1, 1, 2048)])
def test_scores_of_a_large_call_exist_block_by_block(batch, heads, seq, monkeypatch):
    monkeypatch.setattr(_blocked, "BLOCK", 2 * 2**20)
    table = 4 * batch * heads * seq * seq
    shape = jax.ShapeDtypeStruct((batch, seq, heads, 64), jnp.float32)
    keys = jax.ShapeDtypeStruct((batch, seq), bool)
    assert table > 2 * _blocked.BLOCK > 4 * shape.size / 2
    assert kernels.explain(shape, shape, shape, Mask()).startswith("blocked")

    def slopes(path):
        call = lambda q, k, v, keys: jnp.sum(path(q, k, v, Mask(keys=keys), scale=SCALE))
        return jax.make_jaxpr(jax.vmap(jax.grad(call, (0, 1, 2))))(shape, shape, shape, keys).jaxpr

    assert largest(slopes(kernels.plain)) >= table
    assert largest(slopes(kernels.attend)) <= max(_blocked.BLOCK, 4 * shape.size)


SHARDED = """
import re, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from eqx_transformers.nn import Mask, _blocked, kernels
_blocked.BLOCK = 1
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
q, k, v = jax.random.normal(jax.random.key(0), (3, 16, 6, 4, 8))
keys = jnp.arange(6)[None] < jnp.arange(16)[:, None] % 7
step = lambda path: jax.jit(jax.vmap(jax.value_and_grad(
    lambda q, k, v, keys: jnp.sum(jnp.sin(path(q, k, v, Mask(keys=keys), scale=0.3))), (0, 1, 2))))
alone = step(kernels.attend)(q, k, v, keys)
data = jax.device_put((q, k, v, keys), NamedSharding(mesh, P("data")))
gathers = lambda path: len(re.findall("all-gather", step(path).lower(*data).compile().as_text()))
rest = dict(bias=None, rate=0, key=None, empty="zeros")
in_blocks = lambda q, k, v, mask, scale: kernels._by_blocks(q, k, v, mask, scale=scale, **rest)
assert gathers(in_blocks) > 0, "the loop gathers: if it no longer does, it may run here"
assert gathers(kernels.attend) == 0
together = step(kernels.attend)(*data)
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
    assert len(b.sharding.device_set) == 8 and jnp.allclose(a, b, atol=1e-6)
print(kernels.explain(q[0], k[0], v[0], Mask()))
"""


@pytest.mark.full
def test_a_sharded_batch_is_not_gathered():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("plain: ") and "8 devices" in child.stdout


def on(monkeypatch, platform, kind, capability="9.0", count=1):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device] * count)
    monkeypatch.setattr(jax, "device_count", lambda: count)


def shaped(seq=16, heads=4, dim=64, value_dim=None, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((seq, heads, dim), dtype)
    return q, q, jax.ShapeDtypeStruct((seq, heads, value_dim or dim), dtype)


DECISIONS = {
    "nothing masked": ({}, {}, "cudnn"),
    "causal": ({}, {"mask": Mask(causal=True)}, "cudnn"),
    "keys": ({}, {"mask": Mask(keys=jnp.ones(16, bool))}, "cudnn"),
    "float16": ({"dtype": jnp.float16}, {}, "cudnn"),
    "odd, without a table": ({"seq": 15}, {"mask": Mask(causal=True)}, "cudnn"),
    "uniform, but no row is empty": ({}, {"empty": "uniform"}, "cudnn"),
    "float32": ({"dtype": jnp.float32}, {}, "float32"),
    "wide heads": ({"dim": 264}, {}, "head_dim 264"),
    "odd heads": ({"dim": 20}, {}, "head_dim 20"),
    "other values": ({"value_dim": 32}, {}, "value_dim"),
    "bias": ({}, {"bias": jnp.zeros((4, 16, 16))}, "bias"),
    "dropout": ({}, {"rate": 0.1}, "dropped"),
    "uniform": ({}, {"mask": Mask(keys=jnp.ones(16, bool)), "empty": "uniform"}, "mean"),
    "odd table": ({"seq": 15}, {"mask": Mask(keys=jnp.ones(15, bool))}, "odd"),
    "traced scale": ({}, {"scale": jnp.array(1.0)}, "scale"),
}


@pytest.mark.parametrize("sizes, options, expected", DECISIONS.values(), ids=DECISIONS)
def test_which_path_an_nvidia_gpu_takes(sizes, options, expected, monkeypatch):
    on(monkeypatch, "gpu", "NVIDIA H100 80GB HBM3")
    found = kernels.explain(*shaped(**sizes), **({"mask": Mask()} | options))
    assert found.startswith("cudnn: " if expected == "cudnn" else "plain: ") and expected in found


def test_which_path_other_devices_take(monkeypatch):
    assert kernels.explain(*shaped(), Mask()).startswith("blocked: one CPU device")
    on(monkeypatch, "cpu", "cpu", count=8)
    assert kernels.explain(*shaped(), Mask()).startswith("plain: ")
    on(monkeypatch, "tpu", "TPU v5 lite")
    assert kernels.explain(*shaped(), Mask()) == "plain: XLA compiles the formula for TPU v5 lite"
    on(monkeypatch, "gpu", "Tesla V100 (NVIDIA)", capability="7.0")
    assert "8.0" in kernels.explain(*shaped(), Mask())
    on(monkeypatch, "gpu", "NVIDIA A100", capability="8.0")
    assert "up to 128" in kernels.explain(*shaped(dim=256), Mask())


# ---- errors


def test_errors_name_the_axis_what_was_found_and_what_was_expected(unchecked):
    q, k, v, _ = operands()
    call = functools.partial(kernels.attend, scale=SCALE)
    for message, wrong in {
        "head_dim of k: expected 4, got 3": lambda: call(q, k[..., :3], v, Mask()),
        "keys of v: expected 7, got 6": lambda: call(q, k, v[:6], Mask()),
        "num_kv_heads of v: expected 2, got 1": lambda: call(q, k, v[:, :1], Mask()),
        "num_heads of q: expected a multiple of num_kv_heads = 2, got 5": lambda: call(q[:, :5], k, v, Mask()),
        "seq of bias: expected 6, got 5": lambda: call(q, k, v, Mask(), bias=some_bias()[:, :5]),
        "bias: expected the axes num_heads seq keys": lambda: call(q, k, v, Mask(), bias=some_bias()[0]),
        "keys of mask.keys: expected 7, got 6": lambda: call(q, k, v, Mask(keys=jnp.ones(6, bool))),
        "keys of mask.segments: expected 7, got 5": lambda: call(q, k, v, Mask(segments=jnp.ones(5, int))),
        "num_heads of mask.dense: expected 6, got 2": lambda: call(q, k, v, Mask(dense=jnp.ones((2, 6, 7), bool))),
        "leading axes of k: expected those of q": lambda: call(q[None], k, v[None], Mask()),
        "empty='mean' is not known: it is 'zeros' or 'uniform'": lambda: call(q, k, v, Mask(), empty="mean"),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize("field", ["keys", "segments", "dense"])
def test_a_mask_of_numpy_that_is_mapped_over_can_be_differentiated(field):
    """A tokenizer's mask is one; closed over inside `jit`, it reaches the kernel without having been a JAX array."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 2, 3)).astype(np.float32)
    segments, keys, dense = np.array([[0, 0, 1, 1, 1]] * 2), rng.random((2, 5)) < 0.7, rng.random((2, 5, 5)) < 0.7
    given = {"keys": keys, "segments": segments, "dense": dense}[field]
    one = lambda attend: lambda q, x: attend(q, q, q, Mask(**{field: jnp.asarray(x)}), scale=1.0)
    loss = lambda attend: lambda q: (jax.vmap(one(attend))(q, given) ** 2).sum()
    ours, theirs = (jax.jit(jax.grad(loss(attend)))(q) for attend in (kernels.attend, kernels.plain))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
