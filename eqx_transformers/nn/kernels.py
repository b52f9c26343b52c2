"""How `softmax(q k^T * scale + bias) v` runs, decided once for every model.

`attend` is the door: while tracing, it picks the path that is fastest for what it is given. `plain` is the formula
itself, the path that can be taken apart and differentiated in every mode. `explain` says which path `attend` takes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

from . import _blocked
from ._blocked import floor, wide
from .dropout import keep
from .mask import Mask


def attend(
    q: Float[Array, "*axes seq num_heads head_dim"],
    k: Float[Array, "*axes keys num_kv_heads head_dim"],
    v: Float[Array, "*axes keys num_kv_heads value_dim"],
    mask: Mask,
    *,
    bias: Float[Array, "num_heads seq keys"] | None = None,
    scale: float | int | Float[Array, ""],
    rate: float | int | Float[Array, ""] = 0.0,
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    empty: str = "zeros",
) -> Float[Array, "*axes seq num_heads value_dim"]:
    r"""$\mathrm{softmax}(q k^\top \cdot s + b)\, v$ for every head, over the keys that `mask` allows.

    - `q`, `k`, `v`: query head `h` reads key and value head `h // (num_heads // num_kv_heads)`. Leading axes share
        `mask` and `bias`, and draw their own dropout.
    - `bias`: is added to the scores; `-inf` masks.
    - `rate`, `key`: each attention weight is dropped with probability `rate`, the others are divided by `1 - rate`.
        Without a key, nothing is dropped. Every path drops the same entries for the same key.
    - `empty`: what a query gets that may attend to nothing: `"zeros"`, or with `"uniform"` the mean of the values of
        all keys. No gradient reaches `q`, `k` or `bias` from such a row.

    The softmax is computed in float32 (in float64 if `q` is), products of narrower types are summed in float32, and the
    result has the dtype of `q`. Reverse-mode derivatives exist to any order, under any transformation, for everything
    but `rate`; forward mode needs `plain`. Raises `ValueError` when sizes disagree.
    Source: Vaswani et al. 2017, arXiv:1706.03762; in blocks: Dao et al. 2022, arXiv:2205.14135.
    """
    path, _ = _choose(q, k, v, mask, bias, scale, _drops(rate, key), empty)
    return _over_axes(_PATHS[path], q, k, v, mask, bias=bias, scale=scale, rate=rate, key=key, empty=empty)


def plain(
    q: Float[Array, "*axes seq num_heads head_dim"],
    k: Float[Array, "*axes keys num_kv_heads head_dim"],
    v: Float[Array, "*axes keys num_kv_heads value_dim"],
    mask: Mask,
    *,
    bias: Float[Array, "num_heads seq keys"] | None = None,
    scale: float | int | Float[Array, ""],
    rate: float | int | Float[Array, ""] = 0.0,
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    empty: str = "zeros",
) -> Float[Array, "*axes seq num_heads value_dim"]:
    """What `attend` computes, as the formula reads; the whole table of weights exists, and every derivative."""
    _check(q, k, v, mask, bias, empty)
    return _over_axes(_plain, q, k, v, mask, bias=bias, scale=scale, rate=rate, key=key, empty=empty)


def probabilities(
    q: Float[Array, "*axes seq num_heads head_dim"],
    k: Float[Array, "*axes keys num_kv_heads head_dim"],
    mask: Mask,
    *,
    bias: Float[Array, "num_heads seq keys"] | None = None,
    scale: float | int | Float[Array, ""],
    empty: str = "zeros",
) -> Float[Array, "*axes num_heads seq keys"]:
    r"""$\mathrm{softmax}(q k^\top \cdot s + b)$ alone, the weights with which `attend` sums the values, before dropout.

    In float32 at least. They are the whole table, which `attend` itself never holds: to be looked at.
    """
    _check(q, k, k, mask, bias, empty)
    inner = functools.partial(_probabilities, mask=mask, bias=bias, scale=scale, empty=empty)
    for _ in range(q.ndim - 3):
        inner = jax.vmap(inner)
    return inner(q, k)


def explain(q, k, v, mask: Mask, *, bias=None, scale: Any = 1.0, rate: Any = 0.0, empty: str = "zeros") -> str:
    """One line: which path `attend` takes for these operands (arrays, or `jax.ShapeDtypeStruct`s), and why.

    A `rate` other than zero stands for a call with a key.
    """
    return ": ".join(_choose(q, k, v, mask, bias, scale, _drops(rate, "a key"), empty))


def _over_axes(path, q, k, v, mask, *, key, **rest):
    """`path` over the leading axes: they share everything but the dropout key."""
    if q.ndim == 3:
        return path(q, k, v, mask, key=key, **rest)
    keys = None if key is None else jax.random.split(key, q.shape[0])
    inner = lambda q, k, v, key: _over_axes(path, q, k, v, mask, key=key, **rest)
    return jax.vmap(inner, in_axes=(0, 0, 0, None if key is None else 0))(q, k, v, keys)


def _plain(q, k, v, mask, *, bias, scale, rate, key, empty):
    (seq, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    weights = _probabilities(q, k, mask, bias=bias, scale=scale, empty=empty)
    seeds, rate = _dropout(q, rate, key)
    if seeds is not None and rate is not None:
        weights = weights * keep(seeds, rate, keys)
    # The values are widened, rather than the weights rounded: bfloat16 weights err 1.3 times as much as torch's kernel.
    out = jnp.einsum("ngst,tnd->sngd", weights.reshape(kv_heads, -1, seq, keys), v.astype(wide(q.dtype)))
    return out.reshape(seq, heads, -1).astype(q.dtype)


def _probabilities(q, k, mask, *, bias, scale, empty):
    (seq, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    grouped = q.reshape(seq, kv_heads, heads // kv_heads, -1)
    # The scale comes after the product, in its dtype: a bfloat16 query that was scaled has been rounded twice.
    scores = jnp.einsum("sngd,tnd->ngst", grouped, k, preferred_element_type=wide(q.dtype)) * _like(scale, q)
    return _weights(scores.reshape(heads, seq, keys), mask.allowed(seq, keys), bias, empty)


def _weights(
    scores: Float[Array, "heads seq keys"], allowed: Bool[Array, "*heads seq keys"] | None, bias, empty
) -> Float[Array, "heads seq keys"]:
    least = floor(scores.dtype)
    if bias is not None:  # a bias may mask with -inf, which would make an empty row's softmax and its gradient NaN
        bias = bias.astype(scores.dtype)
        scores = jnp.where(bias > least, scores + bias, least)
    if allowed is not None:
        scores = jnp.where(allowed if allowed.ndim == 3 else allowed[None], scores, least)
    weights = jax.nn.softmax(scores, axis=-1)
    if empty == "uniform" or (allowed is None and bias is None):
        return weights
    return jnp.where(jnp.max(scores, axis=-1, keepdims=True) > least, weights, 0)


def _by_blocks(q, k, v, mask, *, bias, scale, rate, key, empty):
    q_, k_, v_ = (x.astype(wide(q.dtype)) for x in (q, k, v))
    bias = None if bias is None else bias.astype(wide(q.dtype))
    kernel = _blocked.kernels[empty]
    k_, v_, mask, bias = jax.tree.map(_own, (k_, v_, mask, bias))
    return kernel(q_ * _like(scale, q), k_, v_, mask, bias, *_dropout(q, rate, key)).astype(q.dtype)


def _own(x):
    """`x` after an operation that changes nothing and is compiled away.

    JAX 0.10 refuses to differentiate a `custom_vjp` whose operand is a NumPy array that `vmap` maps over, which is what
    a tokenizer's mask is.
    """
    return jnp.logical_or(x, False) if jnp.asarray(x).dtype == jnp.bool_ else jnp.multiply(x, 1)


def _like(number, q):
    """A scalar, in the dtype that attention is computed in."""
    return jnp.asarray(number).astype(wide(q.dtype))


def _dropout(q, rate, key):
    """Seeds for all rows of weights, and the rate; None where nothing is dropped."""
    if not _drops(rate, key):
        return None, None
    return _blocked.seeds(key, q.shape[1], q.shape[0]), jax.lax.stop_gradient(_like(rate, q))


def _drops(rate, key) -> bool:
    return key is not None and not (isinstance(rate, int | float) and rate == 0)


def _by_cudnn(q, k, v, mask, *, bias, scale, rate, key, empty):
    """NVIDIA's fused kernel, for what `_cudnn_refuses` lets through: no bias, no dropout, zeros for empty rows."""
    (seq, heads, _), keys = q.shape, k.shape[0]
    fused = functools.partial(jax.nn.dot_product_attention, scale=float(scale), implementation="cudnn")
    probe = jnp.isnan(q[0, 0, 0]) ^ jnp.isnan(k[0, 0, 0]) ^ jnp.isnan(v[0, 0, 0])
    # Under vmap the kernel wants its operands, and the cotangent of its result, batched alike: this ties them together.
    tie = lambda probe, *some: [jax.lax.select(probe, x, x) for x in some]
    if mask.is_empty or _is_causal(mask):
        return tie(probe, fused(*tie(probe, q, k, v), is_causal=mask.causal))[0]
    allowed = mask.allowed(seq, keys)
    allowed = jnp.broadcast_to(allowed if allowed.ndim == 3 else allowed[None], (heads, seq, keys))
    seen = jnp.any(allowed, axis=-1).swapaxes(0, 1)[..., None]
    q, k, v, allowed = tie(probe ^ allowed[0, 0, 0], q, k, v, allowed)
    return jnp.where(seen, fused(q, k, v, mask=allowed), 0)


