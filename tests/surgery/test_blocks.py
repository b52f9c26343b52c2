"""Blocks inserted, removed, repeated and put into another order: in tuples and stacked, which is the same."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import Encoder, load, nn, save, stack, unstack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.surgery.blocks import duplicate, insert_after, insert_before, remove, reorder, take
from eqx_transformers.surgery.ties import shared_leaves

from ..models.ours import call, filled, tokens
from .test_select import equal, model_of

pytestmark = pytest.mark.usefixtures("strict_promotion")
STACKS = [("roberta", "stack"), ("llama", "backbone.stack"), ("t5", "encoder.stack"), ("t5", "decoder.stack")]
every_stack = pytest.mark.parametrize(("name", "place"), STACKS)
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])


def stack_at(model, place):
    for step in place.split("."):
        model = getattr(model, step)
    return model


def blocks_of(model, place):
    return stack_at(unstack(model) if stack_at(model, place).is_stacked else model, place).blocks


def new_block(model, place):
    return filled(blocks_of(model, place)[0], seed=5)


# name: (the change, which of the old blocks stand where; "new" is one that was none)
CHANGES = {
    "before the first": (lambda m, p: insert_before(m, f"{p}.blocks.0", new_block(m, p)), ["new", 0, 1]),
    "before the last": (lambda m, p: insert_before(m, f"{p}.blocks.1", new_block(m, p)), [0, "new", 1]),
    "after the first": (lambda m, p: insert_after(m, f"{p}.blocks.0", new_block(m, p)), [0, "new", 1]),
    "after the last": (lambda m, p: insert_after(m, f"{p}.blocks.1", new_block(m, p)), [0, 1, "new"]),
    "without the first": (lambda m, p: remove(m, f"{p}.blocks.0"), [1]),
    "without the last": (lambda m, p: remove(m, f"{p}.blocks.1"), [0]),
    "the first twice": (lambda m, p: duplicate(m, f"{p}.blocks.0"), [0, 0, 1]),
    "the last twice": (lambda m, p: duplicate(m, f"{p}.blocks.1"), [0, 1, 1]),
    "turned": (lambda m, p: reorder(m, p, [1, 0]), [1, 0]),
    "as it was": (lambda m, p: reorder(m, p, range(2)), [0, 1]),
    "taken": (lambda m, p: take(m, p, [1, 0, 1, 1]), [1, 0, 1, 1]),
}


def halved(model, place):
    """With two blocks where there are more, so that one table serves all."""
    return take(model, place, [0, 1])


@pytest.mark.parametrize(("name", "place"), [STACKS[0], STACKS[3]])
@pytest.mark.parametrize("change", CHANGES)
def test_blocks_stand_where_they_should_in_both_layouts(name, place, change):
    make, expected = CHANGES[change]
    flat, deep = halved(model_of(name), place), halved(model_of(name, stacked=True), place)
    olds = {0: blocks_of(flat, place)[0], 1: blocks_of(flat, place)[1], "new": new_block(flat, place)}
    changed = make(flat, place)
    assert len(blocks_of(changed, place)) == len(expected) == stack_at(changed, place).num_layers
    for block, i in zip(blocks_of(changed, place), expected, strict=True):
        assert equal(block, olds[i]), i
    assert equal(stack(changed), make(deep, place)) and stack_at(make(deep, place), place).is_stacked


@every_stack
@layouts
def test_nothing_else_changes_and_changes_undo_each_other(name, place, stacked):
    model = model_of(name, stacked)
    first, last = f"{place}.blocks.0", f"{place}.blocks.{stack_at(model, place).num_layers - 1}"
    changed = duplicate(model, first)
    old, new = leaves_by_path(model), leaves_by_path(changed)
    outside = [path for path in old if not path.startswith(f"{place}.blocks")]
    assert all(new[path] is old[path] for path in outside) and len(outside) > 3
    assert equal(remove(changed, first), model)
    block = blocks_of(model, place)[-1]
    assert equal(insert_after(remove(model, last), last.replace(last[-1], str(int(last[-1]) - 1)), block), model)
    depth = stack_at(model, place).num_layers
    turned = reorder(model, place, range(depth)[::-1])
    assert equal(reorder(turned, place, range(depth)[::-1]), model) and not equal(turned, model)


class Affine(eqx.Module):
    """x -> gain x + shift, a block whose order matters."""

    gain: jax.Array
    shift: jax.Array
    rate: float = 0.5

    def __call__(self, x, *, key=None):
        return self.gain.astype(x.dtype) * x + self.shift.astype(x.dtype)


def affine(gain, shift, rate=0.5):
    return Affine(jnp.float32(gain), jnp.float32(shift), rate)


def stack_of(stacked, *blocks):
    made = nn.Stack(blocks, remat=True)
    return stack(made) if stacked else made


@layouts
def test_a_stack_by_itself_computes_what_its_blocks_say(stacked):
    model = stack_of(stacked, affine(2, 1), affine(3, 0), affine(1, 5))
    at_one = lambda model: float(model(jnp.ones(1))[0])
    assert at_one(model) == 14
    assert at_one(remove(model, "blocks.0")) == 8
    assert at_one(duplicate(model, "blocks.1")) == 32
    assert at_one(insert_after(model, "blocks.2", affine(10, 0))) == 140
    assert at_one(insert_before(model, "blocks.2", affine(10, 0))) == 95
    assert at_one(reorder(model, "", [2, 0, 1])) == 39
    assert at_one(take(model, "", [2, 2])) == 11
    assert remove(model, "blocks.0").remat is True
    assert at_one(eqx.filter_jit(lambda model: take(model, "", [2, 2]))(model)) == 11


def test_a_tuple_may_hold_blocks_of_other_kinds_and_shares_the_arrays_of_a_duplicate():
    model = stack_of(False, affine(2, 1))
    mixed = insert_after(model, "blocks.0", nn.Stack((affine(3, 3),)))
    assert float(mixed(jnp.ones(1))[0]) == 12
    twice = duplicate(model, "blocks.0")
    assert shared_leaves(twice) == (("blocks.0.gain", "blocks.1.gain"), ("blocks.0.shift", "blocks.1.shift"))
    assert shared_leaves(duplicate(stack(model), "blocks.0")) == ()


def test_the_output_of_a_model_is_that_of_the_blocks_that_are_left():
    model, ids = model_of("roberta"), tokens()
    run = eqx.filter_jit(lambda model, blocks: nn.Stack(blocks)(model.embedding(jnp.asarray(ids)), nn.Mask()))
    blocks = model.stack.blocks
    assert np.allclose(call(remove(model, "stack.blocks.0"), ids), run(model, blocks[1:]), atol=1e-5)
    deep = call(stack(duplicate(model, "stack.blocks.1")), ids)
    assert np.allclose(deep, run(model, (*blocks, blocks[1])), atol=1e-5)
    assert np.abs(np.asarray(deep - call(model, ids))).max() > 0.1


@layouts
def test_skeletons_and_arrays_of_numpy(stacked):
    model = model_of("roberta", stacked)
    built = skeleton(Encoder, model.config, stacked)
    assert equal(duplicate(built, "stack.blocks.1"), eqx.filter_eval_shape(duplicate, model, "stack.blocks.1"))
    assert equal(take(built, "stack", [1]), eqx.filter_eval_shape(lambda m: take(m, "stack", [1]), model))
    on_host = jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, model)
    assert equal(stack(take(unstack(on_host), "stack", [1, 0])), stack(take(unstack(model), "stack", [1, 0])))
    assert equal(take(on_host, "stack", [1, 0]).stack.blocks, take(model, "stack", [1, 0]).stack.blocks)


@layouts
def test_an_edited_model_is_saved_and_loaded_with_the_same_edit(tmp_path, stacked):
    model = duplicate(model_of("roberta", stacked), "stack.blocks.0")
    with pytest.raises(ValueError, match=r"stack\.blocks.* (holds 3 where|has shape \(3, 21, 21\) where)"):
        save(model, tmp_path / "plain")
    save(model, tmp_path / "edited", edited=True)
    loaded, _ = load(tmp_path / "edited", skeleton=lambda m: duplicate(m, "stack.blocks.0"))
    assert equal(loaded, model)


# ---- errors


NO_BLOCK = {
    "stack.blocks.2": "'stack.blocks.2' is not a block: this Stack has 2 blocks. The blocks of this Encoder are"
    " stack.blocks.0 to 1.",
    "stack.blocks.1.attention": "it names no block of a Stack. The blocks of this Encoder are stack.blocks.0 to 1.",
    "stack.blocks": "it names no block",
    "stack": "it names no block",
    "stack.blocks.-1": "it names no block",
    "": "'' is not a block: it names no block",
    "backbone.stack.blocks.0": "it names no block",
}


@layouts
@pytest.mark.parametrize("path", NO_BLOCK)
def test_what_is_no_block_is_an_error_that_names_the_blocks(path, stacked):
    model = model_of("roberta", stacked)
    block = model_of("roberta").stack.blocks[0]
    calls = (
        lambda: remove(model, path),
        lambda: duplicate(model, path),
        lambda: insert_before(model, path, block),
        lambda: insert_after(model, path, block),
    )
    for run in calls:
        with pytest.raises(ValueError, match=re.escape(NO_BLOCK[path])):
            run()


@layouts
def test_the_last_block_stays_and_orders_must_be_whole(stacked):
    one = remove(model_of("roberta", stacked), "stack.blocks.1")
    with pytest.raises(ValueError, match=r"stack\.blocks\.0 is the only block of this Stack"):
        remove(one, "stack.blocks.0")
    model = model_of("roberta", stacked)
    for order in ([0], [0, 0], [0, 1, 2], [1, 2], []):
        said = f"order must name each of the blocks 0 to 1 of stack once, but it is {order}"
        with pytest.raises(ValueError, match=re.escape(said)):
            reorder(model, "stack", order)
    for indices in ([], [2], [0, -1]):
        with pytest.raises(ValueError, match=re.escape(f"some of the blocks 0 to 1; they are {indices}")):
            take(model, "stack", indices)
    for path, kind in (("embedding", "EncoderEmbedding"), ("", "Encoder")):
        with pytest.raises(ValueError, match=rf"is a {kind}, which is no nn\.Stack\. The nearest of these: stack"):
            reorder(model, path, [1, 0])
    with pytest.raises(ValueError, match=r"There is no node at 'stak'.*nearest paths: stack"):
        reorder(model, "stak", [1, 0])


def test_a_model_without_blocks_says_so():
    with pytest.raises(ValueError, match=r"it names no block of a Stack\. There is no Stack in it\."):
        remove(affine(1, 2), "blocks.0")


OTHERS = {
    "shape": (
        lambda b: eqx.tree_at(lambda b: b.shift, b, jnp.zeros(2)),
        r"its shift is float32\[2\], and theirs float32\[\]",
    ),
    "dtype": (
        lambda b: eqx.tree_at(lambda b: b.gain, b, jnp.bfloat16(1)),
        r"its gain is bfloat16\[\], and theirs float32",
    ),
    "setting": (lambda b: affine(1, 1, rate=0.25), r"its rate is 0\.25, and theirs 0\.5"),
    "class": (lambda b: nn.Stack((b,)), r"it is a Stack, and theirs a Affine"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_block_that_is_not_alike_cannot_be_stacked(case):
    change, said = OTHERS[case]
    model, block = stack_of(True, affine(2, 1), affine(3, 0)), change(affine(4, 4))
    with pytest.raises(ValueError, match=rf"The block is not like those at blocks: {said}.*unstack\(model\) first"):
        insert_after(model, "blocks.0", block)
    assert insert_after(unstack(model), "blocks.0", block).num_layers == 3


def test_what_is_no_module_is_no_block(unchecked):
    with pytest.raises(TypeError, match=r"A block is a module, but a function was given"):
        insert_before(stack_of(False, affine(1, 1)), "blocks.0", lambda x: x)  # pyright: ignore[reportArgumentType]


def test_stacks_in_stacked_blocks_are_one_of_every_layer():
    inner = nn.Stack((affine(1, 2), affine(3, 4)))
    deep = eqx.tree_at(lambda s: s.blocks, nn.Stack((inner, inner)), nn.Stack((inner, inner)).blocks)
    outer = eqx.tree_at(
        lambda s: s.blocks, deep, jax.tree.map(lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *deep.blocks)
    )
    assert outer.is_stacked
    with pytest.raises(ValueError, match=r"The Stack at blocks is in stacked blocks.*unstack\(model\) first"):
        remove(outer, "blocks.blocks.0")
    assert remove(deep, "blocks.0.blocks.1").blocks[0].num_layers == 1
