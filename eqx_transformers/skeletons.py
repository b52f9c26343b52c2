"""The tree that a config builds, without its arrays; and where a model differs from it."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .nn import Stack, _trees, stack
from .nn._shapes import SHAPES_ONLY
from .nn._trees import describe, is_array_like
from .surgery.paths import spell

# How a model runs, not what it computes: such a leaf may differ from the config's skeleton.
HOW_TO_RUN = ("attend", "remat", "inference")


@functools.lru_cache(maxsize=16)
def skeleton(model_class: Callable[..., Any], config: Any, stacked: bool | tuple[str, ...] = False) -> Any:
    """What `model_class(config)` is, with shapes for arrays. `stacked`: all its stacks, or those at paths."""

    def make() -> Any:
        model = model_class(config, key=jax.random.key(0))
        for path in stacks(model):
            if stacked is True or (stacked and path in stacked):
                model = eqx.tree_at(lambda m, path=path: stacks(m)[path], model, stack(stacks(model)[path]))
        return model

    token = SHAPES_ONLY.set(True)
    try:
        return eqx.filter_eval_shape(make)
    finally:
        SHAPES_ONLY.reset(token)


def stacks(model: Any) -> dict[str, Stack]:
    """Every `Stack` of a model by its path."""
    is_stack = lambda node: isinstance(node, Stack)
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_stack)
    return {spell(path): node for path, node in nodes if is_stack(node)}


def stacked_paths(model: Any) -> tuple[str, ...]:
    """The paths of the stacks whose blocks are stacked."""
    return tuple(path for path, node in stacks(model).items() if node.is_stacked)


def differences(model: Any, config: Any = None) -> list[str]:
    """Every place in which `model` is not what its config builds: another class, shape, setting or function.

    `config`: another one than its own, which is then no difference itself.

    dtypes, and the leaves that only say how to run (`HOW_TO_RUN`), are no difference.
    """
    built = skeleton(type(model), model.config if config is None else config, stacked_paths(model))
    ignore = HOW_TO_RUN if config is None else (*HOW_TO_RUN, "config")
    found = _trees.differences(model, built, dtypes=False, ignore=ignore)
    return [f"{path or 'the model'} {_said(ours, theirs)}" for path, ours, theirs in found]


def _said(ours: Any, built: Any) -> str:
    if is_array_like(ours) and is_array_like(built):
        return f"has shape {tuple(ours.shape)} where the config builds {tuple(built.shape)}"
    if isinstance(ours, tuple | list) and isinstance(built, tuple | list):
        return f"holds {len(ours)} where the config builds {len(built)}"
    return f"is {describe(ours)} where the config builds {describe(built)}"
