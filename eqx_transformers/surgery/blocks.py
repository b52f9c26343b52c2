"""Blocks of a `Stack` inserted, removed, repeated and put into another order, in a tuple or stacked.

A block is named by its path as printed, with its index, `backbone.stack.blocks.3`: also where the blocks are stacked,
and their paths elsewhere have none. Everything else of the model is the same, array for array.

The model then has another number of layers than its config says. `save(…, edited=True)` writes it as it is; a model
whose blocks are those of another config becomes one of it, to be saved and exported as any other, by
`reconfigure(model, num_layers=…)` (of a T5, also `num_decoder_layers`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from ..nn import Stack
from ..nn._trees import describe, differences
from ._layers import BLOCKS, leads_to_layers
from .paths import at, is_array_like, keypath_of, listed, nodes, spell

Model = TypeVar("Model")
Change = Callable[[list[int]], list[int]]


def insert_before(model: Model, path: str, block: eqx.Module) -> Model:
    """The model with `block` before the block at `path`.

    Among stacked blocks it must be like them: a `ValueError` names the first path at which it is of another class,
    shape, dtype or setting. In a tuple, any module may stand that is called as the blocks are. Raises a `ValueError`
    too where the path names no block of a `Stack`, and a `TypeError` where `block` is no module.
    """
    return _inserted(model, path, block, 0)


def insert_after(model: Model, path: str, block: eqx.Module) -> Model:
    """The model with `block` after the block at `path`; see `insert_before`."""
    return _inserted(model, path, block, 1)


def remove(model: Model, path: str) -> Model:
    """The model without the block at `path`. Raises a `ValueError` for the only one there is, and for no block."""
    place, i = _block(model, path)
    if at(model, place).num_layers == 1:
        raise ValueError(f"remove: {path} is the only block of this Stack, and a Stack without any computes nothing.")
    return _changed(model, place, lambda order: order[:i] + order[i + 1 :])


def duplicate(model: Model, path: str) -> Model:
    """The model with the block at `path` twice, one after the other. Raises a `ValueError` for no block.

    In a tuple both hold the same arrays (`shared_leaves` names them) until training gives each its own.
    """
    place, i = _block(model, path)
    return _changed(model, place, lambda order: order[: i + 1] + order[i:])


def reorder(model: Model, stack_path: str, order: Sequence[int]) -> Model:
    """The model whose `Stack` at `stack_path` has the block `order[i]` at place `i`.

    Raises a `ValueError` where there is no `Stack`, and unless `order` names every block once (`take` may leave out).
    """
    place = _stack(model, stack_path)
    chosen, depth = list(order), at(model, place).num_layers
    if sorted(chosen) != list(range(depth)):
        raise ValueError(
            f"reorder: order must name each of the blocks 0 to {depth - 1} of {stack_path or 'this Stack'} once, but it"
            f" is {chosen}. take(model, {stack_path!r}, {chosen}) leaves out and repeats blocks."
        )
    return _changed(model, place, lambda _: chosen)


def take(model: Model, stack_path: str, indices: Sequence[int]) -> Model:
    """The model whose `Stack` at `stack_path` has the blocks of these indices, in this order.

    Blocks may be left out and repeated. Every second layer, as a DistilBERT starts (arXiv:1910.01108):
    `range(0, 12, 2)`. A deeper model of the layers that there are (arXiv:2312.15166): `[*range(24), *range(8, 32)]`.
    Raises a `ValueError` where there is no `Stack`, for an index beyond it, and for no index.
    """
    place = _stack(model, stack_path)
    chosen, depth = list(indices), at(model, place).num_layers
    if not chosen or not set(chosen) <= set(range(depth)):
        raise ValueError(f"take: indices must be some of the blocks 0 to {depth - 1}; they are {chosen}.")
    return _changed(model, place, lambda _: chosen)


def _inserted(model: Any, path: str, block: Any, shift: int) -> Any:
    if not isinstance(block, eqx.Module):
        raise TypeError(f"A block is a module, but a {type(block).__name__} was given to be inserted at {path}.")
    place, i = _block(model, path)
    stack = at(model, place)
    if stack.is_stacked:
        _expect_like(stack.blocks, block, spell((*place, BLOCKS)))
    return _changed(model, place, lambda order: [*order[: i + shift], stack.num_layers, *order[i + shift :]], block)


def _changed(model: Any, place: KeyPath, change: Change, *more: Any) -> Any:
    """The model whose stack has the blocks in the changed order; `more` blocks have the indices that follow."""
    stack = at(model, place)
    order = change(list(range(stack.num_layers)))
    blocks = _arranged(stack.blocks, more, order) if stack.is_stacked else _picked((*stack.blocks, *more), order)
    return eqx.tree_at(lambda tree: at(tree, place).blocks, model, blocks)


def _picked(blocks: tuple[Any, ...], order: list[int]) -> tuple[Any, ...]:
    return tuple(blocks[i] for i in order)


def _arranged(blocks: Any, more: tuple[Any, ...], order: list[int]) -> Any:
    def arrange(*trees: Any) -> Any:
        arrays, rest = zip(*(eqx.partition(tree, is_array_like) for tree in trees), strict=True)
        join = lambda x, *others: jnp.concatenate([x, *(jnp.asarray(other)[None] for other in others)])
        return eqx.combine(jax.tree.map(lambda *x: join(*x)[np.array(order)], *arrays), rest[0])

    shapes_only = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((blocks, more)))
    return eqx.filter_eval_shape(arrange, blocks, *more) if shapes_only else arrange(blocks, *more)


def _block(model: Any, path: str) -> tuple[KeyPath, int]:
    """Where the stack is, and which of its blocks is meant."""
    for place, stack in _stacks(model):
        start = f"{spell((*place, BLOCKS))}."
        index = path.removeprefix(start)
        if path.startswith(start) and index.isdecimal():
            if int(index) >= stack.num_layers:
                _fail(model, path, f"this Stack has {stack.num_layers} blocks")
            return _outside(model, place), int(index)
    _fail(model, path, "it names no block of a Stack")


def _stack(model: Any, path: str) -> KeyPath:
    place = keypath_of(model, path)
    if not isinstance(at(model, place), Stack):
        stacks = [spell(place) for place, _ in _stacks(model)]
        kind = type(at(model, place)).__name__
        raise ValueError(f"At {path!r} is a {kind}, which is no nn.Stack.{listed('of these', stacks)}")
    return _outside(model, place)


def _outside(model: Any, place: KeyPath) -> KeyPath:
    """The path of a stack, which must not lie in stacked blocks: there it is a stack of every layer."""
    if any(leads_to_layers(at(model, place[:i]), key) for i, key in enumerate(place)):
        raise ValueError(f"The Stack at {spell(place)} is in stacked blocks, one of each layer: unstack(model) first.")
    return place


def _stacks(model: Any) -> list[tuple[KeyPath, Stack]]:
    return [(path, node) for path, node in nodes(model) if isinstance(node, Stack)]


def _fail(model: Any, path: str, why: str) -> NoReturn:
    said = [f"{spell((*place, BLOCKS))}.0 to {stack.num_layers - 1}" for place, stack in _stacks(model)]
    there = f"The blocks of this {type(model).__name__} are {', '.join(said)}" if said else "There is no Stack in it"
    raise ValueError(f"{path!r} is not a block: {why}. {there}.")


def _expect_like(blocks: Any, block: Any, where: str) -> None:
    layer = eqx.filter_eval_shape(lambda tree: jax.tree.map(lambda x: x[0] if is_array_like(x) else x, tree), blocks)
    for path, theirs, ours in differences(layer, block):
        at_path = f"its {path} is" if path else "it is"
        raise ValueError(
            f"The block is not like those at {where}: {at_path} {describe(ours)}, and theirs {describe(theirs)}."
            " Stacked blocks must be alike: change it, or unstack(model) first."
        )
