"""Which texts share a batch: plans of epochs, made of the texts' lengths and a generator alone.

A layout (`Buckets` here, `Packed` and `Windows` in `packing`) says how rows are filled. Arranged for the lengths of a
corpus it has a fixed number of batches of few shapes, and plans each epoch anew.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from ..encode import bucket_lengths

Shape = tuple[int, int]
Remainder = Literal["fill", "drop"]


class Planned(NamedTuple):
    """One batch: its rows are pieces of the corpus, side by side, and padded to `length`.

    A row has the pieces of one line of the arrays, all `rows pieces`: `starts` are places in all tokens of the corpus,
    `sizes` numbers of tokens (0: no piece; a row without any only fills the shape), `texts` what they are pieces of
    (-1: no text in particular).
    """

    length: int
    texts: Int[np.ndarray, "rows pieces"]
    starts: Int[np.ndarray, "rows pieces"]
    sizes: Int[np.ndarray, "rows pieces"]


class AbstractArrangement(abc.ABC):
    """A layout of one corpus."""

    per_epoch: int  # batches: the same number in every epoch
    shapes: list[Shape]  # (rows, length) of all batches
    groups: dict[int, np.ndarray]  # for each length, the texts that may have a row of it alone; empty where none may

    @abc.abstractmethod
    def epoch(self, rng: np.random.Generator | None) -> Sequence[Planned]:
        """The batches of an epoch, shuffled by `rng`; without it, as they are planned."""

    @abc.abstractmethod
    def marks(self, planned: Planned) -> dict[str, Int[np.ndarray, "rows seq"]]:
        """What tells several texts of a row apart."""


class AbstractLayout(abc.ABC):
    """How rows are filled."""

    @abc.abstractmethod
    def arranged(self, lengths: Int[np.ndarray, " texts"], processes: int = 1) -> AbstractArrangement:
        """For texts of these numbers of tokens, in rows of which each of the processes gets as many."""


@dataclass(frozen=True)
class Buckets(AbstractLayout):
    """One text a row; rows of about the same length share a batch and are padded to the length of their bucket.

    - `batch_size`: rows of a batch; or instead `batch_tokens`: of which padding is part, so that short texts come in
      batches of more rows.
    - `max_shapes`: the number of buckets at most, and of compiled programs. Of so many lengths, and fewer, those are
      chosen that compute the fewest tokens, padding and filling counted.
    - `lengths`: these instead. The last one must hold the longest text.
    - `remainder`: what becomes of the last batch of the last bucket: "fill" it with rows of weight 0, or "drop" it. Of
      the other buckets, what does not fill a batch goes to the next one: a batch of few texts would count as much as
      any other. Which ones these are, the generator decides.

    Raises a `ValueError` for what contradicts itself, a text longer than the last length, and no batch at all.
    """

    batch_size: int | None = None
    batch_tokens: int | None = None
    max_shapes: int = 8
    lengths: tuple[int, ...] | None = None
    remainder: Remainder = "fill"

    def __post_init__(self):
        expect_counts(batch_size=self.batch_size, batch_tokens=self.batch_tokens, max_shapes=self.max_shapes)
        expect_remainder(self.remainder)
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError("Buckets: give either batch_size (rows) or batch_tokens (padding is part of them).")
        if self.lengths is not None:
            expect_counts(**{f"lengths[{i}]": n for i, n in enumerate(self.lengths)}, lengths=len(self.lengths))

    def arranged(self, lengths: Int[np.ndarray, " texts"], processes: int = 1) -> AbstractArrangement:
        expect_texts(lengths)
        buckets = self._buckets(lengths, processes)
        if lengths.max() > buckets[-1]:
            at = int(lengths.argmax())
            raise ValueError(
                f"Text {at} has {lengths[at]} tokens, more than the last of lengths, {buckets[-1]}: give a longer one,"
                " or max_length to the tokenizer."
            )
        place = np.searchsorted(buckets, lengths)
        groups = {n: np.flatnonzero(place == i) for i, n in enumerate(buckets)}
        filled = {n: texts for n, texts in groups.items() if len(texts)}
        return _Bucketed(lengths, filled, [self._rows(n, processes) for n in filled], self.remainder)

    def _buckets(self, lengths: Int[np.ndarray, " texts"], processes: int) -> list[int]:
        if self.lengths is not None:
            return sorted(set(self.lengths))
        choices = [bucket_lengths(lengths, most) for most in range(1, self.max_shapes + 1)]
        return min(choices, key=lambda buckets: self._cost(lengths, buckets, processes))

    def _cost(self, lengths: Int[np.ndarray, " texts"], buckets: list[int], processes: int) -> int:
        """Tokens that an epoch computes."""
        counts = np.bincount(np.searchsorted(buckets, lengths), minlength=len(buckets)).tolist()
        rows = [self._rows(n, processes) for n in buckets]
        return sum(many * r * n for many, r, n in zip(_spread(counts, rows, "fill"), rows, buckets, strict=True))

    def _rows(self, length: int, processes: int) -> int:
        if self.batch_size is not None:
            return shared(self.batch_size, processes)
        return max(1, (self.batch_tokens or 0) // length // processes) * processes


class _Bucketed(AbstractArrangement):
    def __init__(self, lengths: np.ndarray, filled: dict[int, np.ndarray], rows: list[int], remainder: Remainder):
        self.lengths, self.starts = lengths, np.cumsum([0, *lengths])[:-1]
        self.filled, self.rows = filled, rows
        self.counts = _spread([len(texts) for texts in filled.values()], rows, remainder)
        self.per_epoch = sum(self.counts)
        expect_batches(self.per_epoch, len(lengths))
        self.shapes = [(r, n) for n, r, many in zip(filled, rows, self.counts, strict=True) if many][::-1]
        self.groups = {n: np.flatnonzero(lengths <= n) for _, n in self.shapes}

    def epoch(self, rng: np.random.Generator | None) -> Sequence[Planned]:
        planned, left = [], np.zeros(0, np.int64)
        for (length, texts), rows, many in zip(self.filled.items(), self.rows, self.counts, strict=True):
            # What is left of shorter ones comes first, so that it is not left again.
            texts = np.concatenate([left, texts if rng is None else rng.permutation(texts)])
            left = texts[many * rows :]
            planned += [self._planned(length, line[:, None]) for line in in_rows(texts[: many * rows], rows, "fill")]
        # The longest first: what does not fit into memory fails at once where nothing is shuffled.
        return planned[::-1] if rng is None else [planned[i] for i in rng.permutation(len(planned))]

    def marks(self, planned: Planned) -> dict[str, Int[np.ndarray, "rows seq"]]:
        return {}

    def _planned(self, length: int, texts: Int[np.ndarray, "rows pieces"]) -> Planned:
        return Planned(length, texts, self.starts[texts], np.where(texts < 0, 0, self.lengths[texts]))


def _spread(counts: list[int], rows: list[int], remainder: Remainder) -> list[int]:
    """How many batches each bucket has, where what does not fill one goes to the next bucket."""
    found, left = [], 0
    for i, (count, size) in enumerate(zip(counts, rows, strict=True)):
        rule: Remainder = "drop" if i < len(counts) - 1 else remainder
        found.append(batches(count + left, size, rule))
        left = max(0, count + left - found[-1] * size)
    return found


def in_rows(items: Int[np.ndarray, " items"], rows: int, remainder: Remainder) -> Int[np.ndarray, "batches rows"]:
    """The items in lines of `rows`, the last of which is filled with -1 or dropped."""
    count = batches(len(items), rows, remainder)
    filled = np.full(count * rows, -1)
    filled[: len(items)] = items[: len(filled)]
    return filled.reshape(count, rows)


def batches(items: int, rows: int, remainder: Remainder) -> int:
    return items // rows if remainder == "drop" else -(-items // rows)


def shared(batch_size: int, processes: int) -> int:
    if batch_size % processes:
        raise ValueError(f"batch_size = {batch_size} rows cannot be shared evenly by {processes} processes.")
    return batch_size


def expect_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} = {count} must be at least 1.")


def expect_remainder(remainder: str) -> None:
    if remainder not in ("fill", "drop"):
        raise ValueError(f"remainder = {remainder!r} must be 'fill' or 'drop'.")


def expect_texts(lengths: Int[np.ndarray, " texts"]) -> None:
    if not len(lengths):
        raise ValueError("There are no texts to make batches of.")


def expect_batches(count: int, items: int) -> None:
    if not count:
        raise ValueError(f"{items} rows do not fill one batch, and remainder = 'drop': use smaller batches, or 'fill'.")
