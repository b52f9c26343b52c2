"""(IA)³: a layer that stays as it is, and one factor for each of its outputs or inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..nn._dtypes import wider
from ..nn._keys import keyed
from ..nn.norm import along
from . import _bases as bases

Side = Literal["output", "input"]


class IA3(bases.AbstractWrapper):
    r"""$y = l \odot (W x + b)$ in the place of a `Linear`, or with `on="input"` $y = W (l \odot x) + b$.

    `scale` is $l$, all ones at first; `base` is the layer as it was, plain or quantized. The paper has the outputs of
    keys and values and the inputs of an MLP's second layer. Of an embedding, the numbers of every row are scaled
    (`output`), in `attend` too.

    Products run in the wider dtype; results have the base's. Source: Liu et al. 2022, arXiv:2205.05638.
    """

    base: eqx.Module
    scale: Float[Array, " features"]
    on: Side = eqx.field(static=True)

    @staticmethod
    def adapter(on: Side = "output") -> Callable[..., "IA3"]:
        """`make` for `Selection.each(model, make)` or `Selection.map(model, make)`; it draws nothing.

        Raises a `ValueError` for another `on`, and, when it is used, for a node that is neither linear nor an
        embedding, or an embedding with `on="input"`.
        """
        if on not in get_args(Side):
            raise ValueError(f"IA3: on must be one of {', '.join(get_args(Side))}; it is {on!r}.")
        return partial(_made, on)

    @property
    def bias(self) -> Float[Array, " outputs"] | None:
        """The base's, scaled with the outputs."""
        bias = getattr(self.base, "bias", None)
        return bias if bias is None or self.on == "input" else self._scaled(bias, wide=True)

    def __call__(
        self, x: Float[Array, "*axes inputs"] | Int[Array, "*axes"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes outputs"]:
        if bases.is_table(self.base):
            return self._scaled(self.base(x))
        if self.on == "input":
            return keyed(self.base, self._scaled(x), key)
        return self._scaled(keyed(self.base, x, key))

    def attend(self, x: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes vocab_size"]:
        """Scores against every row of the scaled table; of an embedding only."""
        return self.base.attend(self._scaled(x))

    def dense(self) -> Array:
        """The scaled matrix, in the base's order (of a table, `vocab_size embed_dim`), not rounded."""
        weight = bases.dense(self.base)
        is_last = self.on == "input" or bases.is_table(self.base)
        return self._scaled(weight, wide=True) if is_last else self._scaled(weight.T, wide=True).T

    def _scaled(self, x: Float[Array, "*axes features"], wide: bool = False) -> Float[Array, "*axes features"]:
        dtype = wider(x.dtype, self.scale.dtype)
        y = x.astype(dtype) * along(self.scale.astype(dtype), x.astype(dtype))
        return y if wide else y.astype(x.dtype)


def _made(on: Side, node: Any, *, key: PRNGKeyArray | None = None) -> IA3:
    inputs, outputs = bases.sizes(node, "IA3")
    if bases.is_table(node) and on == "input":
        raise ValueError(f"IA3: what goes into an {type(node).__name__} are ids, which nothing scales: on='output'.")
    return IA3(node, jnp.ones(inputs if on == "input" else outputs, jnp.float32), on)
