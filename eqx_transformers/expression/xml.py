"""An expression as XML and as JSON: the same tree, an element a node. Queries are asked of this tree."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal
from xml.etree.ElementTree import Element, indent as indented, tostring

import numpy as np

from .node import Node, shorts

Dialect = Literal["yax"]
# Attributes that every node may have. A setting of the same name is `config.name`.
RESERVED = ("kind", "path", "name", "type", "class", "method", "in", "out", "vmap", "stack", "phase", "recognised")
RESERVED_YAX = (*RESERVED, "primitive", "entrypoint", "ephemeral")


def to_xml(root: Node, dialect: Dialect | None = None) -> str:
    """The tree as indented XML; see `Expression.to_xml`."""
    element = element_of(root, dialect)[0]
    indented(element)
    return tostring(element, encoding="unicode")


def to_json(root: Node, indent: int | None = None) -> str:
    """The tree as JSON: a node's tag, its attributes with numbers and bools as such, and its children."""
    return json.dumps(_described(root), indent=indent, allow_nan=False)


def element_of(root: Node, dialect: Dialect | None = None) -> tuple[Element, dict[Element, Node]]:
    """The tree as elements, and which node each of them is."""
    attributes = attributes_yax if dialect == "yax" else attributes_of
    tag_of = _tag_yax if dialect == "yax" else lambda node: node.tag
    nodes: dict[Element, Node] = {}

    def made(node: Node) -> Element:
        element = Element(_name(tag_of(node)), {_name(k): _text(v) for k, v in attributes(node).items()})
        nodes[element] = node
        element.extend(map(made, node.children if dialect == "yax" else inside(node)))
        return element

    return made(root), nodes


def inside(node: Node) -> tuple[Node, ...]:
    """What is inside of a node. A function that does nothing but call one of its own name is that call: `relu` in a
    field is a call of `jax.nn.relu`, which has a derivative rule, and within it a jitted function."""
    if node.kind != "function" or len(node.children) != 1:
        return node.children
    inner = node.children[0]
    is_same = inner.kind == "function" and inner.tag == node.tag and inner.path is None
    return inside(inner) if is_same else node.children


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it, in the order in which they run."""
    yield node
    for child in inside(node):
        yield from walk(child)


def settings(node: Node) -> dict[str, Any]:
    """What a node was told that can be said in a word: scalars, tuples of them, and functions by their names.

    Equations say all they have. What is None was not told.
    """
    return {name: value for name, x in node.config.items() if (value := _said(x)) is not None}


def attributes_of(node: Node, reserved: tuple[str, ...] = RESERVED) -> dict[str, Any]:
    """What is known of a node, without what there is nothing to say of."""
    known = {
        "kind": node.kind,
        "path": node.path,
        "name": name_of(node),
        "type": None if node.cls is None else node.cls.__name__,
        "class": None if node.cls is None else f"{node.cls.__module__}.{node.cls.__qualname__}",
        "method": node.method,
        "in": shorts(node.inputs) or None,
        "out": shorts(node.outputs) or None,
        "vmap": node.vmap or None,
        "stack": node.stack,
        "phase": node.phase,
        "recognised": node.recognised or None,
    }
    told = {f"config.{name}" if name in reserved else name: value for name, value in settings(node).items()}
    return {name: value for name, value in known.items() if value is not None} | told


def name_of(node: Node) -> str | None:
    """The last step of a path; where there is none, the name of a function."""
    if node.path is None:
        return node.tag if node.kind == "function" else None
    return node.path.rpartition(".")[2] or None


def attributes_yax(node: Node) -> dict[str, Any]:
    """The same under the names that YAX has for them, and `features` for the width of a linear map."""
    known = attributes_of(node, RESERVED_YAX) | {"primitive": _tag_yax(node)}
    if node.kind in ("root", "module"):
        known |= {"ephemeral": node.kind == "root"} | ({"entrypoint": node.method} if node.method else {})
    if node.kind == "function" or node.path == "":
        known["name"] = node.tag
    width = known.get("out_features", _width(node))
    return known if width is None else {"features": width} | known


def _width(node: Node) -> int | None:
    """Of a linear map that does not say it in a field: sizes are properties of arrays."""
    is_linear = node.cls is not None and node.cls.__name__ == "Linear" and len(node.outputs) == 1
    return node.outputs[0].shape[-1] if is_linear and node.outputs[0].ndim else None


def _tag_yax(node: Node) -> str:
    if node.kind in ("root", "module"):
        return "module_call"
    # A recognised function has no equation of its own: it is one of the calls that JAX inlined.
    name = "jit" if node.equation is None else node.equation.primitive.name
    return "jit" if name == "pjit" else name


def _said(x: Any) -> Any:
    if isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):
        return x if np.isfinite(x) else str(x)
    if isinstance(x, np.generic):
        return _said(x.item())
    if isinstance(x, np.dtype):
        return str(x)
    if isinstance(x, tuple | list):
        parts = tuple(map(_said, x))
        return None if any(part is None for part in parts) else parts
    return getattr(x, "__name__", None) if callable(x) else None


def _described(node: Node) -> dict[str, Any]:
    described = {"tag": node.tag, "attributes": attributes_of(node)}
    children = [_described(child) for child in inside(node)]
    return described | ({"children": children} if children else {})


# ---- what XML can hold

# All else than these is no character of XML 1.0.
ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _name(text: str) -> str:
    """A name as XML allows it: `<lambda>` is `_lambda_`."""
    text = re.sub(r"[^A-Za-z0-9_.-]", "_", text)
    return text if re.match(r"[A-Za-z_]", text) else f"_{text}"


def _text(x: Any) -> str:
    text = str(x).lower() if isinstance(x, bool) else str(x)
    return ILLEGAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
