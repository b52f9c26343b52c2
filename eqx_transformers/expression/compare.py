"""Where two models begin to differ: the first node, in the order in which they finish, whose result is not the same."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .capture import activation_of, expect_open
from .errors import ExpressionError
from .evaluate import Plan
from .expression import trace
from .node import Node

Key = tuple[str, int]


class Difference(NamedTuple):
    """The node at `path`, of class or function `tag`, and of stacked blocks the `layer`.

    `largest` is the largest absolute difference of its results, infinite where only one is NaN or their shapes differ;
    `scale` is the largest number of the first model's.
    """

    path: str
    tag: str
    largest: float
    scale: float
    layer: int | None = None


def compare(
    a: Callable[..., Any], b: Callable[..., Any], *, rtol: float = 1e-5, atol: float = 1e-5
) -> Callable[..., Difference | None]:
    """`compare(a, b)(*args, **kwargs)` is the first `Difference` of two models on an input; None where there is none.

    Nodes with the same path are compared, modules and functions in fields, the k-th call with the k-th call, in the
    order in which they finish: what is inside of a module comes before it. Results may differ by atol + rtol · `scale`.
    Raises an `ExpressionError` where the two have no path in common but the root's.
    """

    def run(*args: Any, **kwargs: Any) -> Difference | None:
        first, second = _results(a, args, kwargs), _results(b, args, kwargs)
        shared = [key for key in first if key in second]
        if not any(key[0] for key in shared):
            raise ExpressionError("The two models have no path in common: nothing can be compared but their outputs.")
        for key, turn in _in_turns(shared, {key: first[key][0] for key in shared}):
            node, mine = first[key]
            found = _difference(node, _turn_of(mine, turn), _turn_of(second[key][1], turn))._replace(layer=turn)
            if np.isinf(found.largest) or found.largest > atol + rtol * found.scale:
                return found
        return None

    return run


def _results(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[Key, tuple[Node, Any]]:
    """What every node gives that has a path, by its path and number, in the order in which they finish."""
    expression = trace(model, functions=())(*args, **kwargs)
    nodes, plan = [node for node in _finished(expression.root) if _is_seen(node)], Plan()
    for node in nodes:
        plan.caught[node.chain] = activation_of(node)
        plan.touch(node)
    values = {found.chain: found.value for found in expression.run(plan, model, *args, **kwargs)[1]}
    counts: dict[str, int] = {}
    found: dict[Key, tuple[Node, Any]] = {}
    for node in nodes:
        path = str(node.path)
        counts[path] = counts.get(path, -1) + 1
        found[path, counts[path]] = node, values[node.chain]
    return found


def _in_turns(keys: list[Key], nodes: dict[Key, Node]) -> Iterator[tuple[Key, int | None]]:
    """The order of time: of a scan's nodes, all of the first turn come before those of the second."""
    for _, group in itertools.groupby(keys, lambda key: id(_scan_around(nodes[key]))):
        inside = list(group)
        scan = _scan_around(nodes[inside[0]])
        turns = [None] if scan is None else range(scan.params["length"])
        yield from ((key, turn) for turn in turns for key in inside)


def _scan_around(node: Node) -> Any:
    """The outermost scan that a node is in."""
    return next((e for e in node.around if e.primitive.name == "scan"), None)


def _turn_of(value: Any, turn: int | None) -> Any:
    return value if turn is None else jax.tree.map(lambda x: x[turn], value)


def _finished(node: Node) -> list[Node]:
    return [*(below for child in node.children for below in _finished(child)), node]


def _is_seen(node: Node) -> bool:
    if node.path is None:
        return False
    try:
        expect_open(node)
    except ExpressionError:  # what is inside of a loop is compared by what comes out of it
        return False
    return True


def _difference(node: Node, a: Any, b: Any) -> Difference:
    largest = scale = 0.0
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    if [np.shape(x) for x in left] != [np.shape(x) for x in right]:
        return Difference(str(node.path), node.tag, np.inf, np.inf)
    for x, y in zip(left, right, strict=True):
        if not jnp.issubdtype(jnp.asarray(x).dtype, np.number) or not np.size(x):  # keys of random numbers, and nothing
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        gap = np.abs(x - y)
        largest = max(largest, float(np.where(np.isnan(gap), np.inf, gap).max()))
        scale = max(scale, float(np.abs(x).max()))
    return Difference(str(node.path), node.tag, largest, scale)
