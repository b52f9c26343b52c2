"""A function's own equations, looked for among those of a jaxpr, from each possible result backwards.

Every variable is made by one equation, so a walk from a result towards the arguments has nothing to choose: it ends at
the arguments of the one call that this may be, or it fails.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _jaxpr


class Recogniser(NamedTuple):
    """A function of arrays with one result, and the keywords that it is called with.

    - `ranks`: of several arrays, the numbers of axes to try. One array is tried with every shape that there is.
    - `masks`: how many of them, the last ones, are boolean.
    - `read`: keywords that are numbers in the formula, such as an epsilon: each is taken from where it stands there.
    """

    name: str
    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...] = ()
    ranks: tuple[tuple[int, ...], ...] = ()
    masks: int = 0
    read: tuple[str, ...] = ()


class Group(NamedTuple):
    """The equations that together are a function's call, in their order."""

    recogniser: Recogniser
    equations: tuple[Any, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class Aval(NamedTuple):
    """What a function's equations depend on of an argument."""

    shape: tuple[int, ...]
    dtype: Any
    weak: bool = False


# How many arrays a function may have whose ranks nobody said, and the ranks that are tried then.
GUESSED = 3
MOST_AXES = 4
# Numbers that no formula has, to see where a keyword stands in one: exact in every dtype.
MARKS = (2.0**-11 + 2.0**-13, 2.0**-12 + 2.0**-14)


def of_function(function: Callable[..., Any]) -> tuple[Recogniser, ...]:
    """How to recognise a function of which nothing is known: it has as many arrays as arguments that must be given.

    Empty where that cannot be: it has no name or none or too many of them.
    """
    name = getattr(function, "__name__", None)
    arrays = _required(function)
    if name is None or not 0 < arrays <= GUESSED:
        return ()
    ranks = tuple(itertools.product(range(MOST_AXES + 1), repeat=arrays)) if arrays > 1 else ()
    return (Recogniser(name, function, ranks=ranks),)


def _required(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def groups_of(jaxpr: Any, recognisers: Sequence[Recogniser]) -> list[Group]:
    """All calls of these functions among the equations of a jaxpr, earlier recognisers first; none shares equations."""
    if not recognisers or not jaxpr.eqns:
        return []
    place = _Place(jaxpr)
    found = []
    for recogniser in recognisers:
        for group in _calls(recogniser, place):
            if place.taken.isdisjoint(map(id, group.equations)):
                place.taken |= set(map(id, group.equations))
                found.append(group)
    return found


class _Place:
    """The equations of a jaxpr by what they make, and those that belong to a group already."""

    def __init__(self, jaxpr: Any):
        self.order = {id(e): i for i, e in enumerate(jaxpr.eqns)}
        self.maker = {v: e for e in jaxpr.eqns for v in e.outvars}
        self.by_primitive: dict[Any, list[Any]] = {}
        for e in jaxpr.eqns:
            self.by_primitive.setdefault(e.primitive, []).append(e)
        avals = [a for v in _read(jaxpr.eqns) if (a := _aval(v)) is not None]
        self.avals = dict.fromkeys(a for a in avals if jnp.issubdtype(a.dtype, jnp.inexact))
        self.ranks = {len(a.shape) for a in avals}
        self.taken: set[int] = set()

    def results(self, pattern: Any) -> list[Any]:
        """The variables that may be a pattern's result."""
        last = _maker(pattern)[pattern.outvars[0]]
        index = list(last.outvars).index(pattern.outvars[0])
        return [e.outvars[index] for e in self.by_primitive.get(last.primitive, ()) if id(e) not in self.taken]


def _read(equations: Iterable[Any]) -> Iterator[Any]:
    return (v for e in equations for v in _jaxpr.variables(e.invars))


def _aval(variable: Any) -> Aval | None:
    aval = variable.aval
    if not hasattr(aval, "dtype") or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return None
    return Aval(aval.shape, aval.dtype, bool(getattr(aval, "weak_type", False)))


def _calls(recogniser: Recogniser, place: _Place) -> Iterator[Group]:
    if not recogniser.ranks:
        for aval in place.avals:
            yield from _exactly(recogniser, (aval,), place)
        return
    dtypes = dict.fromkeys(a.dtype for a in place.avals)
    for ranks, dtype, batch in itertools.product(recogniser.ranks, dtypes, (2, 1)):
        if not place.ranks.issuperset(ranks) or (batch == 1 and max(ranks) < 3):
            continue
        rough = _pattern(recogniser, _sketched(recogniser, ranks, dtype, batch))
        for result in () if rough is None else place.results(rough):
            yield from _bound(recogniser, ranks, rough, result, place)


def _sketched(recogniser: Recogniser, ranks: tuple[int, ...], dtype: Any, batch: int) -> tuple[Aval, ...]:
    """Arrays of these ranks. A batch of one is a case of its own: products leave such an axis out."""
    real = len(ranks) - recogniser.masks
    shapes = [(batch, *(2,) * (rank - 1)) if rank > 2 else (2,) * rank for rank in ranks]
    return tuple(Aval(shape, dtype if i < real else jnp.dtype(bool)) for i, shape in enumerate(shapes))


def _exactly(recogniser: Recogniser, avals: tuple[Aval, ...], place: _Place) -> Iterator[Group]:
    pattern = _pattern(recogniser, avals)
    for result in () if pattern is None else place.results(pattern):
        match = _Match(place, exact=True).of(pattern, result)
        if match is not None:
            yield _group(recogniser, pattern, match, place)


def _bound(recogniser: Recogniser, ranks: tuple[int, ...], rough: Any, result: Any, place: _Place) -> Iterator[Group]:
    """The call of several arrays that ends in `result`. Its primitives alone say what the arguments are; then the
    function is traced on their shapes, and has to have the very equations."""
    found = _Match(place, exact=False).of(rough, result)
    avals = [] if found is None else [a for x in rough.invars if (a := _aval(found.bound[x])) is not None]
    if found is None or tuple(len(a.shape) for a in avals) != ranks:
        return
    read = {name: found.marked.get(mark) for name, mark in zip(recogniser.read, MARKS, strict=False)}
    if None in read.values():
        return
    told = recogniser._replace(keywords=(*recogniser.keywords, *read.items()), read=())
    pattern = _pattern(told, tuple(avals))
    match = None if pattern is None else _Match(place, exact=True).of(pattern, result)
    if pattern is not None and match is not None:
        yield _group(told, pattern, match, place)


def _group(recogniser: Recogniser, pattern: Any, match: "_Match", place: _Place) -> Group:
    equations = sorted(match.used.values(), key=lambda e: place.order[id(e)])
    inputs = tuple(match.bound[x] for x in pattern.invars)
    return Group(recogniser, tuple(equations), inputs, (match.bound[pattern.outvars[0]],))


class _Match:
    """A pattern laid over equations. `bound` has what each of its variables is there, `used` the equations by id.

    Not `exact`: parameters, shapes and numbers may differ; `marked` are the numbers where the pattern has a mark.
    """

    def __init__(self, place: _Place, *, exact: bool):
        self.place, self.exact = place, exact
        self.bound: dict[Any, Any] = {}
        self.used: dict[int, Any] = {}
        self.marked: dict[float, float] = {}

    def of(self, pattern: Any, result: Any) -> "_Match | None":
        """Itself, where the pattern ends in `result` and each of its arguments is something there."""
        self.maker, self.arguments = _maker(pattern), set(pattern.invars)
        alike = self._same(pattern.outvars[0], result)
        return self if alike and self.arguments <= self.bound.keys() else None

    def _same(self, wanted: Any, found: Any) -> bool:
        if isinstance(wanted, _jaxpr.Literal) or isinstance(found, _jaxpr.Literal):
            return isinstance(wanted, _jaxpr.Literal) and self._same_number(wanted, found)
        if wanted in self.bound:
            return self.bound[wanted] is found
        if self.exact and _kind(wanted) != _kind(found):
            return False
        self.bound[wanted] = found
        return wanted in self.arguments or self._same_maker(wanted, found)

    def _same_maker(self, wanted: Any, found: Any) -> bool:
        a, b = self.maker.get(wanted), self.place.maker.get(found)
        if a is None or b is None or a.primitive is not b.primitive or id(b) in self.place.taken:
            return False
        alike = len(a.invars) == len(b.invars) and list(a.outvars).index(wanted) == list(b.outvars).index(found)
        if not alike or (self.exact and not _same_params(a.params, b.params)):
            return False
        self.used[id(b)] = b
        return all(self._same(x, y) for x, y in zip(a.invars, b.invars, strict=True))

    def _same_number(self, wanted: Any, found: Any) -> bool:
        if not isinstance(found, _jaxpr.Literal):
            return False
        if not self.exact:
            if np.ndim(wanted.val) == np.ndim(found.val) == 0 and _is_real(wanted.val):
                self.marked.setdefault(float(wanted.val), float(found.val))
            return True
        return _same_literal(wanted, found)


def _kind(variable: Any) -> tuple[Any, Any]:
    return getattr(variable.aval, "shape", None), getattr(variable.aval, "dtype", None)


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _maker(pattern: Any) -> dict[Any, Any]:
    return {v: e for e in pattern.eqns for v in e.outvars}


@functools.lru_cache(maxsize=8192)
def _pattern(recogniser: Recogniser, avals: tuple[Aval, ...]) -> Any:
    """The function's jaxpr on such arrays; None where it cannot be called so, or where its name says already what it
    is: one equation, which has a name or does nothing."""
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak) for a in avals]
    keywords = dict(recogniser.keywords) | dict(zip(recogniser.read, MARKS, strict=False))
    try:
        # The code that was traced may have been allowed these promotions.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            closed = jax.make_jaxpr(lambda *x: recogniser.function(*x, **keywords))(*given)
    except Exception:  # whatever a function says of arrays that it is not for, they are not what made this value
        return None
    jaxpr = closed.jaxpr
    made = jaxpr.eqns and len(jaxpr.outvars) == 1 and not closed.consts
    if not made or jaxpr.outvars[0] not in _maker(jaxpr):
        return None
    names = {_jaxpr.name_of_jit(jaxpr.eqns[0]), _jaxpr.name_of_custom(jaxpr.eqns[0])}
    return None if len(jaxpr.eqns) == 1 and recogniser.name in names else jaxpr


