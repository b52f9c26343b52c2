"""`trace`: a call of a model as a tree that can be looked at, asked, and run again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from . import _jaxpr
from .boundary import Record, Recorder, instrument, is_array, is_same
from .build import Above, Source, nodes_of
from .errors import ExpressionError
from .evaluate import Caught, Plan, evaluate
from .node import Node, short
from .page import to_html
from .query import Found, query
from .recognise import JAX_NN, Recogniser
from .show import Options, show
from .xml import Dialect, to_json, to_xml

METHODS = ("__call__", "attend")


@dataclass(frozen=True, eq=False)
class Expression:
    """A call of a model: `root` is its tree of nodes, and calling the expression runs it.

    `expression(model, *args, **kwargs)` gives what `model(*args, **kwargs)` gave, to the last bit, for arguments of the
    same structure, shapes and dtypes; it can be jitted, differentiated and mapped. The structure is that of the model
    that was traced: the arrays may be others.
    """

    root: Node
    body: _jaxpr.Inner
    signature: "Signature"
    records: dict[str, Record]

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(Plan(), model, *args, **kwargs)[0]

    def run(self, plan: Plan, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Caught]]:
        """With a plan of what to replace and what to catch; see `evaluate`."""
        values = self.signature.values((model, args, kwargs))
        out, caught = evaluate(self.body, values, plan)
        return self.signature.result(out), caught

    def nodes(self) -> Iterator[Node]:
        """All nodes, in the order in which they run, without the root."""
        return (node for child in self.root.children for node in child.walk())

    def skeleton(self) -> Any:
        """The model that was traced, with shapes and dtypes for its arrays."""
        model, args, _ = self.signature.skeleton()
        return model_of(model, args)

    def __repr__(self) -> str:
        return f"<Expression of {sum(1 for _ in self.nodes())} nodes; print it>"

    def __str__(self) -> str:
        return self.show()

    def show(
        self,
        depth: int | None = None,
        width: int = 120,
        *,
        under: Any = None,
        functions: bool = False,
        equations: bool = False,
        fold: bool = True,
    ) -> str:
        """The tree as text, a line a call: `path : Class [marks and settings] (inputs) -> outputs`.

        - `depth`: how many levels; `…` ends a line of which something is left out.
        - `width`: of a line; settings that do not fit are left out.
        - `under`: only what is at a path as printed, or is found by what `find` takes; its inside is shown in any case.
        - `functions`: also JAX's own helpers (`cumsum`, `_where`), and what is inside of functions.
        - `equations`: all there is.
        - `fold`: blocks in which nothing differs are shown once: `blocks.1 … blocks.11 : as blocks.0`.

        Marks: `vmap=1`, within an inner `jax.vmap`, of which one example is shown; `stack=12`, a call that the layers
        of stacked blocks share; `recognised`, by its equations alone; `jvp`, `transpose`, added by a derivative.
        """
        return show(self, Options(depth, width, functions, equations, fold), under)

    def to_xml(self, dialect: Dialect | None = None) -> str:
        """The tree as XML, an element a node, named by its tag (`<lambda>` is `_lambda_`). Attributes: `kind`, `path`,
        `name` (its last step, or that of a function), `type` and `class` (short and qualified), `method`, `in`, `out`,
        `vmap`, `stack`, `phase`, `recognised`, and all settings that can be said in a word; one that is called as any
        of these is `config.name`.

        In the dialect "yax", modules are `module_call` and all else is named by its primitive; there are also
        `primitive`, `entrypoint`, `ephemeral` (of the root alone) and `features` (of linear maps, their width).
        """
        return to_xml(self.root, dialect)

    def to_json(self, indent: int | None = None) -> str:
        """The same tree as JSON: `tag`, `attributes` (numbers and bools as such) and `children` of every node."""
        return to_json(self.root, indent)

    def to_html(self, path: str | Path | None = None, *, equations: bool = False) -> str:
        """The tree as an HTML page that needs nothing else, with levels that unfold, and the parameters of each module;
        also written to `path`. Needs the extra `expression`.
        """
        return to_html(self, path, equations=equations)

    def query(self, xpath: str, dialect: Dialect | None = None, *, allow_empty: bool = False) -> Found:
        """The nodes that an XPath 2 query selects in the tree that `to_xml(dialect)` prints: `//Linear`,
        `//MLP//gelu`, `(//Block)[2]`, `//*[matches(@path, "^blocks[.][0-3][.]")]`. Needs the extra `expression`.

        Raises a `QueryError`, which has the engine's message, for what is no query or selects no nodes but a number or
        a text; and a `NoMatch` that names what is near when nothing is found, unless `allow_empty`.
        """
        return query(self, xpath, dialect, allow_empty=allow_empty)


@dataclass(frozen=True, eq=False)
class Signature:
    """What a traced call was given and gave: which leaves are arrays, their shapes, and what the others are."""

    tree: Any
    dynamic: tuple[bool, ...]
    static: tuple[Any, ...]
    structs: tuple[Any, ...]
    out_tree: Any
    out_dynamic: tuple[bool, ...]
    out_static: tuple[Any, ...]

    def values(self, given: Any) -> list[Any]:
        """The arrays of a call's arguments. Raises an `ExpressionError` where they are not as those of the trace."""
        leaves, tree = jax.tree.flatten(given)
        if tree != self.tree:
            raise ExpressionError(
                f"The arguments have another structure than the traced ones: {_first_gap(tree, self.tree)}"
            )
        for is_traced, x, static in zip(self.dynamic, leaves, self.static, strict=True):
            if not is_traced and not is_same(x, static):
                raise ExpressionError(f"The trace was made with {static!r}, but now there is {x!r}: trace anew.")
        found = [x for is_traced, x in zip(self.dynamic, leaves, strict=True) if is_traced]
        for x, wanted in zip(found, self.structs, strict=True):
            if not hasattr(x, "dtype") or (np.shape(x), x.dtype) != (wanted.shape, wanted.dtype):
                said = short(x) if hasattr(x, "dtype") else repr(x)
                raise ExpressionError(f"The trace was made with {short(wanted)}, but now there is {said}: trace anew.")
        return found

    def skeleton(self) -> Any:
        """What was given, with shapes and dtypes for its arrays."""
        rest = iter(self.structs)
        given = [next(rest) if is_traced else x for is_traced, x in zip(self.dynamic, self.static, strict=True)]
        return jax.tree.unflatten(self.tree, given)

    def result(self, values: list[Any]) -> Any:
        """What the call gives, of its arrays."""
        rest = iter(values)
        leaves = [
            next(rest) if is_traced else x for is_traced, x in zip(self.out_dynamic, self.out_static, strict=True)
        ]
        return jax.tree.unflatten(self.out_tree, leaves)


