"""What a text says of itself without a model: its entropy under counts of single tokens and of pairs."""

import math

import numpy as np
from jaxtyping import Int

Train = Int[np.ndarray, " train"]
Held = Int[np.ndarray, " held"]


def unigram_entropy(train: Train, held_out: Held, vocab_size: int, *, smoothing: int | float = 1.0) -> float:
    r"""$-\frac{1}{n - 1} \sum_{t > 0} \log \frac{c(w_t) + s}{N + s V}$: nats a token of `held_out`, but for the first.

    $c$ counts the tokens of `train`, $N$ is how many there are, $V$ the `vocab_size` and $s$ the `smoothing`: so much
    is added to every count. Infinite where a token was never counted and nothing is added. The first token is left out,
    so that it is the mean over the same tokens as `bigram_entropy` and the loss of a language model.

    Raises a `ValueError` for fewer than two tokens, and for tokens outside of the vocabulary.
    """
    _expect(train, held_out, vocab_size, smoothing)
    counts = np.bincount(train, minlength=vocab_size)
    return _mean(counts[held_out[1:]], np.full(len(held_out) - 1, len(train)), vocab_size, smoothing)


def bigram_entropy(train: Train, held_out: Held, vocab_size: int, *, smoothing: int | float = 1.0) -> float:
    r"""$-\frac{1}{n - 1} \sum_{t > 0} \log \frac{c(w_{t-1}, w_t) + s}{c(w_{t-1}) + s V}$: nats a token of `held_out`.

    $c$ counts pairs of neighbours in `train`, and how often a token is the first of one. With `held_out` = `train` and
    `smoothing=0` it is the text's own: no model that sees one token has less on it. Else as `unigram_entropy`.
    """
    _expect(train, held_out, vocab_size, smoothing)
    paired = lambda ids: ids[:-1].astype(np.int64) * vocab_size + ids[1:]
    pairs, counts = np.unique(paired(train), return_counts=True)
    asked = paired(held_out)
    at = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    found = np.where(pairs[at] == asked, counts[at], 0)
    firsts = np.bincount(train[:-1], minlength=vocab_size)
    return _mean(found, firsts[held_out[:-1]], vocab_size, smoothing)


def bits_per_character(loss: float, tokens: int, characters: int) -> float:
    """A loss in nats a token as bits a character of a text of so many tokens and characters."""
    return loss / math.log(2) * tokens / characters


def _mean(counts: np.ndarray, totals: np.ndarray, vocab_size: int, smoothing: int | float) -> float:
    given, all_ = counts + smoothing, totals + smoothing * vocab_size
    if (given == 0).any():
        return math.inf
    return float((np.log(all_) - np.log(given)).mean())


def _expect(train: Train, held_out: Held, vocab_size: int, smoothing: int | float) -> None:
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"Texts of {len(train)} and {len(held_out)} tokens have no pairs: two tokens each are needed.")
    highest = max(int(train.max()), int(held_out.max()))
    if highest >= vocab_size or min(int(train.min()), int(held_out.min())) < 0:
        raise ValueError(f"There is the token {highest}, but vocab_size = {vocab_size}.")
    if smoothing < 0:
        raise ValueError(f"smoothing = {smoothing} must be at least 0.")
