"""What every part of a model gives on the way, for those that compare."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import MultipleChoice


def at(tree: Any, path: str) -> Any:
    """The node at a path as it is printed."""
    for step in path.split("."):
        tree = tree[int(step)] if step.isdigit() else getattr(tree, step)
    return tree


class _Tap(eqx.Module):
    """Calls the module in its place and leaves the result in `sink`, which lives for one trace."""

    module: eqx.Module
    leave: Callable[[Any], None] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)
        self.leave(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "module"), name)


def outputs(model: Any, paths: Sequence[str], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The output of the module at each path, and the model's own at "", for every row of `inputs`.

    A model of several outputs gives them side by side. The choices of a multiple choice are rows of their own: what
    its inner `vmap` computes could not be seen from outside.
    """
    inner = sorted(paths, key=lambda path: -path.count("."))  # inner ones first: a tap hides what it holds
    choices = isinstance(model, MultipleChoice)
    given = {name: x.reshape(-1, x.shape[-1]) if choices else x for name, x in inputs.items()}

    @eqx.filter_jit
    def run(model: Any, given: Any) -> dict[str, Any]:
        kwargs = {name: x for name, x in given.items() if name != "ids"}
        return jax.vmap(lambda ids, kwargs: _tapped(model, inner, ids, kwargs))(given["ids"], kwargs)

    return {path: np.asarray(x) for path, x in run(model, given).items()}


def _tapped(model: Any, paths: Sequence[str], ids: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    sink: dict[str, Any] = {}
    for path in paths:
        tap = _Tap(at(model, path), lambda y, path=path: sink.__setitem__(path, y))
        model = eqx.tree_at(lambda m, path=path: at(m, path), model, tap)
    output = model.score(ids, kwargs, None) if isinstance(model, MultipleChoice) else model(ids, **kwargs)
    if "pooler" in paths:  # a bare encoder holds its pooler for others, and does not call it
        model.pooler(output)
    leaves = jax.tree.leaves(output)
    return {**sink, "": leaves[0] if len(leaves) == 1 else jnp.concatenate([x.ravel() for x in leaves])}
