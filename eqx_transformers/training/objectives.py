"""What models are trained on: losses of a model on a batch, as `Updater` takes them.

A batch is a dict of arrays whose leading axis are the rows. `token_ids` and `attention_mask` are `rows seq`, and so are
`token_type_ids`, `segment_ids` and `position_ids`, which a model is given where they are there. `weights` are ` rows`:
0 for a row that only fills the shape and counts nowhere, 1 for the others (and for all, where there are none).

Every loss is `loss(model, batch, *, key=None) -> (value, aux)`. `key` switches dropout on, each row draws its own. In
`aux`, `weight` is what the value is a mean of and `tokens` how many real tokens were seen. `functools.partial` sets
what else a loss takes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.heads import CausalLM
from ..nn._dtypes import wider
from ._autoencoder import autoencoder_loss as autoencoder_loss
from ._rows import Batch, Found, Key, by_row, counting, decoder_reads, real_tokens, row_weights, share_right, told
from .losses import MaskedBy, chunked_cross_entropy, cross_entropy, next_tokens


def classification_loss(model: Any, batch: Batch, *, key: Key = None) -> Found:
    """The cross-entropy of `labels` (` rows`), a mean over rows; `aux` has the `accuracy`.

    The model gives logits ` labels` of a row. Raises a `ValueError` where it gives one, which is a regression.
    """
    logits = by_row(model, batch, key)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"A classifier gives two logits a row at least, but this model gives {logits.shape[1:]}.")
    labels, weights = jnp.asarray(batch["labels"]), row_weights(batch)
    value = cross_entropy(logits, labels, weights)
    return value, told(batch, weights.sum(), accuracy=share_right(logits, labels, weights))


def language_model_loss(
    model: Any,
    batch: Batch,
    *,
    key: Key = None,
    chunk: int | None = None,
    masked_by: MaskedBy = "target",
    z_loss: int | float = 0.0,
) -> Found:
    """The cross-entropy of every next token, a mean over tokens; see `lm_loss`, which has the same options.

    Where `segment_ids` are given, texts are packed: no token predicts one of another text.
    """
    ids = jnp.asarray(batch["token_ids"])
    marks: dict[str, Any] = {
        name: jnp.asarray(batch[name]) for name in ("attention_mask", "segment_ids") if name in batch
    }
    targets, mask = next_tokens(ids, **marks, masked_by=masked_by)
    counted = counting(mask, batch)
    if chunk is None:
        value = cross_entropy(by_row(model, batch, key)[:, :-1], targets, counted, z_loss=z_loss)
    elif isinstance(model, CausalLM):
        hidden = by_row(lambda ids, *, key, **given: model.hidden(ids, key, given), batch, key)[:, :-1]
        hidden, weight, bias = model.factors(hidden)
        value = chunked_cross_entropy(hidden, weight, targets, counted, bias=bias, chunk=chunk, z_loss=z_loss)
    else:
        raise ValueError(f"chunk = {chunk} needs a CausalLM, but the model is a {type(model).__name__}: chunk=None.")
    return value, told(batch, counted.sum())


def masked_lm_loss(model: Any, batch: Batch, *, key: Key = None, accuracy: bool = False) -> Found:
    """The cross-entropy of `targets` (`rows seq`), a mean over tokens: those that are not negative, as -100 is.

    With `accuracy`, `aux` has the share of them whose score is the highest.
    """
    return _token_loss(by_row(model, batch, key), batch, accuracy)


def sequence_to_sequence_loss(model: Any, batch: Batch, *, key: Key = None, accuracy: bool = False) -> Found:
    """The cross-entropy of `targets` (`rows target`) by an encoder-decoder, a mean over those that are not negative.

    The decoder reads `decoder_token_ids`, or without these the targets, one place on behind the model's `start_id`
    (what is negative as its padding). `aux` as of `masked_lm_loss`; its tokens are those of both sides.
    """
    targets = jnp.asarray(batch["targets"])
    if "decoder_token_ids" in batch:
        read = jnp.asarray(batch["decoder_token_ids"])
    else:
        read = decoder_reads(model, jnp.where(targets < 0, model.padding_id or 0, targets))
    given: Batch = {"decoder_token_ids": read}
    if "decoder_attention_mask" in batch:
        given["decoder_attention_mask"] = jnp.asarray(batch["decoder_attention_mask"])
    call = lambda ids, *, key, decoder_token_ids, **given: model(ids, decoder_token_ids, key=key, **given)
    value, aux = _token_loss(by_row(call, batch, key, given), batch, accuracy)
    return value, aux | {"tokens": aux["tokens"] + aux["weight"].astype(jnp.int32)}


def contrastive_loss(
    model: Any, batch: Batch, *, key: Key = None, temperature: int | float = 0.05, symmetric: bool = True
) -> Found:
    r"""InfoNCE: of all second texts of a batch, which one belongs to the first? A mean over rows.

    $-\log \exp(s_{ii} / \tau) / \sum_j \exp(s_{ij} / \tau)$, where $s_{ij}$ is the cosine of the model's vectors of row
    i's first text and row j's second one, and $\tau$ the `temperature`; the mean with the other direction where
    `symmetric`. Rows of weight 0 are neither asked nor wrong answers. In float32 at least.

    The second texts are `positive_token_ids`, with `positive_attention_mask` and so on; without them they are the first
    ones again, under another dropout, for which there must be a `key` (a `ValueError`). With micro-batches, wrong
    answers are those of the same one. `aux` has the `accuracy`: how often the right one is the nearest.
    Sources: van den Oord et al. 2018, arXiv:1807.03748; Gao et al. 2021, arXiv:2104.08821.
    """
    paired = {name.removeprefix("positive_"): x for name, x in batch.items() if name.startswith("positive_")}
    if not paired and key is None:
        raise ValueError(
            "Without dropout, a text's two views are the same: pass a key, or pairs, as positive_token_ids."
        )
    one, other = (None, None) if key is None else jax.random.split(key)
    weights = row_weights(batch)
    first, second = (_unit(x, weights) for x in (by_row(model, batch, one), by_row(model, paired or batch, other)))
    scores = first @ second.T / temperature
    right = jnp.arange(len(scores))
    asked = [scores, scores.T] if symmetric else [scores]
    there = jnp.broadcast_to(weights > 0, scores.shape)
    asked = [jnp.where(there, x, jnp.finfo(x.dtype).min) for x in asked]
    value = sum((cross_entropy(x, right, weights) for x in asked), jnp.zeros(())) / len(asked)
    said = told(batch, weights.sum(), accuracy=share_right(asked[0], right, weights))
    return value, said | ({"tokens": said["tokens"] + real_tokens(paired | _weights(batch))} if paired else {})


def _token_loss(logits: Array, batch: Batch, accuracy: bool) -> Found:
    targets = jnp.asarray(batch["targets"])
    counted = counting(targets >= 0, batch)
    said = {"accuracy": share_right(logits, targets, counted)} if accuracy else {}
    return cross_entropy(logits, targets, counted), told(batch, counted.sum(), **said)


def _unit(x: Float[Array, "rows dim"], weights: Float[Array, " rows"]) -> Float[Array, "rows dim"]:
    """Of unit length, and zero in rows that do not count."""
    wide = x.astype(wider(x.dtype, jnp.float32))
    wide = jnp.where(jnp.broadcast_to(weights[:, None] > 0, wide.shape), wide, 0)
    return wide / jnp.sqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24))


def _weights(batch: Batch) -> Batch:
    return {"weights": batch["weights"]} if "weights" in batch else {}
