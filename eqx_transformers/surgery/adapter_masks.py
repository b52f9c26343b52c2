"""What of an adapted model trains, and at which rate."""

import operator
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey

from .freeze import trainable
from .ia3 import IA3
from .lora import LoRA
from .merging import expect_unmerged
from .paths import is_array_like, nodes
from .select import Selection

Bias = Literal["none", "all", "adapters"]
OTHER, FROZEN = "other", "frozen"
LABELS = {"a": "a", "b": "b", "b_bias": OTHER, "magnitude": OTHER}


def adapter_mask(model: Any, *, bias: Bias = "none", also: Selection | None = None, name: str | None = None) -> Any:
    """A tree of bools for `eqx.partition`: which leaves train.

    `optax.masked` alone does not freeze the others: it hands their gradients on as they are. Partition the model, or
    use `optax.multi_transform` with `set_to_zero` (`adapter_labels`).

    - Of every `LoRA`, what its adapters learn: A, B, B's bias, DoRA's magnitude (of `name` alone, if given); of every
      `IA3`, its factors. Scales and weights of adapters are numbers of the user's.
    - `bias`: "adapters", the biases of the adapted layers too; "all", every array whose field is called `bias`.
    - `also`: what else trains, a new head say.

    Raises a `ValueError` where there is no adapter (of that name), and where layers are merged.
    """
    if bias not in get_args(Bias):
        raise ValueError(f"adapter_mask: bias must be one of {', '.join(get_args(Bias))}; it is {bias!r}.")
    labels = adapter_labels(model, name=name)
    adapted = _biases(model) if bias == "adapters" else set()
    is_bias = lambda path: path in adapted or (bias == "all" and path[-1:] == (GetAttrKey("bias"),))
    keep = lambda path, leaf, label: label != FROZEN or (is_array_like(leaf) and is_bias(path))
    mask = jax.tree_util.tree_map_with_path(keep, model, labels)
    return mask if also is None else jax.tree.map(operator.or_, mask, trainable(also, model))


def adapter_labels(model: Any, *, name: str | None = None) -> Any:
    """A tree of labels for `optax.multi_transform`: "a", "b", "other" (B's bias, magnitudes, factors), else "frozen".

    LoRA+ (arXiv:2402.12354) lets B learn at a rate some 16 times that of A:

        optax.multi_transform(
            {"a": adamw(1e-4), "b": adamw(16e-4), "other": adamw(1e-4), "frozen": optax.set_to_zero()},
            adapter_labels,
        )

    The function itself, not its result: optax takes what can be called for a function of the parameters, and a tree
    that is a model can be called.

    Raises a `ValueError` where there is no adapter (of that `name`), and where layers are merged.
    """
    expect_unmerged(model, "adapter_labels")
    labels = dict(_labelled(model, name))
    if not labels:
        said = "" if name is None else f" named {name!r}"
        raise ValueError(f"There is no adapter{said} in this {type(model).__name__}." + _names(model))
    return jax.tree_util.tree_map_with_path(lambda path, _: labels.get(path, FROZEN), model)


def _labelled(model: Any, name: str | None) -> Iterator[tuple[KeyPath, str]]:
    for path, node in nodes(model):
        if isinstance(node, LoRA):
            for i in (i for i, other in enumerate(node.names) if name in (None, other)):
                adapter = (*path, GetAttrKey("adapters"), SequenceKey(i))
                yield from (((*adapter, GetAttrKey(field)), label) for field, label in LABELS.items())
        elif isinstance(node, IA3) and name is None:
            yield (*path, GetAttrKey("scale")), OTHER


def _names(model: Any) -> str:
    names = {name for _, node in nodes(model) if isinstance(node, LoRA) for name in node.names}
    return f" There are {', '.join(sorted(names))}." if names else ""


def _biases(model: Any) -> set[KeyPath]:
    """Of adapted layers."""
    tail = (GetAttrKey("base"), GetAttrKey("bias"))
    return {(*path, *tail) for path, node in nodes(model) if isinstance(node, LoRA | IA3)}
