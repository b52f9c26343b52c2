"""Nodes of an expression found by XPath, class, function, selection or predicate; and a `where` for `eqx.tree_at`."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Protocol, runtime_checkable
from xml.etree.ElementTree import Element, ElementTree

from jax.tree_util import KeyPath, SequenceKey

from ..surgery.paths import at, children, listed, spell
from ..surgery.select import Selection
from .boundary import Every
from .build import spell_call
from .errors import NoMatch, QueryError
from .node import Node
from .xml import Dialect, attributes_of, element_of, name_of, walk


@runtime_checkable
class Traced(Protocol):
    """What of an expression is needed to find nodes in it."""

    @property
    def root(self) -> Node: ...

    def skeleton(self) -> Any: ...


def find(expression: Traced, what: Any, *, allow_empty: bool = False) -> tuple[Node, ...]:
    """The nodes of an expression that are meant by `what`, each once, never the root:

    | `what` | means |
    |---|---|
    | a text | the XPath query's nodes |
    | what `expression.query` gave | the nodes of the same query, asked of this expression |
    | a `Selection` (`surgery.select`) | the calls of what it selects in the model |
    | a class | the calls of modules of this class and of its subclasses |
    | a function | the calls of functions of its name: `jax.nn.softmax` |
    | any other function | a predicate: the nodes of which it is True |
    | a node, or a sequence of any of these | these |

    Raises a `NoMatch` that names what is near when there are none (of each, in a sequence), unless `allow_empty`; a
    selection that selects nothing in the model raises its own `ValueError` in any case.
    """
    if isinstance(what, list | tuple):
        found = [node for part in what for node in find(expression, part, allow_empty=allow_empty)]
        return tuple(dict.fromkeys(found))
    found = tuple(node for node in _meant(expression, what) if node.kind != "root")
    if not found and not allow_empty:
        raise NoMatch(_nothing(expression.root, what))
    return found


def query(expression: Traced, xpath: str, dialect: Dialect | None = None, *, allow_empty: bool = False) -> "Found":
    """The nodes that an XPath query selects; see `Expression.query`."""
    nodes = _asked(expression.root, xpath, dialect)
    if not nodes and not allow_empty:
        raise NoMatch(_nothing(expression.root, xpath))
    return Found(xpath, dialect, nodes)


@dataclass(frozen=True, eq=False)
class Found:
    """The nodes of a query, in the order that the engine gives: that in which they run."""

    xpath: str
    dialect: Dialect | None
    nodes: tuple[Node, ...]

    def __repr__(self) -> str:
        paths = self.paths
        said = ", ".join(path or "." for path in (*paths[:6], "…")[: len(paths)]) or "no place in the model"
        return f"<{self.xpath!r}: {self.count} nodes, at {said}>"

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.nodes)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where in the model they are, each place once; what has no place is not among them."""
        return tuple(dict.fromkeys(node.path for node in self.nodes if node.path is not None))

    def one(self) -> Node:
        """The node. Raises a `QueryError` unless there is one alone."""
        if len(self.nodes) != 1:
            said = ", ".join(node.name for node in self.nodes[:6]) + ", …" * (self.count > 6)
            raise QueryError(f"{self.xpath!r}: expected 1 node, found {self.count}: {said}")
        return self.nodes[0]

    @property
    def where(self) -> Callable[[Any], list[Any]]:
        """For `eqx.tree_at(found.where, model, replace_fn=…)`: the modules and functions at the nodes' paths, in the
        order of `paths`. A path with `*` is all elements of its sequence.

        Raises a `QueryError` for a node that has no place in the tree, and for two of which one contains the other.
        """
        keypaths = tuple(dict.fromkeys(map(_place, self.nodes)))
        _expect_apart(keypaths)
        return lambda model: [at(model, path) for keypath in keypaths for path in places(model, keypath)]


# ---- XPath


