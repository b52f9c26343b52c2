"""Weights that are read outside of their own module's call: what a replacement of the module would not see."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.tree_util import KeyPath

from ..surgery.paths import at, spell
from . import _jaxpr
from .boundary import SCOPE, is_called
from .build import spell_call
from .expression import METHODS, Expression, model_of


class Use(NamedTuple):
    """An equation that reads a weight: its primitive, and the path of the module in whose call it stands."""

    primitive: str
    within: str


class Weight(NamedTuple):
    """A weight's path, and that of the module whose call it belongs to."""

    path: str
    home: str


def direct_uses(expression: Expression) -> dict[str, tuple[Use, ...]]:
    """`{path of a weight: where it is read}` for weights that are read outside of their own module's call.

    Such a weight is tied to what reads it by attribute access: an adapter or a quantised layer in the module's place
    changes what the module computes, and not what the other place computes. Empty where there is none.
    """
    found: dict[str, list[Use]] = {}
    inputs = expression.body.jaxpr.invars
    known = {x: weight for x, weight in zip(inputs, _weights(expression), strict=True) if weight is not None}
    _walk(expression, expression.body.jaxpr, known, "", found)
    return {path: tuple(dict.fromkeys(uses)) for path, uses in found.items()}


def _weights(expression: Expression) -> list[Weight | None]:
    """Of every array that goes into the call, what it is; None of what is no module's."""
    signature = expression.signature
    given = jax.tree.unflatten(signature.tree, range(len(signature.dynamic)))
    model = model_of(given[0], given[1])
    places = dict.fromkeys(range(len(signature.dynamic)), None)
    for keypath, index in jax.tree_util.tree_leaves_with_path(model):
        places[index] = Weight(spell(keypath), _home(model, keypath))
    return [places[i] for i, is_array in enumerate(signature.dynamic) if is_array]


def _home(model: Any, keypath: KeyPath) -> str:
    """The innermost module around a leaf whose calls are seen."""
    around = [keypath[:i] for i in range(len(keypath))]
    called = [path for path in around if _is_watched(at(model, path))]
    return spell(called[-1]) if called else ""


def _is_watched(node: Any) -> bool:
    return isinstance(node, eqx.Module) and is_called(node, METHODS)


def _walk(
    expression: Expression, jaxpr: Any, known: dict[Any, Weight], within: str, found: dict[str, list[Use]]
) -> None:
    for equation in jaxpr.eqns:
        given = [None if isinstance(x, _jaxpr.Literal) else known.get(x) for x in equation.invars]
        if not any(given):
            continue
        bodies = _jaxpr.inners(equation)
        if SCOPE in _jaxpr.scopes(equation):  # not the model's own: see boundary
            known = known | {
                x: weight for x, weight in zip(equation.outvars, given, strict=False) if weight is not None
            }
        elif not bodies:
            _note(equation, given, within, found)
        for body in bodies:
            inside = dict(zip(body.jaxpr.invars, _passed(equation, body, given), strict=True))
            below = {x: weight for x, weight in inside.items() if weight is not None}
            _walk(expression, body.jaxpr, below, _owner(expression, equation, within), found)


def _note(equation: Any, given: Sequence[Weight | None], within: str, found: dict[str, list[Use]]) -> None:
    for weight in given:
        if weight is not None and weight.home != within:
            found.setdefault(weight.path, []).append(Use(equation.primitive.name, within))


def _owner(expression: Expression, equation: Any, within: str) -> str:
    record = expression.records.get(_jaxpr.name_of_jit(equation) or "")
    return within if record is None or record.cls is None else spell_call(record.keypath)


def _passed(equation: Any, body: _jaxpr.Inner, given: list[Weight | None]) -> list[Weight | None]:
    """Which of an equation's operands each input of a jaxpr in it is."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        return given[1:]
    if name == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        is_condition = body.jaxpr is _jaxpr.inner(params["cond_jaxpr"]).jaxpr
        return (given[:a] if is_condition else given[a : a + b]) + given[a + b :]
    if len(body.jaxpr.invars) == len(given):
        return given
    return [None] * len(body.jaxpr.invars)  # a derivative rule's jaxpr: not the call itself
