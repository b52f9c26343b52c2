"""A model's arrays as the reference library names them: what an export writes and a verification compares."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers.surgery.paths import is_array_like, leaves_by_path

from .errors import ConversionError
from .families import DIRECTORIES
from .ops import SAME
from .rules import Link, Tie, expand


def paths(model: Any) -> dict[str, str]:
    """The reference library's name of every tensor of a model, and the path of our array that it is (or is made of)."""
    return {name: link.ours[0] for name, (link, _) in _named(model).items()}


def tensors(model: Any) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str], np.ndarray]]:
    """A model's tensors as the reference library names them: shapes and dtypes, and a way to get each.

    Works for anything with the model's structure, such as its gradients.
    """
    named, leaves = _named(model), leaves_by_path(model)
    specs = {number: _specs(link, leaves) for number, link in {id(link): link for link, _ in named.values()}.items()}

    def get(name: str) -> np.ndarray:
        link, key = named[name]
        return np.asarray(link.write(lambda path: np.asarray(leaves[path]))[key])

    return {name: specs[id(link)][key] for name, (link, key) in named.items()}, get


def _specs(link: Link, leaves: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The tensors that a link writes."""
    if link.op is SAME:  # most rules: nothing to trace
        leaf = leaves[link.ours[0]]
        return {key: jax.ShapeDtypeStruct(leaf.shape[len(link.sizes) :], leaf.dtype) for key in link.keys}
    zeros = lambda path: jnp.zeros(leaves[path].shape, leaves[path].dtype)
    return jax.eval_shape(lambda: link.write(zeros))


def _named(model: Any) -> dict[str, tuple[Link, str]]:
    """The reference's name of every tensor, with the link that writes it and the key under which it does."""
    family = DIRECTORIES.get(model.config.family)
    if family is None:
        raise ConversionError(
            f"The reference library has no {model.config.family!r}, so there is nothing that this could be exported as;"
            " eqx_transformers.save writes it in the native format."
        )
    table = family.table(model.config, type(model))
    leaves = {path: leaf for path, leaf in leaves_by_path(model).items() if is_array_like(leaf)}
    owner = {key: (link, key) for link in expand(table, leaves) for key in link.keys}
    owner |= {one.theirs: owner[one.to] for one in table if isinstance(one, Tie) and one.written}
    prefix = "" if family.is_prefixed(type(model)) else family.prefix
    return {key.removeprefix(prefix): owner[key] for key in sorted(owner)}
