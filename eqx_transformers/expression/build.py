"""From a jaxpr to nodes: boundaries are modules' calls, named jits and custom derivatives are functions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ..surgery.paths import at, spell
from . import _jaxpr
from .boundary import PREFIX, SCOPE, Every, Record
from .node import Node, struct
from .recognise import Group, Recogniser, groups_of


class Source(NamedTuple):
    """What the nodes of one trace are made from."""

    records: Mapping[str, Record]
    model: Any
    recognisers: tuple[Recogniser, ...]


class Above(NamedTuple):
    """The equations around a place, and what a derivative or a function around it says of it."""

    around: tuple[Any, ...] = ()
    phase: str | None = None
    within: str | None = None  # the function's name, which is not recognised within itself


def nodes_of(source: Source, body: _jaxpr.Inner, above: Above) -> tuple[Node, ...]:
    """The nodes of a jaxpr; equations that make up a recognised function are the children of its node."""
    recognisers = tuple(r for r in source.recognisers if r.name != above.within)
    groups = groups_of(body.jaxpr, recognisers)
    group_at = {id(e): group for group in groups for e in group.equations}
    found: list[Node] = []
    done: set[int] = set()
    for equation in body.jaxpr.eqns:
        group = group_at.get(id(equation))
        if group is not None and id(group) not in done:
            done.add(id(group))
            found.append(_recognised(source, group, above))
        if group is None and _is_anothers(source, equation):
            below = Above((*above.around, equation), above.phase, above.within)
            found += nodes_of(source, _jaxpr.body_of_jit(equation), below)  # pyright: ignore[reportArgumentType]
        elif group is None and SCOPE not in _jaxpr.scopes(equation):
            found.append(node_of(source, equation, above))
    return tuple(found)


def _is_anothers(source: Source, equation: Any) -> bool:
    """Whether it is a call that another trace saw: one within this, or around it."""
    name = _jaxpr.name_of_jit(equation)
    return name is not None and name.startswith(PREFIX) and name not in source.records


def node_of(source: Source, equation: Any, above: Above) -> Node:
    name = _jaxpr.name_of_jit(equation)
    if name is not None and name in source.records:
        return _called(source, equation, above, source.records[name])
    custom = _jaxpr.name_of_custom(equation)
    if name is not None or custom is not None:
        return _function(source, equation, above, str(name or custom))
    return _equation(source, equation, above)


def _recognised(source: Source, group: Group, above: Above) -> Node:
    plain = source._replace(recognisers=())
    return Node(
        kind="function",
        tag=group.recogniser.name,
        config=dict(group.recogniser.keywords),
        inputs=_structs(group.inputs),
        outputs=_structs(group.outputs),
        recognised=True,
        children=tuple(node_of(plain, e, above) for e in group.equations),
        chain=_chain(above.around, group.equations[-1]),
        around=above.around,
        group=group,
        **_marks(group.equations[-1], above),
    )


def _called(source: Source, equation: Any, above: Above, record: Record) -> Node:
    tag = record.tag
    marks = _marks(equation, above)
    below = Above((*above.around, equation), marks["phase"], None if record.cls is not None else tag)
    return Node(
        kind="module" if record.cls is not None else "function",
        tag=tag,
        path=spell_call(record.keypath),
        keypath=record.keypath,
        cls=record.cls,
        method=record.method,
        config=record.config,
        inputs=tuple(map(struct, record.inputs)),
        outputs=tuple(map(struct, record.outputs)),
        stack=_stack(source.model, record, marks["vmap"]),
        children=nodes_of(source, _jaxpr.body_of_jit(equation), below),  # pyright: ignore[reportArgumentType]
        chain=_chain(above.around, equation),
        around=above.around,
        equation=equation,
        record=record,
        **marks,
    )


def _function(source: Source, equation: Any, above: Above, name: str) -> Node:
    return _container(source, equation, above, "function", name, {}, within=name)


def _equation(source: Source, equation: Any, above: Above) -> Node:
    kind = "control" if _jaxpr.inners(equation) else "equation"
    config = {name: x for name, x in equation.params.items() if _is_readable(x)}
    return _container(source, equation, above, kind, equation.primitive.name, config)


def _container(
    source: Source, equation: Any, above: Above, kind: Any, tag: str, config: dict[str, Any], within: str | None = None
) -> Node:
    marks = _marks(equation, above)
    below = Above((*above.around, equation), marks["phase"], within)
    bodies = _jaxpr.inners(equation)
    return Node(
        kind=kind,
        tag=tag,
        config=config,
        inputs=_structs(equation.invars),
        outputs=_structs(equation.outvars),
        children=tuple(node for body in bodies for node in nodes_of(source, body, below)),
        chain=_chain(above.around, equation),
        around=above.around,
        equation=equation,
        **marks,
    )


def _marks(equation: Any, above: Above) -> dict[str, Any]:
    scopes = _jaxpr.scopes(equation)
    phase = "transpose" if "transpose(" in scopes else "jvp" if "jvp(" in scopes else above.phase
    return {"vmap": scopes.count("vmap("), "phase": phase}


def _chain(around: Sequence[Any], equation: Any) -> tuple[int, ...]:
    # One inner jaxpr may stand at several places, for jit keeps what it has traced: a node is the way to it.
    return (*map(id, around), id(equation))


def _structs(atoms: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(struct(x.aval) for x in atoms if hasattr(x.aval, "shape"))


def _is_readable(x: Any) -> bool:
    return isinstance(x, bool | int | float | str | tuple) and len(str(x)) < 60


def _stack(model: Any, record: Record, vmap: int) -> int | None:
    """How many layers the module's arrays hold at its path, where the call has those of one."""
    if record.cls is None or vmap or any(isinstance(key, Every) for key in record.keypath):
        return None
    arrays = [x for x in jax.tree.leaves(at(model, record.keypath)) if hasattr(x, "ndim")]
    if not arrays or not record.widths or arrays[0].ndim != record.widths[0] + 1:
        return None
    return arrays[0].shape[0]


def spell_call(keypath: Any) -> str:
    """A key path as text; an element that may be any is `*`."""
    return ".".join("*" if isinstance(key, Every) else spell((key,)) for key in keypath)
