"""A change of a matrix of low rank: what it computes beside a layer, and the matrix that it amounts to."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from ..nn._dtypes import wider
from ..nn._keys import keyed
from ..nn.dropout import Dropout
from ..nn.linear import contract
from ..nn.norm import along
from ._bases import at_least_float32, matrix


class LowRank(eqx.Module):
    r"""$W \mapsto W + s\,BA$, or with a magnitude $m$ (DoRA) $\frac{m}{\lVert W + s\,BA \rVert}\,(W + s\,BA)$ by rows.

    Shapes, `outputs inputs` being the matrix that is changed (of an embedding, its table the other way round:
    `embed_dim vocab_size`):

    - `a` is `rank inputs`, `b` is `outputs rank`, as PEFT has them. A fused projection of n parts has n of both: `a`
      is `n·rank inputs`, and the n-th slice of the outputs has the n-th slice of rows of `a` and of `b`, so that the
      change is block-diagonal in (outputs, rank). `rank` and `parts` are read off the shapes.
    - `b_bias` (`outputs`) is added to what `b` gives, before the scale.
    - `scale` is $s$: alpha / rank, or alpha / sqrt(rank). An array, so that another alpha compiles nothing anew.
    - `magnitude` (`outputs`) is DoRA's. The norm gets no gradient (section 4.3 of the paper).
    - `residual`: the base is what remained when `a` and `b` were taken out of it (PiSSA, OLoRA).
    - `salt` is folded into the key of the block, which all of its layers share: each drops something else.

    In stacked blocks all arrays have a leading layer axis. Sums run in float32 at least.
    Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
    """

    a: Float[Array, "rows inputs"]
    b: Float[Array, "outputs rank"]
    b_bias: Float[Array, " outputs"] | None
    scale: Float[Array, ""]
    magnitude: Float[Array, " outputs"] | None
    dropout: Dropout
    salt: UInt32[Array, ""]
    residual: bool = eqx.field(static=True)

    def __init__(
        self,
        a: Float[Array, "rows inputs"],
        b: Float[Array, "outputs rank"],
        scale: float | Float[Array, ""] = 1.0,
        *,
        b_bias: Float[Array, " outputs"] | None = None,
        magnitude: Float[Array, " outputs"] | None = None,
        dropout: float = 0.0,
        salt: int | UInt32[Array, ""] = 0,
        residual: bool = False,
    ):
        self.a = a
        self.b = b
        self.b_bias = b_bias
        self.scale = jnp.asarray(scale, jnp.float32)
        self.magnitude = magnitude
        self.dropout = Dropout(float(dropout))
        self.salt = jnp.asarray(salt, jnp.uint32)
        self.residual = residual

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def parts(self) -> int:
        """Of how many layers in one it is."""
        return self.a.shape[-2] // self.rank

    def product(self) -> Float[Array, "outputs inputs"]:
        r"""$s\,BA$."""
        a, b = self._by_part()
        sums = at_least_float32(a.dtype)
        b, a = b.astype(sums), a.astype(sums)
        blocks = jnp.einsum("por,pri->poi", b, a, precision=jax.lax.Precision.HIGHEST)
        return blocks.reshape(self.b.shape[-2], self.a.shape[-1]) * self.scale.astype(sums)

    def change(self, base: Any) -> Float[Array, "outputs inputs"]:
        """What it adds to the matrix of `base`."""
        if self.magnitude is None:
            return self.product()
        old, product = matrix(base), self.product()
        gain = self._gain(old, product)[:, None]
        return jnp.broadcast_to(gain - 1, old.shape) * old + jnp.broadcast_to(gain, old.shape) * product

    def of_linear(self, base: Any, x: Array, y: Array, key: PRNGKeyArray | None) -> Float[Array, "*axes outputs"]:
        r"""What it adds to `y = base(x)`.

        DoRA with dropout drops what goes into the base too, for its own part alone, as PEFT does:
        $(g - 1)\,W x' + g\,s\,BA x'$ with the gain $g = m / \lVert W + s\,BA \rVert$ and $x'$ the dropped $x$.
        """
        dropped = self._dropped(x, key)
        low = self._scaled(self._up(contract(dropped, self.a)))
        if self.magnitude is None:
            return low
        plain = without_bias(base, y if dropped is x else keyed(base, dropped, key)).astype(low.dtype)
        gain = along(self._gain(matrix(base), self.product()), low)
        return (gain - 1) * plain + gain * low

    def of_table(self, base: Any, ids: Int[Array, "*axes"], rows: Array) -> Float[Array, "*axes outputs"]:
        """What it adds to `rows = base(ids)`. There is no dropout: an id is not a sum, of which a part could go."""
        low = self._scaled(self._up(self._columns(base, ids)))
        if self.magnitude is None:
            return low
        gain = along(self._gain(matrix(base), self.product()), low)
        return (gain - 1) * rows.astype(low.dtype) + gain * low

    def of_scores(self, base: Any, x: Float[Array, "*axes outputs"]) -> Float[Array, "*axes inputs"]:
        """What it adds to `base.attend(x)`, the scores of a tied output: the table that both ends share is changed."""
        wide = x.astype(wider(x.dtype, self.b.dtype, jnp.float32))
        if self.magnitude is None:
            return self._scores(wide)
        gain = along(self._gain(matrix(base), self.product()), wide)
        return base.attend((gain - 1) * wide) + self._scores(gain * wide)

    def bias(self) -> Float[Array, " outputs"] | None:
        """What it adds to the bias."""
        return None if self.b_bias is None else self._scaled(self.b_bias.astype(at_least_float32(self.b_bias.dtype)))

    def _by_part(self) -> tuple[Array, Array]:
        """A and B with a leading axis of parts."""
        return self.a.reshape(self.parts, self.rank, -1), self.b.reshape(self.parts, -1, self.rank)

    def _up(self, low: Float[Array, "*axes rows"]) -> Float[Array, "*axes outputs"]:
        if self.parts == 1:
            y = contract(low, self.b)
        else:
            wide = at_least_float32(wider(low.dtype, self.b.dtype))
            low = low.reshape(*low.shape[:-1], self.parts, self.rank).astype(wide)
            y = jnp.einsum("...pr,por->...po", low, self._by_part()[1].astype(wide))
            y = y.reshape(*y.shape[:-2], -1)
        return y if self.b_bias is None else y + along(self.b_bias, y)

    def _columns(self, base: Any, ids: Int[Array, "*axes"]) -> Float[Array, "*axes rank"]:
        """Of `a`, one for each id; a row of the table that lookups give no gradient to has none here either."""
        found = self.a.at[:, ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        found = jnp.moveaxis(found, 0, -1)
        if (padding_id := getattr(base, "padding_id", None)) is None:
            return found
        return jnp.where((ids == padding_id)[..., None], jax.lax.stop_gradient(found), found)

    def _scores(self, x: Float[Array, "*axes outputs"]) -> Float[Array, "*axes inputs"]:
        return self._scaled(contract(contract(x, self.b.T), self.a.T))

    def _gain(
        self, old: Float[Array, "outputs inputs"], product: Float[Array, "outputs inputs"]
    ) -> Float[Array, " outputs"]:
        r"""$m / \lVert W + s\,BA \rVert$ by rows; 1 for a row of zeros, which any gain leaves as it is."""
        assert self.magnitude is not None
        norm = jax.lax.stop_gradient(norms(old + product))
        gain = self.magnitude.astype(norm.dtype) / jnp.where(norm == 0, 1, norm)
        return jnp.where(norm == 0, 1, gain)

    def _scaled(self, y: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        return y * self.scale.astype(y.dtype)

    def _dropped(self, x: Array, key: PRNGKeyArray | None) -> Array:
        """`x` itself where nothing is dropped."""
        if key is None or self.dropout.inference or (isinstance(self.dropout.p, float) and self.dropout.p == 0):
            return x
        return self.dropout(x, key=jax.random.fold_in(key, self.salt))


def norms(x: Float[Array, "outputs inputs"]) -> Float[Array, " outputs"]:
    """Of the rows."""
    return jnp.sqrt(jnp.square(x).sum(-1))


def without_bias(base: Any, y: Float[Array, "*axes outputs"]) -> Float[Array, "*axes outputs"]:
    bias = getattr(base, "bias", None)
    return y if bias is None else y - along(bias, y)