def _is_causal(mask) -> bool:
    """True where `mask` is causal and nothing else, which the fused kernel knows without a table."""
    plainly = mask.causal and mask.window is None and isinstance(mask.offset, int) and mask.offset == 0
    return plainly and mask.keys is None and mask.segments is None and mask.dense is None


def _cudnn_refuses(device, q, k, v, mask, bias, scale, drops: bool, empty: str) -> str | None:
    """Why the fused kernel cannot run, or None. Limits: `jax/_src/cudnn/fused_attention_stablehlo.py`."""
    capability = tuple(int(x) for x in getattr(device, "compute_capability", "0.0").split("."))
    widest = 256 if capability >= (9, 0) else 128
    tabled = not (mask.is_empty or _is_causal(mask))
    reasons = {
        "the device is older than compute capability 8.0": capability < (8, 0),
        f"{q.dtype} is not float16 or bfloat16": q.dtype not in (jnp.float16, jnp.bfloat16),
        "q, k and v differ in dtype": not q.dtype == k.dtype == v.dtype,
        f"head_dim {q.shape[-1]} is not a multiple of 8 up to {widest}": q.shape[-1] % 8 or q.shape[-1] > widest,
        "value_dim differs from head_dim": v.shape[-1] != q.shape[-1],
        "there is a bias": bias is not None,
        "weights are dropped": drops,
        "empty rows give the mean of all values": empty != "zeros" and tabled,
        "the scale is traced": not isinstance(scale, int | float),
        "the mask is a table of odd size": tabled and (q.shape[-3] % 2 or k.shape[-3] % 2),
    }
    return next((why for why, holds in reasons.items() if holds), None)


