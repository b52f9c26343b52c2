"""How `softmax(q k^T * scale + bias) v` runs, decided once for every model.

`attend` is the door: while tracing, it picks the path that is fastest for what it is given. `plain` is the formula itself, the
path that can be taken apart and differentiated in every mode. `explain` says which path `attend` takes, and why.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

from ._blocked import EMPTY, blocked, floor, keep, wide
from .mask import Mask


def attend(
    q: Float[Array, "*axes seq num_heads head_dim"],
    k: Float[Array, "*axes keys num_kv_heads head_dim"],
    v: Float[Array, "*axes keys num_kv_heads value_dim"],
    mask: Mask,
    *,
    bias: Float[Array, "num_heads seq keys"] | None = None,
    scale: float | Float[Array, ""],
    rate: float | Float[Array, ""] = 0.0,
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    empty: str = "zeros",
) -> Float[Array, "*axes seq num_heads value_dim"]:
    r"""$\mathrm{softmax}(q k^\top \cdot s + b)\, v$ for every head, over the keys that `mask` allows.

    - `q`, `k`, `v`: query head `h` reads key and value head `h // (num_heads // num_kv_heads)`. Leading axes share `mask`
        and `bias`, and draw their own dropout.
    - `rate`, `key`: each attention weight is dropped with probability `rate`, the others are divided by `1 - rate`. Without
        a key, nothing is dropped. Every path drops the same entries for the same key.
    - `empty`: what a query gets that may attend to nothing, `"zeros"`, or with `"uniform"` the mean of the values of all
        keys. No gradient reaches `q`, `k` or `bias` from such a row.

    The softmax is computed in float32 (in float64 if `q` is), products of narrower types are accumulated in float32, and the
    result has the dtype of `q`. Derivatives are reverse mode, to any order and under any transformation; forward mode needs `plain`.
    Raises `ValueError` when sizes disagree. Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    path, _ = _choose(q, k, v, mask, bias, rate, key is not None, empty)
    return _over_axes(_PATHS[path], q, k, v, mask, bias=bias, scale=scale, rate=rate, key=key, empty=empty)


def plain(
    q: Float[Array, "*axes seq num_heads head_dim"],
    k: Float[Array, "*axes keys num_kv_heads head_dim"],
    v: Float[Array, "*axes keys num_kv_heads value_dim"],
    mask: Mask,
    *,
    bias: Float[Array, "num_heads seq keys"] | None = None,
    scale: float | Float[Array, ""],
    rate: float | Float[Array, ""] = 0.0,
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    empty: str = "zeros",
) -> Float[Array, "*axes seq num_heads value_dim"]:
    """What `attend` computes, as the formula reads; the whole table of weights exists, and every derivative."""
    _check(q, k, v, mask, bias, empty)
    return _over_axes(_plain, q, k, v, mask, bias=bias, scale=scale, rate=rate, key=key, empty=empty)


def explain(q, k, v, mask: Mask, *, bias=None, rate=0.0, empty: str = "zeros") -> str:
    """One line: which path `attend` takes for these operands (arrays, or `jax.ShapeDtypeStruct`s), and why.

    A `rate` other than zero stands for a call with a key.
    """
    return ": ".join(_choose(q, k, v, mask, bias, rate, True, empty))


def _over_axes(path, q, k, v, mask, *, key, **rest):
    """`path` over the leading axes: they share everything but the dropout key."""
    if q.ndim == 3:
        return path(q, k, v, mask, key=key, **rest)
    keys = None if key is None else jax.random.split(key, q.shape[0])
    inner = lambda q, k, v, key: _over_axes(path, q, k, v, mask, key=key, **rest)
    return jax.vmap(inner, in_axes=(0, 0, 0, None if key is None else 0))(q, k, v, keys)


def _plain(q, k, v, mask, *, bias, scale, rate, key, empty):
    (seq, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    grouped = q.reshape(seq, kv_heads, heads // kv_heads, -1)
    scores = jnp.einsum("sngd,tnd->ngst", grouped, k, preferred_element_type=wide(q.dtype)) * jnp.asarray(
        scale, wide(q.dtype)
    )
    weights = _weights(scores.reshape(heads, seq, keys), mask.allowed(seq, keys), bias, empty)
    if _drops(rate, key):
        weights = weights * keep(
            key, jax.lax.stop_gradient(jnp.asarray(rate)), jnp.arange(heads), jnp.arange(seq), keys, weights.dtype
        )
    weights = weights.astype(v.dtype).reshape(kv_heads, -1, seq, keys)
    out = jnp.einsum("ngst,tnd->sngd", weights, v, preferred_element_type=wide(q.dtype))
    return out.reshape(seq, heads, -1).astype(q.dtype)


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


def _blocked(q, k, v, mask, *, bias, scale, rate, key, empty):
    q_, k_, v_ = (x.astype(wide(q.dtype)) for x in (q, k, v))
    bias = None if bias is None else bias.astype(wide(q.dtype))
    key, rate = (key, jnp.asarray(rate, wide(q.dtype))) if _drops(rate, key) else (None, None)
    return blocked[empty](q_ * jnp.asarray(scale, wide(q.dtype)), k_, v_, mask, bias, key, rate).astype(q.dtype)


def _cudnn(q, k, v, mask, *, bias, scale, rate, key, empty):
    raise NotImplementedError


def _drops(rate, key) -> bool:
    return key is not None and not (isinstance(rate, int | float) and rate == 0)


_PATHS = {"plain": _plain, "blocked": _blocked, "cudnn": _cudnn}


def _choose(q, k, v, mask, bias, rate, keyed, empty) -> tuple[str, str]:
    _check(q, k, v, mask, bias, empty)
    if jax.default_backend() != "cpu":
        return "plain", "XLA compiles the formula on this platform"
    if jax.device_count() > 1:
        return "plain", f"a loop over the batch would gather what is sharded over {jax.device_count()} devices"
    return "blocked", "one CPU device, block by block"


def _check(q, k, v, mask, bias, empty) -> None:
    if empty not in EMPTY:
        raise ValueError(f"empty={empty!r} is not known: it is {' or '.join(map(repr, EMPTY))}.")
    (seq, heads, dim), (keys, kv_heads, _) = q.shape[-3:], k.shape[-3:]
    if heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of the {kv_heads} key and value heads, got {heads}.")
    for name, found, expected in (
        ("leading axes of k", k.shape[:-3], q.shape[:-3]),
        ("leading axes of v", v.shape[:-3], q.shape[:-3]),
        ("head_dim of k", k.shape[-1], dim),
        ("keys of v", v.shape[-3], keys),
        ("num_kv_heads of v", v.shape[-2], kv_heads),
    ):
        if found != expected:
            raise ValueError(f"{name}: expected {expected}, got {found}.")
