"""Attention on one CPU, block by block: what is computed at once stays in cache, whatever the batch.

A `jax.custom_vjp` whose forward and backward are each a `jax.custom_batching.custom_vmap`: under `vmap` they loop over blocks of the
batch. Each has a derivative of its own (of its own code), so that gradients of gradients exist as well. Without the outer
`custom_vjp`, `grad(f)` and `vmap(grad(f))` would meet a `custom_vmap`, which has no reverse mode.

Shapes inside: q `(kv_heads, groups, seq, head_dim)`, k and v `(kv_heads, keys, dim)`, scores `(kv_heads, groups, seq, keys)`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

EMPTY = ("zeros", "uniform")

# Bytes of scores that exist at once. Measured with 1 MiB of L2 a core and 32 MiB of L3 (12 heads of 64, 128 to 1024 keys):
# below 1 MiB, starting operations costs more than they do; at 12 MiB and above the scores have left the cache.
BLOCK = 2 * 2**20


def wide(dtype):
    """The dtype in which attention on arrays of `dtype` is computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def floor(dtype) -> float:
    """The score of a masked key. Finite, since a row of -inf has NaN weights; adding a score to it does not change it."""
    return float(jnp.finfo(dtype).min)


def keep(key, rate, heads, rows, keys: int, dtype):
    """The factors `(*heads, rows, keys)` of dropout, 0 or `1 / (1 - rate)`: the same for a (head, row), whatever is computed with it."""
    draw = lambda head, row: jax.random.bernoulli(
        jax.random.fold_in(jax.random.fold_in(key, head), row), 1 - rate, (keys,)
    )
    kept = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(heads.reshape(-1), rows)
    return jnp.where(kept, 1 / (1 - rate.astype(dtype)), 0).reshape(*heads.shape, *kept.shape[1:])


def _divisor(n: int, limit: float) -> int:
    """The largest divisor of `n` that is at most `limit` (1 where there is none)."""
    return next(d for d in range(n, 0, -1) if d == 1 or (n % d == 0 and d <= limit))


# ---- the formula on one block


def _raw(q, k, shift):
    scores = jnp.einsum("ngsd,ntd->ngst", q, k)
    return scores if shift is None else scores + shift


def _forward_block(empty, q, k, v, shift, factors):
    scores = _raw(q, k, shift)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    share = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    if empty == "zeros" and shift is not None:
        share = jnp.where(top > floor(top.dtype), share, 0)
    # Dividing the output is cheaper than dividing the weights.
    return jnp.einsum("ngst,ntd->ngsd", weights if factors is None else weights * factors, v) * share, top, share


def _backward_block(q, k, v, shift, factors, out, top, share, g):
    weights = jnp.exp(_raw(q, k, shift) - top)
    g = g * share
    dv = jnp.einsum("ngst,ngsd->ntd", weights if factors is None else weights * factors, g)
    g = jnp.where(top > floor(top.dtype), g, 0)  # a uniform row depends on v alone
    dweights = jnp.einsum("ngsd,ntd->ngst", g, v)
    dweights = dweights if factors is None else dweights * factors
    dscores = weights * (dweights - jnp.sum(g * out, axis=-1, keepdims=True))
    return jnp.einsum("ngst,ntd->ngsd", dscores, k), jnp.einsum("ngst,ngsd->ntd", dscores, q), dv, dscores


# ---- one example: blocks of heads, and of query rows where one head is too large


def _shift(mask, bias, kv_heads: int, seq: int, keys: int, dtype):
    """What is added to scores, `(1 or kv_heads, 1 or groups, 1 or seq, keys)`: the bias, and the floor where `mask` forbids."""
    alike = not mask.causal and mask.window is None and mask.segments is None and mask.dense is None  # all rows are
    allowed = mask.allowed(1 if alike else seq, keys)
    if allowed is not None:
        allowed = allowed[None, None] if allowed.ndim == 2 else allowed.reshape(kv_heads, -1, seq, keys)
    if bias is None:
        return None if allowed is None else jnp.where(allowed, jnp.zeros((), dtype), floor(dtype))
    bias = jnp.maximum(bias, floor(dtype)).reshape(kv_heads, -1, seq, keys)
    return bias if allowed is None else jnp.where(allowed, bias, floor(dtype))