_PATHS = {"plain": _plain, "blocked": _by_blocks, "cudnn": _by_cudnn}


def _choose(q, k, v, mask, bias, scale, drops: bool, empty: str) -> tuple[str, str]:
    """The path, and why; known while tracing."""
    _check(q, k, v, mask, bias, empty)
    device = jax.devices()[0]
    if v.shape[-1] > max(k.shape[-1], k.shape[-3]):
        # Each head's result is larger than its scores. XLA takes it on into what follows, such as a sum of all heads.
        return "plain", f"value_dim {v.shape[-1]} is more than the keys and head_dim: blocks of scores save nothing"
    if q.shape[-3] == 1:
        return "plain", "one query, whose scores are a row: blocks of them save nothing"
    if device.platform == "cpu" and jax.device_count() == 1:
        return "blocked", "one CPU device, whose cache holds the scores of a block"
    if device.platform == "cpu":
        return "plain", f"a loop over the batch would gather what {jax.device_count()} devices hold"
    if "nvidia" not in device.device_kind.lower():
        return "plain", f"XLA compiles the formula for {device.device_kind}"
    if refusal := _cudnn_refuses(device, q, k, v, mask, bias, scale, drops, empty):
        return "plain", f"no fused kernel, {refusal}"
    return "cudnn", f"fused kernel on {device.device_kind}"


def _check(q, k, v, mask, bias, empty) -> None:
    if empty not in _blocked.kernels:
        raise ValueError(f"empty={empty!r} is not known: it is {' or '.join(map(repr, _blocked.kernels))}.")
    sizes = dict(zip(("seq", "num_heads", "head_dim"), q.shape[-3:], strict=True))
    sizes |= dict(zip(("keys", "num_kv_heads"), k.shape[-3:-1], strict=True)) | {"value_dim": v.shape[-1]}
    table = ("num_heads", "seq", "keys")
    _expect("k", k.shape[-3:], ("keys", "num_kv_heads", "head_dim"), sizes)
    _expect("v", v.shape[-3:], ("keys", "num_kv_heads", "value_dim"), sizes)
    for name, x, axes in (
        ("bias", bias, table),
        ("mask.keys", mask.keys, ("keys",)),
        ("mask.segments", mask.segments, ("keys",)),
        ("mask.dense", mask.dense, table if mask.dense is not None and mask.dense.ndim == 3 else table[1:]),
    ):
        if x is not None:
            _expect(name, x.shape, axes, sizes)
    for name, x in (("k", k), ("v", v)):
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"leading axes of {name}: expected those of q, {q.shape[:-3]}, got {x.shape[:-3]}.")
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        multiple = f"a multiple of num_kv_heads = {sizes['num_kv_heads']}"
        raise ValueError(f"num_heads of q: expected {multiple}, got {sizes['num_heads']}.")


def _expect(name: str, shape: tuple, axes: tuple, sizes: dict) -> None:
    if len(shape) != len(axes):
        raise ValueError(f"{name}: expected the axes {' '.join(axes)}, got the shape {shape}.")
    for axis, found in zip(axes, shape, strict=True):
        if found != sizes[axis]:
            raise ValueError(f"{axis} of {name}: expected {sizes[axis]}, got {found}.")
