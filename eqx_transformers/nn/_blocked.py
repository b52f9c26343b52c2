"""Attention on one CPU, block by block: what is computed at once stays in cache, whatever the batch.

A `jax.custom_vjp` whose forward and backward are each a `jax.custom_batching.custom_vmap`: under `vmap` they loop over
blocks of the batch. Each has a derivative of its own (of its own code), so that gradients of gradients exist as well.
Without the outer `custom_vjp`, `grad(f)` and `vmap(grad(f))` would meet a `custom_vmap`, which has no reverse mode.
"""

import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Key, UInt32

from .dropout import keep

# Bytes of tables `seq keys` that exist at once: 1 MiB, what the L2 cache of a server core holds, for each core.
# Measured with 12 heads of 64 and 128 to 1024 keys: a forward pass is fastest at 1 to 2 MiB, a backward pass (two such
# tables) at 1 MiB each. A quarter of that costs up to 40 % more (starting operations), twice as much 20 % (cache
# misses), and the whole batch at once 4 times the forward pass.
BLOCK = 2**20 * (os.cpu_count() or 1)


def wide(dtype):
    """The dtype in which attention on arrays of `dtype` is computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def floor(dtype) -> float:
    """The score of a masked key. Finite, since a row of -inf has NaN weights; adding a score does not change it."""
    return float(jnp.finfo(dtype).min)


# ---- dropout


def seeds(key: Key[Array, ""] | UInt32[Array, "2"], num_heads: int, seq: int) -> UInt32[Array, "num_heads seq"]:
    """One random number for each row of weights; `keep` makes the row's dropout of it, wherever the row is computed."""
    row = lambda head: jax.random.bits(jax.random.fold_in(key, head), (seq,), jnp.uint32)
    return jax.vmap(row)(jnp.arange(num_heads))


# ---- the formula on one block
# q, out and g: (kv_heads, groups, seq, dim); k and v: (kv_heads, keys, dim); tables: (kv_heads, groups, seq, keys)


def _scores(q, k, shift):
    scores = jnp.einsum("ngsd,ntd->ngst", q, k)
    return scores if shift is None else scores + shift


def _forward_block(empty, q, k, v, shift, factors):
    scores = _scores(q, k, shift)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    share = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    if empty == "zeros" and shift is not None:
        share = jnp.where(top > floor(top.dtype), share, 0)
    # Dividing the output is cheaper than dividing the weights.
    out = jnp.einsum("ngst,ntd->ngsd", weights if factors is None else weights * factors, v) * share
    return (out, top, share), ()


def _backward_block(biased, q, k, v, shift, factors, out, top, share, g):
    weights = jnp.exp(_scores(q, k, shift) - top)
    g = g * share
    dv = jnp.einsum("ngst,ngsd->ntd", weights if factors is None else weights * factors, g)
    g = jnp.where(top > floor(top.dtype), g, 0)  # a uniform row depends on v alone
    dweights = jnp.einsum("ngsd,ntd->ngst", g, v)
    dweights = dweights if factors is None else dweights * factors
    dscores = weights * (dweights - jnp.sum(g * out, axis=-1, keepdims=True))
    dq, dk = jnp.einsum("ngst,ntd->ngsd", dscores, k), jnp.einsum("ngst,ngsd->ntd", dscores, q)
    return (dq, dscores if biased else None), (dk, dv)


# ---- one example: blocks of heads, and of query rows where one head is too large


def _shift(mask, bias, kv_heads: int, seq: int, keys: int, dtype):
    """What is added to scores: the bias, and the floor where `mask` forbids. Axes of a table, or 1 where alike."""
    alike = not mask.causal and mask.window is None and mask.segments is None and mask.dense is None  # all rows are
    allowed = mask.allowed(1 if alike else seq, keys)
    if allowed is not None:
        allowed = allowed[None, None] if allowed.ndim == 2 else allowed.reshape(kv_heads, -1, seq, keys)
    if bias is None:
        return None if allowed is None else jnp.where(allowed, jnp.zeros((), dtype), floor(dtype))
    bias = jnp.maximum(bias, floor(dtype)).reshape(kv_heads, -1, seq, keys)
    return bias if allowed is None else jnp.where(allowed, bias, floor(dtype))


def _blocks(f: Callable, tables: int, q, k, v, mask, bias, seeds, rate, *more, totals=()):
    """`f(q, k, v, shift, factors, *more)` on blocks of heads and of rows.

    It returns results for its rows, which get two axes in front, blocks of heads and of rows; and results for its
    heads, shaped like `totals`, to which all blocks of rows add: these get one axis in front.
    """
    (kv_heads, groups, seq, _), keys = q.shape, k.shape[1]
    room = BLOCK / (q.dtype.itemsize * groups * seq * keys * tables)  # how many kv_heads fit a block
    head_parts, row_parts = kv_heads // _divisor(kv_heads, room), _row_parts(seq, room)
    shift = _shift(mask, bias, kv_heads, seq, keys, q.dtype)
    seeds = None if seeds is None else seeds.reshape(kv_heads, groups, seq)

    def of_heads(head):
        heads = lambda x: _part(x, 0, head, head_parts)

        def of_rows(total, row):
            rows = lambda x: None if x is None else _part(heads(x), 2, row, row_parts)
            factors = None if seeds is None else keep(_part(heads(seeds), 2, row, row_parts), rate, keys)
            found, partial = f(rows(q), heads(k), heads(v), rows(shift), factors, *map(rows, more))
            return jax.tree.map(jnp.add, total, partial), found

        return lax.scan(of_rows, tuple(jnp.zeros_like(heads(x)) for x in totals), jnp.arange(row_parts))

    total, found = lax.map(of_heads, jnp.arange(head_parts))
    return found, total


