"""Cross-entropy over a vocabulary: of logits that exist, or chunk by chunk of those that would take too much room."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..models.heads import CausalLM
from ..nn._dtypes import wider
from ..nn._errors import error_if
from ._chunks import by_chunks, even, picked

Ids = Integer[Array | np.ndarray, "*axes seq"]
Real = Bool[Array | np.ndarray, "*axes seq"] | Integer[Array | np.ndarray, "*axes seq"]
Weights = Real | Float[Array | np.ndarray, "*axes seq"]
MaskedBy = Literal["target", "input", "both"]


def cross_entropy(
    logits: Float[Array, "*axes seq vocab"],
    targets: Ids,
    mask: Weights | None = None,
    *,
    z_loss: float | Float[Array, ""] = 0.0,
) -> Float[Array, ""]:
    r"""$\sum_t m_t (l_t - x_{t, y_t} + \zeta\, l_t^2) / \sum_t m_t$ where $l_t = \log \sum_v \exp x_{t, v}$.

    $x$ are the logits, $y$ the `targets`, $m$ the `mask` (all ones unless given; weights are possible) and $\zeta$
    `z_loss`, which keeps the logits from drifting. All leading axes count as tokens of one mean. Computed in float32 at
    least. Where nothing counts, the loss and its gradients are zero.

    What stands where the mask is 0 has no effect, be it a target outside the vocabulary (such as -100) or a NaN. A
    target outside the vocabulary that counts is a `ValueError` where targets and mask are known while tracing, an error
    at run time under `EQX_TRANSFORMERS_CHECK=1`, and otherwise makes the loss and its gradients NaN.
    Source of the z-loss: Chowdhery et al. 2022, arXiv:2204.02311.
    """
    wide = logits.astype(wider(logits.dtype, jnp.float32))
    targets, weights = _counted(logits.shape, targets, mask, wide.dtype)
    wide = jnp.where((weights != 0)[..., None], wide, 0)
    total = jax.nn.logsumexp(wide, axis=-1)
    return _mean(total, picked(wide, targets), weights, z_loss)


def chunked_cross_entropy(
    hidden: Float[Array, "*axes seq embed_dim"],
    weight: Float[Array, "vocab_size embed_dim"],
    targets: Ids,
    mask: Weights | None = None,
    *,
    bias: Float[Array, " vocab_size"] | None = None,
    chunk: int = 8192,
    z_loss: float | Float[Array, ""] = 0.0,
) -> Float[Array, ""]:
    r"""`cross_entropy(hidden @ weight.T + bias, targets, mask)`, of which `chunk` columns exist at a time.

    The vocabulary is gone through in chunks, and $\log \sum \exp$ is brought up to date at each; the backward pass
    computes each chunk again. Neither pass holds an array `seq vocab`, under `jax.vmap` either, whose gradient of
    `weight` is summed over the rows as it is made. Products are summed in float32 at least and not rounded.

    If no number from `chunk / 8` to `chunk` divides the vocabulary, the last chunk is a smaller one, and the rows of
    the others are copied once a pass.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden is {hidden.shape}, but weight {weight.shape}: their last axes must be the same.")
    if not isinstance(chunk, int | np.integer) or chunk < 1:
        raise ValueError(f"chunk = {chunk!r} must be a whole number, at least 1: so many columns of the logits exist.")
    vocab_size = weight.shape[0]
    dtype = wider(hidden.dtype, weight.dtype, jnp.float32)
    targets, weights = _counted((*hidden.shape[:-1], vocab_size), targets, mask, dtype)
    hidden = jnp.where((weights != 0)[..., None], hidden, 0)
    total, found = by_chunks(hidden, weight, bias, targets, even(vocab_size, chunk), dtype)
    return _mean(total, found, weights, z_loss)


def next_tokens(
    token_ids: Ids,
    *,
    attention_mask: Real | None = None,
    padding_id: int | None = None,
    segment_ids: Ids | None = None,
    masked_by: MaskedBy = "target",
) -> tuple[Integer[Array, "*axes pairs"], Bool[Array, "*axes pairs"]]:
    r"""(targets, mask) of the positions $0, \dots, \mathrm{seq} - 2$: each predicts the token after it.

    A token is real where `attention_mask` is 1, or where it is not `padding_id`; all are without either, and giving
    both is a `ValueError`. Position $t$ counts

    - by "target", if the token that it predicts, $t + 1$, is real: no padding is predicted. (Padding on the left
      predicts the first token, from nothing.)
    - by "input", if it is real itself: the first padding after a text is predicted too, which teaches a model to end
      where texts have no end token. The tutorial of Haiku does so.
    - by "both", if both are.

    No position counts whose next token is another segment's: with `segment_ids`, texts are packed in one row.
    Where the padding is also the token that ends a text, `attention_mask` tells them apart and `padding_id` cannot.
    """
    ids = jnp.asarray(token_ids)
    real = _real(ids, attention_mask, padding_id)
    here, there = real[..., :-1], real[..., 1:]
    masks = {"target": there, "input": here, "both": here & there}
    if masked_by not in masks:
        raise ValueError(f"masked_by = {masked_by!r} is not one of {', '.join(masks)}.")
    mask = masks[masked_by]
    if segment_ids is not None:
        segments = jnp.asarray(segment_ids)
        _expect_shape("segment_ids", segments, ids)
        mask = mask & (segments[..., :-1] == segments[..., 1:])
    return ids[..., 1:], mask


