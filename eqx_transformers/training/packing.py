"""Rows of one length without padding to speak of: several texts packed in each, or cut from one stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from .batching import (
    AbstractArrangement,
    AbstractLayout,
    Planned,
    Remainder,
    batches,
    expect_batches,
    expect_counts,
    expect_remainder,
    expect_texts,
    in_rows,
    shared,
)


@dataclass(frozen=True)
class Packed(AbstractLayout):
    """Whole texts side by side in rows of `length` tokens: one shape, and little padding.

    Longest first, each text goes to the first row that has room for it (first-fit decreasing: at most 11/9 of the
    fewest rows possible, and a few more). A batch has `segment_ids` (int32, `rows seq`): 1, 2, ... for the texts of a
    row, 0 for padding; models make each text see itself alone, and begin its positions anew.

    - `remainder`: the last batch of an epoch is filled with rows of weight 0, or dropped.
    - `first_position`: with it a batch has `position_ids` too, which begin with this number in each text and are 0
      where padding is. The models here need none and have their families' rules: RoBERTa's begin after its padding id.

    The texts that share a row change from epoch to epoch among those of one length, and the number of rows never does.
    Raises a `ValueError` for a text that no row holds.
    """

    batch_size: int
    length: int
    remainder: Remainder = "fill"
    first_position: int | None = None

    def __post_init__(self):
        expect_counts(batch_size=self.batch_size, length=self.length)
        expect_remainder(self.remainder)

    def arranged(self, lengths: Int[np.ndarray, " texts"], processes: int = 1) -> AbstractArrangement:
        expect_texts(lengths)
        if lengths.max() > self.length:
            at = int(lengths.argmax())
            raise ValueError(
                f"Text {at} has {lengths[at]} tokens, more than the rows of {self.length}: cut or skip it."
            )
        return _Packing(self, lengths, shared(self.batch_size, processes))


class _Packing(AbstractArrangement):
    def __init__(self, layout: Packed, lengths: np.ndarray, rows: int):
        self.layout, self.lengths, self.starts = layout, lengths, np.cumsum([0, *lengths])[:-1]
        self.order = np.argsort(-lengths, kind="stable")
        self.bins = pack(lengths[self.order], layout.length)  # of places in `order`
        self.shapes, self.groups = [(rows, layout.length)], {}
        self.per_epoch = batches(len(self.bins), rows, layout.remainder)
        expect_batches(self.per_epoch, len(self.bins))

    def epoch(self, rng: np.random.Generator | None) -> Sequence[Planned]:
        texts, numbers = np.append(self._order(rng), -1), np.arange(len(self.bins))
        lines = in_rows(numbers if rng is None else rng.permutation(numbers), self.shapes[0][0], self.layout.remainder)
        empty = np.full((1, self.bins.shape[1]), -1)
        return [self._planned(texts[np.concatenate([self.bins, empty])[line]]) for line in lines]

    def marks(self, planned: Planned) -> dict[str, Int[np.ndarray, "rows seq"]]:
        """Segments from 1 on; and positions in each."""
        places, ends = np.arange(planned.length), planned.sizes.cumsum(1)
        before = (ends[:, None] <= places[:, None]).sum(2)  # texts of the row that end before a place
        real = places < ends[:, -1:]
        found = {"segment_ids": np.where(real, before + 1, 0).astype(np.int32)}
        if self.layout.first_position is not None:
            starts = np.take_along_axis(ends - planned.sizes, np.minimum(before, ends.shape[1] - 1), axis=1)
            positions = np.where(real, places - starts + self.layout.first_position, 0)
            found["position_ids"] = positions.astype(np.int32)
        return found

    def _order(self, rng: np.random.Generator | None) -> Int[np.ndarray, " texts"]:
        """The texts, longest first; those of one length in an order of their own."""
        if rng is None:
            return self.order
        shuffled = rng.permutation(len(self.lengths))
        return shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]

    def _planned(self, texts: Int[np.ndarray, "rows pieces"]) -> Planned:
        return Planned(self.layout.length, texts, self.starts[texts], np.where(texts < 0, 0, self.lengths[texts]))


def pack(lengths: Int[np.ndarray, " texts"], room: int) -> Int[np.ndarray, "rows pieces"]:
    """First-fit decreasing: the numbers of the texts in each row, -1 behind them. `lengths` fall, and none is > `room`.

    First fit is found in a tree over the rows whose nodes know the most room below them: O(texts log texts).
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    tree: list[int] = [room] * (2 * leaves)
    rows: list[list[int]] = []
    for text, length in enumerate(lengths.tolist()):
        row = _first_with_room(tree, leaves, length)
        if row == len(rows):
            rows.append([])
        rows[row].append(text)
        _take_room(tree, leaves + row, length)
    widest = max(map(len, rows))
    return np.array([row + [-1] * (widest - len(row)) for row in rows])


