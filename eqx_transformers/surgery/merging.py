"""Adapters into the layers that they stand beside, and back."""

from typing import Any, TypeVar

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..nn._keys import keyed
from . import _bases as bases
from .ia3 import IA3
from .lora import LoRA, changed
from .paths import nodes, spell
from .select import select

Tree = TypeVar("Tree")


class Merged(bases.AbstractWrapper):
    """A layer that computes what an adapted one does, and that one beside it, for `unmerge`."""

    base: eqx.Module
    original: eqx.Module

    @property
    def bias(self) -> Float[Array, " outputs"] | None:
        return getattr(self.base, "bias", None)

    def __call__(
        self, x: Float[Array, "*axes inputs"] | Int[Array, "*axes"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes outputs"]:
        return self.base(x) if bases.is_table(self.base) else keyed(self.base, x, key)

    def attend(self, x: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes vocab_size"]:
        """Scores against every row of the table; of an embedding only."""
        return self.base.attend(x)

    def dense(self) -> Array:
        """The matrix."""
        return bases.dense(self.base)


def merge(model: Tree, *, keep: bool = False) -> Tree:
    """The model with plain layers in the place of `LoRA`, `IA3` and `Merged`; with `keep`, with `Merged` ones.

    Adapters count as much as their weights say. Sums run in float32 at least and are rounded once, to the dtype of
    the base; a number to which nothing is added stays, to the bit. `keep` holds the adapted layers too (memory for
    two), so that `unmerge` gives them back as they were.

    Raises a `ValueError` where there is no adapter, for a quantized base, and for a B with a bias beside a base
    without one.
    """
    adapted = _found(model, (LoRA, IA3, Merged), "merge: there is no adapter")
    return adapted.map(model, _kept if keep else plain)


def unmerge(model: Tree) -> Tree:
    """The adapted model that `merge(…, keep=True)` was given, to the bit. Raises a `ValueError` if it kept none."""
    merged = _found(model, (Merged,), "unmerge: there is no layer that merge(…, keep=True) made")
    return merged.map(model, lambda node: node.original)


def expect_unmerged(model: Any, who: str) -> None:
    """Raises a `ValueError` where adapters are there but have no effect."""
    for path, node in nodes(model):
        if isinstance(node, Merged):
            raise ValueError(f"{who}: the adapters at {spell(path) or 'the root'} are merged. unmerge(model) first.")


def _found(model: Any, kinds: tuple[type, ...], message: str) -> Any:
    if not any(isinstance(node, kinds) for _, node in nodes(model)):
        raise ValueError(f"{message} in this {type(model).__name__}.")
    return select(kinds).outermost().on(model)


def _kept(node: Any) -> Merged:
    return node if isinstance(node, Merged) else Merged(plain(node), node)


def plain(node: Any) -> Any:
    """One layer without adapters, which computes the same."""
    if isinstance(node, Merged):
        return node.base
    if not isinstance(node, LoRA | IA3):
        return node
    base = plain(node.base)
    _expect_mergeable(node, base)
    node = eqx.tree_at(lambda n: n.base, node, base)
    return _with_bias(bases.with_matrix(base, _matrix(node)), node.bias)


def _matrix(node: LoRA | IA3) -> Float[Array, "outputs inputs"]:
    return changed(node) if isinstance(node, LoRA) else bases.matrix(node)


def _with_bias(base: Any, bias: Float[Array, " outputs"] | None) -> Any:
    if bias is None or base.bias is bias:
        return base
    return eqx.tree_at(lambda n: n.bias, base, bias.astype(base.bias.dtype))


def _expect_mergeable(node: LoRA | IA3, base: Any) -> None:
    who, kind = f"merge: a {type(node).__name__}", type(base).__name__
    if not bases.is_plain(base):
        raise ValueError(
            f"{who} stands beside a {kind}, whose matrix is stored in a code: the sum would be rounded to it. Make it"
            " dense first (dequantize(model)), or keep the adapter as it is."
        )
    if getattr(base, "bias", None) is None and node.bias is not None:
        raise ValueError(
            f"{who} adds a bias, which this {kind} has no place for. Give it one of zeros first (eqx.tree_at at its"
            " bias, is_leaf=lambda x: x is None), or keep the adapter as it is."
        )
