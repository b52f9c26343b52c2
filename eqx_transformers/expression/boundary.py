"""How a module's call is seen in a jaxpr: a copy of the model whose modules run inside of named `jax.jit`s.

Every module becomes an instance of a generated subclass of its own class, which has one static field more, its places:
one, or several where a model that is traced traces a part of itself. Nothing is patched, and no class, function or
thread changes. Functions in fields, such as an activation, are wrapped.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import KeyPath, SequenceKey

PREFIX = "expression:"
SCOPE = "expression.order"
PLACES = "_expression_places"


@dataclass(frozen=True)
class Every:
    """Stands in a path for the index of any element: blocks that a forward pass stacks itself must not differ."""

    def __str__(self) -> str:
        return "*"


@dataclass(eq=False)
class Record:
    """One call of a module or of a function in a field, as the Python code saw it."""

    keypath: KeyPath
    tag: str
    cls: type | None
    method: str | None
    config: dict[str, Any]
    in_tree: Any
    traced: tuple[bool, ...]  # of the leaves of (self, args, kwargs)
    static: list[Any]
    own: int  # how many of the traced ones are the module's
    widths: tuple[int, ...]  # how many axes the module's arrays have in this call
    inputs: tuple[Any, ...]
    out_tree: Any = None
    out_traced: tuple[bool, ...] = ()
    out_static: list[Any] = field(default_factory=list)
    outputs: tuple[Any, ...] = ()


class Recorder:
    """The records of one trace. When it is closed, what it watched runs as if nothing watched it."""

    def __init__(self, methods: tuple[str, ...]):
        self.methods = methods
        self.number = next(_numbers)
        self.records: dict[str, Record] = {}
        self.open = True
        _recorders[self.number] = self

    def add(self, record: Record) -> str:
        name = f"{PREFIX}{self.number}:{len(self.records)}"
        self.records[name] = record
        return name


_numbers = itertools.count()
# Places name their recorder by number, so that what JAX caches of a model's shape keeps no recorder alive.
_recorders: "weakref.WeakValueDictionary[int, Recorder]" = weakref.WeakValueDictionary()
_classes: "weakref.WeakKeyDictionary[type, dict[tuple[str, ...], type]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Place:
    """Where a module is, and in whose copy: static, and so a part of what JAX tells programs apart by."""

    recorder: int
    keypath: KeyPath

    @property
    def watching(self) -> Recorder | None:
        found = _recorders.get(self.recorder)
        return found if found is not None and found.open else None


def is_elsewhere(name: str | None) -> bool:
    """Whether a name is that of a call which another trace sees that is still going on, around this one."""
    if name is None or not name.startswith(PREFIX):
        return False
    recorder = _recorders.get(int(name.removeprefix(PREFIX).partition(":")[0]))
    return recorder is not None and recorder.open


def is_any_open() -> bool:
    """Whether a trace is going on, around this code or in another thread."""
    found = (ref() for ref in _recorders.valuerefs())
    return any(recorder is not None and recorder.open for recorder in found)


class Watched:
    """A function in a field of a module, whose calls are seen."""

    def __init__(self, function: Callable[..., Any], place: Place):
        self.function = function
        self.place = place
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.place.watching
        if recorder is None:
            return self.function(*args, **kwargs)
        return _call(recorder, lambda _, *a, **k: self.function(*a, **k), None, self, self.place.keypath, args, kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Watched) and (self.function, self.place) == (other.function, other.place)

    def __hash__(self) -> int:
        return hash((self.function, self.place))


def instrument(tree: Any, recorder: Recorder, keypath: KeyPath = (), *, alike: bool = False) -> Any:
    """The same tree, whose modules' and functions' calls `recorder` sees. With `alike`, paths do not tell elements of
    a sequence apart."""
    if _is_bound(tree):
        return getattr(instrument(tree.__self__, recorder, keypath, alike=alike), tree.__func__.__name__)
    children, shape = _one_level(tree)
    place = Place(recorder.number, keypath)
    if len(children) == 1 and children[0][1] is tree:
        return Watched(tree, place) if keypath and _is_function(tree) else tree
    step = lambda key: Every() if alike and isinstance(key, SequenceKey) else key
    below = lambda path: (*keypath, *map(step, path))
    made = shape.unflatten([instrument(x, recorder, below(path), alike=alike) for path, x in children])
    if not isinstance(tree, eqx.Module) or not is_called(tree, recorder.methods):
        return made
    places = (*getattr(tree, PLACES, ()), place)
    methods = tuple(dict.fromkeys(name for x in places if x.watching is not None for name in x.watching.methods))
    return _as(_watched_class(_unwatched(type(tree)), methods), made, places)


def _is_bound(x: Any) -> bool:
    return isinstance(getattr(x, "__self__", None), eqx.Module) and hasattr(x, "__func__")


def _one_level(tree: Any) -> tuple[list[tuple[KeyPath, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)


def _is_function(x: Any) -> bool:
    return callable(x) and not isinstance(x, type | eqx.Module) and bool(getattr(x, "__name__", ""))


def is_called(module: eqx.Module, methods: tuple[str, ...]) -> bool:
    """Whether its class has one of the methods; Equinox's own wrappers are no modules of anyone's model."""
    home = type(module).__module__
    if home.startswith("equinox.") and not home.startswith("equinox.nn"):
        return False
    return any(_defines(type(module), name) for name in methods)


def _defines(cls: type, name: str) -> bool:
    # `hasattr(cls, "__call__")` is true of every class, which can be called itself.
    return any(name in base.__dict__ for base in cls.__mro__[:-1])


def _unwatched(cls: type) -> type:
    """The class itself, of one that was generated here."""
    return cls.__mro__[1] if PLACES in cls.__dict__ else cls


def _watched_class(cls: type, methods: tuple[str, ...]) -> type:
    made = _classes.setdefault(cls, {})
    if methods not in made:
        made[methods] = _subclass(cls, [name for name in methods if _defines(cls, name)])
    return made[methods]


def _subclass(cls: type, methods: list[str]) -> type:
    inside: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    inside |= {"__annotations__": {PLACES: Any}, PLACES: eqx.field(static=True, default=())}
    inside |= {name: _watched_method(getattr(cls, name), name, cls) for name in methods}
    return type(cls)(cls.__name__, (cls,), inside)


def _watched_method(method: Callable[..., Any], name: str, cls: type) -> Callable[..., Any]:
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = method
        for place in getattr(self, PLACES):
            recorder = place.watching
            if recorder is not None and name in recorder.methods:
                call = _seen(recorder, call, cls, place.keypath)
        return call(self, *args, **kwargs)

    watched.__name__ = name
    return watched


def _seen(recorder: Recorder, method: Callable[..., Any], cls: type, keypath: KeyPath) -> Callable[..., Any]:
    @functools.wraps(method)
    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(recorder, method, cls, self, keypath, args, kwargs)

    return seen


def _as(cls: type, module: Any, places: tuple[Place, ...]) -> Any:
    made = object.__new__(cls)
    for name, value in vars(module).items():
        object.__setattr__(made, name, value)
    object.__setattr__(made, PLACES, places)
    return made


# ---- a call


def _call(
    recorder: Recorder,
    function: Callable[..., Any],
    cls: type | None,
    owner: Any,
    keypath: KeyPath,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`function(owner, …)` in a named `jax.jit`. Tracers are its operands; all else stays what it is in Python."""
    leaves, tree = jax.tree.flatten((None if cls is None else owner, args, kwargs))
    own = len(jax.tree.leaves(owner)) if cls is not None else 0
    traced = tuple(map(_is_traced, leaves))
    record = Record(
        keypath=keypath,
        tag=owner.__name__ if cls is None else cls.__name__,
        cls=cls,
        method=None if cls is None else function.__name__,
        config=_scalars(kwargs) if cls is None else _settings(owner),
        in_tree=tree,
        traced=traced,
        static=[None if is_traced else x for is_traced, x in zip(traced, leaves, strict=True)],
        own=sum(traced[:own]),
        widths=tuple(x.ndim for x in leaves[:own] if is_array(x)),
        inputs=tuple(jax.typeof(x) for x in jax.tree.leaves((args, kwargs)) if is_array(x)),
    )

    def body(*operands: Any) -> list[Any]:
        owner, args, kwargs = arguments_of(record, operands)
        out = function(owner, *args, **kwargs)
        leaves, record.out_tree = jax.tree.flatten(out)
        record.out_traced = tuple(map(_is_traced, leaves))
        record.out_static = [None if t else x for t, x in zip(record.out_traced, leaves, strict=True)]
        record.outputs = tuple(jax.typeof(x) for x in leaves if is_array(x))
        return [_in_order(x) for x in leaves if _is_traced(x)]

    body.__name__ = body.__qualname__ = recorder.add(record)
    operands = [x for x, is_traced in zip(leaves, traced, strict=True) if is_traced]
    operands = operands[: record.own] + [_in_order(x) for x in operands[record.own :]]
    return result_of(record, jax.jit(body)(*operands))