def _asked(root: Node, xpath: str, dialect: Dialect | None) -> tuple[Node, ...]:
    if dialect not in (None, "yax"):
        raise QueryError(f"The dialect of a query is None (XPath) or 'yax'; it is {dialect!r}.")
    engine = _engine()
    element, nodes = element_of(root, dialect)
    asked = _numeric(_translated(xpath) if dialect == "yax" else xpath)
    try:
        found = engine.select(ElementTree(element), asked, item=element)
    except (engine.ElementPathError, ArithmeticError, RecursionError) as error:
        said = "" if asked == xpath else f" (asked as {asked!r})"
        raise QueryError(f"This query is not XPath that can be asked: {error}.\n  {xpath}{said}") from error
    return tuple(_node_of(x, xpath, nodes) for x in (found if isinstance(found, list) else [found]))


def _engine() -> Any:
    try:
        import elementpath
    except ImportError as error:
        raise ImportError("A query needs elementpath: pip install 'eqx_transformers[expression]'") from error
    return elementpath


def _node_of(x: Any, xpath: str, nodes: dict[Element, Node]) -> Node:
    x = x.getroot() if hasattr(x, "getroot") else x  # the document is its root
    try:
        return nodes[x]
    except (KeyError, TypeError):
        raise QueryError(
            f"{xpath!r} gives {x!r}, but a query selects nodes: ask for them, and read .count and .paths."
        ) from None


def _translated(query: str) -> str:
    """A query of YAX's as XPath: a step that is a predicate alone (`//[@a=1]`) is `*`, and `//` alone is all nodes.
    What is `jit` now was `pjit` when it was written."""
    query = re.sub(r"\bpjit\b", "jit", query)
    if query.strip() == "//":
        return "//*"
    return _outside_quotes(lambda piece: re.sub(r"/(\s*)\[", r"/\1*[", piece), query)


def _numeric(query: str) -> str:
    """Where an attribute is compared with a number, only those that are numbers: the engine refuses the others."""
    pattern = r"(@[\w.-]+)(\s*(?:=|!=|<=|>=|<|>)\s*-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))"
    return _outside_quotes(lambda piece: re.sub(pattern, r"\1[. castable as xs:double]\2", piece), query)


def _outside_quotes(change: Callable[[str], str], query: str) -> str:
    pieces = re.split(r"(\"[^\"]*\"|'[^']*')", query)
    return "".join(piece if i % 2 else change(piece) for i, piece in enumerate(pieces))


# ---- what else can be meant


def _meant(expression: Traced, what: Any) -> Iterable[Node]:
    if isinstance(what, str):
        return _asked(expression.root, what, None)
    if isinstance(what, Found):
        return _asked(expression.root, what.xpath, what.dialect)
    if isinstance(what, Node):
        return [_own(expression.root, what)]
    everything = [node for node in walk(expression.root) if node is not expression.root]
    if isinstance(what, Selection):
        return _selected(everything, what.paths(expression.skeleton()))
    if isinstance(what, type):
        return [node for node in everything if node.cls is not None and issubclass(node.cls, what)]
    if callable(what):
        called = [node for node in everything if node.kind == "function" and node.tag == _name(what)]
        return called if called or _is_function(what) else [node for node in everything if _holds(what, node)]
    raise QueryError(
        f"Nodes are found by an XPath query, a class, a function, a predicate, a Selection or a node; this is {what!r}."
    )


def _own(root: Node, node: Node) -> Node:
    if not any(node is other for other in root.walk()):
        raise QueryError(f"{node.name}: this node is of another expression. Query this one, or pass the query.")
    return node


def _selected(nodes: Sequence[Node], paths: Sequence[str]) -> Iterator[Node]:
    chosen = set(paths)
    for node in nodes:
        if node.keypath is not None and (node.path in chosen or _is_any_of(node.keypath, chosen)):
            yield node


