"""What is trained and how fast: parts of a model for `eqx.partition`, and labels, rates and masks for optax."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..nn import Stack
from ..nn._dtypes import wider
from ._bases import unwrapped
from .paths import children, is_array_like, leaves_by_path, spell
from .select import Selection

Model = TypeVar("Model")


def partition(model: Model, selection: Selection) -> tuple[Model, Model]:
    """(trainable, frozen): the numbers at or below the selected nodes, and everything else.

    Trainable are floating-point and complex arrays alone: of a quantized layer its scales and bias. `eqx.combine` joins
    both; `eqx.filter_grad` and an optimizer see the first. Raises a `ValueError` where nothing would be trained.
    """
    trained = trainable(selection, model)
    if not any(jax.tree.leaves(trained)):
        raise ValueError(f"{selection}: there are no floating-point arrays in what it selects, so nothing to train.")
    return eqx.partition(model, trained)


def trainable(selection: Selection, model: Any) -> Any:
    """A tree of bools: which leaves at or below the selected nodes can be trained; no salts, and no whole numbers."""
    return jax.tree.map(lambda chosen, leaf: chosen and _is_inexact(leaf), selection.mask(model), model)


def labels(model: Any, selections: Mapping[str, Selection], default: str = "frozen") -> Any:
    """A tree of labels for `optax.multi_transform`: of each leaf that of the selection it is in, else `default`.

        groups = labels(model, {"slow": select(under="backbone"), "fast": select(under="head")})
        rates = {"slow": optax.adam(1e-5), "fast": optax.adam(1e-3), "frozen": optax.set_to_zero()}
        optax.multi_transform(rates, lambda _: groups)

    (The function is for optax, which calls labels that are callable; so is a tree of labels that is a model.) Every
    leaf has a label, arrays or not: a tree of parameters with None in the place of the rest fits it. Only arrays are
    ever in a selection. Raises a `ValueError` where two selections have a leaf in common, naming both.
    """
    masks = {label: jax.tree.leaves(selection.mask(model)) for label, selection in selections.items()}
    found = []
    for i, path in enumerate(leaves_by_path(model)):
        mine = [label for label, mask in masks.items() if mask[i]]
        if len(mine) > 1:
            said = " and ".join(f"{label!r} ({selections[label]})" for label in mine)
            raise ValueError(f"labels: {path} is in the selections of {said}. Take one from the other: a - b.")
        found.append(mine[0] if mine else default)
    return jax.tree.unflatten(jax.tree.structure(model), found)


def layer_rates(model: Any, decay: float = 0.9) -> Any:
    r"""A tree of multipliers for the updates of each layer: those far from the output are trained more slowly.

    In a `Stack` of $n$ blocks, the arrays of block $i$ have $\mathrm{decay}^{n - i}$; what comes before it has
    $\mathrm{decay}^{n + 1}$ (embeddings); what comes after it, and every other leaf, 1 (final norms, poolers, heads).
    Before and after are the order of the fields in what holds the stack, down from the model. The halves of an
    encoder-decoder count each for itself, and what comes before both by the deeper one.

    A multiplier is a number; for stacked blocks an array with the layer axis of its leaf, the others being 1, and the
    updates are the same, bit for bit. `scale_by_rates` applies them. Some rates are changed as any leaf of a tree is:
    `select(under="backbone.pooler").map(rates, lambda part: jax.tree.map(lambda _: 0.5, part))`.

    These are the exponents of BEiT (arXiv:2106.08254). ELECTRA (arXiv:2003.10555) counts one step more between the
    last block and the head. Raises a `ValueError` where there is no `Stack`, and for a decay that is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_rates: decay = {decay} must be in (0, 1]: what a rate is multiplied with a layer.")
    if _depth(model) is None:
        raise ValueError(f"There is no nn.Stack in this {type(model).__name__}, so its layers cannot be counted.")
    return jax.tree.unflatten(jax.tree.structure(model), list(_multipliers(model, decay)))


def _depth(node: Any) -> int | None:
    """How many blocks the deepest `Stack` in a node has; None where there is none. Those in blocks do not count."""
    if isinstance(node, Stack):
        return node.num_layers
    return max((depth for _, child in children(node) if (depth := _depth(child)) is not None), default=None)


def _multipliers(node: Any, decay: float) -> Iterator[Any]:
    """One for each leaf of a node that is or has a `Stack`, in the tree's order."""
    if isinstance(node, Stack):
        yield from _of_stack(node, decay)
        return
    inside = [(child, _depth(child)) for _, child in children(node)]
    outside = decay ** (1 + max(depth for _, depth in inside if depth is not None))
    for child, depth in inside:
        if depth is None:
            yield from (outside for _ in jax.tree.leaves(child))
        else:
            outside = 1.0  # what comes behind
            yield from _multipliers(child, decay)


