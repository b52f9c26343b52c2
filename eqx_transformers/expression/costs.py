"""What a call costs, node by node: floating-point operations, and bytes that go in and out."""

import math
from typing import Any, NamedTuple

from . import _jaxpr
from .expression import Expression
from .node import Node


class Cost(NamedTuple):
    """`flops`: additions and multiplications each count one. `bytes`: of what every equation reads and writes.

    The bytes are those of a program in which each equation runs by itself; a compiler that fuses them moves fewer.
    `bounded` is False where a `while_loop` runs nobody knows how often: it is counted once.
    """

    flops: int = 0
    bytes: int = 0
    bounded: bool = True

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.bounded and other.bounded)

    def times(self, n: int) -> "Cost":
        return Cost(self.flops * n, self.bytes * n, self.bounded)


# Equations that move numbers or look at them, but compute none.
FREE = {"reshape", "squeeze", "broadcast_in_dim", "transpose", "convert_element_type", "bitcast_convert_type", "copy"}
FREE |= {"slice", "dynamic_slice", "dynamic_update_slice", "gather", "concatenate", "pad", "rev", "iota", "select_n"}
FREE |= {"stop_gradient", "optimization_barrier", "expand_dims", "split", "copy_p", "eq", "ne", "lt", "le", "gt", "ge"}
FREE |= {"and", "or", "not", "is_finite", "random_wrap", "random_unwrap", "random_bits", "threefry2x32"}


def costs(expression: Expression) -> dict[Node, Cost]:
    """The cost of every node, what is inside of it included; a scan's body counts as often as it runs, of a `cond` the
    dearest branch. The root's is that of the whole call."""
    found: dict[Node, Cost] = {}
    _add(expression.root, found)
    return found


def _add(node: Node, found: dict[Node, Cost]) -> Cost:
    if node.kind == "equation":
        cost = _of_equation(node.equation)
    else:
        inside = [_add(child, found) for child in node.children]
        cost = _joined(node, inside)
    found[node] = cost
    return cost


def _joined(node: Node, inside: list[Cost]) -> Cost:
    name = node.tag if node.kind == "control" else ""
    if name == "cond":
        return _dearest(node, inside)
    total = Cost()
    for cost in inside:
        total = total.plus(cost)
    if name == "scan":
        return total.times(node.equation.params["length"])
    return total._replace(bounded=False) if name == "while" else total


def _dearest(node: Node, inside: list[Cost]) -> Cost:
    """Of the branches' nodes, which stand side by side, those of the branch with the most operations."""
    places = {id(e): i for i, branch in enumerate(_jaxpr.inners(node.equation)) for e in branch.jaxpr.eqns}
    branches: dict[int, Cost] = {}
    for child, cost in zip(node.children, inside, strict=True):
        branch = places[child.chain[-1]]
        branches[branch] = branches.get(branch, Cost()).plus(cost)
    return max(branches.values(), default=Cost())


def _of_equation(equation: Any) -> Cost:
    moved = sum(_bytes(x) for x in (*equation.invars, *equation.outvars))
    return Cost(_flops(equation), moved)


def _flops(equation: Any) -> int:
    name, out = equation.primitive.name, sum(_size(x) for x in equation.outvars)
    if name == "dot_general":
        (left, _), _ = equation.params["dimension_numbers"]
        return 2 * out * math.prod(equation.invars[0].aval.shape[axis] for axis in left)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        spec = equation.params["dimension_numbers"].rhs_spec
        return 2 * out * math.prod(kernel[axis] for axis in spec[1:])
    if name in FREE:
        return 0
    return max(out, sum(_size(x) for x in equation.invars)) if name.startswith(("reduce", "arg", "cum")) else out


def _size(x: Any) -> int:
    return math.prod(getattr(x.aval, "shape", ()))


def _bytes(x: Any) -> int:
    return _size(x) * getattr(getattr(x.aval, "dtype", None), "itemsize", 0)
