"""What all losses ask of a batch: a model's output on every row of it, and what counts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..models.t5 import shifted

Batch = dict[str, Any]
Key = PRNGKeyArray | None
Found = tuple[Float[Array, ""], dict[str, Array]]
INPUTS = ("attention_mask", "token_type_ids", "segment_ids", "position_ids")


def row_weights(batch: Batch) -> Float[Array, " rows"]:
    """How much each row of a batch counts."""
    return jnp.asarray(batch["weights"], jnp.float32) if "weights" in batch else jnp.ones(len(batch["token_ids"]))


def real_tokens(batch: Batch) -> Int[Array, ""]:
    """How many tokens of a batch are text: those that its `attention_mask` shows, of rows that count."""
    ids = jnp.asarray(batch["token_ids"])
    mask = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids))).astype(jnp.int32)
    return jnp.where(row_weights(batch) != 0, mask.sum(1), 0).sum()


def told(batch: Batch, weight: Array, **aux: Array) -> dict[str, Array]:
    return {"weight": weight, "tokens": real_tokens(batch), **aux}


def by_row(call: Callable[..., Any], batch: Batch, key: Key, more: Batch | None = None) -> Any:
    """A model's output on every row."""
    ids = jnp.asarray(batch["token_ids"])
    given = {name: jnp.asarray(batch[name]) for name in INPUTS if name in batch} | (more or {})
    keys = None if key is None else jax.random.split(key, len(ids))
    return jax.vmap(lambda ids, given, key: call(ids, key=key, **given))(ids, given, keys)


def counting(mask: Bool[Array, "rows seq"], batch: Batch) -> Float[Array, "rows seq"]:
    """How much each token counts that does."""
    return mask.astype(jnp.float32) * row_weights(batch)[:, None]


def share_right(logits: Array, targets: Array, weights: Array) -> Float[Array, ""]:
    """Of what counts, how often the highest score is the target's."""
    right = (jnp.argmax(logits, axis=-1) == targets).astype(weights.dtype)
    return (right * weights).sum() / jnp.maximum(weights.sum(), 1)


def decoder_reads(model: Any, ids: Array) -> Array:
    """What a decoder reads to say these."""
    return jax.vmap(lambda row: shifted(row, model.start_id))(ids)
