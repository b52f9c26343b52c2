"""An expression put to work: its equations run again, some of them replaced, some of their values caught."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import _jaxpr
from .boundary import PREFIX, SCOPE, is_any_open, is_elsewhere
from .errors import ExpressionError
from .node import Chain, Node

# What a replacement is given: the operands' values, what the place gave itself, and which turn of a scan it is.
Replace = Callable[[Sequence[Any], Callable[[], Sequence[Any]], Any], Sequence[Any]]


class Replacement(NamedTuple):
    """What stands in the place of an equation, or of the last one of a group."""

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    call: Replace


@dataclass
class Plan:
    """What to do at which place. `touched` are the ways to the places: all else runs as it is.

    `caught` gives the arrays that the operands and the results of a place are worth.
    """

    replaced: dict[Chain, Replacement] = field(default_factory=dict)
    skipped: set[Chain] = field(default_factory=set)
    caught: dict[Chain, Callable[[Sequence[Any], Sequence[Any]], Any]] = field(default_factory=dict)
    touched: set[Chain] = field(default_factory=set)

    def touch(self, node: Node) -> None:
        self.touched |= {node.chain[:i] for i in range(1, len(node.chain))}

    def acts_at(self, chain: Chain) -> bool:
        return chain in self.replaced or chain in self.skipped or chain in self.caught or chain in self.touched


class Caught(NamedTuple):
    """A value that was brought out, with a leading axis for each scan around it, and the place that it is from."""

    chain: Chain
    value: Any


def evaluate(body: _jaxpr.Inner, values: Sequence[Any], plan: Plan) -> tuple[list[Any], list[Caught]]:
    """The results, and what was caught."""
    chains: list[Chain] = []
    out, caught = _run(body, values, plan, (), chains, None)
    return out, [Caught(chain, value) for chain, value in zip(chains, caught, strict=True)]


def _run(
    body: _jaxpr.Inner, values: Sequence[Any], plan: Plan, at: Chain, chains: list[Chain], turn: Any
) -> tuple[list[Any], list[Any]]:
    """Of one jaxpr. `chains` collects where each caught value comes from, in their order."""
    state = _State(body, values, plan, at)
    caught: list[Any] = []
    for equation in body.jaxpr.eqns:
        chain = (*at, id(equation))
        if chain in plan.skipped and id(equation) not in state.kept:
            continue
        if id(equation) in state.same and not plan.acts_at(chain):
            state.flush()
            state.write(equation.outvars, [state.read(state.same[id(equation)])])
            continue
        if _waits(equation, chain, plan):
            state.waiting.append(equation)
            continue
        state.flush()
        caught += _step(state, equation, chain, chains, turn)
    state.flush()
    return [state.read(x) for x in body.jaxpr.outvars], caught


def _waits(equation: Any, chain: Chain, plan: Plan) -> bool:
    """Whether an equation runs as it is, in one stretch with its neighbours. Boundaries are taken apart: what runs is
    what would have run without them."""
    return not plan.acts_at(chain) and not _is_boundary(equation)


def _is_boundary(equation: Any) -> bool:
    name = _jaxpr.name_of_jit(equation)
    return name is not None and name.startswith(PREFIX) and not is_elsewhere(name)


def _step(state: "_State", equation: Any, chain: Chain, chains: list[Chain], turn: Any) -> list[Any]:
    plan, caught = state.plan, []
    replacement = plan.replaced.get(chain)
    inputs = equation.invars if replacement is None else replacement.inputs
    operands = [state.read(x) for x in inputs]

    def original() -> list[Any]:
        if replacement is not None and list(replacement.inputs) != list(equation.invars):
            raise ExpressionError("A recognised function has no call of its own to go on with.")
        out, more = _opened(state.body.jaxpr, equation, operands, plan, chain, chains, turn)
        caught.extend(more)
        return out

    if replacement is None:
        state.write(equation.outvars, original())
    else:
        state.write(replacement.outputs, replacement.call(operands, original, turn))
    if chain in plan.caught:
        outputs = equation.outvars if replacement is None else replacement.outputs
        chains.append(chain)
        caught.append(plan.caught[chain](operands, [state.read(x) for x in outputs]))
    return caught


def _opened(
    jaxpr: Any, equation: Any, operands: Sequence[Any], plan: Plan, chain: Chain, chains: list[Chain], turn: Any
) -> tuple[list[Any], list[Any]]:
    """What an equation gives: boundaries run in place, containers with something to do inside are put together anew."""
    body = _jaxpr.body_of_jit(equation)
    if body is not None and _is_boundary(equation):
        return _run(body, operands, plan, chain, chains, turn)
    if chain not in plan.touched:
        return _jaxpr.run_one(jaxpr, equation, operands), []
    rebuild = _jaxpr.CONTAINERS.get(equation.primitive.name)
    if rebuild is None:
        raise ExpressionError(f"Nothing can be changed or caught inside of {equation.primitive.name}.")
    found: list[Chain] = []

    def run(body: _jaxpr.Inner, operands: Sequence[Any], inner: Any) -> tuple[list[Any], list[Any]]:
        found.clear()  # a container may trace its body more than once
        turns = turn if inner is None else inner if turn is None else (turn, inner)
        return _run(body, operands, plan, chain, found, turns)

    out, caught = rebuild(equation, operands, run)
    chains += found if caught else []
    return list(out), list(caught)


class _State:
    """The variables of one jaxpr that have values already, and the equations that wait to be run together."""

    def __init__(self, body: _jaxpr.Inner, values: Sequence[Any], plan: Plan, at: Chain):
        self.body, self.plan, self.at = body, plan, at
        self.values = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        self.values |= dict(zip(body.jaxpr.invars, values, strict=True))
        self.waiting: list[Any] = []
        self.kept = _kept(body.jaxpr, plan, at)
        # A trace around this one needs them: what is mapped between the two is in its order by them alone.
        self.same = {} if is_any_open() else _same_again(body.jaxpr)
        self.last = _last_reads(body.jaxpr, plan, at)
        self.place = {id(e): i for i, e in enumerate(body.jaxpr.eqns)}
        for e, before in self.same.items():
            self.last[before] = max(self.last[before], self.place[e])

    def read(self, x: Any) -> Any:
        return x.val if isinstance(x, _jaxpr.Literal) else self.values[x]

    def write(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        self.values |= dict(zip(variables, values, strict=True))

    def flush(self) -> None:
        """Runs what waits; only what is read later comes out."""
        if not self.waiting:
            return
        end = self.place[id(self.waiting[-1])]
        wanted = [v for e in self.waiting for v in e.outvars if self.last.get(v, -1) > end]
        self.write(wanted, _jaxpr.run(self.body.jaxpr, self.waiting, wanted, self.values))
        self.waiting = []


def _same_again(jaxpr: Any) -> dict[int, Any]:
    """What a boundary's operations for the order of axes give back as it was, by the equation that does: they would be
    second copies of their values, which a derivative would keep."""
    made = {e.outvars[0]: e.invars[0] for e in jaxpr.eqns if e.primitive.name == "reshape" and _orders(e)}
    found = {}
    for e in jaxpr.eqns:
        if e.primitive.name == "squeeze" and _orders(e) and e.invars[0] in made:
            before, after = made[e.invars[0]], e.outvars[0]
            if before.aval.shape == after.aval.shape:
                found[id(e)] = before
    return found


def _orders(equation: Any) -> bool:
    return SCOPE in _jaxpr.scopes(equation) and not isinstance(equation.invars[0], _jaxpr.Literal)


def _reads(equation: Any, plan: Plan, chain: Chain) -> list[Any]:
    replacement = plan.replaced.get(chain)
    return _jaxpr.variables(equation.invars if replacement is None else replacement.inputs)


def _last_reads(jaxpr: Any, plan: Plan, at: Chain) -> dict[Any, int]:
    """Behind which equation each variable is not read any more."""
    last = {}
    for i, e in enumerate(jaxpr.eqns):
        chain = (*at, id(e))
        more = _jaxpr.variables(plan.replaced[chain].outputs) if chain in plan.replaced else []
        last |= dict.fromkeys([*_reads(e, plan, chain), *more], i)
        last |= dict.fromkeys(_jaxpr.variables(e.invars), i)
    return last | dict.fromkeys(_jaxpr.variables(jaxpr.outvars), len(jaxpr.eqns))


def _kept(jaxpr: Any, plan: Plan, at: Chain) -> set[int]:
    """Equations of replaced groups that have to run nevertheless: what they make is read elsewhere."""
    read = set(_jaxpr.variables(jaxpr.outvars))
    kept: set[int] = set()
    for e in reversed(jaxpr.eqns):
        chain = (*at, id(e))
        if chain not in plan.skipped or not read.isdisjoint(e.outvars):
            read |= set(_reads(e, plan, chain))
            kept |= {id(e)} if chain in plan.skipped else set()
    return kept
