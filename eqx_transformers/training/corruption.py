"""What is hidden from a model that it is to restore: single tokens (masked LM), or spans of them (T5).

`mask_tokens` and `corrupt_batch` are what `Batches(transform=...)` takes, once `functools.partial` has set their
options: they read a batch, draw from the generator given, and return another batch.
"""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Int

from .data import IGNORED, Batch


def mask_tokens(
    batch: Batch,
    rng: np.random.Generator,
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Collection[int],
    rate: float = 0.15,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    words: Bool[np.ndarray, " vocab_size"] | None = None,
) -> Batch:
    """Chooses each token with probability `rate`; `targets` are the chosen ones, and -100 elsewhere.

    Of the chosen, a share `split[0]` becomes `mask_id`, `split[1]` another token, drawn evenly from the vocabulary
    without special ones, and `split[2]` stays, each on its own. Padding, `special_ids`, `mask_id` and rows of weight 0
    are never chosen.

    `words`: which tokens begin a word (`word_starts`). Whole words are chosen then, with probability `rate` each; the
    first token after a special one, or of another packed text, begins a word too.
    Sources: Devlin et al. 2019, arXiv:1810.04805; whole words: its authors' code of May 2019.
    """
    _expect_split(rate, split)
    special = np.union1d(np.asarray(list(special_ids), np.int64), mask_id)
    ids = batch["token_ids"]
    free = (batch["attention_mask"] != 0) & (batch["weights"] != 0)[:, None] & ~np.isin(ids, special)
    draws = rng.random(ids.shape)
    if words is not None:
        draws = np.take_along_axis(draws, _word_of(batch, free, words), axis=1)
    chosen = free & (draws < rate)
    fate, ordinary = rng.random(ids.shape), np.setdiff1d(np.arange(vocab_size), special)
    drawn = ordinary[rng.integers(len(ordinary), size=ids.shape)]
    out = np.where(chosen & (fate < split[0]), mask_id, ids)
    out = np.where(chosen & (fate >= split[0]) & (fate < split[0] + split[1]), drawn, out)
    targets = np.where(chosen, ids, IGNORED)
    return {**batch, "token_ids": out.astype(np.int32), "targets": targets.astype(np.int32)}


def corrupt_spans(
    ids: Int[np.ndarray, " seq"],
    rng: np.random.Generator,
    *,
    sentinels: Sequence[int],
    eos: int,
    rate: float = 0.15,
    mean_length: float = 3.0,
) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
    """Spans of a text, each put in one sentinel's place, and what stood there, each behind its sentinel.

    With A, B the `sentinels` in the order of their use (T5's are `range(32099, 31999, -1)`):

        a b c d e f g   ->   a b A e f B <eos>   and   A c d B g <eos>

    Of n tokens, `round(rate n)` are hidden, at least 1 and at most n - 1, in `round(hidden / mean_length)` spans, at
    least 1; how these share the hidden tokens, and what is between them the others, is drawn evenly. The text begins
    with a token that stays, and ends in a span. Of a text of one token, nothing is hidden. Both lengths are functions
    of n (`corrupted_lengths`). Raises a `ValueError` for more spans than sentinels.
    Source: Raffel et al. 2020, arXiv:1910.10683, and its code (`random_spans_noise_mask`).
    """
    hidden, spans = _amounts(len(ids), rate, mean_length)
    if spans > len(sentinels):
        raise ValueError(
            f"{len(ids)} tokens have {spans} spans, but there are {len(sentinels)} sentinels: cut the text."
        )
    lengths = np.stack([_parts(len(ids) - hidden, spans, rng), _parts(hidden, spans, rng)], axis=1).ravel()
    pieces = np.split(ids, lengths.cumsum()[:-1]) if spans else [ids]
    marks = [np.array([sentinel]) for sentinel in sentinels[:spans]]
    end, stay, hide = [np.array([eos])], pieces[::2], pieces[1::2]
    inputs = [x for pair in zip(stay, marks, strict=True) for x in pair] if spans else stay
    targets = [x for pair in zip(marks, hide, strict=True) for x in pair]
    return np.concatenate(inputs + end).astype(np.int32), np.concatenate(targets + end).astype(np.int32)


