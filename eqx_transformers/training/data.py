"""Batches of token ids, endless and in an order that is known beforehand, read ahead by a few threads."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from .batching import AbstractLayout, Planned, Shape
from .tokens import Texts, TokenizedTexts

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, np.random.Generator], Mapping[str, Any]]
IGNORED = -100  # what stands in `targets` where there is none
ORDER, TRANSFORM = 0, 1  # what a generator is for: equal numbers for both would be a coincidence that is none


class Batches:
    """Batches of a corpus, epoch after epoch: `iter(batches)` is a `BatchIterator`, which has a position.

    A batch is a dict of arrays whose leading axis are its rows: `token_ids` and `attention_mask` (int32, `rows seq`),
    `weights` (float32, ` rows`: 1, or 0 for a row that only fills the shape), `token_type_ids` where the tokenizer gave
    them, `segment_ids` where rows are packed, and what `columns`, `more` and `transform` add. A row that fills the
    shape is all padding, of which its mask shows one token (attention to nothing is an edge); its columns are zeros.

    - `texts`: a `TokenizedTexts`, or lists of ids, one a text.
    - `layout`: `Buckets`, `Packed` or `Windows`: how rows are filled, and with it which shapes there are.
    - `padding_id`: what stands behind a text.
    - `columns`: arrays with one entry a text, such as `{"labels": ...}`. Whole numbers become int32, others float32.
    - `more`: further texts that go with these, one each: `{"positive": texts}` gives `positive_token_ids` and
      `positive_attention_mask`, `{"decoder": texts}` likewise, `{"targets": texts}` gives `targets`, -100 for padding.
      They are padded to the longest one that goes with a text that a row of this length can hold.
    - `transform(batch, rng) -> batch`: what is done to every batch, with a generator of its own: corruption, negatives.
      It may be called from several threads at once, and gets all rows, whichever process asks.
    - `seed`: the order, a function of the seed and the number of the epoch alone, and the generators of `transform`.
      `shuffle=False` takes the texts as they come, within a bucket.
    - `epochs`: how many; None: without end.
    - `process`: (number, of how many). All have the same batches, and each one gets its share of the rows of each.
    - `threads`: how many read ahead; 0: none.

    `per_epoch` is the number of batches of an epoch, the same for all; `shapes` are the (rows, length) of
    `token_ids`, before `transform`; `tokens_per_epoch` is how many tokens an epoch has. `batches[i]` is batch i,
    counted over all epochs.

    Raises a `ValueError` for columns of other lengths, for columns where rows hold several texts, and for a corpus that
    does not fill one batch.
    """

    layout: AbstractLayout
    per_epoch: int
    shapes: list[Shape]
    epochs: int | None

    def __init__(
        self,
        texts: Texts,
        layout: AbstractLayout,
        *,
        padding_id: int,
        columns: Mapping[str, Any] | None = None,
        more: Mapping[str, Texts] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        process: tuple[int, int] = (0, 1),
        threads: int = 2,
    ):
        self.texts, self.layout = TokenizedTexts.of(texts), layout
        self.columns = {name: _column(x) for name, x in (columns or {}).items()}
        self.more = {name: TokenizedTexts.of(x) for name, x in (more or {}).items()}
        self.padding_id, self.transform, self.seed, self.shuffle = padding_id, transform, seed, shuffle
        self.epochs, self.process, self.threads = epochs, process, threads
        _expect_numbers(self)
        self._arrangement = layout.arranged(self.texts.lengths, process[1])
        self.per_epoch, self.shapes = self._arrangement.per_epoch, self._arrangement.shapes
        groups = self._arrangement.groups
        _expect_columns(self, groups)
        longest = lambda texts, chosen: int(texts.lengths[chosen].max())
        self._widths = {
            name: {length: longest(further, chosen) for length, chosen in groups.items()}
            for name, further in self.more.items()
        }
        self._planned: dict[int, Sequence[Planned]] = {}

    def __len__(self) -> int:
        """The number of batches of all epochs; of endless ones, one that is never reached."""
        return sys.maxsize if self.epochs is None else self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches, numbered from 0: {index} is none of them.")
        epoch, at = divmod(int(index), self.per_epoch)
        batch = self._made(self._plan(epoch)[at])
        if self.transform is not None:
            batch = dict(self.transform(batch, _generator(self.seed, TRANSFORM, epoch, at)))
        number, count = self.process
        rows = len(batch["weights"]) // count
        return {name: x[number * rows : (number + 1) * rows] for name, x in batch.items()}

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells whether a position is one of these batches: made of all arrays, the layout and the seed."""
        told = hashlib.blake2b(repr((self.layout, self.seed, self.shuffle, self.padding_id)).encode(), digest_size=8)
        further = [x for texts in self.more.values() for x in (texts.ids, texts.offsets)]
        for x in (self.texts.ids, self.texts.offsets, *self.columns.values(), *further):
            told.update(np.ascontiguousarray(x).data)
        return told.hexdigest()

    @functools.cached_property
    def tokens_per_epoch(self) -> tuple[int, int]:
        """How many tokens the first epoch has, of all processes: (with padding, which is computed too; without)."""
        plan = self._plan(0)
        return sum(one.length * len(one.sizes) for one in plan), sum(int(one.sizes.sum()) for one in plan)

    def _plan(self, epoch: int) -> Sequence[Planned]:
        """Of the last two epochs asked for: threads read ahead across the border."""
        found = self._planned.get(epoch)
        if found is None:
            found = self._arrangement.epoch(_generator(self.seed, ORDER, epoch, 0) if self.shuffle else None)
            self._planned = {e: plan for e, plan in self._planned.items() if abs(e - epoch) == 1} | {epoch: found}
        return found

    def _made(self, planned: Planned) -> Batch:
        of = lambda values, fill: _laid_out(values, planned, fill)
        sizes = planned.sizes.sum(1)
        mask = (np.arange(planned.length) < np.maximum(sizes, 1)[:, None]).astype(np.int32)
        batch = {"token_ids": of(self.texts.ids, self.padding_id), "attention_mask": mask}
        batch["weights"] = (sizes > 0).astype(np.float32)
        if self.texts.types is not None:
            batch["token_type_ids"] = of(self.texts.types, 0)
        columns = {name: _picked(x, planned.texts[:, 0]) for name, x in self.columns.items()}
        return batch | self._arrangement.marks(planned) | columns | self._more(planned)

    def _more(self, planned: Planned) -> Batch:
        made: Batch = {}
        for name, texts in self.more.items():
            made |= _further(name, texts, planned.texts, self._widths[name][planned.length], self.padding_id)
        return made