def _blocks(f: Callable, q, k, v, mask, bias, key, rate, *more):
    """`f(q, k, v, shift, factors, *more)` on blocks of heads and rows; every result has two axes in front that count them."""
    (kv_heads, groups, seq, _), keys = q.shape, k.shape[1]
    size = q.dtype.itemsize * groups * seq * keys
    parts = kv_heads // _divisor(kv_heads, BLOCK / size), seq // _divisor(seq, seq * BLOCK / size)
    shift = _shift(mask, bias, kv_heads, seq, keys, q.dtype)
    heads = jnp.arange(kv_heads * groups).reshape(kv_heads, groups)

    def block(index):
        head, row = index // parts[1], index % parts[1]
        cut = lambda x: _part(_part(x, 0, head, parts[0]), 2, row, parts[1])
        whole = lambda x: _part(x, 0, head, parts[0])
        factors = None
        if key is not None:
            factors = keep(key, rate, whole(heads), _part(jnp.arange(seq), 0, row, parts[1]), keys, q.dtype)
        return f(cut(q), whole(k), whole(v), None if shift is None else cut(shift), factors, *map(cut, more))

    count = math.prod(parts)
    results = lax.map(block, jnp.arange(count)) if count > 1 else jax.tree.map(lambda x: x[None], block(0))
    return jax.tree.map(lambda x: x.reshape(*parts, *x.shape[1:]), results)


def _part(x, axis: int, index, parts: int):
    """Part `index` of `parts` equal ones; an axis of length 1 is shared by all."""
    if parts == 1 or x.shape[axis] == 1:
        return x
    size = x.shape[axis] // parts
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _glue(x):
    """(head blocks, row blocks, kv_heads, groups, seq, dim) of blocks -> (kv_heads, groups, seq, dim) of all."""
    blocks, _, heads, groups, _, dim = x.shape
    return x.transpose(0, 2, 3, 1, 4, 5).reshape(blocks * heads, groups, -1, dim)


def _add(x):
    """(head blocks, row blocks, kv_heads, keys, dim) -> (kv_heads, keys, dim): row blocks each contribute."""
    return jnp.sum(x, axis=1).reshape(-1, *x.shape[3:])


def _heads_first(q, k, v):
    kv_heads = k.shape[1]
    grouped = q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])
    return grouped.transpose(1, 2, 0, 3), k.swapaxes(0, 1), v.swapaxes(0, 1)


def _heads_last(x):
    """(kv_heads, groups, seq, dim) -> (seq, num_heads, dim)"""
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _forward(empty, q, k, v, mask, bias, key, rate):
    """The output, and what the backward pass needs besides the operands."""
    blocks = _blocks(functools.partial(_forward_block, empty), *_heads_first(q, k, v), mask, bias, key, rate)
    out, top, share = map(_glue, blocks)
    return _heads_last(out), (top, share)


def _backward(q, k, v, mask, bias, key, rate, out, rest, g):
    out, _, _ = _heads_first(out, k, v)
    g, _, _ = _heads_first(g, k, v)
    blocks = _blocks(_backward_block, *_heads_first(q, k, v), mask, bias, key, rate, out, *rest, g)
    dq, dk, dv, dscores = blocks
    dbias = None if bias is None else _glue(dscores).reshape(bias.shape)
    return _heads_last(_glue(dq)), _add(dk).swapaxes(0, 1), _add(dv).swapaxes(0, 1), None, dbias, None, None


# ---- derivatives outside, the loop over the batch inside


def _looped(f: Callable, size: int) -> Callable:
    """`f` of arrays, whose scores take `size` bytes: under `vmap`, as many calls at once as fit a block, one block after another."""
    call = custom_vmap(f)

    @call.def_vmap
    def rule(n, batched, *xs):
        together = _divisor(n, BLOCK / size)
        inner = call if together == 1 else _looped(jax.vmap(f, [0 if b else None for b in batched]), size * together)
        if together == n:
            out = inner(*xs)
        else:
            some = lambda x: x if together == 1 else x.reshape(n // together, together, *x.shape[1:])
            merge = lambda mapped: (mapped.pop(0) if b else x for x, b in zip(xs, batched, strict=True))
            out = lax.map(
                lambda mapped: inner(*merge(list(mapped))), [some(x) for x, b in zip(xs, batched, strict=True) if b]
            )
            out = out if together == 1 else jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def _stage(f: Callable) -> Callable:
    """`f(q, k, ...)` of pytrees, looped under `vmap`, with a derivative: that of its own code."""

    def fast(*operands):
        leaves, tree = jax.tree.flatten(operands)
        q, k = operands[:2]
        size = q.dtype.itemsize * math.prod(q.shape[:2]) * k.shape[0]
        return _looped(lambda *leaves: f(*tree.unflatten(leaves)), size)(*leaves)

    stage = jax.custom_vjp(fast)
    stage.defvjp(lambda *operands: (fast(*operands), operands), lambda operands, g: jax.vjp(f, *operands)[1](g))
    return stage


def _kernel(empty: str) -> Callable:
    forward, backward = _stage(functools.partial(_forward, empty)), _stage(_backward)
    kernel = jax.custom_vjp(lambda *operands: forward(*operands)[0])

    def run(*operands):
        out, rest = forward(*operands)
        return out, (operands, out, rest)

    kernel.defvjp(run, lambda saved, g: backward(*saved[0], *saved[1:], g))
    return kernel


# `(q, k, v, mask, bias, key, rate)`: q scaled, all floating arrays of the wide dtype; bias, or key and rate, may be None.
blocked = {empty: _kernel(empty) for empty in EMPTY}
