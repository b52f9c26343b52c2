"""The doors of all models: what a tokenizer or a packer gives, as arrays of one kind, or one clear error."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from ..nn import Mask
from ..nn._errors import error_if

Ids = Integer[Array | np.ndarray, " seq"]
Attended = Bool[Array | np.ndarray, "*queries seq"] | Integer[Array | np.ndarray, "*queries seq"]
# The same of what a decoder reads beside a sequence.
TargetIds = Integer[Array | np.ndarray, " target"]
TargetAttended = Bool[Array | np.ndarray, "*looking target"] | Integer[Array | np.ndarray, "*looking target"]
ONE = "A model takes one sequence: jax.vmap it over a batch."


def whole_numbers(name: str, x: Any, like: Array | None = None) -> Array | None:
    """One whole number a token, as int32: counts of tokens would overflow in the bytes that tokenizers save."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, but it is {x.dtype}.")
    if x.ndim == 1 and not x.size:
        raise ValueError(f"{name} is empty: a model takes a sequence of at least one token.")
    if x.ndim != 1:
        raise ValueError(f"{name} must be 'seq', but it is {x.shape}. {ONE}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} must be as long as token_ids, {like.shape[0]}, but it is {x.shape[0]}.")
    return x.astype(jnp.int32)


def mask_of(attention_mask: Any, segments: Int[Array, " seq"] | None, seq: int, causal: bool) -> Mask:
    """The encoder's mask from what a tokenizer or a packer gives."""
    if attention_mask is None:
        return Mask(causal=causal, segments=segments)
    given = jnp.asarray(attention_mask)
    if given.shape not in ((seq,), (seq, seq)):
        wanted = f"{(seq,)} (keys) or {(seq, seq)} (queries, keys)"
        raise ValueError(f"attention_mask must be {wanted}, but it is {given.shape}. {ONE}")
    if jnp.issubdtype(given.dtype, jnp.floating):
        # In an additive mask 0 means attend: read as one of ours, it would hide exactly what should be seen.
        raise ValueError(f"attention_mask must be bool or integers, 1 where to attend, but it is {given.dtype}.")
    if given.dtype != jnp.bool_:
        wrong = (given != 0) & (given != 1)
        given = error_if(given, wrong, "attention_mask must hold 0 and 1 (or False and True).") != 0
    keys, dense = (given, None) if given.ndim == 1 else (None, given)
    return Mask(causal=causal, segments=segments, keys=keys, dense=dense)
