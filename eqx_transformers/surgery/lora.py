"""LoRA: a layer that stays as it is, and changes of low rank beside it."""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..nn._dtypes import wider
from ..nn._keys import keyed
from . import _bases as bases
from ._inits import FROM_WEIGHT, INITS, Init, Shape, drawn, taken, uniform
from ._lowrank import LowRank, norms


class LoRA(bases.AbstractWrapper):
    r"""$y = W x + \sum_i w_i s_i B_i A_i x$ in the place of a `Linear`; of an `Embedding` or of what stands for either.

    - `base` is the layer as it was, plain or quantized. `adapter_mask` leaves it out of the training.
    - `adapters` are the changes, one a name. Several add up, each as a change of the base alone: with DoRA too, where
      PEFT applies one to what another has changed.
    - `weights` say how much each counts, 1.0 from the beginning. `set_adapters` gives other numbers, and nothing is
      compiled anew.

    An embedding's `attend`, the tied output, uses the changed table as lookups do. Computed in float32 at least; the
    result has the dtype that the base gives. With a `key`, adapters drop out of what goes into them.

    Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353.
    """

    base: eqx.Module
    adapters: tuple[LowRank, ...]
    weights: Float[Array, " adapters"]
    names: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        base: eqx.Module,
        adapters: Sequence[LowRank],
        names: Sequence[str] = ("default",),
        weights: Float[Array, " adapters"] | None = None,
    ):
        self.base = base
        self.adapters = tuple(adapters)
        self.names = tuple(names)
        self.weights = jnp.ones(len(self.adapters), jnp.float32) if weights is None else weights

    def __check_init__(self):
        if len(set(self.names)) != len(self.names) or len(self.names) != len(self.adapters):
            raise ValueError(f"LoRA: {len(self.adapters)} adapters need as many different names, not {self.names}.")

    @staticmethod
    def adapter(
        rank: int,
        alpha: float | int | None = None,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        init: Init = "kaiming",
        dora: bool = False,
        parts: int = 1,
        use_bias: bool = False,
        name: str = "default",
    ) -> Callable[..., "LoRA"]:
        """`make` for `Selection.each(model, make, key=key)`: a layer becomes a LoRA of it, a LoRA gets one more name.

        - The scale is alpha / rank, with `rslora` alpha / sqrt(rank); `alpha` is the rank, where none is given.
        - `init`: "kaiming", "gaussian" (nothing changes at first), "random"; "pissa" and "olora" take A and B out of
          the weight, and the base is what remains: nothing changes at first here either, but for rounding.
        - `dora`: with a magnitude, the norm of each row of what the matrix is at first.
        - `parts`: of how many projections in one (queries, keys and values, say) this layer is; each has its own.
        - `use_bias`: a bias to B (PEFT's `lora_bias`).

        Raises a `ValueError` for numbers that make no sense together, and, when it is used, for a node that is neither
        linear nor an embedding, for a rank beyond what the matrix has, and for a name that is there already.
        """
        plan = Plan(rank, rank if alpha is None else alpha, rslora, dropout, init, dora, parts, use_bias, name)
        plan.check()
        return partial(_made, plan)

    @property
    def bias(self) -> Float[Array, " outputs"] | None:
        """The base's, changed by what the adapters add to it."""
        bias = getattr(self.base, "bias", None)
        for weight, adapter in zip(self.weights, self.adapters, strict=True):
            if (more := adapter.bias()) is not None:
                more = more * weight.astype(more.dtype)
                bias = more if bias is None else bias.astype(more.dtype) + more
        return bias

    def __call__(
        self, x: Float[Array, "*axes inputs"] | Int[Array, "*axes"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes outputs"]:
        if bases.is_table(self.base):
            y = self.base(x)
            return self._sum(y, [adapter.of_table(self.base, x, y) for adapter in self.adapters])
        y = keyed(self.base, x, key)
        return self._sum(y, [adapter.of_linear(self.base, x, y, key) for adapter in self.adapters])

    def attend(self, x: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes vocab_size"]:
        """Scores against every row of the changed table; of an embedding only."""
        return self._sum(self.base.attend(x), [adapter.of_scores(self.base, x) for adapter in self.adapters])

    def dense(self) -> Array:
        """The changed matrix, in the base's order (of a table, `vocab_size embed_dim`), not rounded."""
        new = changed(self)
        return new.T if bases.is_table(self.base) else new

    def _sum(self, y: Float[Array, "*axes outputs"], changes: list[Array]) -> Float[Array, "*axes outputs"]:
        """`y` and what the adapters add, rounded once."""
        total = y
        for weight, change in zip(self.weights, changes, strict=True):
            wide = wider(total.dtype, change.dtype)
            total = total.astype(wide) + weight.astype(wide) * change.astype(wide)
        return total.astype(y.dtype)


def changed(node: LoRA) -> Float[Array, "outputs inputs"]:
    """The matrix of the base with all changes; where they are zero, the very number that is there."""
    old = bases.matrix(node.base)
    change = jnp.zeros_like(old)
    for weight, adapter in zip(node.weights, node.adapters, strict=True):
        change = change + weight.astype(old.dtype) * adapter.change(node.base).astype(old.dtype)
    return jnp.where(change == 0, old, old + change)  # -0.0 + 0.0 is 0.0


class Plan(NamedTuple):
    """The arguments of `LoRA.adapter`."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    init: str
    dora: bool
    parts: int
    use_bias: bool
    name: str

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self) -> None:
        """Raises a `ValueError` for what can be seen without a layer."""
        if not all(isinstance(n, int) and n >= 1 for n in (self.rank, self.parts)):
            raise ValueError(
                f"LoRA: rank and parts are whole numbers, at least 1; they are {self.rank!r} and {self.parts!r}."
            )
        if not isinstance(self.alpha, int | float) or self.alpha == 0:
            raise ValueError(f"LoRA: alpha must be a number, and with 0 nothing ever changes; it is {self.alpha!r}.")
        if self.init not in INITS:
            raise ValueError(f"LoRA: init must be one of {', '.join(INITS)}; it is {self.init!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout must be at least 0 and less than 1; it is {self.dropout}.")
        if self.init in FROM_WEIGHT and self.alpha <= 0:
            raise ValueError(f"LoRA: init={self.init!r} needs an alpha above 0; it is {self.alpha}.")
        if self.use_bias and self.dora:
            raise ValueError("LoRA: DoRA changes the direction of a matrix and has no bias; take dora or use_bias.")

    def shape_for(self, base: Any) -> Shape:
        """Raises a `ValueError` where it does not fit a layer."""
        inputs, outputs = bases.sizes(base, "LoRA")
        kind = type(base).__name__
        if bases.is_table(base) and (self.parts > 1 or self.use_bias):
            raise ValueError(f"LoRA: parts and use_bias are for linear layers, and this is an {kind}.")
        if outputs % self.parts:
            raise ValueError(f"LoRA: {outputs} outputs are not {self.parts} equal parts.")
        if self.rank > (most := min(inputs, outputs // self.parts)):
            each = f" in each of {self.parts} parts" if self.parts > 1 else ""
            raise ValueError(
                f"LoRA: the rank is {self.rank}, but a matrix {outputs} by {inputs} has at most {most}{each}. A smaller"
                " rank for these layers: add_adapter(…, rank_pattern={pattern: rank})."
            )
        return Shape(inputs, outputs, self.rank, self.parts)


def _made(plan: Plan, node: Any, *, key: PRNGKeyArray | None = None) -> LoRA:
    if key is None:
        raise ValueError("LoRA: A is drawn by chance, which needs a key: where.each(model, make, key=key).")
    before = node if isinstance(node, LoRA) else LoRA(node, (), ())
    _expect_new(plan, before)
    # Two adapters of one layer, added with one key, are none of each other.
    base, adapter = _begun(plan, before.base, jax.random.fold_in(key, zlib.crc32(plan.name.encode())))
    weights = jnp.concatenate([before.weights, jnp.ones(1, before.weights.dtype)])
    return LoRA(base, (*before.adapters, adapter), (*before.names, plan.name), weights)


def _expect_new(plan: Plan, before: LoRA) -> None:
    if plan.name in before.names:
        raise ValueError(
            f"LoRA: there is an adapter named {plan.name!r} here already ({', '.join(before.names)}): give the new one"
            " another name."
        )
    if before.adapters and plan.init in FROM_WEIGHT:
        raise ValueError(
            f"LoRA: init={plan.init!r} changes the base, on which {', '.join(before.names)} stands: let it be the"
            " first adapter, or begin with another init."
        )


def _begun(plan: Plan, base: Any, key: PRNGKeyArray) -> tuple[Any, LowRank]:
    """The base, changed if its numbers go into the adapter, and the adapter."""
    shape = plan.shape_for(base)
    for_ab, for_bias, for_salt = jax.random.split(key, 3)
    if plan.init in FROM_WEIGHT:
        a, b = taken(plan.init, bases.matrix(base), shape, plan.scale)
    else:
        a, b = drawn(plan.init, shape, bases.is_table(base), for_ab)
    bias = _bias(plan, shape, for_bias) if plan.use_bias else None
    salt = jax.random.bits(for_salt, (), jnp.uint32)
    adapter = LowRank(a, b, plan.scale, b_bias=bias, dropout=plan.dropout, salt=salt, residual=plan.init in FROM_WEIGHT)
    if plan.init in FROM_WEIGHT:
        base = _remainder(plan, base, adapter)
    if plan.dora:
        magnitude = norms(bases.matrix(base) + adapter.product())
        adapter = eqx.tree_at(lambda x: x.magnitude, adapter, magnitude, is_leaf=lambda x: x is None)
    return base, adapter


def _bias(plan: Plan, shape: Shape, key: PRNGKeyArray) -> Float[Array, " outputs"]:
    return (
        uniform(key, (shape.outputs,), shape.rank) if plan.init == "random" else jnp.zeros(shape.outputs, jnp.float32)
    )


def _remainder(plan: Plan, base: Any, adapter: LowRank) -> Any:
    if not bases.is_plain(base):
        raise ValueError(
            f"LoRA: init={plan.init!r} leaves a remainder in the base, and a {type(base).__name__} would round it to"
            " its code: add the adapter before the model is quantized (quantize its bases after), or take another init."
        )
    return bases.with_matrix(base, bases.matrix(base) - adapter.product())