def corrupted_lengths(length: int, rate: float = 0.15, mean_length: float = 3.0) -> tuple[int, int]:
    """How long inputs and targets of a text of so many tokens are, their end tokens counted."""
    hidden, spans = _amounts(length, rate, mean_length)
    return length - hidden + spans + 1, hidden + spans + 1


def corrupt_batch(
    batch: Batch,
    rng: np.random.Generator,
    *,
    sentinels: Sequence[int],
    eos: int,
    start_id: int,
    padding_id: int,
    rate: float = 0.15,
    mean_length: float = 3.0,
) -> Batch:
    """`corrupt_spans` of every row: `token_ids`, `attention_mask`, `targets` (-100 behind) and `decoder_token_ids`.

    The decoder reads the targets one place on, behind `start_id`, and padding. An end token that a row has already is
    put aside first. The widths are `corrupted_lengths` of the batch's own: as few shapes as before. What has one entry
    a row stays. Raises a `ValueError` for rows of several texts.
    """
    if "segment_ids" in batch:
        raise ValueError("corrupt_batch: rows are packed, and spans would reach from text to text: use Buckets.")
    widths = corrupted_lengths(batch["token_ids"].shape[1], rate, mean_length)
    rows = zip(batch["token_ids"], batch["attention_mask"], strict=True)
    texts = [_without_end(row[mask != 0], eos) for row, mask in rows]
    options = {"sentinels": sentinels, "eos": eos, "rate": rate, "mean_length": mean_length}
    pairs = [corrupt_spans(text, rng, **options) for text in texts]
    ids, mask = _padded([x for x, _ in pairs], widths[0], padding_id)
    targets, real = _padded([y for _, y in pairs], widths[1], IGNORED)
    read = np.where(real[:, :-1] != 0, targets[:, :-1], padding_id)
    read = np.concatenate([np.full((len(read), 1), start_id), read], axis=1).astype(np.int32)
    kept = {name: x for name, x in batch.items() if name not in ("token_ids", "attention_mask", "token_type_ids")}
    return {**kept, "token_ids": ids, "attention_mask": mask, "targets": targets, "decoder_token_ids": read}


def _word_of(batch: Batch, free: Bool[np.ndarray, "rows seq"], words: np.ndarray) -> Int[np.ndarray, "rows seq"]:
    """The number of each token's word in its row."""
    ids = batch["token_ids"]
    if ids.max() >= len(words):
        raise ValueError(
            f"words has {len(words)} entries, one a token of the vocabulary, but there is a token {ids.max()}."
        )
    begins = words[ids] | ~free
    begins[:, 1:] |= ~free[:, :-1]
    if "segment_ids" in batch:
        begins[:, 1:] |= batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]
    begins[:, 0] = True
    return begins.cumsum(1) - 1


def _amounts(length: int, rate: float, mean_length: float) -> tuple[int, int]:
    """How many tokens are hidden, and in how many spans."""
    if not 0 < rate < 1 or mean_length < 1:
        raise ValueError(f"rate = {rate} must be between 0 and 1, and mean_length = {mean_length} at least 1.")
    if length < 1:
        raise ValueError("A text to corrupt has at least one token.")
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_length), 1), hidden, length - hidden)


def _parts(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, " parts"]:
    """So many positive numbers with this sum, each way to choose them as likely as any other."""
    if not parts:
        return np.zeros(0, np.int64)
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total])


def _without_end(ids: Int[np.ndarray, " seq"], eos: int) -> Int[np.ndarray, " text"]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _padded(rows: list[np.ndarray], width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows in one array, and where they are."""
    mask = (np.arange(width) < np.array([len(row) for row in rows])[:, None]).astype(np.int32)
    out = np.full((len(rows), width), fill, np.int32)
    out[mask != 0] = np.concatenate(rows)
    return out, mask


def _expect_split(rate: float, split: tuple[float, float, float]) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"rate = {rate} must be above 0 and at most 1.")
    if min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise ValueError(f"split = {split} must be three shares (masked, another token, unchanged) whose sum is 1.")