def _first_with_room(tree: list[int], leaves: int, length: int) -> int:
    node = 1
    while node < leaves:
        node = 2 * node if tree[2 * node] >= length else 2 * node + 1
    return node - leaves


def _take_room(tree: list[int], node: int, length: int) -> None:
    tree[node] -= length
    while node > 1:
        node //= 2
        tree[node] = max(tree[2 * node], tree[2 * node + 1])


@dataclass(frozen=True)
class Windows(AbstractLayout):
    """All texts as one stream of tokens, cut into rows of `length`: what language models are trained on.

    Row i is the tokens from `i * stride` on. With `stride` = `length` (None) rows do not overlap, and the first token
    of each is never predicted; with `length - 1` every token is predicted exactly once.

    - `starts`: "fixed"; "offset": all rows begin later by a number below `stride` that is drawn for each epoch, so that
      borders differ (of the stream's end, less than `stride` tokens are lost to it); "random": every row begins
      anywhere, as many rows an epoch as with "fixed".
    - `pad`: the tokens left at the end are a last row, padded ("fixed" alone); else they are dropped.
    - `remainder`: the last batch of an epoch is filled with rows of weight 0, or dropped.

    Raises a `ValueError` for a stream shorter than one row.
    """

    batch_size: int
    length: int
    stride: int | None = None
    starts: Literal["fixed", "offset", "random"] = "fixed"
    pad: bool = False
    remainder: Remainder = "fill"

    def __post_init__(self):
        expect_counts(batch_size=self.batch_size, length=self.length, stride=self.stride)
        expect_remainder(self.remainder)
        if self.starts not in ("fixed", "offset", "random"):
            raise ValueError(f"starts = {self.starts!r} must be 'fixed', 'offset' or 'random'.")
        if self.pad and self.starts != "fixed":
            raise ValueError(f"pad = True needs starts = 'fixed', but it is {self.starts!r}.")

    def arranged(self, lengths: Int[np.ndarray, " texts"], processes: int = 1) -> AbstractArrangement:
        expect_texts(lengths)
        return _Cut(self, int(lengths.sum()), shared(self.batch_size, processes))


class _Cut(AbstractArrangement):
    def __init__(self, layout: Windows, total: int, rows: int):
        self.layout, self.total, self.stride = layout, total, layout.stride or layout.length
        room = total - layout.length - (self.stride - 1 if layout.starts == "offset" else 0)
        # A last row is padded where tokens are left that no row has.
        self.count = room // self.stride + 1 if room >= 0 else 0
        if layout.pad and (self.count == 0 or (self.count - 1) * self.stride + layout.length < total):
            self.count += 1
        if not self.count:
            raise ValueError(
                f"The texts have {total} tokens in all, too few for one row of {layout.length}"
                f" (starts = {layout.starts!r}): give more text or shorter rows."
            )
        self.shapes, self.groups = [(rows, layout.length)], {}
        self.per_epoch = batches(self.count, rows, layout.remainder)
        expect_batches(self.per_epoch, self.count)

    def epoch(self, rng: np.random.Generator | None) -> Sequence[Planned]:
        starts = np.arange(self.count) * self.stride
        if rng is not None:
            starts = rng.permutation(self._drawn(starts, rng))
        return [self._planned(line[:, None]) for line in in_rows(starts, self.shapes[0][0], self.layout.remainder)]

    def marks(self, planned: Planned) -> dict[str, Int[np.ndarray, "rows seq"]]:
        return {}

    def _drawn(self, starts: Int[np.ndarray, " rows"], rng: np.random.Generator) -> Int[np.ndarray, " rows"]:
        if self.layout.starts == "offset":
            return starts + rng.integers(self.stride)
        if self.layout.starts == "random":
            return rng.integers(0, self.total - self.layout.length + 1, len(starts))
        return starts

    def _planned(self, starts: Int[np.ndarray, "rows pieces"]) -> Planned:
        sizes = np.where(starts < 0, 0, np.minimum(self.layout.length, self.total - starts))
        return Planned(self.layout.length, np.full_like(starts, -1), starts, sizes)
