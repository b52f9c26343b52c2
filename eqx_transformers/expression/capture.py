"""What is inside of a call: brought out (`capture`), set (`patch`), or taken out (`ablate`).

All three are function transformations: `capture(model, what)` is called as the model is, inside of `jit`, `grad`,
`vmap` and remat, and everything it gives can be differentiated.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn import kernels
from . import _jaxpr
from .boundary import arguments_of, result_of
from .errors import ExpressionError, NoMatch, ShapeMismatch
from .evaluate import Plan, Replacement
from .expression import Expression, trace
from .node import Node, short
from .query import find

ATTEND = "attend"  # the field of an attention in which the heads are still apart


def capture(model: Callable[..., Any], what: Any, *, probabilities: bool = False) -> Callable[..., Any]:
    """`capture(model, what)(*args, **kwargs)` is the model's output and `{path: activation}`.

    - `what`: an XPath (`"//MLP"`), a `Selection`, a class, or whatever else `Expression.query` takes.
    - An activation is what the module or function gave: of stacked blocks with a leading layer axis, of what runs under
      an inner `jax.vmap` with a leading axis of its examples. A second call at the same path is `path@1`, a third
      `path@2`. What has no place in the tree is called by the path around it: `blocks.0.mlp/softmax`.
    - With `probabilities`, `what` selects attentions, and each gives softmax(q kᵀ · scale + bias), `num_heads seq
      keys`, before dropout: computed in addition, for no fast path of attention holds it.

    Raises `NoMatch` where nothing is selected, and an `ExpressionError` for what cannot come out: a value in the body
    of a `while_loop` or of a `cond`, or within a function that has a derivative rule of its own.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        expression = trace(model)(*args, **kwargs)
        nodes = find(expression, what)
        if probabilities:
            nodes = tuple(_attend_of(expression, node) for node in nodes)
        plan = Plan()
        for node in nodes:
            expect_open(node)
            plan.caught[node.chain] = _probabilities(node) if probabilities else activation_of(node)
            plan.touch(node)
        out, caught = expression.run(plan, model, *args, **kwargs)
        values = {found.chain: found.value for found in caught}
        labels = _labels(expression, nodes)
        return out, {label: values[node.chain] for label, node in zip(labels, nodes, strict=True)}

    return run


def patch(model: Callable[..., Any], values: Mapping[Any, Any]) -> Callable[..., Any]:
    """The model with activations set: `patch(model, {what: value})(*args, **kwargs)` is its output.

    - `what`: a path as printed (`"stack.blocks.3.mlp"`, of stacked blocks too: that layer alone), or what `capture`
      takes.
    - `value`: what the module or function shall give, as `capture` brought it out of this or another call (of stacked
      blocks with a leading layer axis); or a function of what it gives by itself.

    Raises `NoMatch` where nothing is selected, and `ShapeMismatch` for a value of another structure, shape or dtype.
    """

    return _edited(model, values, lambda plan, _, place, value: _set(plan, place, value))


def ablate(
    model: Callable[..., Any], heads: Mapping[Any, int | Sequence[int]], *, mean: bool = False
) -> Callable[..., Any]:
    """The model without some heads: `ablate(model, {"stack.blocks.3.attention": [0, 5]})(*args, **kwargs)`.

    `heads` names attentions, as `patch` does, and their heads from 0 on. What these give before the output projection
    is zero, or with `mean` its mean over the sequence. Raises a `ValueError` for a head that is not there.
    """

    def without(plan: Plan, expression: Expression, place: "Spot", chosen: int | Sequence[int]) -> None:
        place = place._replace(node=_attend_of(expression, place.node))
        _set(plan, place, _without(place.node, chosen, mean))

    return _edited(model, heads, without)


def _edited(
    model: Callable[..., Any],
    edits: Mapping[Any, Any],
    add: Callable[[Plan, Expression, "Spot", Any], None],
) -> Callable[..., Any]:
    """The model's output under the plan to which `add` adds an edit of each place that is named."""

    def run(*args: Any, **kwargs: Any) -> Any:
        expression, plan = trace(model)(*args, **kwargs), Plan()
        for what, value in edits.items():
            for place in places_of(expression, what):
                add(plan, expression, place, value)
        return expression.run(plan, model, *args, **kwargs)[0]

    return run


# ---- places


class Spot(NamedTuple):
    """A node, and of stacked blocks one layer, if only that one is meant."""

    node: Node
    layer: int | None


def places_of(expression: Expression, what: Any) -> list[Spot]:
    """Raises `NoMatch` where there are none."""
    if not isinstance(what, str) or "/" in what:
        return [Spot(node, None) for node in find(expression, what)]
    exact = [Spot(node, None) for node in expression.nodes() if node.path == what]
    return exact or _in_stacked(expression, what) or [Spot(node, None) for node in find(expression, what)]


def _in_stacked(expression: Expression, path: str) -> list[Spot]:
    """`blocks.3.mlp` where all blocks are one: the node `blocks.mlp`, at layer 3."""
    steps = path.split(".")
    for i in (i for i, step in enumerate(steps) if step.isdigit()):
        whole, layer = ".".join(steps[:i] + steps[i + 1 :]), int(steps[i])
        depth = next((n.stack for n in expression.nodes() if n.stack and n.path == ".".join(steps[:i])), None)
        found = [Spot(node, layer) for node in expression.nodes() if node.path == whole]
        if depth is not None and found:
            if layer >= depth:
                raise NoMatch(
                    f"{path} names layer {layer}, but {depth} are stacked at {'.'.join(steps[:i])}, from 0 on."
                )
            return found
    return []