def next_token_loss(
    logits: Float[Array, "*axes seq vocab"],
    token_ids: Ids,
    *,
    attention_mask: Real | None = None,
    padding_id: int | None = None,
    segment_ids: Ids | None = None,
    masked_by: MaskedBy = "target",
    z_loss: float | Float[Array, ""] = 0.0,
) -> Float[Array, ""]:
    """The cross-entropy of every next token: `token_ids` are those that gave the `logits`, and are shifted here.

    The last position's logits predict nothing. What counts: see `next_tokens`.
    """
    targets, mask = next_tokens(
        token_ids, attention_mask=attention_mask, padding_id=padding_id, segment_ids=segment_ids, masked_by=masked_by
    )
    return cross_entropy(logits[..., :-1, :], targets, mask, z_loss=z_loss)


def lm_loss(
    model: Any,
    token_ids: Ids,
    *,
    attention_mask: Real | None = None,
    segment_ids: Ids | None = None,
    masked_by: MaskedBy = "target",
    chunk: int | None = None,
    z_loss: float | Float[Array, ""] = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """`next_token_loss` of a causal model on a sequence, or on sequences whose tokens share one mean (`batch seq`).

    Without an `attention_mask` all tokens are real, but those that the model itself hides by their id. `key` switches
    dropout on; every sequence draws its own. `chunk` is that of `chunked_cross_entropy`, which an encoder's head takes
    part in too: its own layer runs as it is, and its output is one matrix. The result is the same but for the rounding
    of the logits to the dtype of the stream, which only those make that exist.

    Without a `chunk`, `model` is anything that is called for one sequence as a `CausalLM` is. With one it must be a
    `CausalLM` whose output is a plain `Linear` or `Embedding`: a `ValueError` where it is wrapped or replaced.
    """
    ids = jnp.asarray(token_ids)
    if attention_mask is None and isinstance(model, CausalLM) and model.backbone.hidden_id is not None:
        attention_mask = ids != model.backbone.hidden_id
    marks = {"attention_mask": attention_mask, "segment_ids": segment_ids}
    given: dict[str, Any] = {name: jnp.asarray(x) for name, x in marks.items() if x is not None}
    for name, x in given.items():
        _expect_shape(name, x, ids)
    targets, mask = next_tokens(ids, **given, masked_by=masked_by)
    if chunk is None:
        logits = _each(lambda ids, given, key: model(ids, key=key, **given), ids, given, key)
        return cross_entropy(logits[..., :-1, :], targets, mask, z_loss=z_loss)
    if not isinstance(model, CausalLM):
        found = type(model).__name__
        raise ValueError(f"chunk = {chunk} needs a CausalLM, but the model is a {found}: chunk=None takes any model.")
    hidden = _each(lambda ids, given, key: model.hidden(ids, key, given), ids, given, key)
    hidden, weight, bias = model.factors(hidden[..., :-1, :])
    return chunked_cross_entropy(hidden, weight, targets, mask, bias=bias, chunk=chunk, z_loss=z_loss)


def _each(call: Callable[..., Array], ids: Array, given: dict[str, Any], key: PRNGKeyArray | None) -> Array:
    """`call` for one sequence, over the leading axes."""
    if ids.ndim <= 1:
        return call(ids, given, key)
    keys = None if key is None else jax.random.split(key, len(ids))
    return jax.vmap(lambda *args: _each(call, *args))(ids, given, keys)


def _real(ids: Array, attention_mask: Any, padding_id: int | None) -> Bool[Array, "*axes seq"]:
    if attention_mask is not None and padding_id is not None:
        raise ValueError("attention_mask and padding_id both say which tokens are real: give one of them.")
    if attention_mask is None:
        return jnp.ones(ids.shape, bool) if padding_id is None else ids != padding_id
    mask = jnp.asarray(attention_mask)
    _expect_shape("attention_mask", mask, ids)
    if jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(f"attention_mask must be bool or integers, 1 for a real token, but it is {mask.dtype}.")
    return mask.astype(bool)


def _expect_shape(name: str, x: Array, ids: Array) -> None:
    if x.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of token_ids, {ids.shape}, but it is {x.shape}.")


def _counted(shape: tuple[int, ...], targets: Any, mask: Any, dtype: Any) -> tuple[Array, Array]:
    """Targets, and how much each counts: NaN where one counts that is not in the vocabulary."""
    *tokens, vocab_size = shape
    targets = jnp.asarray(targets)
    mask = jnp.ones(targets.shape, dtype) if mask is None else jnp.asarray(mask).astype(dtype)
    for name, x in (("targets", targets), ("mask", mask)):
        if x.shape != tuple(tokens):
            raise ValueError(f"{name} must have the shape {tuple(tokens)}, one entry a token, but it is {x.shape}.")
    wrong = ((targets < 0) | (targets >= vocab_size)) & (mask != 0)
    said = f"Targets must be 0 to {vocab_size - 1} (a vocabulary of {vocab_size}) wherever the mask is not 0"
    if not isinstance(wrong, jax.core.Tracer) and wrong.any():
        raise ValueError(f"{said}, but {int(wrong.sum())} of them are not, the first is {targets[wrong][0]}.")
    return targets, jnp.where(wrong, jnp.nan, error_if(mask, wrong, said + "."))


def _mean(total: Array, found: Array, weights: Array, z_loss: Any) -> Float[Array, ""]:
    each = total - found
    if not isinstance(z_loss, int | float) or z_loss:
        each = each + z_loss * jnp.square(total)
    count = weights.sum()
    return (weights * each).sum() / jnp.where(count == 0, 1, count)
