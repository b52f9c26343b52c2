"""The tree that a config builds, without its arrays; and where a model differs from it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

from .nn import Stack, stack
from .surgery.paths import is_array_like, spell

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

    return eqx.filter_eval_shape(make)


def stacks(model: Any) -> dict[str, Stack]:
    """Every `Stack` of a model by its path."""
    is_stack = lambda node: isinstance(node, Stack)
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_stack)
    return {spell(path): node for path, node in nodes if is_stack(node)}


def stacked_paths(model: Any) -> tuple[str, ...]:
    """The paths of the stacks whose blocks are stacked."""
    return tuple(path for path, node in stacks(model).items() if node.is_stacked)


def differences(model: Any) -> list[str]:
    """Every place in which `model` is not what its config builds: another class, shape, setting or function.

    dtypes, and the leaves that only say how to run (`HOW_TO_RUN`), are no difference.
    """
    return list(_compare(model, skeleton(type(model), model.config, stacked_paths(model)), ""))


def _compare(ours: Any, built: Any, path: str) -> Iterator[str]:
    at = path or "the model"
    if is_array_like(ours) and is_array_like(built):
        if ours.shape != built.shape:
            yield f"{at} has shape {tuple(ours.shape)} where the config builds {tuple(built.shape)}"
    elif type(ours) is not type(built):
        yield f"{at} is {_name(ours)} where the config builds {_name(built)}"
    elif isinstance(ours, eqx.Module):
        for field in dataclasses.fields(ours):
            if field.name not in HOW_TO_RUN:
                step = f"{path}.{field.name}" if path else field.name
                yield from _compare(getattr(ours, field.name, None), getattr(built, field.name, None), step)
    elif isinstance(ours, tuple | list) and len(ours) == len(built):
        for i, (a, b) in enumerate(zip(ours, built, strict=True)):
            yield from _compare(a, b, f"{path}.{i}")
    elif isinstance(ours, tuple | list):
        yield f"{at} holds {len(ours)} where the config builds {len(built)}"
    elif ours is not built and ours != built:
        yield f"{at} is {_name(ours)} where the config builds {_name(built)}"


def _name(x: Any) -> str:
    if isinstance(x, eqx.Module):
        return f"a {type(x).__name__}"
    if is_array_like(x):
        return f"an array {tuple(x.shape)}"
    return getattr(x, "__name__", None) or repr(x)
