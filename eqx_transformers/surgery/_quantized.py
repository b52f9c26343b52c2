"""Linear layers and embeddings whose matrix is of 8-bit or 4-bit whole numbers."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, PRNGKeyArray

from ..nn import Embedding, Linear
from ..nn._errors import expect_last_axis
from ._rounding import LEVELS, dense4, dense8, product, product4, rounded, rounded4


class Quantized(eqx.Module):
    """What all have in common: a matrix of few bits, which `dense` gives in full, and the `plain` layer of that matrix.

    The whole numbers are frozen: they have no gradient. `scale` and a bias have one, and the input.
    """

    bits: eqx.AbstractClassVar[int]

    @staticmethod
    def make(bits: int = 8, group: int = 64) -> Callable[[Any], "Quantized"]:
        """What makes a quantized layer of a `Linear` or an `Embedding`, for `Selection.each` and `Selection.map`.

        `group`: how many numbers of a row share a scale, for 4 bits; the last group of a row may be smaller.

        Raises a `ValueError` for other bits, a group below 1, and stacked layers that are not shown one by one; a
        `TypeError` for a node of any other class: one that is quantized is dequantized first.
        """
        return _maker(bits, group)

    @abc.abstractmethod
    def dense(self) -> Float[Array, "*layers rows columns"]:
        """The matrix, q · scale without rounding, in float32 at least."""

    @abc.abstractmethod
    def plain(self) -> Linear | Embedding:
        """The layer with this matrix, rounded once to the dtype that it had."""


def _with_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _given(weight: Array) -> Any:
    """What draws nothing: the numbers are there."""
    return {"init": lambda *_: weight, "key": jax.random.key(0)}


@eqx.filter_jit
def _matrix(node: Quantized) -> Array:
    """Of a plain layer."""
    return node.dense().astype(node.scale.dtype)


def _linear(weight: Array, bias: Array | None) -> Linear:
    linear = Linear(*weight.shape[::-1], use_bias=False, **_given(weight))
    return eqx.tree_at(lambda x: x.bias, linear, bias, is_leaf=lambda x: x is None)


def _rows(table: Array, ids: Array) -> Array:
    """Rows by their number, with an `Embedding`'s errors for those that there are not."""
    return Embedding(*table.shape, **_given(table))(ids)


