"""Parts of a call replaced by functions, where no field holds them: `rewrite` for a function, `Rewritten` for a module.

What a field holds is replaced by `eqx.tree_at`, and `query(…).where` says where it is. This is for the rest: functions
that are written inline, and single calls.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..surgery.select import Selection
from . import _jaxpr
from .boundary import arguments_of, is_array, is_same
from .errors import ExpressionError, NoMatch, QueryError, ShapeMismatch
from .evaluate import Plan, Replacement
from .expression import Expression, trace
from .matching import Recogniser
from .node import Node, shorts, struct
from .query import Found, find
from .recognise import JAX_NN, recognisers_of

Rules = Mapping[Any, Callable[..., Any]] | Sequence[tuple[Any, Callable[..., Any]]]


def rewrite(model: Callable[..., Any], rules: Rules, *, allow_empty: bool = False) -> Callable[..., Any]:
    """`rewrite(model, {what: replacement})(*args, **kwargs)` is `model(*args, **kwargs)` with parts replaced.

    - `model`: an Equinox module, a method of one, or a function; see `trace`.
    - `what`: an XPath (`"//gelu"`, `"(//Block)[2]"`), a function (`jax.nn.gelu`, which is found where it is written
      inline, as every function is that is given as one), a class, a `Selection`, or whatever else `Expression.query`
      takes; several of them as a list.
    - A replacement of a function is called with the arrays that the function got (that of one in a field with the
      arguments and keywords of the call), one of a module's call with the arguments and keywords of that call. It gives
      what the original gave: the same structure, shapes and dtypes.

    It is a function transformation: the model is traced anew for new shapes and rules are asked anew, so that other
    lengths work; it can be jitted, differentiated and mapped; nothing is changed in place. Of nodes within one another
    a rule replaces the outermost. What else reads a replaced value reads the new one; what else reads a value from
    inside of it still gets it. Derivative rules stay, and those of replacements hold.

    Raises `NoMatch` where a rule finds nothing, unless `allow_empty`; `ShapeMismatch` where a replacement gives
    something else; an `ExpressionError` for what cannot be replaced: what is inside of a function with a derivative
    rule of its own, the call of a module under an inner `jax.vmap`, a part of a derivative that the model takes itself.
    """
    pairs = _pairs(rules)
    functions = _functions(key for key, _ in pairs)

    def rewritten(*args: Any, **kwargs: Any) -> Any:
        expression = trace(model, functions=functions)(*args, **kwargs)
        return expression.run(_plan(expression, pairs, allow_empty), model, *args, **kwargs)[0]

    return rewritten


class Rewritten(eqx.Module):
    """A model with parts of its call replaced: `rewrite` as a module. `Rewritten(model, rules)(*args, **kwargs)`.

    The model and the replacements are its subtrees, so that both are trained, saved and selected as anything else is;
    what the rules ask for is static. See `rewrite` for what they are, and what is raised.
    """

    model: Callable
    replacements: tuple[Callable, ...]
    keys: tuple[Any, ...] = eqx.field(static=True)
    allow_empty: bool = eqx.field(static=True)

    def __init__(self, model: Callable[..., Any], rules: Rules, *, allow_empty: bool = False):
        pairs = _pairs(rules)
        self.model = model
        self.keys = tuple(tuple(key) if isinstance(key, list) else key for key, _ in pairs)
        self.replacements = tuple(replacement for _, replacement in pairs)
        self.allow_empty = allow_empty

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rules = list(zip(self.keys, self.replacements, strict=True))
        return rewrite(self.model, rules, allow_empty=self.allow_empty)(*args, **kwargs)


# ---- rules


def _pairs(rules: Rules) -> list[tuple[Any, Callable[..., Any]]]:
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"Rules are a mapping, or pairs, of what is replaced and its replacement; here is {pair!r}."
            )
        if not callable(pair[1]):
            raise TypeError(
                f"The replacement of {_said(pair[0])} is {pair[1]!r}, which cannot be called: a value that is always"
                " the same is `lambda *args, **kwargs: value`."
            )
    return [(key, replacement) for key, replacement in pairs]


def _functions(keys: Any) -> tuple[Recogniser, ...]:
    """What to recognise: what a rule names comes first, for it may be written of what is recognised anyway."""
    named = [r for key in keys for part in _parts(key) if _is_function(part) for r in recognisers_of(part)]
    return tuple(dict.fromkeys((*named, *JAX_NN)))


def _parts(key: Any) -> Sequence[Any]:
    return [x for part in key for x in _parts(part)] if isinstance(key, list | tuple) else [key]


def _is_function(key: Any) -> bool:
    """Whether it may be a function that is called; a lambda is a predicate."""
    other = isinstance(key, type | Selection | Found | eqx.Module)
    return callable(key) and not other and getattr(key, "__name__", "<lambda>") != "<lambda>"


def _said(key: Any) -> str:
    return repr(key) if isinstance(key, str) else getattr(key, "__name__", None) or repr(key)


# ---- nodes


def _plan(expression: Expression, pairs: Sequence[tuple[Any, Callable[..., Any]]], allow_empty: bool) -> Plan:
    plan = Plan()
    chosen: dict[int, str] = {}
    for key, replacement in pairs:
        for node in _outermost(_found(expression, key, allow_empty)):
            _expect_replaceable(node)
            if id(node) in chosen:
                raise ExpressionError(f"{_place(node)} is replaced by two rules: {chosen[id(node)]} and {_said(key)}.")
            chosen[id(node)] = _said(key)
            _add(plan, node, replacement)
    _expect_apart(expression, chosen)
    return plan


def _found(expression: Expression, key: Any, allow_empty: bool) -> tuple[Node, ...]:
    try:
        return find(expression, key, allow_empty=allow_empty)
    except QueryError as error:
        if not isinstance(key, FunctionType) or not _is_function(key):
            raise
        if allow_empty:
            return ()
        raise NoMatch(str(error)) from error


def _outermost(nodes: Sequence[Node]) -> list[Node]:
    below = {id(x) for node in nodes for x in node.walk() if x is not node}
    return [node for node in nodes if id(node) not in below]


def _expect_apart(expression: Expression, chosen: Mapping[int, str]) -> None:
    for outer in expression.nodes():
        if id(outer) not in chosen:
            continue
        inner = next((x for x in outer.walk() if x is not outer and id(x) in chosen), None)
        if inner is not None:
            raise ExpressionError(
                f"{_place(inner)}, which {chosen[id(inner)]} replaces, is inside of {_place(outer)}, which"
                f" {chosen[id(outer)]} replaces: leave one of them out, or rewrite one after the other."
            )


def _expect_replaceable(node: Node) -> None:
    where = _place(node)
    if node.guard is not None:
        raise ExpressionError(
            f"{where} is inside of {node.guard}, which has a derivative rule of its own that would still be that of the"
            f" old value: replace {node.guard} as a whole."
        )
    if node.phase is not None:
        raise ExpressionError(
            f"{where} is a part of a derivative ({node.phase}) that the model takes itself, whose other parts would"
            " still be those of the old value: rewrite the function inside of it, before its derivative is taken."
        )
    if node.kind == "module" and _mapped(node):
        raise ExpressionError(
            f"This call of {where} runs under jax.vmap, for many examples at once: replace the module itself, by"
            " eqx.tree_at(query(…).where, model, …)."
        )
    if _is_named(node) and _is_within_vmap(node) and not _is_pointwise(node.equation):
        raise ExpressionError(
            f"This call of {where} runs under jax.vmap, and nothing says which axis the examples are on: rewrite the"
            " function that is mapped, before it is."
        )


def _place(node: Node) -> str:
    return node.tag if node.path is None else f"{node.path or 'the model itself'} ({node.tag})"


def _is_named(node: Node) -> bool:
    """Whether a name in the jaxpr is all that is known of a function."""
    return node.kind == "function" and node.record is None and node.group is None


def _is_within_vmap(node: Node) -> bool:
    return node.vmap > 0 or any("vmap(" in _jaxpr.scopes(e) for e in node.around)


def _is_pointwise(equation: Any) -> bool:
    """Whether it does the same to every number, so that one axis is as good as another."""
    arrays = {x.aval.shape for x in (*equation.invars, *equation.outvars) if getattr(x.aval, "shape", ())}
    moves = any(name in equation.params for name in ("axis", "axes", "dimension", "dimensions", "permutation"))
    inside = [e for body in _jaxpr.inners(equation) for e in body.jaxpr.eqns]
    return len(arrays) <= 1 and not moves and all(map(_is_pointwise, inside))


def _mapped(node: Node) -> bool:
    return node.record is not None and any(_more_axes(node))


def _more_axes(node: Node) -> list[int]:
    """How many axes each operand of a recorded call has in its equation, beyond those that the Python code saw."""
    record = node.record
    seen = iter([*record.widths, *(x.ndim for x in record.inputs)])
    axes = []
    for is_traced, static in zip(record.traced, record.static, strict=True):
        if is_traced or is_array(static):
            ndim = next(seen)
            axes += [ndim] if is_traced else []
    return [x.aval.ndim - n for x, n in zip(_given(node, node.equation.invars), axes, strict=True)]


def _given(node: Node, operands: Sequence[Any]) -> Sequence[Any]:
    """The operands that the call was given; before them are those that its function closes over."""
    return operands[len(operands) - sum(node.record.traced) :]


# ---- what a replacement is given, and gives


def _add(plan: Plan, node: Node, replacement: Callable[..., Any]) -> None:
    inputs = node.equation.invars if node.group is None else node.group.inputs
    outputs = node.equation.outvars if node.group is None else node.group.outputs

    def call(operands: Sequence[Any], original: Callable[[], Sequence[Any]], turn: Any) -> Sequence[Any]:
        return _results(node, replacement, operands)

    plan.replaced[node.chain] = Replacement(inputs, outputs, call)
    plan.touch(node)
    if node.group is not None:
        plan.skipped |= {(*node.chain[:-1], id(e)) for e in node.group.equations[:-1]}


def _results(node: Node, replacement: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
    try:
        if node.record is None:
            leaves = jax.tree.leaves(replacement(*operands))
            wanted = node.group.outputs if node.group is not None else node.equation.outvars
            return _expected(node, leaves, [struct(x.aval) for x in wanted])
        run = functools.partial(_called, node, replacement)
        axes = _more_axes(node)
        given = _given(node, operands)
        return list(_vmapped(node, run, axes)(*given))
    except ExpressionError:
        raise
    except Exception as error:
        error.add_note(f"This happened in the replacement of {_place(node)}.")
        raise


def _vmapped(node: Node, run: Callable[..., list[Any]], axes: list[int]) -> Callable[..., list[Any]]:
    """`run` under the `jax.vmap`s around a call, whose axes come first; an operand has all of them or none."""
    depth = max(axes, default=0)
    if any(n not in (0, depth) for n in axes):
        raise ExpressionError(
            f"{_place(node)} runs under several jax.vmap that map different arguments: rewrite the function that is"
            " mapped, before it is."
        )
    for _ in range(depth):
        run = jax.vmap(run, in_axes=tuple(0 if n else None for n in axes))
    return run


def _called(node: Node, replacement: Callable[..., Any], *operands: Any) -> list[Any]:
    """The traced results of a recorded call's replacement; what is not traced has to be what it was."""
    record = node.record
    _, args, kwargs = arguments_of(record, operands)
    leaves, tree = jax.tree.flatten(replacement(*args, **kwargs))
    if tree != record.out_tree:
        raise ShapeMismatch(_gap(node, str(record.out_tree), str(tree)))
    results = []
    for x, is_traced, static in zip(leaves, record.out_traced, record.out_static, strict=True):
        if is_traced:
            results.append(x)
        elif not is_same(x, static):
            raise ShapeMismatch(_gap(node, f"{static!r}, which is no array and decided what follows", repr(x)))
    shapes = zip(_arrays(record.out_traced, record.out_static), record.outputs, strict=True)
    return _expected(node, results, [struct(x) for is_traced, x in shapes if is_traced])


def _arrays(traced: tuple[bool, ...], static: list[Any]) -> list[bool]:
    """Of the leaves that are arrays, which are traced."""
    return [is_traced for is_traced, x in zip(traced, static, strict=True) if is_traced or is_array(x)]


def _expected(node: Node, leaves: list[Any], wanted: list[jax.ShapeDtypeStruct]) -> list[Any]:
    """The arrays that a replacement gave, if they are as wanted."""
    try:
        found = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in leaves]
    except TypeError as error:
        raise ShapeMismatch(_gap(node, shorts(tuple(wanted)), ", ".join(map(repr, leaves)))) from error
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in wanted]:
        raise ShapeMismatch(_gap(node, shorts(tuple(wanted)), shorts(tuple(found))))
    return found


def _gap(node: Node, wanted: str, found: str) -> str:
    return (
        f"The replacement of {_place(node)} gives {found}, but what it replaces gives {wanted}: the equations that read"
        " it were traced for that. To change it, change the code or the module around it."
    )
