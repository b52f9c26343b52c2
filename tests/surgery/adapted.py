"""A small tree with all that adapters meet (a tied table, fused projections, blocks), and adapters of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import nn, select
from eqx_transformers.nn._keys import keyed
from eqx_transformers.surgery.adapter_masks import adapter_mask
from eqx_transformers.surgery.adapters import add_adapter
from eqx_transformers.surgery.ia3 import IA3

KEY = jax.random.key(7)
IDS = jnp.array([3, 10, 0, 3, 7])
LINEAR, TABLE, FUSED = select("Linear"), select("Embedding"), select("Linear", under="**.fused")


class Block(eqx.Module):
    """`fused` is three projections in one."""

    fused: eqx.Module
    output: eqx.Module

    def __init__(self, *, key):
        first, second = jax.random.split(key)
        self.fused = nn.Linear(7, 15, key=first)
        self.output = nn.Linear(15, 7, use_bias=False, key=second)

    def __call__(self, x, *, key=None):
        return x + keyed(self.output, jnp.tanh(keyed(self.fused, x, key)), key)


class Small(eqx.Module):
    """Scores of its own table, as in a model whose output is tied: `head` is None."""

    embedding: eqx.Module
    stack: nn.Stack
    head: eqx.Module | None

    def __init__(self, *, key):
        table, bias, *blocks = jax.random.split(key, 4)
        self.embedding = nn.Embedding(11, 7, padding_id=0, key=table)
        fill = lambda block: eqx.tree_at(lambda b: b.fused.bias, block, jax.random.normal(bias, (15,)))
        self.stack = nn.Stack(tuple(fill(Block(key=block)) for block in blocks))
        self.head = None

    def __call__(self, ids, *, key=None):
        x = self.stack(self.embedding(ids), key=key)
        return self.embedding.attend(x) if self.head is None else self.head(x)


@functools.cache
def small(stacked: bool = False, dtype: Any = jnp.float32) -> Small:
    model = Small(key=jax.random.key(1))
    model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, model)
    return nn.stack(model) if stacked else model


@dataclass(frozen=True)
class Case:
    """Ways to adapt the tree. `exact`: adding one changes no bit, and merging it untouched gives the very tree back."""

    adapt: Callable[[Any], Any]
    exact: bool = True


def added(selection: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda model: add_adapter(model, selection, **{"rank": 3, "alpha": 5.0, "key": KEY} | options)


def twice(model: Any) -> Any:
    first = added(LINEAR | TABLE)(model)
    return added(select("LoRA"), rank=2, name="other", rslora=True, key=jax.random.key(8))(first)


def scaled(model: Any) -> Any:
    model = IA3_OUTPUT.map(model, IA3.adapter())
    return IA3_INPUT.map(model, IA3.adapter("input"))


IA3_OUTPUT = FUSED | TABLE
IA3_INPUT = select("Linear", under="**.output")
CASES = {
    "linear": Case(added(LINEAR)),
    "embedding": Case(added(TABLE, init="gaussian")),
    "dora": Case(added(LINEAR | TABLE, dora=True), exact=False),
    "parts": Case(added(FUSED, parts=3, use_bias=True, rslora=True)),
    "pissa": Case(added(LINEAR | TABLE, init="pissa"), exact=False),
    "olora": Case(added(FUSED, parts=3, init="olora", dora=True), exact=False),
    "two": Case(twice),
    "ia3": Case(scaled),
}


@functools.cache
def adapted(case: str, stacked: bool = False, dtype: Any = jnp.float32) -> Any:
    return CASES[case].adapt(small(stacked, dtype))


@eqx.filter_jit
def compiled(model: Any, args: Any, key: Any) -> Any:
    return model(*args, key=key)


def run(model: Any, *args: Any, key: Any = None) -> np.ndarray:
    return np.asarray(compiled(model, args, key), np.float32)


def trained(model: Any, size: float = 0.3) -> Any:
    """With every learned number changed."""
    learned, rest = eqx.partition(model, adapter_mask(model))
    leaves, tree = jax.tree.flatten(learned)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(tree, moved), rest)


class Coded(eqx.Module):
    """A quantized linear layer: eight bits and one scale for all."""

    codes: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None

    @property
    def in_features(self):
        return self.codes.shape[-1]

    @property
    def out_features(self):
        return self.codes.shape[-2]

    def dense(self):
        return self.codes.astype(jnp.float32) * self.scale

    def __call__(self, x, *, key=None):
        return nn.linear.contract(x, self.dense()).astype(x.dtype)


class CodedTable(eqx.Module):
    """A quantized table."""

    codes: jax.Array
    scale: jax.Array

    @property
    def vocab_size(self):
        return self.codes.shape[-2]

    @property
    def embed_dim(self):
        return self.codes.shape[-1]

    def dense(self):
        return self.codes.astype(jnp.float32) * self.scale

    def __call__(self, ids):
        return self.dense()[ids]

    def attend(self, x):
        return nn.linear.contract(x, self.dense()).astype(x.dtype)


def coded(node: Any) -> Any:
    scale = jnp.abs(node.weight).max() / 127
    codes = jnp.round(node.weight / scale).astype(jnp.int8)
    return CodedTable(codes, scale) if isinstance(node, nn.Embedding) else Coded(codes, scale)