def _is_any_of(keypath: KeyPath, paths: set[str]) -> bool:
    """Whether a call that blocks share is one of a block that is chosen."""
    if not any(isinstance(key, Every) for key in keypath):
        return False
    pattern = r"\.".join(r"\d+" if isinstance(key, Every) else re.escape(spell((key,))) for key in keypath)
    return any(re.fullmatch(pattern, path) for path in paths)


def _name(function: Any) -> str | None:
    name = getattr(function, "__name__", None)
    return None if name == "<lambda>" else name  # every lambda has this name: it is a predicate


def _is_function(x: Any) -> bool:
    """Whether it cannot be a predicate: JAX's own, and what has a name but is no plain function, as a jitted one."""
    if not isinstance(x, FunctionType):
        return _name(x) is not None
    return str(x.__module__).partition(".")[0] == "jax"  # code that was executed has no module


def _holds(predicate: Callable[[Node], Any], node: Node) -> bool:
    name = getattr(predicate, "__name__", repr(predicate))
    try:
        holds = predicate(node)
    except Exception as error:
        raise QueryError(
            f"No function that is called here has the name {name}, and as a predicate on the node"
            f" {node.name} it failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(holds, bool):
        raise QueryError(
            f"No function that is called here has the name {name}, and a predicate gives a bool, not {holds!r}."
        )
    return holds


# ---- nothing found


def _nothing(root: Node, what: Any) -> str:
    nodes = [node for node in walk(root) if node is not root]
    asked = what.xpath if isinstance(what, Found) else what
    words = [_called(asked)] if not isinstance(asked, str) else re.findall(r"(?<![@\w.-])[\w.-]+", asked)
    settings = re.findall(r"@([\w.-]+)", asked) if isinstance(asked, str) else []
    tags = _near(words, {node.tag for node in nodes if node.kind != "equation"})
    paths = _near(words, {x for node in nodes if node.path for x in (node.path, str(name_of(node)))})
    attributes = _near(settings, {name for node in nodes for name in attributes_of(node)})
    near = listed("tags", tags) + listed("paths", paths) + listed("attributes", attributes)
    return f"{_called(asked)} finds none of the {len(nodes)} nodes of this expression.{near or _modules(nodes)}"


def _called(what: Any) -> str:
    return repr(what) if isinstance(what, str) else getattr(what, "__name__", None) or repr(what)


def _near(words: list[str], names: set[str]) -> list[str]:
    found = [name for word in words if word not in names for name in get_close_matches(word, sorted(names))]
    return list(dict.fromkeys(found))[:4]


def _modules(nodes: list[Node]) -> str:
    tags = list(dict.fromkeys(node.tag for node in nodes if node.kind == "module"))
    return f" Its modules: {', '.join(tags[:8])}{', …' if len(tags) > 8 else ''}." if tags else " It calls no module."


# ---- places


def _place(node: Node) -> KeyPath:
    if node.keypath is None:
        raise QueryError(f"{node.tag} is a {node.kind}, not a module: it has no place in the tree; use rewrite().")
    return node.keypath


def _expect_apart(keypaths: Sequence[KeyPath]) -> None:
    """Raises where replacing one node would lose another."""
    chosen = set(keypaths)
    for inner in keypaths:
        outer = next((inner[:i] for i in range(len(inner)) if inner[:i] in chosen), None)
        if outer is not None:
            names = (_spelled(outer), _spelled(inner))
            raise QueryError(f"{names[0]} contains {names[1]}: each can only be replaced by itself.")


def _spelled(keypath: KeyPath) -> str:
    return spell_call(keypath) or "the model itself"


def places(model: Any, keypath: KeyPath) -> Iterator[KeyPath]:
    """The same path, for each element where it says any."""
    i = next((i for i, key in enumerate(keypath) if isinstance(key, Every)), None)
    if i is None:
        yield keypath
        return
    for index in range(len(children(at(model, keypath[:i])))):
        yield from places(model, (*keypath[:i], SequenceKey(index), *keypath[i + 1 :]))