# What differs between two traces of one function without meaning anything: functions made anew, and the mesh.
IRRELEVANT = ("ctx_mesh", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees")


def _same_params(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_same_param(name, a[name], b[name]) for name in a)


def _same_param(name: str, a: Any, b: Any) -> bool:
    parts, others = (x if isinstance(x, tuple | list) else (x,) for x in (a, b))
    if any(map(_jaxpr.is_jaxpr, parts)):
        return len(parts) == len(others) and all(map(_same_jaxpr, parts, others))
    if name in IRRELEVANT or callable(a):
        return True
    return bool(np.all(a == b))


def _same_jaxpr(a: Any, b: Any) -> bool:
    """Whether two jaxprs have the same equations in the same order."""
    if not _jaxpr.is_jaxpr(a) or not _jaxpr.is_jaxpr(b):
        return a is b
    a, b = _jaxpr.inner(a).jaxpr, _jaxpr.inner(b).jaxpr
    if any(len(x) != len(y) for x, y in ((a.eqns, b.eqns), (a.invars, b.invars), (a.constvars, b.constvars))):
        return False
    bound = dict(zip((*a.constvars, *a.invars), (*b.constvars, *b.invars), strict=True))

    def same_atoms(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
        return len(xs) == len(ys) and all(_same_atom(x, y, bound) for x, y in zip(xs, ys, strict=True))

    for x, y in zip(a.eqns, b.eqns, strict=True):
        if x.primitive is not y.primitive or not same_atoms(x.invars, y.invars):
            return False
        if len(x.outvars) != len(y.outvars) or not _same_params(x.params, y.params):
            return False
        bound |= dict(zip(x.outvars, y.outvars, strict=True))
    return same_atoms(a.outvars, b.outvars)


def _same_atom(a: Any, b: Any, bound: Mapping[Any, Any]) -> bool:
    if isinstance(a, _jaxpr.Literal) or isinstance(b, _jaxpr.Literal):
        return isinstance(a, _jaxpr.Literal) and isinstance(b, _jaxpr.Literal) and _same_literal(a, b)
    return bound.get(a) is b and _kind(a) == _kind(b)


def _same_literal(a: Any, b: Any) -> bool:
    same_kind = a.aval.shape == b.aval.shape and a.aval.dtype == b.aval.dtype
    return same_kind and bool(np.array_equal(a.val, b.val, equal_nan=_is_real(a.val)))