def _of_stack(stack: Stack, decay: float) -> Iterator[Any]:
    count = stack.num_layers
    rates = [decay ** (count - i) for i in range(count)]
    if isinstance(stack.blocks, tuple):
        yield from (rate for rate, block in zip(rates, stack.blocks, strict=True) for _ in jax.tree.leaves(block))
    else:
        along = lambda leaf: np.reshape(np.array(rates, np.float32), (count,) + (1,) * (leaf.ndim - 1))
        yield from (along(leaf) if is_array_like(leaf) else 1.0 for leaf in jax.tree.leaves(stack.blocks))
    yield from (1.0 for _ in range(len(jax.tree.leaves(stack)) - len(jax.tree.leaves(stack.blocks))))


class Transformation(NamedTuple):
    """What optax calls a `GradientTransformation`, and takes for one: optax is not needed to define it."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def scale_by_rates(rates: Any) -> Any:
    """An optax transformation that multiplies every update by its rate, as of `layer_rates`. It has no state.

        optax.chain(optax.adamw(schedule), scale_by_rates(layer_rates(model, decay=0.8)))

    It stands last, so that it scales the step and not the gradient, which Adam would undo. Products are computed in
    float32 at least and have the update's dtype; an update that is missing (None, or masked by optax) stays so.
    """

    def scaled(rate: Any, update: Any) -> Any:
        return jax.tree.map(lambda x: _times(x, rate), update)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(scaled, rates, updates), state

    return Transformation(lambda params: (), update)


def _times(x: Any, rate: Any) -> Any:
    wide = wider(x.dtype, jnp.float32)
    return (x.astype(wide) * jnp.asarray(rate, wide)).astype(x.dtype)


def decay_mask(model: Any, exclude: tuple[str | Selection, ...] = ("bias", "norm")) -> Any:
    """A tree of bools for `optax.adamw(mask=…)`: True for the arrays that decay, all but those of `exclude`.

    | word | arrays |
    |---|---|
    | `"bias"` | with a step `bias` or `…_bias` in their paths: biases, and tables of relative positions |
    | `"norm"` | in a module whose class or a base of it is called `…Norm`, or with a step `norm` or `…_norm` |
    | `"embedding"` | of tables: `nn.Embedding`, `eqx.nn.Embedding`, and what has `attend` as a method, as wrappers do |

    As in the reference's trainer, whose names these match; many GPTs leave out embeddings too. The rule looks at paths
    and classes, not at ranks: biases of stacked blocks are matrices. `exclude` may have selections too. A word that
    fits nothing in the model is no error, for many models have no biases; a selection that finds nothing is. Raises a
    `ValueError` for another word.
    """
    if wrong := [word for word in exclude if isinstance(word, str) and word not in WORDS]:
        raise ValueError(
            f"decay_mask: exclude has {wrong[0]!r}, but takes {', '.join(map(repr, WORDS))} and selections."
        )
    words = [one for one in exclude if isinstance(one, str)]
    masks = [jax.tree.leaves(one.mask(model)) for one in exclude if isinstance(one, Selection)]
    leaves, treedef = jax.tree.flatten(model)
    excluded = [any(marks) for marks in zip(_excluded(model, "", words), *masks, strict=True)]
    return treedef.unflatten([_is_inexact(leaf) and not out for leaf, out in zip(leaves, excluded, strict=True)])


def _excluded(node: Any, step: str, words: list[str]) -> Iterator[bool]:
    """Of each leaf of a node, whether it is, or is in, what one of the words means."""
    if any(WORDS[word](step, node) for word in words):
        yield from (True for _ in jax.tree.leaves(node))
    elif inside := children(node):
        for key, child in inside:
            yield from _excluded(child, spell((key,)), words)
    else:
        yield from (False for _ in jax.tree.leaves(node))


def _called(name: str) -> Callable[[str], bool]:
    return lambda step: step == name or step.endswith(f"_{name}")


def _is_norm(node: Any) -> bool:
    return any(base.__name__.endswith("Norm") for base in type(node).__mro__)


def _is_table(node: Any) -> bool:
    node = unwrapped(node)
    return isinstance(node, eqx.Module) and (isinstance(node, eqx.nn.Embedding) or hasattr(type(node), "attend"))


WORDS: dict[str, Callable[[str, Any], bool]] = {
    "bias": lambda step, node: _called("bias")(step),
    "norm": lambda step, node: _called("norm")(step) or _is_norm(node),
    "embedding": lambda step, node: _is_table(node),
}


def _is_inexact(leaf: Any) -> bool:
    return is_array_like(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