class Int8Linear(Quantized):
    r"""A `Linear` whose matrix is of 8-bit numbers: $x \mapsto (x q^\top) \cdot \mathrm{scale} + b$.

    Symmetric, with one scale for each output feature. Products are summed in float32 at least and scaled there, the
    bias is added before the one rounding, and the result has the input's dtype. `scale` has the matrix's former dtype.
    """

    numbers: Int8[Array, "out_features in_features"]
    scale: Float[Array, " out_features"]
    bias: Float[Array, " out_features"] | None
    bits = 8

    def __init__(self, linear: Linear):
        self.numbers, self.scale = rounded(linear.weight, LEVELS[8])
        self.bias = linear.bias

    @property
    def in_features(self) -> int:
        return self.numbers.shape[-1]

    @property
    def out_features(self) -> int:
        return self.numbers.shape[-2]

    def __call__(
        self, x: Float[Array, "*axes {self.in_features}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes {self.out_features}"]:
        expect_last_axis(self, "in_features", self.in_features, x.shape)
        return _with_bias(product(x, self.numbers, self.scale), self.bias).astype(x.dtype)

    def dense(self) -> Float[Array, "*layers {self.out_features} {self.in_features}"]:
        return dense8(self.numbers, self.scale)

    def plain(self) -> Linear:
        return _linear(_matrix(self), self.bias)


class Int4Linear(Quantized):
    r"""A `Linear` whose matrix is of 4-bit numbers, -7 to 7, with a scale for each group of an output's inputs.

    Two numbers are one byte. Where `group` does not divide the inputs, the last group is smaller. A call multiplies
    with the matrix in full, which is exact in float32 and is not kept; else as `Int8Linear`.
    """

    numbers: Int8[Array, "out_features half"]
    scale: Float[Array, "out_features groups"]
    bias: Float[Array, " out_features"] | None
    in_features: int = eqx.field(static=True)  # half of an odd number does not say it
    group: int = eqx.field(static=True)
    bits = 4

    def __init__(self, linear: Linear, *, group: int = 64):
        self.numbers, self.scale = rounded4(linear.weight, group)
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.group = group

    @property
    def out_features(self) -> int:
        return self.numbers.shape[-2]

    def __call__(
        self, x: Float[Array, "*axes {self.in_features}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes {self.out_features}"]:
        expect_last_axis(self, "in_features", self.in_features, x.shape)
        y = product4(x, self.numbers, self.scale, self.group, self.in_features)
        return _with_bias(y, self.bias).astype(x.dtype)

    def dense(self) -> Float[Array, "*layers {self.out_features} {self.in_features}"]:
        return dense4(self.numbers, self.scale, self.group, self.in_features)

    def plain(self) -> Linear:
        return _linear(_matrix(self), self.bias)


class Int8Embedding(Quantized):
    """An `Embedding` whose table is of 8-bit numbers, with a scale for each row. Rows have the table's former dtype."""

    numbers: Int8[Array, "vocab_size embed_dim"]
    scale: Float[Array, " vocab_size"]
    padding_id: int | None = eqx.field(static=True)
    bits = 8

    def __init__(self, embedding: Embedding):
        self.numbers, self.scale = rounded(embedding.weight, LEVELS[8])
        self.padding_id = embedding.padding_id

    @property
    def vocab_size(self) -> int:
        return self.numbers.shape[-2]

    @property
    def embed_dim(self) -> int:
        return self.numbers.shape[-1]

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes {self.embed_dim}"]:
        """See `Embedding`: an id outside the table raises or gives NaN."""
        scale = _rows(self.scale[..., None], ids)[..., 0]
        return dense8(self.numbers.at[ids].get(mode="clip"), scale).astype(self.scale.dtype)

    def attend(self, x: Float[Array, "*axes {self.embed_dim}"]) -> Float[Array, "*axes {self.vocab_size}"]:
        """Scores of `x` against every row."""
        expect_last_axis(self, "embed_dim", self.embed_dim, x.shape)
        return product(x, self.numbers, self.scale).astype(x.dtype)

    def dense(self) -> Float[Array, "*layers {self.vocab_size} {self.embed_dim}"]:
        return dense8(self.numbers, self.scale)

    def plain(self) -> Embedding:
        return _embedding(_matrix(self), self.padding_id)


class Int4Embedding(Quantized):
    """An `Embedding` whose table is of 4-bit numbers, with a scale for each group of a row; see `Int4Linear`."""

    numbers: Int8[Array, "vocab_size half"]
    scale: Float[Array, "vocab_size groups"]
    embed_dim: int = eqx.field(static=True)
    group: int = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)
    bits = 4

    def __init__(self, embedding: Embedding, *, group: int = 64):
        self.numbers, self.scale = rounded4(embedding.weight, group)
        self.embed_dim = embedding.embed_dim
        self.group = group
        self.padding_id = embedding.padding_id

    @property
    def vocab_size(self) -> int:
        return self.numbers.shape[-2]

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes {self.embed_dim}"]:
        """See `Embedding`: an id outside the table raises or gives NaN."""
        scale = _rows(self.scale, ids)
        rows = dense4(self.numbers.at[ids].get(mode="clip"), scale, self.group, self.embed_dim)
        return rows.astype(self.scale.dtype)

    def attend(self, x: Float[Array, "*axes {self.embed_dim}"]) -> Float[Array, "*axes {self.vocab_size}"]:
        """Scores of `x` against every row."""
        expect_last_axis(self, "embed_dim", self.embed_dim, x.shape)
        return product4(x, self.numbers, self.scale, self.group, self.embed_dim).astype(x.dtype)

    def dense(self) -> Float[Array, "*layers {self.vocab_size} {self.embed_dim}"]:
        return dense4(self.numbers, self.scale, self.group, self.embed_dim)

    def plain(self) -> Embedding:
        return _embedding(_matrix(self), self.padding_id)


def _embedding(weight: Array, padding_id: int | None) -> Embedding:
    """With the padding's row as it was, which an `Embedding` that is made anew has as zeros."""
    made = Embedding(*weight.shape, padding_id=padding_id, **_given(weight))
    return eqx.tree_at(lambda x: x.weight, made, weight)


def _maker(bits: int, group: int) -> Callable[[Any], Quantized]:
    if bits not in LEVELS:
        raise ValueError(f"Weights are quantized to 8 or to 4 bits, not to {bits!r}.")
    if group < 1:
        raise ValueError(f"group = {group}: at least 1 number must share a scale; 32, 64 or 128 are usual.")

    def make(node: Any) -> Quantized:
        _expect_plain(node)
        if bits == 8:
            return Int8Linear(node) if type(node) is Linear else Int8Embedding(node)
        return Int4Linear(node, group=group) if type(node) is Linear else Int4Embedding(node, group=group)

    return make


def _expect_plain(node: Any) -> None:
    if type(node) not in (Linear, Embedding):
        already = " It is quantized already: dequantize(model) first." if isinstance(node, Quantized) else ""
        raise TypeError(f"A Linear or an Embedding can be quantized, but this is a {type(node).__name__}.{already}")
    if node.weight.ndim != 2:
        raise ValueError(
            f"The weight of this {type(node).__name__} is {node.weight.shape}, of stacked layers: use"
            " selection.map(model, …) or quantize(model, selection), which show each layer by itself."
        )