class BatchIterator(Iterator[Batch]):
    """Batches from a position on: a grain dataset iterator whose state knows which batches it is a position of.

    `get_state()` is a dict for JSON: `next_index`, the number of the next batch over all epochs, and the fingerprint of
    the batches. After `set_state` of it, here or in another process, the very same batches follow. `close` ends the
    threads that read ahead; the end of the batches, of a `with`, and the iterator being forgotten do so too.
    """

    def __init__(self, batches: Batches):
        self._batches, self._reader, self._ended = batches, _reader(batches), False

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        try:
            return next(self._reader)
        except StopIteration:
            self._ended = True
            self._reader.close()
            raise

    def get_state(self) -> dict[str, Any]:
        """The position, for JSON."""
        return {**self._reader.get_state(), "batches": self._batches.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position. Raises a `ValueError` if it is one of other batches."""
        missing = {"next_index", "batches"} - state.keys()
        if missing:
            raise ValueError(f"The position {dict(state)} has no {' and no '.join(sorted(missing))}.")
        if state["batches"] != self._batches.fingerprint:
            raise ValueError(
                "The position is one of other batches: the texts, the columns, the layout, the seed or the order have"
                " changed since. Go on with the same data and options, or begin anew."
            )
        self._reader.close()
        self._reader, self._ended = _reader(self._batches), False
        self._reader.set_state({"next_index": int(state["next_index"])})

    def close(self) -> None:
        """Ends the threads; nothing can be read any more."""
        self._reader.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _reader(batches: Batches) -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError("Batches are read by grain: pip install 'eqx_transformers[train]'") from error
    options = grain.ReadOptions(num_threads=batches.threads, prefetch_buffer_size=2 * batches.threads)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _generator(seed: int, *what: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=what))


def _laid_out(values: np.ndarray, planned: Planned, fill: int) -> Int[np.ndarray, "rows seq"]:
    """The pieces of each row side by side, and `fill` behind them."""
    out = np.full((len(planned.sizes), planned.length), fill, np.int32)
    ends = planned.sizes.cumsum(1)
    for row, piece in zip(*np.nonzero(planned.sizes), strict=True):
        start, size, end = planned.starts[row, piece], planned.sizes[row, piece], ends[row, piece]
        out[row, end - size : end] = values[start : start + size]
    return out


def _picked(column: np.ndarray, texts: Int[np.ndarray, " rows"]) -> Shaped[np.ndarray, "rows ..."]:
    found = column[texts]  # -1 picks something, which is put away
    found[texts < 0] = 0
    return found


def _further(name: str, texts: TokenizedTexts, chosen: np.ndarray, width: int, padding_id: int) -> Batch:
    sizes = np.where(chosen < 0, 0, texts.lengths[chosen])
    planned = Planned(width, chosen, texts.offsets[chosen], sizes)
    if name == "targets":
        return {name: _laid_out(texts.ids, planned, IGNORED)}
    mask = (np.arange(width) < np.maximum(sizes, 1)).astype(np.int32)
    return {f"{name}_token_ids": _laid_out(texts.ids, planned, padding_id), f"{name}_attention_mask": mask}


def _column(given: Any) -> np.ndarray:
    column = np.asarray(given)
    if column.dtype.kind not in "biuf":
        raise ValueError(f"A column must hold numbers, but its first entry is {column.flat[:1]!r}: give their indices.")
    return column.astype(np.float32 if column.dtype.kind == "f" else np.int32)


def _expect_numbers(batches: Batches) -> None:
    number, count = batches.process
    if not 0 <= number < count:
        raise ValueError(f"process = {batches.process} must be (number, of how many), the number below the other.")
    if batches.epochs is not None and batches.epochs < 1:
        raise ValueError(f"epochs = {batches.epochs} must be at least 1, or None for batches without end.")
    if batches.threads < 0:
        raise ValueError(f"threads = {batches.threads} must be at least 0.")


def _expect_columns(batches: Batches, groups: Mapping[int, np.ndarray]) -> None:
    columns = {**batches.columns, **batches.more}
    if columns and not groups:
        layout = type(batches.layout).__name__
        raise ValueError(
            f"{layout} puts several texts into a row, which cannot have {', '.join(columns)}: use Buckets."
        )
    for name, column in columns.items():
        if len(column) != len(batches.texts):
            raise ValueError(f"There are {len(batches.texts)} texts, but {name!r} has {len(column)} entries.")
