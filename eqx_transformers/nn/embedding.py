"""Rows of a table by their number, and the way back to scores over the rows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._errors import error_if, expect_last_axis
from .linear import contract


class Embedding(eqx.Module):
    """`ids -> weight[ids]`; the result has the weight's dtype, which becomes that of the stream through the model.

    `padding_id` names a row that lookups give no gradient to (torch's `padding_idx`); `attend` still does.

    An id outside the table is a `ValueError` where the ids are known while tracing, an error at run time under
    `EQX_TRANSFORMERS_CHECK=1`, and a row of NaN otherwise: a wrong number is never handed on as a plausible vector.
    """

    weight: Float[Array, "vocab_size embed_dim"]
    padding_id: int | None = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        padding_id: int | None = None,
        init: Initializer = jax.nn.initializers.normal(1.0),  # noqa: B008
        key: PRNGKeyArray,
    ):
        self.weight = init(key, (vocab_size, embed_dim), jnp.float32)
        if padding_id is not None:
            if not 0 <= padding_id < vocab_size:
                raise ValueError(f"Embedding: padding_id = {padding_id} is not a row of a table of {vocab_size} rows.")
            self.weight = self.weight.at[padding_id].set(0.0)
        self.padding_id = padding_id

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[-2]

    @property
    def embed_dim(self) -> int:
        return self.weight.shape[-1]

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes {self.embed_dim}"]:
        ids = self._bounded(ids)
        rows = self.weight.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        if self.padding_id is None:
            return rows
        padding = jnp.broadcast_to((ids == self.padding_id)[..., None], rows.shape)
        return jnp.where(padding, jax.lax.stop_gradient(rows), rows)

    def attend(self, x: Float[Array, "*axes {self.embed_dim}"]) -> Float[Array, "*axes {self.vocab_size}"]:
        """Scores of `x` against every row, `x · weightᵀ`: the output layer of a model whose embeddings are tied."""
        expect_last_axis(self, "embed_dim", self.embed_dim, x.shape)
        return contract(x, self.weight).astype(x.dtype)

    def _bounded(self, ids: Int[Array, "*axes"]) -> Int[Array, "*axes"]:
        said = f"Embedding: ids must be 0 to {self.vocab_size - 1} (a table of {self.vocab_size} rows)"
        if not isinstance(ids, jax.core.Tracer):
            outside = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= self.vocab_size)]
            if outside.size:
                raise ValueError(f"{said}, but {outside.size} of them are outside, the first is {outside.flat[0]}.")
        return error_if(ids, (ids < 0) | (ids >= self.vocab_size), said + ".")
