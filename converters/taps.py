"""What every part of a model gives on the way, for those that compare: which inputs, which parts, and the run."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import MultipleChoice
from eqx_transformers.expression import capture
from eqx_transformers.skeletons import stacks

from .families import FAMILIES

SEED, ROWS, LENGTH = 0, 4, 24
Inputs = dict[str, np.ndarray]


def random_inputs(model: Any, seed: int = SEED) -> Inputs:
    """Random rows: a whole one, one padded right, one padded left, a short one; and what the family adds to them.

    For multiple choice, the same rows are the choices of two examples. All seeds have the same shapes and masks.
    """
    config, rng, room = model.config, np.random.default_rng(seed), getattr(model, "backbone", model).room
    family = FAMILIES[config.family]
    length = LENGTH if room is None else min(LENGTH, room)
    ids = rng.integers(0, config.vocab_size, (ROWS, length))
    mask = np.ones((ROWS, length), np.int64)
    mask[1, (2 * length + 2) // 3 :] = 0
    mask[2, : length // 3] = 0
    mask[3, max(1, length // 6) :] = 0
    if config.padding_id is None and family.reads == "last":
        mask.sort(axis=1)  # where nothing marks padding, the last token is the one that is read: it may only be left
    if config.padding_id is not None:
        ids[ids == config.padding_id] = (config.padding_id + 1) % config.vocab_size
        ids[mask == 0] = config.padding_id
    given = {"ids": ids, "attention_mask": mask, **family.inputs(model, ids, mask, rng)}
    return {name: x.reshape(2, -1, length) if type(model) is MultipleChoice else x for name, x in given.items()}


def flat(x: np.ndarray) -> np.ndarray:
    """`rows seq` of an input; the choices of a multiple choice are rows."""
    return x.reshape(-1, x.shape[-1])


def of_tokens(x: np.ndarray, mask: np.ndarray) -> bool:
    """Whether an output has something of every token of every row."""
    return x.ndim > 2 and x.shape[:2] == mask.shape


def seen(model: Any, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Which tokens of an output of a causal model, or which rows, are of a query that sees something (1, else 0)."""
    if of_tokens(x, mask):
        return mask
    return mask[:, 0] if FAMILIES[model.config.family].reads == "first" else np.ones_like(mask[:, 0])


def cotangent(model: Any, inputs: Inputs) -> np.ndarray:
    """Random numbers for all of a row's outputs; none for what a causal model gives where it sees nothing."""
    shapes = [x.shape for x in jax.eval_shape(lambda: _outputs(model, inputs))]
    rng, mask = np.random.default_rng(SEED), inputs["attention_mask"]
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    if model.config.causal:
        counted = [seen(model, x, mask) for x in weights]
        weights = [x * y.reshape(*y.shape, *[1] * (x.ndim - y.ndim)) for x, y in zip(weights, counted, strict=True)]
    return np.concatenate([x.reshape(len(x), -1) for x in weights], axis=1)


def probes(model: Any) -> dict[str, str]:
    """Our path -> the reference's module name, for every probe that the model has, in order of execution."""
    listed = FAMILIES[model.config.family].probes(type(model))
    stack_of = lambda probe: probe[0].partition(".blocks.{i}")[0] if "{i}" in probe[0] else None
    depths = {path: stack.num_layers for path, stack in stacks(model).items()}
    found: dict[str, str] = {}
    for stack, group in itertools.groupby(listed, stack_of):
        probed = list(group)
        for i in range(1 if stack is None else depths[stack]):
            found |= {ours.format(i=i): theirs.format(i=i) for ours, theirs in probed}
    return {ours: theirs for ours, theirs in found.items() if at(model, ours) is not None}


def at(tree: Any, path: str) -> Any:
    """The node at a path as it is printed."""
    for step in path.split("."):
        tree = tree[int(step)] if step.isdigit() else getattr(tree, step)
    return tree


def outputs(model: Any, paths: Sequence[str]) -> Callable[[Inputs], dict[str, np.ndarray]]:
    """A function of inputs: the output of the module at each path, and the model's own at "", for every row.

    It is compiled once for all inputs of one shape. A model of several outputs gives them side by side. The choices of
    a multiple choice are rows of their own, as they are in the reference.
    """
    chosen, choices = frozenset(paths), isinstance(model, MultipleChoice)

    def called(model: Any, ids: Any, kwargs: dict[str, Any]) -> Any:
        output = model.score(ids, kwargs, None) if choices else model(ids, **kwargs)
        if "pooler" in chosen:  # a bare encoder holds its pooler for others, and does not call it
            model.pooler(output)
        return output

    wanted = lambda node: node.path in chosen and node.method == "__call__"

    @eqx.filter_jit
    def run(model: Any, given: Any) -> dict[str, Any]:
        kwargs = {name: x for name, x in given.items() if name != "ids"}
        seen = capture(called, wanted) if chosen else lambda *args: (called(*args), {})
        return jax.vmap(lambda ids, kwargs: _outputs_of(*seen(model, ids, kwargs)))(given["ids"], kwargs)

    def of(inputs: Inputs) -> dict[str, np.ndarray]:
        given = {name: flat(x) if choices else x for name, x in inputs.items()}
        return {path: np.asarray(x) for path, x in run(model, given).items()}

    return of


def _outputs_of(output: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Of what is called twice (`path`, `path@1`), as one table for both halves of a T5, the last one counts."""
    parts = {path.partition("@")[0]: x for path, x in parts.items()}
    leaves = jax.tree.leaves(output)
    return {**parts, "": leaves[0] if len(leaves) == 1 else jnp.concatenate([x.ravel() for x in leaves])}


def gradient(model: Any, inputs: Inputs, weights: np.ndarray) -> Any:
    """The gradient of the output's sum with these weights (a line of numbers a row)."""

    @eqx.filter_jit
    @eqx.filter_grad
    def of(model: Any) -> Any:
        found = jnp.concatenate([x.reshape(len(x), -1) for x in _outputs(model, inputs)], axis=1)
        return (found * weights).sum()

    return of(model)


def _outputs(model: Any, inputs: Inputs) -> list[Any]:
    """All outputs of the model on every row."""
    given = {name: jnp.asarray(x) for name, x in inputs.items()}
    return jax.tree.leaves(jax.vmap(lambda ids, kwargs: model(ids, **kwargs))(given.pop("ids"), given))
