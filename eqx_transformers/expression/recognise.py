"""Functions that are written inline, found by their equations.

`jax.nn.gelu` and `softmax` leave no boundary in a jaxpr. But the function itself, traced on a candidate's own shape and
dtype, gives the very equations to look for: every value that is exactly `f(v)`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _jaxpr


class Recogniser(NamedTuple):
    """A function of one array with one result, and the keywords that it is called with."""

    name: str
    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...] = ()


class Group(NamedTuple):
    """The equations that together are a function's call."""

    recogniser: Recogniser
    equations: tuple[Any, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


JAX_NN = (
    Recogniser("gelu", jax.nn.gelu, (("approximate", True),)),
    Recogniser("gelu", jax.nn.gelu, (("approximate", False),)),
    Recogniser("softmax", jax.nn.softmax, (("axis", -1),)),
    Recogniser("sigmoid", jax.nn.sigmoid),
)


@functools.lru_cache(maxsize=4096)
def _pattern(recogniser: Recogniser, shape: tuple[int, ...], dtype: Any, weak: bool) -> Any:
    """The function's jaxpr on one array; None where it cannot be called so, or does nothing."""
    given = jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)
    try:
        closed = jax.make_jaxpr(lambda x: recogniser.function(x, **dict(recogniser.keywords)))(given)
    except (TypeError, ValueError):  # a function that takes no such array is not what made this value
        return None
    jaxpr = closed.jaxpr
    whole = jaxpr.eqns and len(jaxpr.invars) == len(jaxpr.outvars) == 1 and not closed.consts
    return jaxpr if whole and _jaxpr.variables(jaxpr.outvars) else None


def groups_of(jaxpr: Any, recognisers: Sequence[Recogniser]) -> list[Group]:
    """All calls of these functions among the equations of a jaxpr, earlier recognisers first; none shares equations."""
    if not recognisers or not jaxpr.eqns:
        return []
    users, nullary = _users(jaxpr)
    order = {id(e): i for i, e in enumerate(jaxpr.eqns)}
    taken: set[int] = set()
    found = []
    for recogniser in recognisers:
        for variable in users:
            group = _group(recogniser, variable, users, nullary, taken)
            if group is not None:
                taken |= {id(e) for e in group.equations}
                found.append(group._replace(equations=tuple(sorted(group.equations, key=lambda e: order[id(e)]))))
    return found


def _users(jaxpr: Any) -> tuple[dict[Any, list[Any]], list[Any]]:
    """The equations that read each variable, and those that read none."""
    users: dict[Any, list[Any]] = {}
    for e in jaxpr.eqns:
        for v in dict.fromkeys(_jaxpr.variables(e.invars)):
            users.setdefault(v, []).append(e)
    return users, [e for e in jaxpr.eqns if not _jaxpr.variables(e.invars)]


def _group(recogniser: Recogniser, variable: Any, users: Any, nullary: list[Any], taken: set[int]) -> Group | None:
    aval = variable.aval
    if not hasattr(aval, "dtype") or not jnp.issubdtype(aval.dtype, jnp.inexact):
        return None
    pattern = _pattern(recogniser, aval.shape, aval.dtype, bool(getattr(aval, "weak_type", False)))
    if pattern is None:
        return None
    bound: dict[Any, Any] = {pattern.invars[0]: variable}
    used: list[Any] = []
    for wanted in pattern.eqns:
        inputs = _jaxpr.variables(wanted.invars)
        candidates = users.get(bound[inputs[0]], []) if inputs else nullary
        free = (e for e in candidates if id(e) not in taken and not any(e is u for u in used))
        hit = next((e for e in free if _matches(wanted, e, bound)), None)
        if hit is None:
            return None
        used.append(hit)
        bound |= dict(zip(wanted.outvars, hit.outvars, strict=True))
    return Group(recogniser, tuple(used), (variable,), (bound[pattern.outvars[0]],))


def _matches(wanted: Any, found: Any, bound: Mapping[Any, Any]) -> bool:
    if wanted.primitive is not found.primitive or len(wanted.invars) != len(found.invars):
        return False
    alike = all(_same_atom(a, b, bound) for a, b in zip(wanted.invars, found.invars, strict=True))
    return alike and _same_params(wanted.params, found.params)


def _same_atom(a: Any, b: Any, bound: Mapping[Any, Any]) -> bool:
    if isinstance(a, _jaxpr.Literal) != isinstance(b, _jaxpr.Literal):
        return False
    if not isinstance(a, _jaxpr.Literal):
        return bound.get(a) is b
    return a.aval.shape == b.aval.shape and a.aval.dtype == b.aval.dtype and np.array_equal(a.val, b.val)


# What differs between two traces of one function without meaning anything: functions made anew, and the mesh.
IRRELEVANT = ("ctx_mesh", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees")


def _same_params(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_same_param(name, a[name], b[name]) for name in a)


def _same_param(name: str, a: Any, b: Any) -> bool:
    parts = a if isinstance(a, tuple | list) else (a,)
    if any(map(_jaxpr.is_jaxpr, parts)):
        return str(a) == str(b)
    if name in IRRELEVANT or callable(a):
        return True
    return bool(np.all(a == b))