def trace(
    model: Callable[..., Any],
    *,
    methods: tuple[str, ...] = METHODS,
    functions: tuple[Recogniser, ...] = JAX_NN,
) -> Callable[..., Expression]:
    """`trace(model)(*args, **kwargs)` is the `Expression` of `model(*args, **kwargs)`.

    - `model`: an Equinox module, a method of one (`model.encode`), or a function, whose first argument that is a module
      is the model then, which paths begin at. Arguments are arrays or `jax.ShapeDtypeStruct`s; with those alone nothing
      is computed or allocated.
    - `methods`: the methods whose calls are nodes.
    - `functions`: what to recognise where it is written inline.

    Works under `jit`, `grad` and `vmap`. Nothing is patched, and nothing of the trace outlives the expression.
    """
    return lambda *args, **kwargs: _traced(model, args, kwargs, methods, functions)


def _traced(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    methods: tuple[str, ...],
    functions: tuple[Recogniser, ...],
) -> Expression:
    leaves, tree = jax.tree.flatten((model, args, kwargs))
    dynamic = tuple(map(_is_shaped, leaves))
    static = tuple(None if is_traced else x for is_traced, x in zip(dynamic, leaves, strict=True))
    arrays = [x for is_traced, x in zip(dynamic, leaves, strict=True) if is_traced]
    recorder, out = Recorder(methods), {}

    def flat(alike: bool, *values: Any) -> list[Any]:
        rest = iter(values)
        given = [next(rest) if is_traced else x for is_traced, x in zip(dynamic, static, strict=True)]
        function, args, kwargs = _watched(jax.tree.unflatten(tree, given), recorder, alike)
        found, out["tree"] = jax.tree.flatten(function(*args, **kwargs))
        out["dynamic"] = tuple(map(_is_shaped, found))
        out["static"] = tuple(None if d else x for d, x in zip(out["dynamic"], found, strict=True))
        return [x for d, x in zip(out["dynamic"], found, strict=True) if d]

    closed = _jaxpr_of(flat, arrays, recorder)
    recorder.open = False
    body = _jaxpr.inner(closed)
    source = Source(recorder.records, model_of(model, args), functions)
    root = Node("root", "expression", children=nodes_of(source, body, Above()))
    structs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    signature = Signature(tree, dynamic, static, structs, out["tree"], out["dynamic"], out["static"])
    return Expression(root, body, signature, recorder.records)


def _jaxpr_of(flat: Callable[..., list[Any]], arrays: list[Any], recorder: Recorder) -> Any:
    with jax.disable_jit(False):  # a user's disable_jit would erase every boundary
        try:
            return jax.make_jaxpr(lambda *values: flat(False, *values))(*arrays)
        except ValueError as error:
            # Blocks that a forward pass stacks itself have to be alike, but their paths are not.
            if "metadata" not in str(error) and "custom node data" not in str(error):
                raise
            recorder.records.clear()
            return jax.make_jaxpr(lambda *values: flat(True, *values))(*arrays)


def _watched(given: Any, recorder: Recorder, alike: bool) -> Any:
    """The call's function and arguments, with its model instrumented."""
    model, args, kwargs = given
    if _is_model(model):
        return instrument(model, recorder, alike=alike), args, kwargs
    index = next((i for i, x in enumerate(args) if _is_model(x)), None)
    if index is None:
        return model, args, kwargs
    return model, (*args[:index], instrument(args[index], recorder, alike=alike), *args[index + 1 :]), kwargs


def _is_model(x: Any) -> bool:
    return isinstance(x, eqx.Module)


def model_of(model: Any, args: tuple[Any, ...]) -> Any:
    """The tree that paths begin at."""
    if _is_model(model):
        return getattr(model, "__self__", model)
    return next((x for x in args if _is_model(x)), model)


def _first_gap(found: Any, wanted: Any) -> str:
    """Where two structures part, looked for from the outside in."""
    pairs = list(zip(found.children(), wanted.children(), strict=False))
    is_here = found.node_data() != wanted.node_data() or len(found.children()) != len(wanted.children())
    gap = None if is_here else next(((a, b) for a, b in pairs if a != b), None)
    return f"{_structure(found)} where there was {_structure(wanted)}." if gap is None else _first_gap(*gap)


def _structure(tree: Any) -> str:
    if tree.node_data() is None:
        return "a leaf"
    kind, facts = tree.node_data()
    return f"{kind.__name__} of {len(tree.children())}" + (f" {facts}" if facts else "")


def _is_shaped(x: Any) -> bool:
    return is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
