"""What a T5-VAE is trained on: texts said again from their codes, and what keeps these near the prior."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._rows import Batch, Found, Key, by_row, counting, decoder_reads, row_weights, share_right, told
from .losses import cross_entropy
from .regularisers import ORIGINAL, AbstractKernel, kl, logistic_weight, mmd_to_prior, reconstruction_loss


def autoencoder_loss(
    *,
    weight: int | float | Callable[[Any], Any] = logistic_weight,
    regulariser: Literal["mmd", "kl", "none"] = "mmd",
    reconstruct: bool = False,
    per: Literal["row", "token", "batch"] = "row",
    kernel: AbstractKernel = ORIGINAL,
    per_token: bool = False,
    free_bits: int | float = 0.0,
) -> Callable[..., Found]:
    r"""A loss of a `T5VAE`, which says its texts again: cross-entropy + weight(step) * regulariser (+ reconstruction).

    - The cross-entropy of the tokens of `token_ids` that `attention_mask` says are real: their sum, by the number of
      rows with `per="row"`; their mean with "token"; with "batch" the sum of all, as the T5-VAE has it, whose
      micro-batches count alike.
    - `regulariser`: "mmd", `mmd_to_prior` of the codes and as many draws, with this `kernel`, `per_token` or flat;
      "kl" of what is variational, with these `free_bits`; or "none".
    - `weight`: a number, or a schedule of the step. The T5-VAE's options: `reg_constant_weight` is a number,
      `reg_schedule_k` and `_b` are the `slope` and `offset` of `logistic_weight`. Without a step, as where a model is
      evaluated, a schedule's weight is 1.
    - `reconstruct` adds the mean squared error of the encoder's states and those rebuilt from the codes, of real tokens
      (`use_recon_loss`).

    `loss(model, batch, *, key=None, step=None)`; without a key the draws of the prior are always the same ones. `aux`:
    `cross_entropy` and `accuracy` by token, `regulariser`, `regulariser_weight`, `reconstruction` if asked for.
    Source: https://github.com/Fraser-Greenlee/T5-VAE.
    """

    def loss(model: Any, batch: Batch, *, key: Key = None, step: Any = None) -> Found:
        inside, draw = (None, jax.random.key(0)) if key is None else jax.random.split(key)
        output, targets, counted = _said_again(model, batch, inside)
        mean, count, weights = cross_entropy(output.logits, targets, counted), counted.sum(), row_weights(batch)
        rows = jnp.maximum(weights.sum(), 1)
        value = {"token": mean, "row": mean * count / rows, "batch": mean * count}[per]
        aux = {"cross_entropy": mean, "accuracy": share_right(output.logits, targets, counted)}
        if regulariser != "none":
            cost = _divergence(output, weights, draw, regulariser, kernel, per_token, free_bits)
            factor = (weight(step) if step is not None else 1.0) if callable(weight) else weight
            aux |= {"regulariser": cost, "regulariser_weight": jnp.asarray(factor, jnp.float32)}
            value = value + aux["regulariser_weight"] * cost
        if reconstruct:
            aux["reconstruction"] = reconstruction_loss(output.states, output.reconstructed_states, counted > 0)
            value = value + aux["reconstruction"]
        by = {"token": count, "row": weights.sum(), "batch": (weights.sum() > 0).astype(jnp.float32)}[per]
        return value, told(batch, by, **aux)

    return loss


def _said_again(model: Any, batch: Batch, key: Key) -> tuple[Any, Array, Array]:
    """(a T5-VAE's output, its targets, how much each counts)."""
    ids = jnp.asarray(batch["token_ids"])
    call = lambda ids, *, key, decoder_token_ids, **given: model(ids, decoder_token_ids, key=key, **given)
    output = by_row(call, batch, key, {"decoder_token_ids": decoder_reads(model, ids)})
    real = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids)))
    return output, ids, counting(real != 0, batch)


def _divergence(
    output: Any,
    weights: Array,
    key: PRNGKeyArray,
    regulariser: str,
    kernel: AbstractKernel,
    per_token: bool,
    free_bits: int | float,
) -> Float[Array, ""]:
    if regulariser == "mmd":
        return mmd_to_prior(output.latents, key=key, per_token=per_token, kernel=kernel, weights=weights)
    mean, log_variance, _ = output.posterior
    if log_variance is None:
        raise ValueError('regulariser = "kl" is of codes that are drawn, but this T5VAE is not variational: "mmd".')
    return kl(mean, log_variance, free_bits=free_bits, weights=weights)
