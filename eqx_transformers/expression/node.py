"""A node of an expression: a call of a module or of a function, a control structure, or one equation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.tree_util import KeyPath

from . import _jaxpr

Kind = Literal["root", "module", "function", "control", "equation"]
Chain = tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """What was called, with what, and what is inside of it.

    - `tag`: the class of a module, the name of a function or of a primitive.
    - `path`: where it is in the model, spelled; None for what is in no field of it. `keypath`: the same as JAX has it.
    - `config`: static fields and scalars of a module, keyword arguments of a function, parameters of an equation.
    - `inputs`, `outputs`: shapes and dtypes of the arrays as the Python code saw them, under `jax.vmap` of one example.
    - `vmap`: under how many inner `jax.vmap` it runs. `stack`: how many layers share the call, as in a scan over them.
    - `phase`: "jvp" or "transpose" for what a derivative inside of the model added.
    - `recognised`: whether a function was found by its equations alone.
    """

    kind: Kind
    tag: str
    path: str | None = None
    keypath: KeyPath | None = None
    cls: type | None = None
    method: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[jax.ShapeDtypeStruct, ...] = ()
    outputs: tuple[jax.ShapeDtypeStruct, ...] = ()
    vmap: int = 0
    stack: int | None = None
    phase: str | None = None
    recognised: bool = False
    children: tuple["Node", ...] = ()
    # How evaluation finds it again: the equations around it and its own, and what was recorded of the call.
    chain: Chain = ()
    around: tuple[Any, ...] = ()
    equation: Any = None
    record: Any = None
    group: Any = None

    def __repr__(self) -> str:
        place = f" at {self.path}" if self.path else ""
        return f"<{self.kind} {self.tag}{place}>"

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, in the order in which they run."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def name(self) -> str:
        """What a message calls it: its path, or its tag where it has none."""
        return self.path or self.tag

    @property
    def guard(self) -> str | None:
        """The function with its own derivative rule around this node, if there is one."""
        named = (_jaxpr.name_of_custom(e) for e in self.around)
        return next((name for name in named if name is not None), None)


def struct(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a tracer or an abstract value."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def short(x: Any) -> str:
    """`f32[5,16]`: a dtype and a shape in few letters."""
    name = str(x.dtype)
    for long, brief in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            name = brief + name.removeprefix(long)
            break
    return f"{name}[{','.join(map(str, x.shape))}]"


def shorts(xs: tuple[Any, ...]) -> str:
    return ", ".join(map(short, xs))
