"""Texts with labels: read, tokenized and put into batches, and what a classifier says of them."""

import csv
import io
import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from .. import metrics
from .._rows import INPUTS, by_row
from ..data import Batches
from ..text import DataError, Records, read_texts
from ..tokens import TokenizedTexts, tokenize
from . import _encoders as encoders
from ._gathered import fetched
from ._options import naming


class Labelled(NamedTuple):
    """Texts, their labels as numbers, and their tokens."""

    texts: list[Any]
    labels: Int[np.ndarray, " texts"]
    tokens: TokenizedTexts

    def taken(self, rows: Int[np.ndarray, " rows"]) -> "Labelled":
        """Some of them."""
        types = self.tokens.types
        cuts = [slice(*self.tokens.offsets[i : i + 2]) for i in rows]
        join = lambda values: np.concatenate([values[cut] for cut in cuts])
        offsets = np.cumsum([0, *self.tokens.lengths[rows]])
        tokens = TokenizedTexts(join(self.tokens.ids), offsets, types=None if types is None else join(types))
        return Labelled([self.texts[i] for i in rows], self.labels[rows], tokens)


def read(
    path: str | PathLike[str],
    *,
    text: str | tuple[str, str],
    label: str,
    names: Sequence[str] | None = None,
) -> Records:
    """What is trained on, of two classes at least; with the `names` of the classes, what is only evaluated."""
    known: dict[str, Any] = {} if names is None else {"labels": names, "least_classes": 1}
    texts = [text] if isinstance(text, str) else text
    with naming(dict.fromkeys(texts, "--text") | {label: "--label"}):
        return read_texts(path, text=text, label=label, **known)


def tokenized(records: Records, tokenizer: Any, config: Any, max_length: int | None) -> Labelled:
    """With tokens of at most `max_length` a text, and their types where texts are pairs and the model tells them apart.

    Raises a `DataError` for a token that the model has no row for, which is another model's tokenizer.
    """
    tokens = tokenize(records.texts, tokenizer, max_length=max_length, place=records.place)
    encoders.expect_known(tokens.ids, config.vocab_size)
    is_pair = not isinstance(records.texts[0], str)
    if not is_pair or getattr(config, "token_types", 0) < 2:
        tokens = TokenizedTexts(tokens.ids, tokens.offsets, truncated=tokens.truncated)
    assert records.labels is not None
    return Labelled(records.texts, records.labels, tokens)


def split(labels: Int[np.ndarray, " texts"], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): the same share of every class is held out, drawn by the seed; both in the order of the texts.

    Raises a `DataError` where nothing would be held out, or nothing of a class kept.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for one in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == one))
        held[members[: round(share * len(members))]] = True
    kept, counts = np.flatnonzero(~held), np.bincount(labels)
    if not held.any() or (np.bincount(labels[kept], minlength=len(counts)) < (counts > 0)).any():
        raise DataError(
            f"A share of {share} cannot be held out of {len(labels)} texts, {counts[counts > 0].min()} of a class: of"
            " every class some must be kept, and some texts held out. Give another share, or a file."
        )
    return kept, np.flatnonzero(held)


@eqx.filter_jit
def _forward(model: Any, batch: dict[str, Any]) -> Float[Array, "rows labels"]:
    return by_row(model, batch, None)


def logits(model: Any, batches: Batches) -> Float[np.ndarray, "texts labels"]:
    """Of every text, in their order, without dropout."""
    found: list[Any] = [None] * len(batches.texts)
    for batch in batches:
        rows = fetched(_forward(model, {name: batch[name] for name in ("token_ids", *INPUTS) if name in batch}))
        for place, row, weight in zip(batch["places"], rows, batch["weights"], strict=True):
            if weight:
                found[place] = row
    return np.stack(found)


def log_probabilities(logits: Float[np.ndarray, "texts labels"]) -> Float[np.ndarray, "texts labels"]:
    r"""$x - \log \sum \exp x$, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def told(logits: Float[np.ndarray, "texts labels"], labels: Int[np.ndarray, " texts"]) -> dict[str, float]:
    """Loss, accuracy and macro F1; NaN where a model said what is not a number."""
    if not np.isfinite(logits).all():
        return dict.fromkeys(("loss", "accuracy", "macro_f1"), math.nan)
    confusion = metrics.confusion_matrix(labels, logits.argmax(-1), logits.shape[-1])
    loss = -log_probabilities(logits)[np.arange(len(labels)), labels].mean()
    return {"loss": float(loss), "accuracy": metrics.accuracy(confusion), "macro_f1": metrics.macro_f1(confusion)}


def predictions(texts: Labelled, logits: Float[np.ndarray, "texts labels"], names: Sequence[str]) -> str:
    """A table: of every text its label, the one that is predicted, how probable that is said to be, and the text."""
    table = io.StringIO()
    write = csv.writer(table, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n").writerow
    is_pair = not isinstance(texts.texts[0], str)
    write(["label", "predicted", "probability", *(["text", "second"] if is_pair else ["text"])])
    probable = np.exp(log_probabilities(logits))
    for text, label, row in zip(texts.texts, texts.labels, probable, strict=True):
        fields = [names[label], names[row.argmax()], f"{row.max():.4f}", *(text if is_pair else [text])]
        write([" ".join(str(field).split()) for field in fields])
    return table.getvalue()


def shares(batches: Batches) -> str:
    """How much of what is computed is padding, for the user."""
    computed, real = batches.tokens_per_epoch
    lengths = "one length" if len(batches.shapes) == 1 else f"{len(batches.shapes)} lengths"
    return f"{lengths}, {1 - real / computed:.0%} of the tokens are padding"


def counted(name: str, texts: Labelled, names: Sequence[str]) -> str:
    """What was read, for the user."""
    classes = np.bincount(texts.labels, minlength=len(names))
    each = ", ".join(f"{one}: {count}" for one, count in list(zip(names, classes, strict=True))[:8])
    more = f", … of {len(names)} classes" if len(names) > 8 else ""
    return f"{name}: {len(texts.texts)} texts ({each}{more})"
