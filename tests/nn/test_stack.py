"""A tuple of blocks and one stacked block are the same model."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn, stack, unstack

from .test_layers import filled, random

KEY = jax.random.key(0)
DIM, LAYERS, SEQ = 6, 3, 5


class Block(eqx.Module):
    """What real blocks have: arrays, an activation, dropout rates, static settings, a kernel; and no array (None)."""

    attention: eqx.Module
    norm: eqx.Module
    mlp: eqx.Module
    dropout: eqx.nn.Dropout
    spare: Callable | None = None

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.attention = nn.Attention(DIM, 2, dropout=0.2, key=a)
        self.norm = nn.LayerNorm(DIM)
        self.mlp = nn.MLP(DIM, 9, nn.gelu, key=b)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x, mask=None, *, key=None):
        a, b = (None, None) if key is None else jax.random.split(key)
        x = self.norm(x + self.attention(x, mask, key=a))
        return self.dropout(x + self.mlp(x), key=b, inference=True if key is None else None)


class Model(eqx.Module):
    """Two stacks, deep in containers, and something else beside them."""

    stacks: dict
    head: eqx.Module


block = filled(Block(KEY))
blocks = tuple(filled(block, seed) for seed in range(LAYERS))
TUPLE = nn.Stack(blocks)
STACKED = stack(TUPLE)
MASK = nn.Mask(causal=True)
X = random(SEQ, DIM)

run = eqx.filter_jit(lambda model, x, key=None: model(x, MASK, key=key))


def loss(model, x):
    y = model(x, MASK, key=KEY)
    return jnp.square(y).sum(), y


train = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))


def close(a, b, tolerance=2e-5):
    """Equal trees up to float32 noise, relative to the largest number of each array."""
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, float(np.abs(y).max())))


# ---- the round trip


def test_stacking_and_unstacking_is_the_identity_bit_for_bit():
    model = Model({"a": TUPLE, "b": nn.Stack(blocks[:1], remat=True)}, nn.Linear(2, 3, key=KEY))
    there = stack(model)
    assert [s.is_stacked for s in there.stacks.values()] == [True, True]
    assert there.stacks["b"].remat and not there.stacks["a"].remat
    assert eqx.tree_equal(unstack(there), model)
    assert eqx.tree_equal(stack(unstack(there)), there)
    assert there.head.weight is model.head.weight


def test_what_is_already_so_stays():
    assert stack(STACKED).blocks is STACKED.blocks
    assert unstack(TUPLE).blocks is TUPLE.blocks
    half = Model({"a": TUPLE, "b": STACKED}, nn.Linear(2, 3, key=KEY))
    assert stack(half).stacks["a"].is_stacked and not unstack(half).stacks["b"].is_stacked


def test_depth_and_kind_are_read_off_the_blocks():
    assert (TUPLE.is_stacked, TUPLE.num_layers) == (False, LAYERS)
    assert (STACKED.is_stacked, STACKED.num_layers) == (True, LAYERS)
    assert STACKED.blocks.mlp.up_proj.weight.shape == (LAYERS, 9, DIM)
    uneven = eqx.tree_at(lambda s: s.blocks.norm.bias, STACKED, jnp.ones((2, DIM)))
    with pytest.raises(ValueError, match="must share a leading layer axis"):
        _ = uneven.num_layers


def test_stacking_works_on_skeletons_and_under_filter_eval_shape():
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, tree)
    for convert, before, after in ((stack, TUPLE, STACKED), (unstack, STACKED, TUPLE)):
        assert eqx.tree_equal(eqx.filter_eval_shape(convert, before), shapes(after))
        assert eqx.tree_equal(convert(shapes(before)), shapes(after))


def test_numpy_arrays_are_stacked_as_arrays_are():
    on_host = lambda tree: jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, tree)
    assert eqx.tree_equal(stack(on_host(TUPLE)), STACKED)
    assert eqx.tree_equal(unstack(on_host(STACKED)), on_host(TUPLE))
    close(run(on_host(STACKED), X), run(STACKED, X))


# ---- the same numbers


@functools.cache
def trained(stacked, remat):
    """(output, gradients) of two blocks with dropout on; a gradient costs a second of compiling a block."""
    model = stack(nn.Stack(blocks[:2])) if stacked else nn.Stack(blocks[:2])
    (_, y), gradients = train(eqx.tree_at(lambda s: s.remat, model, remat), X)
    return y, gradients


def test_a_tuple_and_a_stack_compute_the_same():
    close(run(STACKED, X), run(TUPLE, X))
    (y, gradients), (y_stacked, gradients_stacked) = trained(False, False), trained(True, False)
    close(y_stacked, y)
    close(gradients_stacked, stack(gradients))


def test_a_stack_is_its_blocks_one_after_another_with_the_folded_keys():
    expected = X
    for i, block in enumerate(blocks):
        expected = run(block, expected, jax.random.fold_in(KEY, i))
    close(run(TUPLE, X, KEY), expected)
    assert not np.allclose(run(TUPLE, X), expected, atol=1e-2)


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_remat_recomputes_and_changes_no_number(stacked):
    model = STACKED if stacked else TUPLE
    jaxpr = lambda model: str(jax.make_jaxpr(lambda x: model(x, MASK))(X))
    assert "prevent_cse" not in jaxpr(model)
    assert "prevent_cse" in jaxpr(eqx.tree_at(lambda s: s.remat, model, True))
    close(trained(stacked, True), trained(stacked, False))


@pytest.mark.parametrize("model", [TUPLE, STACKED], ids=["tuple", "stacked"])
def test_a_stack_takes_leading_axes_and_vmap_alike(model):
    batch = jnp.stack([X, X + 1])
    each = jnp.stack([run(model, x) for x in batch])
    close(run(model, batch), each)
    close(jax.vmap(run, in_axes=(None, 0))(model, batch), each)


def test_a_stack_of_no_blocks_is_the_identity_and_cannot_be_stacked():
    empty = nn.Stack(())
    assert empty.num_layers == 0
    assert empty(X, MASK, key=KEY) is X
    with pytest.raises(ValueError, match="without blocks"):
        stack(empty)


# ---- refusals

EDITS = {
    "shape": (
        lambda b: b.mlp.up_proj.bias,
        jnp.ones(10),
        r"blocks\.1\.mlp\.up_proj\.bias is float32\[10\] but .* float32\[9\]",
    ),
    "dtype": (lambda b: b.norm.weight, jnp.ones(DIM, "bfloat16"), r"blocks\.1\.norm\.weight is bfloat16\[6\]"),
    "dropout rate": (lambda b: b.dropout.p, 0.5, r"blocks\.1\.dropout\.p is 0\.5 but blocks\.0\.dropout\.p is 0\.3"),
    "activation": (lambda b: b.mlp.activation, nn.relu, r"blocks\.1\.mlp\.activation is relu but .* is gelu"),
    "kernel": (lambda b: b.attention.attend, nn.kernels.plain, r"blocks\.1\.attention\.attend is plain"),
    "setting": (lambda b: b.norm, filled(nn.LayerNorm(DIM, eps=1.0)), r"blocks\.1\.norm\.eps is 1\.0 but .* is 1e-05"),
    "class": (
        lambda b: b.norm,
        filled(nn.RMSNorm(DIM)),
        r"blocks\.1\.norm is a RMSNorm but blocks\.0\.norm is a LayerNorm",
    ),
    "presence": (lambda b: b.mlp.down_proj.bias, None, r"blocks\.1\.mlp\.down_proj\.bias is None but"),
}


@pytest.mark.parametrize("name", EDITS)
def test_blocks_that_differ_are_refused_by_the_first_path(name):
    where, value, said = EDITS[name]
    edited = eqx.tree_at(where, blocks[1], value, is_leaf=lambda x: x is None)
    with pytest.raises(ValueError, match=said):
        stack(nn.Stack((blocks[0], edited, blocks[2])))


def test_the_last_block_is_compared_too_and_its_own_class():
    with pytest.raises(ValueError, match=r"blocks\.2 is a LayerNorm but blocks\.0 is a Block"):
        stack(nn.Stack((*blocks[:2], nn.LayerNorm(DIM))))


@pytest.mark.parametrize("convert", [stack, unstack])
def test_a_tree_without_a_stack_is_refused(convert):
    with pytest.raises(ValueError, match=r"There is no nn\.Stack in this Block"):
        convert(block)


@pytest.mark.parametrize(("model", "path"), [(TUPLE, "blocks.1.up_proj"), (STACKED, "blocks.up_proj")])
def test_an_error_inside_carries_the_blocks_path(unchecked, model, path):
    where = lambda s: s.blocks[1].mlp.up_proj.weight if model is TUPLE else s.blocks.mlp.up_proj.weight
    wrong = eqx.tree_at(where, model, jnp.ones((9, 7) if model is TUPLE else (LAYERS, 9, 7)))
    with pytest.raises(ValueError, match="in_features = 7") as raised:  # this file's own Block adds no step
        # Traced, as under jit; but a scan runs its body through a door of JAX, which adds a note of its own.
        wrong(X, MASK) if model is STACKED else jax.eval_shape(lambda x: wrong(x, MASK), X)
    assert raised.value.__notes__[0] == f"at {path}"
