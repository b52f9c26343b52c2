"""A deep model's blocks: a tuple of them, or one block whose arrays have a leading layer axis."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._errors import within
from ._trees import describe, differences

Tree = TypeVar("Tree")


class Stack(eqx.Module):
    """Blocks applied one after another: `x = block(x, *args, key=…)`.

    `blocks` is a tuple (each block is a plain subtree: easy surgery) or one stacked block (a `lax.scan`: compile time
    does not grow with depth). `stack` and `unstack` convert; both compute the same, dropout included, for block `i`
    always gets the key `fold_in(key, i)`. `remat` recomputes each block in the backward pass instead of storing what
    is inside it; it changes no number, and `tree_at` switches it.
    """

    blocks: tuple[eqx.Module, ...] | eqx.Module
    remat: bool

    def __init__(self, blocks: tuple[eqx.Module, ...] | eqx.Module, *, remat: bool = False):
        self.blocks = blocks
        self.remat = remat

    @property
    def is_stacked(self) -> bool:
        return not isinstance(self.blocks, tuple)

    @property
    def num_layers(self) -> int:
        return len(self.blocks) if isinstance(self.blocks, tuple) else _depth(self.blocks)

    def __call__(
        self, x: Float[Array, "*axes embed_dim"], *args: object, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes embed_dim"]:
        run = self._scan if self.is_stacked else self._loop
        return run(x, args, key)

    def _loop(self, x: Float[Array, "*axes embed_dim"], args: tuple, key: PRNGKeyArray | None) -> Array:
        for i, block in enumerate(self.blocks):  # pyright: ignore[reportArgumentType]
            step = eqx.filter_checkpoint(_apply) if self.remat else _apply
            with within(f"blocks.{i}"):
                x = step(block, x, args, _fold(key, i))
        return x

    def _scan(self, x: Float[Array, "*axes embed_dim"], args: tuple, key: PRNGKeyArray | None) -> Array:
        arrays, rest = eqx.partition(self.blocks, _is_array)

        def step(x, layer):
            i, arrays = layer
            return _apply(eqx.combine(arrays, rest), x, args, _fold(key, i)), None

        # Inside a scan XLA cannot merge the recomputation with the first pass, so the guard against it only costs.
        step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
        with within("blocks"):
            return jax.lax.scan(step, x, (jnp.arange(self.num_layers), arrays))[0]


def _apply(block: Callable, x: Array, args: tuple, key: PRNGKeyArray | None) -> Array:
    return block(x, *args, key=key)


def _fold(key: PRNGKeyArray | None, i: Array | int) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, i)


def stack(tree: Tree) -> Tree:
    """The same model with the blocks of every `Stack` in it stacked into one (those that are, stay).

    Raises a `ValueError` that names the first path at which two blocks differ in class, setting or shape.
    """
    return _convert(tree, lambda s: s if s.is_stacked else eqx.tree_at(lambda s: s.blocks, s, _stacked(s.blocks)))


def unstack(tree: Tree) -> Tree:
    """The same model with the blocks of every `Stack` in it as a tuple (those that are, stay).

    Do this once, outside `jit`: inside, it costs a copy of the model at every call.
    """
    return _convert(tree, lambda s: eqx.tree_at(lambda s: s.blocks, s, _unstacked(s.blocks)) if s.is_stacked else s)


def _convert(tree: Tree, change: Callable[[Stack], Stack]) -> Tree:
    is_stack = lambda node: isinstance(node, Stack)
    if not any(map(is_stack, jax.tree.leaves(tree, is_leaf=is_stack))):
        raise ValueError(f"There is no nn.Stack in this {type(tree).__name__}: nothing to stack or unstack.")
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):  # a skeleton stays one
        return eqx.filter_eval_shape(partial(_convert, change=change), tree)
    return jax.tree.map(lambda node: change(node) if is_stack(node) else node, tree, is_leaf=is_stack)


def _stacked(blocks: Any) -> eqx.Module:
    if not blocks:
        raise ValueError("A Stack without blocks cannot be stacked.")
    for i, block in enumerate(blocks[1:], start=1):
        _expect_alike(blocks[0], block, i)
    arrays, rest = zip(*(eqx.partition(block, _is_array) for block in blocks), strict=True)
    # Dropout rates and activations are leaves too, and jnp.stack would fail on them: stack the arrays, keep the rest.
    return eqx.combine(jax.tree.map(lambda *x: jnp.stack(x), *arrays), rest[0])


def _unstacked(block: Any) -> tuple[eqx.Module, ...]:
    arrays, rest = eqx.partition(block, _is_array)
    layer = lambda i: eqx.combine(jax.tree.map(lambda x: x[i], arrays), rest)
    return tuple(layer(i) for i in range(_depth(block)))


def _depth(block: eqx.Module) -> int:
    shapes = {x.shape for x in jax.tree.leaves(block) if _is_array(x) or isinstance(x, jax.ShapeDtypeStruct)}
    if len({shape[:1] for shape in shapes} - {()}) != 1 or () in shapes:
        raise ValueError(f"The arrays of stacked blocks must share a leading layer axis; theirs are {sorted(shapes)}.")
    return shapes.pop()[0]


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _expect_alike(first: eqx.Module, other: eqx.Module, i: int) -> None:
    for path, a, b in differences(first, other):
        at = f".{path}" if path else ""
        raise ValueError(f"blocks.{i}{at} is {describe(b)} but blocks.0{at} is {describe(a)}; they must be alike.")