def _attend_of(expression: Expression, node: Node) -> Node:
    """The function in which an attention's heads are apart: the node itself, or the one in its field."""
    if node.record is not None and node.path is not None and node.path.split(".")[-1] == ATTEND:
        return node
    inside = [n for n in node.walk() if n.path == f"{node.path}.{ATTEND}"] if node.kind == "module" else []
    if len(inside) != 1:
        raise ExpressionError(
            f"{node.name} is a {node.tag}: heads are those of an attention, a module whose field"
            f" {ATTEND} is called once."
        )
    return inside[0]


def expect_open(node: Node) -> None:
    """Raises an `ExpressionError` where nothing can be brought out of, or set at, a node's place."""
    where = node.name
    if node.guard is not None:
        raise ExpressionError(
            f"{where} lies within {node.guard}, which has a derivative rule of its own: use the whole of it."
        )
    closed = [e.primitive.name for e in node.around if e.primitive.name in _jaxpr.CLOSED]
    if closed:
        raise ExpressionError(f"{where} lies within a {closed[0]}, which nothing can be brought out of, or set in.")
    if node.phase is not None:
        raise ExpressionError(f"{where} belongs to a derivative ({node.phase}) that the model takes itself.")


def _labels(expression: Expression, nodes: Sequence[Node]) -> list[str]:
    """A name for each node, of which none is there twice."""
    above = {id(child): node for node in (expression.root, *expression.nodes()) for child in node.children}
    seen: dict[str, int] = {}
    labels = []
    for node in nodes:
        name = _name(node, above)
        count = seen.get(name, 0)
        seen[name] = count + 1
        labels.append(f"{name}@{count}" if count else name)
    return labels


def _name(node: Node, above: Mapping[int, Node]) -> str:
    if node.path is not None:
        return node.path
    around = above[id(node)]
    while around.path is None and id(around) in above:
        around = above[id(around)]
    return f"{around.path or ''}/{node.tag}"


# ---- what is brought out


def activation_of(node: Node) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """What a node gave, of its operands and results."""
    if node.record is not None:
        return lambda _, results: result_of(node.record, results)
    return lambda _, results: results[0] if len(results) == 1 else tuple(results)


def _probabilities(node: Node) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    def weights(operands: Sequence[Any], _: Sequence[Any]) -> Float[Array, "*axes num_heads seq keys"]:
        _, (q, k, _, mask), options = arguments_of(node.record, operands)
        wanted = {name: options[name] for name in ("bias", "scale", "empty") if name in options}
        return kernels.probabilities(q, k, mask, **wanted)

    return weights


# ---- what is set


def _set(plan: Plan, place: Spot, value: Any) -> None:
    node = place.node
    expect_open(node)
    if node.equation is None:
        raise ExpressionError(f"{node.tag} was recognised by its equations: rewrite replaces it as a function.")
    if node.chain in plan.replaced:
        raise ExpressionError(f"{node.name} is set twice.")

    def call(_: Sequence[Any], original: Callable[[], Sequence[Any]], turn: Any) -> Sequence[Any]:
        results = list(original())
        old = activation_of(node)([], results)
        new = value(old) if callable(value) else _at_turn(value, None if place.layer is not None else turn)
        return _chosen(node, old, new, place.layer, turn, results)

    plan.replaced[node.chain] = Replacement(node.equation.invars, node.equation.outvars, call)
    plan.touch(node)


def _at_turn(value: Any, turn: Any) -> Any:
    """A fixed value, of which every turn of a scan over layers takes its own."""
    return jax.tree.map(lambda x: jnp.asarray(x) if turn is None else jnp.asarray(x)[turn], value)


def _chosen(node: Node, old: Any, new: Any, layer: int | None, turn: Any, results: list[Any]) -> list[Any]:
    before, after = jax.tree.flatten(old), jax.tree.flatten(new)
    if before[1] != after[1]:
        raise ShapeMismatch(f"{node.name} gives {before[1]}, but was set to {after[1]}.")
    for a, b in zip(before[0], after[0], strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
            raise ShapeMismatch(f"{node.name} gives {short(a)}, but was set to {short(b)}.")
    if layer is not None:
        after = [jnp.where(turn == layer, b, a) for a, b in zip(before[0], after[0], strict=True)], after[1]
    dynamic = node.record.out_traced if node.record is not None else (True,) * len(results)
    return [x for x, is_traced in zip(after[0], dynamic, strict=True) if is_traced]


def _without(node: Node, heads: int | Sequence[int], mean: bool) -> Callable[[Any], Any]:
    chosen = [heads] if isinstance(heads, int) else list(heads)
    count = node.outputs[0].shape[-2]
    wrong = [head for head in chosen if not 0 <= head < count]
    if wrong:
        raise ValueError(f"{node.path} has {count} heads, from 0 on: there is no head {wrong[0]}.")

    def without(
        attended: Float[Array, "*axes seq num_heads value_dim"],
    ) -> Float[Array, "*axes seq num_heads value_dim"]:
        instead = attended.mean(-3, keepdims=True) if mean else jnp.zeros_like(attended)
        out = jnp.isin(jnp.arange(count), jnp.asarray(chosen))[:, None]
        return jnp.where(out, instead, attended).astype(attended.dtype)

    return without
