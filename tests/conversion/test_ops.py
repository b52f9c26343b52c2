"""Every operation is a bijection: backward undoes forward, bit for bit, on NumPy and on JAX arrays."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.ops import FLIP, SAME, split
from converters.rules import rule

OPS = {
    "same": (SAME, [(5, 3)]),
    "flip": (FLIP, [(5, 3)]),
    "split": (split(4, 2, 1), [(7, 3)]),
    "flip, then split": (FLIP.then(split(4, 2, 1)), [(3, 7)]),
    "split of a vector": (split(4, 3), [(7,)]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
@pytest.mark.parametrize("namespace", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", OPS)
def test_backward_undoes_forward(name, namespace, dtype):
    op, shapes = OPS[name]
    kept = np.int32 if namespace is jnp and dtype is np.int64 else dtype
    given = [namespace.arange(np.prod(s), dtype=kept).reshape(s) for s in shapes]
    back = op.backward(*op.forward(*given))
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(given, back, strict=True))


def test_flip_and_split_are_what_they_say():
    x = np.arange(21).reshape(3, 7)
    parts = FLIP.then(split(4, 2, 1)).forward(x)
    assert [p.shape for p in parts] == [(4, 3), (2, 3), (1, 3)]
    assert np.array_equal(parts[1], x.T[4:6])


@pytest.mark.parametrize("stacked", [False, True])
def test_a_fused_rule_goes_both_ways(stacked):
    """Three projections in one transposed tensor a layer, for a tuple of blocks and for stacked ones."""
    names = ("query", "key", "value")
    table = rule("h.{i}.qkv", tuple(f"blocks.{{i}}.{n}" for n in names), FLIP.then(split(4, 2, 2)))
    sizes = {"query": 4, "key": 2, "value": 2}
    one = {f"blocks.{n}": np.zeros((2, sizes[n], 5)) for n in names}
    many = {f"blocks.{i}.{n}": np.zeros((sizes[n], 5)) for i in range(2) for n in names}
    links = list(table.expand(one if stacked else many))
    assert len(links) == (1 if stacked else 2)
    held = {f"h.{i}.qkv": np.random.default_rng(i).normal(size=(5, 8)) for i in range(2)}
    leaves = {path: x for link in links for path, x in link.read(held.__getitem__).items()}
    assert leaves.keys() == (one if stacked else many).keys()
    key = leaves["blocks.key"][1] if stacked else leaves["blocks.1.key"]
    assert np.array_equal(key, held["h.1.qkv"].T[4:6])
    back = {k: x for link in links for k, x in link.write(leaves.__getitem__).items()}
    assert back.keys() == held.keys() and all(np.array_equal(back[k], held[k]) for k in held)