def _divisor(n: int, limit: float) -> int:
    """The largest divisor of `n` that is at most `limit`; 1 where there is none."""
    return next(d for d in range(n, 0, -1) if d == 1 or (n % d == 0 and d <= limit))


def _row_parts(seq: int, room: float) -> int:
    """In how many parts to cut the rows of a head, of which the share `room` fits a block."""
    rows = _divisor(seq, seq * room)
    return 1 if 4 * rows < seq * room else seq // rows  # a prime number of rows stays whole, rather than go one by one


def _part(x, axis: int, index, parts: int):
    """Part `index` of `parts` equal ones; an axis of length 1 is shared by all."""
    if parts == 1 or x.shape[axis] == 1:
        return x
    size = x.shape[axis] // parts
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _glue(x):
    """(head blocks, row blocks, kv_heads, groups, seq, dim) -> (kv_heads, groups, seq, dim)"""
    blocks, _, heads, groups, _, dim = x.shape
    return x.transpose(0, 2, 3, 1, 4, 5).reshape(blocks * heads, groups, -1, dim)


def _heads_first(q, k, v):
    kv_heads = k.shape[1]
    grouped = q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])
    return grouped.transpose(1, 2, 0, 3), k.swapaxes(0, 1), v.swapaxes(0, 1)


def _heads_last(x):
    """(kv_heads, groups, seq, dim) -> (seq, num_heads, dim)"""
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _forward(empty, q, k, v, mask, bias, seeds, rate):
    """The output, and what the backward pass needs besides the operands."""
    block = functools.partial(_forward_block, empty)
    found, _ = _blocks(block, 1, *_heads_first(q, k, v), mask, bias, seeds, rate)
    out, top, share = map(_glue, found)
    return _heads_last(out), (top, share)


def _backward(q, k, v, mask, bias, seeds, rate, out, rest, g):
    (out, _, _), (g, _, _), (q, k, v) = _heads_first(out, k, v), _heads_first(g, k, v), _heads_first(q, k, v)
    block = functools.partial(_backward_block, bias is not None)
    found, total = _blocks(block, 2, q, k, v, mask, bias, seeds, rate, out, *rest, g, totals=(k, v))
    dq, dbias = _glue(found[0]), None if bias is None else _glue(found[1]).reshape(bias.shape)
    dk, dv = (x.reshape(-1, *x.shape[2:]).swapaxes(0, 1) for x in total)
    return _heads_last(dq), dk, dv, None, dbias, None, None


# ---- derivatives outside, the loop over the batch inside


def _looped(f: Callable, size: int) -> Callable:
    """`f` of arrays, whose tables take `size` bytes: under `vmap`, as many calls at once as fit a block, then more."""
    call = custom_vmap(f)

    @call.def_vmap
    def rule(n, batched, *xs):
        together = _divisor(n, BLOCK / size)
        inner = _looped(jax.vmap(f, [0 if b else None for b in batched]), size * together)

        def some(part):
            part = iter(part)
            return inner(*(next(part) if b else x for x, b in zip(xs, batched, strict=True)))

        cut = lambda x: x.reshape(n // together, together, *x.shape[1:])
        out = lax.map(some, [cut(x) for x, b in zip(xs, batched, strict=True) if b])
        return jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), out), jax.tree.map(lambda _: True, out)

    return call


def _stage(f: Callable, tables: int) -> Callable:
    """`f(q, k, ...)` of pytrees, looped under `vmap`, with a derivative: that of its own code."""

    def fast(*operands):
        leaves, tree = jax.tree.flatten(operands)
        q, k = operands[:2]
        size = q.dtype.itemsize * math.prod(q.shape[:2]) * k.shape[0] * tables
        return _looped(lambda *leaves: f(*tree.unflatten(leaves)), size)(*leaves)

    stage = jax.custom_vjp(fast)
    stage.defvjp(lambda *operands: (fast(*operands), operands), lambda operands, g: jax.vjp(f, *operands)[1](g))
    return stage


def _kernel(empty: str) -> Callable:
    forward, backward = _stage(functools.partial(_forward, empty), 1), _stage(_backward, 2)
    kernel = jax.custom_vjp(lambda *operands: forward(*operands)[0])

    def run(*operands):
        out, rest = forward(*operands)
        return out, (operands, out, rest)

    kernel.defvjp(run, lambda saved, g: backward(*saved[0], *saved[1:], g))
    return kernel


# Called with `(q, k, v, mask, bias, seeds, rate)`: q scaled, floating arrays of the wide dtype, the last three or None.
kernels = {empty: _kernel(empty) for empty in ("zeros", "uniform")}
