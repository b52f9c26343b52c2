"""Attention on one CPU, block by block: what is computed at once stays in cache, whatever the batch.

A `jax.custom_vjp` whose forward and backward are each a `jax.custom_batching.custom_vmap`: under `vmap` they loop over blocks of the
batch. Each has a derivative of its own (of its own code), so that gradients of gradients exist as well. Without the outer
`custom_vjp`, `grad(f)` and `vmap(grad(f))` would meet a `custom_vmap`, which has no reverse mode.

Shapes inside: q `(kv_heads, groups, seq, head_dim)`, k and v `(kv_heads, keys, dim)`, scores `(kv_heads, groups, seq, keys)`.
"""

import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Key, UInt32

EMPTY = ("zeros", "uniform")

# Bytes of tables `seq keys` that exist at once: 1 MiB, what the L2 cache of a server core holds, for each core. Measured on 2 cores
# with 12 heads of 64 and 128 to 1024 keys: a forward pass is fastest at 2 MiB, a backward pass (two such tables) at 1 + 1; a
# quarter of that costs up to 20 % and 45 % (starting operations), four times as much up to 25 % (cache misses), all at once 200 %.
BLOCK = 2**20 * (os.cpu_count() or 1)


def wide(dtype):
    """The dtype in which attention on arrays of `dtype` is computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def floor(dtype) -> float:
    """The score of a masked key. Finite, since a row of -inf has NaN weights; adding a score to it does not change it."""
    return float(jnp.finfo(dtype).min)


# ---- dropout


def seeds(key: Key[Array, ""] | UInt32[Array, "2"], num_heads: int, seq: int) -> UInt32[Array, "num_heads seq"]:
    """One random number for each row of weights; `keep` makes the row's dropout of it, wherever the row is computed."""
    row = lambda head: jax.random.bits(jax.random.fold_in(key, head), (seq,))
    return jax.vmap(row)(jnp.arange(num_heads))


def keep(seeds: UInt32[Array, "*rows"], rate: Float[Array, ""], keys: int) -> Float[Array, "*rows keys"]:
    """What dropout multiplies weights with: 0, or 1 / (1 - rate).

    Each weight's random number is a hash of its row's seed and its key's place (multiply and shift until every bit depends
    on all others): on a CPU, `jax.random` on all of them takes 4 times as long as the attention itself, this a tenth of it.
    """
    places = jnp.arange(keys, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)  # 2**32 / golden ratio: spreads neighbours
    bits = seeds[..., None] ^ places.reshape((1,) * seeds.ndim + (keys,))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # Wellons 2018, "Prospecting for Hash Functions"
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    uniform = ((bits ^ (bits >> 16)) >> 8).astype(rate.dtype) * 2**-24
    return jnp.where(uniform >= rate, 1 / (1 - rate), 0)


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


def _blocks(f: Callable, tables: int, q, k, v, mask, bias, seeds, rate, *more):
    """`f(q, k, v, shift, factors, *more)` on blocks of heads and rows; every result has two axes in front that count them."""
    (kv_heads, groups, seq, _), keys = q.shape, k.shape[1]
    size = q.dtype.itemsize * groups * seq * keys * tables
    parts = kv_heads // _divisor(kv_heads, BLOCK / size), seq // _divisor(seq, seq * BLOCK / size)
    shift = _shift(mask, bias, kv_heads, seq, keys, q.dtype)
    seeds = None if seeds is None else seeds.reshape(kv_heads, groups, seq)

    def block(index):
        head, row = index // parts[1], index % parts[1]
        heads = lambda x: _part(x, 0, head, parts[0])
        rows = lambda x: None if x is None else _part(heads(x), 2, row, parts[1])
        factors = None if seeds is None else keep(rows(seeds), rate, keys)
        return f(rows(q), heads(k), heads(v), rows(shift), factors, *map(rows, more))

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


def _forward(empty, q, k, v, mask, bias, seeds, rate):
    """The output, and what the backward pass needs besides the operands."""
    blocks = _blocks(functools.partial(_forward_block, empty), 1, *_heads_first(q, k, v), mask, bias, key, rate)
    out, top, share = map(_glue, blocks)
    return _heads_last(out), (top, share)


def _backward(q, k, v, mask, bias, seeds, rate, out, rest, g):
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


# `(q, k, v, mask, bias, seeds, rate)`: q scaled, all floating arrays of the wide dtype; bias, or seeds and rate, may be None.
blocked = {empty: _kernel(empty) for empty in EMPTY}
