"""Where two trees of modules differ."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np


def is_array_like(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one in a skeleton."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def differences(
    a: Any, b: Any, *, dtypes: bool = True, ignore: Collection[str] = (), path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(path, a's, b's) of every place in which two trees differ in class, shape, setting or function.

    The numbers in arrays are no difference, and their dtypes only where asked for; static fields are compared too.
    `ignore` are names of fields.
    """
    step = lambda name: f"{path}.{name}" if path else str(name)
    inside = lambda x, y, name: differences(x, y, dtypes=dtypes, ignore=ignore, path=step(name))
    if is_array_like(a) and is_array_like(b):
        if a.shape != b.shape or (dtypes and a.dtype != b.dtype):
            yield path, a, b
    elif type(a) is not type(b) or (isinstance(a, tuple | list) and len(a) != len(b)):
        yield path, a, b
    elif isinstance(a, eqx.Module):
        for name in [f.name for f in dataclasses.fields(a) if f.name not in ignore]:
            yield from inside(getattr(a, name, None), getattr(b, name, None), name)
    elif isinstance(a, tuple | list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from inside(x, y, i)
    elif isinstance(a, dict) and a.keys() == b.keys():
        for name in a:
            yield from inside(a[name], b[name], name)
    elif a is not b and a != b:
        yield path, a, b


def describe(x: Any) -> str:
    """A node of a tree in a few words, never its numbers."""
    if is_array_like(x):
        return f"{x.dtype}{list(x.shape)}"
    if isinstance(x, tuple | list):
        return f"{len(x)} of them"
    return f"a {type(x).__name__}" if isinstance(x, eqx.Module) else getattr(x, "__name__", None) or repr(x)


def rebuilt(module: Any, changed: dict[str, Any]) -> Any:
    """A module of the same class that holds the same, but for what is changed, and has passed its own checks."""
    new = object.__new__(type(module))
    for name, value in (vars(module) | changed).items():
        object.__setattr__(new, name, value)
    for kind in type(new).__mro__:  # as Equinox runs them when a module is made
        if "__check_init__" in vars(kind):
            vars(kind)["__check_init__"](new)
    return new
