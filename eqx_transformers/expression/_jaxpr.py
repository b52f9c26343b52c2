"""The only module that looks into jaxprs: what is in one, and how a part of one is run.

No equation is bound by hand: stretches of them become a jaxpr again, which `jaxpr_as_fun` runs. What contains others is
put together anew from its parameters with the public combinators; these parameters' names are not promised by anyone,
and so they stand in one table, `CONTAINERS`, here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
Equation = core.JaxprEqn
Var = core.Var
Literal = core.Literal
# Functions that carry their own derivative rule: what is in them is not the whole truth.
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Inner(NamedTuple):
    """A jaxpr within an equation, and the values of its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Any]


def inner(x: Any) -> Inner:
    return Inner(x.jaxpr, x.consts) if isinstance(x, ClosedJaxpr) else Inner(x, ())


def is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def inners(equation: Equation) -> list[Inner]:
    """All jaxprs that an equation contains, in the order of its parameters."""
    found = []
    for value in equation.params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        found += [inner(x) for x in parts if is_jaxpr(x)]
    return found


def body_of_jit(equation: Equation) -> Inner | None:
    """What a jitted function consists of; None of any other equation."""
    return inner(equation.params["jaxpr"]) if equation.primitive.name in ("jit", "pjit") else None


def name_of_jit(equation: Equation) -> str | None:
    return str(equation.params["name"]) if equation.primitive.name in ("jit", "pjit") else None


def name_of_custom(equation: Equation) -> str | None:
    """The function's name where an equation is one with its own derivative; None of any other equation."""
    if equation.primitive.name not in CUSTOM:
        return None
    body = inner(equation.params["call_jaxpr"]).jaxpr
    named = getattr(body.debug_info, "func_name", None)
    if not named and len(body.eqns) == 1:
        named = name_of_jit(body.eqns[0])
    return named or equation.primitive.name


def scopes(equation: Equation) -> str:
    """The named scopes and transformations around an equation, as text."""
    return str(equation.source_info.name_stack)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Those that are not literals."""
    return [x for x in atoms if not isinstance(x, Literal)]


def run_one(jaxpr: Jaxpr, equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """All results of one equation of a jaxpr."""
    values = {x: value for x, value in zip(equation.invars, operands, strict=True) if not isinstance(x, Literal)}
    return run(jaxpr, [equation], equation.outvars, values)


def run(jaxpr: Jaxpr, equations: Sequence[Equation], wanted: Sequence[Any], values: dict[Any, Any]) -> list[Any]:
    """The `wanted` variables of a stretch of a jaxpr's equations, given the values of those that it does not make."""
    made = {v for e in equations for v in e.outvars}
    free = list(dict.fromkeys(v for e in equations for v in variables(e.invars) if v not in made))
    effects = frozenset().union(*(e.effects for e in equations))
    part = jaxpr.replace(constvars=[], invars=free, outvars=list(wanted), eqns=list(equations), effects=effects)
    return core.jaxpr_as_fun(ClosedJaxpr(part, ()))(*(values[v] for v in free))


# ---- containers: an equation's operands, and how to run what it contains -> its results, and what was caught inside

Run = Callable[[Inner, Sequence[Any], Any], tuple[list[Any], list[Any]]]


def _jit(equation: Equation, operands: Sequence[Any], run: Run) -> tuple[list[Any], list[Any]]:
    def body(*operands: Any) -> Any:
        return run(inner(equation.params["jaxpr"]), operands, None)

    body.__name__ = body.__qualname__ = str(equation.params["name"])
    return jax.jit(body)(*operands)


def _remat(equation: Equation, operands: Sequence[Any], run: Run) -> tuple[list[Any], list[Any]]:
    given = equation.params
    body = lambda *operands: run(inner(given["jaxpr"]), operands, None)
    return jax.checkpoint(body, prevent_cse=given["prevent_cse"], policy=given["policy"])(*operands)


def _scan(equation: Equation, operands: Sequence[Any], run: Run) -> tuple[list[Any], list[Any]]:
    """What is caught in it gets a leading axis; a part that is told its turn finds it as the last argument of `run`."""
    given = equation.params
    consts, carries, length = given["num_consts"], given["num_carry"], given["length"]
    fixed, first, rest = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]

    def body(carry: Any, xs: Any) -> Any:
        turn, xs = xs
        out, caught = run(inner(given["jaxpr"]), [*fixed, *carry, *xs], turn)
        return list(out[:carries]), (list(out[carries:]), caught)

    turns = jax.numpy.arange(length)
    options = {"length": length, "reverse": given["reverse"], "unroll": given["unroll"]}
    carry, (ys, caught) = jax.lax.scan(body, list(first), (turns, list(rest)), **options)
    return [*carry, *ys], caught


def _cond(equation: Equation, operands: Sequence[Any], run: Run) -> tuple[list[Any], list[Any]]:
    branches = [lambda *operands, b=b: _uncaught(run(inner(b), operands, None)) for b in equation.params["branches"]]
    return jax.lax.switch(operands[0], branches, *operands[1:]), []


def _while(equation: Equation, operands: Sequence[Any], run: Run) -> tuple[list[Any], list[Any]]:
    given = equation.params
    a, b = given["cond_nconsts"], given["body_nconsts"]
    ask, do, first = operands[:a], operands[a : a + b], operands[a + b :]
    more = lambda state: _uncaught(run(inner(given["cond_jaxpr"]), [*ask, *state], None))[0]
    turn = lambda state: _uncaught(run(inner(given["body_jaxpr"]), [*do, *state], None))
    return jax.lax.while_loop(more, turn, list(first)), []


def _uncaught(found: tuple[list[Any], list[Any]]) -> list[Any]:
    """Of a place from which nothing can be brought out, which the plan has made sure of."""
    out, caught = found
    assert not caught
    return list(out)


CONTAINERS: dict[str, Callable[[Equation, Sequence[Any], Run], tuple[list[Any], list[Any]]]] = {
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
CLOSED = ("cond", "while")  # nothing that is caught inside comes out: its shape is not known before it runs