def result_of(record: Record, results: Any) -> Any:
    """The value of the call, of its traced leaves."""
    return jax.tree.unflatten(record.out_tree, _filled(record.out_traced, record.out_static, results))


def arguments_of(record: Record, operands: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The module (None of a function), positional arguments and keywords of the call, of its traced leaves."""
    return jax.tree.unflatten(record.in_tree, _filled(record.traced, record.static, operands))


def _filled(traced: tuple[bool, ...], static: list[Any], values: Any) -> list[Any]:
    rest = iter(values)
    return [next(rest) if is_traced else x for is_traced, x in zip(traced, static, strict=True)]


def _in_order(x: Any) -> Any:
    """`x` itself, by an operation whose batching rule puts the batch first: jit's may leave it on any axis.

    It has every derivative, XLA removes it, and the tree does not show it.
    """
    with jax.named_scope(SCOPE):
        return jax.lax.squeeze(jax.lax.reshape(x, (1, *x.shape)), (0,))


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array or a tracer, and not a setting."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def is_same(a: Any, b: Any) -> bool:
    """Whether a value that was no array in the trace is what it was."""
    if isinstance(a, jax.core.Tracer):
        return False
    return a is b or (type(a) is type(b) and bool(np.all(a == b)))


def _settings(module: eqx.Module) -> dict[str, Any]:
    """What a module was told: its static fields and scalars, and functions by their names."""
    found = {}
    for entry in fields(module):  # pyright: ignore[reportArgumentType]
        value = getattr(module, entry.name, None)
        if entry.name != PLACES and (entry.metadata.get("static") or _is_setting(value)):
            found[entry.name] = value
    return found


def _scalars(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if _is_setting(value)}


def _is_setting(x: Any) -> bool:
    return isinstance(x, bool | int | float | str) or _is_function(x)
