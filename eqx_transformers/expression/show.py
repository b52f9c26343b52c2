"""An expression as a person reads it: a line a call, what is inside of it indented."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import KeyPath, SequenceKey

from .node import Node, shorts
from .query import Traced, find
from .xml import inside, settings


class Options(NamedTuple):
    """See `Expression.show`."""

    depth: int | None = None
    width: int = 120
    functions: bool = False
    equations: bool = False
    fold: bool = True


def show(expression: Traced, options: Options, under: Any = None) -> str:
    """The text; `under` is a path as printed, or what `find` takes."""
    root = expression.root
    if under is None:
        count = sum(1 for _ in root.walk()) - 1
        return "\n".join(_lines(shown(root, options), options)) or f"no call of a module; equations: {count}"
    nodes = [node for node in root.walk() if isinstance(under, str) and node.path == under]
    return "\n".join(
        line for node in nodes or find(expression, under) for line in _opened(node, _inside(node, options), 0)
    )


def _inside(node: Node, options: Options) -> Options:
    """What was asked for by itself is shown with its inside, a function too."""
    return options if shown(node, options) else options._replace(functions=True)


def _lines(nodes: Sequence[Node], options: Options, level: int = 0) -> Iterator[str]:
    """The lines of these nodes and of what is shown of their insides; blocks that are alike are shown once."""
    first: Node | None = None
    folded: list[Node] = []
    for node in nodes:
        if first is not None and options.fold and _alike(first, node, options):
            folded.append(node)
            continue
        yield from _folded(first, folded, options.width, level)
        first, folded = node, []
        yield from _opened(node, options, level)
    yield from _folded(first, folded, options.width, level)


def _opened(node: Node, options: Options, level: int) -> Iterator[str]:
    rows = shown(node, options)
    is_cut = options.depth is not None and level + 1 >= options.depth
    yield _fitted(node, level, options.width, " …" if rows and is_cut else "")
    if not is_cut:
        yield from _lines(rows, options, level + 1)


# ---- what a reader wants to see


def shown(node: Node, options: Options) -> list[Node]:
    """What is shown of the inside of a node: modules and functions, and loops and branches that contain some.

    Of functions those that are in a field of the model, or were recognised, or are anyone's own. JAX's helpers
    (functions of `jax.numpy`, and those whose names are private) are left out, and so is what is inside of a function
    that calls no module.
    """
    if options.equations:
        return list(node.children)
    if node.kind == "function" and not options.functions and not _calls_a_module(node):
        return []
    return [child for child in inside(node) if _is_shown(child, options)]


def _is_shown(node: Node, options: Options) -> bool:
    if node.kind == "function":
        return options.functions or not _is_helper(node) or _calls_a_module(node)
    return node.kind == "module" or any(_is_shown(child, options) for child in node.children)


def _is_helper(node: Node) -> bool:
    is_own = node.path is not None or node.recognised
    return not is_own and (not node.tag.isidentifier() or node.tag.startswith("_") or hasattr(jnp, node.tag))


def _calls_a_module(node: Node) -> bool:
    return any(child.kind == "module" or _calls_a_module(child) for child in node.children)


# ---- a line


def _fitted(node: Node, level: int, width: int, end: str) -> str:
    """The line of a node. Where it is longer than `width`, settings are left out, the last ones first."""
    said = told(node)
    for count in range(len(said), -1, -1):
        text = "  " * level + _line(node, said[:count] + ["…"] * (count < len(said))) + end
        if len(text) <= width:
            return text
    return _cut(text, width)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _line(node: Node, said: list[str]) -> str:
    return head(node) + (f" [{' '.join(said)}]" if said else "") + signature(node)


def head(node: Node) -> str:
    """Where it is, and what."""
    tag = node.tag if node.method in (None, "__call__") else f"{node.tag}.{node.method}"
    return f"{node.path} : {tag}" if node.path else tag


def told(node: Node) -> list[str]:
    """Marks and settings; of loops and branches, how often they turn."""
    marks = [f"vmap={node.vmap}"] * bool(node.vmap) + [f"stack={node.stack}"] * (node.stack is not None)
    marks += ["recognised"] * node.recognised + [str(node.phase)] * (node.phase is not None)
    kept = {name: x for name, x in settings(node).items() if node.kind != "control" or name == "length"}
    return marks + [f"{name}={_said(value)}" for name, value in kept.items()]


def signature(node: Node) -> str:
    """What it is given and gives; nothing of the root, and of loops and branches, which pass on all there is."""
    return "" if node.kind in ("root", "control") else f" ({shorts(node.inputs)}) -> {shorts(node.outputs)}"


def _said(value: Any) -> str:
    if not isinstance(value, tuple):
        text = str(value)
        return text if text.isprintable() else repr(value)
    return f"({', '.join(map(_said, value))}{',' * (len(value) == 1)})"


# ---- what is alike


def _folded(first: Node | None, nodes: list[Node], width: int, level: int) -> Iterator[str]:
    if first is None or not nodes:
        return
    paths = list(dict.fromkeys(str(node.path) for node in nodes))
    span = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
    said = f"{len(nodes)} more" if paths == [first.path] else f"as {first.path}"
    yield _cut("  " * level + f"{span} : {said}", width)


def _alike(first: Node, node: Node, options: Options) -> bool:
    """Whether two calls are of elements of one sequence, or of one module, and nothing shown of them differs."""
    a, b = first.keypath, node.keypath
    if not a or not b or len(a) != len(b) or first.kind != "module":
        return False
    gaps = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    is_one_step = len(gaps) < 2 and all(isinstance(key, SequenceKey) for gap in gaps for key in gap)
    return is_one_step and _likeness(first, a, options) == _likeness(node, b, options)


def _likeness(node: Node, base: KeyPath, options: Options) -> tuple[Any, ...]:
    """All that is shown of a node, its path from the block at `base` on."""
    path, size = node.keypath, len(base)
    relative = path if path is None or path[:size] != base else ("here", *path[size:])
    said = (node.tag, node.method, *told(node), signature(node))
    return relative, said, tuple(_likeness(child, base, options) for child in shown(node, options))
