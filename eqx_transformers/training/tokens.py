"""Texts as token ids: many of them in one array, made by a tokenizer in parallel and kept in a cache."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ..encode import AT_ONCE, Tokens, _corpus, _tokenize
from ._token_cache import keep, kept, key_of

Longer = Literal["truncate", "error", "skip"]


class TokenizedTexts:
    """The ids of many texts in one int32 array, one after the other; `len`, `[i]` and iteration give single texts.

    `ids`: all tokens. `offsets` (` texts+1`): text i is `ids[offsets[i]:offsets[i+1]]`. `types`: which of a pair each
    token belongs to, or None. `indices` (` texts`): which of the texts that were tokenized these are, where too long
    ones were skipped; columns such as labels are taken with it. `skipped` and `truncated` are numbers of texts.

    Raises a `ValueError` for offsets that do not fit, and for a text without tokens.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None
    indices: np.ndarray
    skipped: int
    truncated: int

    def __init__(
        self,
        ids: Int[np.ndarray, " tokens"],
        offsets: Int[np.ndarray, " offsets"],
        *,
        types: Int[np.ndarray, " tokens"] | None = None,
        indices: Int[np.ndarray, " texts"] | None = None,
        skipped: int = 0,
        truncated: int = 0,
    ):
        self.ids, self.offsets = ids.astype(np.int32, copy=False), offsets.astype(np.int64, copy=False)
        self.types = None if types is None else types.astype(np.int32, copy=False)
        self.indices = np.arange(len(offsets) - 1) if indices is None else indices.astype(np.int64, copy=False)
        self.skipped, self.truncated = skipped, truncated
        _expect_whole(self)

    @classmethod
    def of(cls, texts: "TokenizedTexts | Iterable[Sequence[int] | np.ndarray]") -> "TokenizedTexts":
        """Of lists of ids, one a text; what is tokenized already stays what it is."""
        if isinstance(texts, TokenizedTexts):
            return texts
        rows = [np.asarray(text, np.int32) for text in texts]
        ids = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        return cls(ids, np.cumsum([0, *(len(row) for row in rows)]))

    @property
    def lengths(self) -> Int[np.ndarray, " texts"]:
        """The number of tokens of each text."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> Int[np.ndarray, " seq"]:
        if not -len(self) <= text < len(self):
            raise IndexError(f"There are {len(self)} texts, numbered from 0: {text} is none of them.")
        at = range(len(self))[text]
        return self.ids[self.offsets[at] : self.offsets[at + 1]]


def _expect_whole(texts: TokenizedTexts) -> None:
    lengths = texts.lengths
    if not len(texts.offsets) or texts.offsets[0] != 0 or texts.offsets[-1] != len(texts.ids) or (lengths < 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of ids, {len(texts.ids)}.")
    if (lengths == 0).any():
        at = int(np.flatnonzero(lengths == 0)[0])
        raise ValueError(f"Text {at} has no tokens. Leave empty texts out, or use a tokenizer that adds special ones.")


Texts = TokenizedTexts | Iterable[Sequence[int] | np.ndarray] | Any


def tokenize(
    texts: Iterable[str] | Iterable[Sequence[str]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    longer: Longer = "truncate",
    cache: str | os.PathLike[str] | None = None,
    place: Callable[[int], str] = "texts[{}]".format,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedTexts:
    """The ids of texts, or of pairs of texts, with the special tokens that the tokenizer adds.

    - `tokenizer`: a `tokenizers.Tokenizer` or a tokenizer of transformers. It is not changed: padding and truncation
      that it is set to are put aside, only the side and the strategy of its truncation are kept.
    - `max_length`: tokens of a text at most, special ones included; None: any number.
    - `longer`: of a text with more, "truncate" keeps what the tokenizer keeps, and special tokens with it; "error"
      raises and says where it stands; "skip" leaves it out. `TokenizedTexts` counts them.
    - `cache`: a directory. What is tokenized is written there, under a hash of the texts, the tokenizer and the
      options, and read the next time. A damaged file is made anew, with a warning.
    - `place`: where a text comes from, for errors: `Records.place` is one.
    - `progress(done, total)` is called with numbers of texts.

    Raises a `TypeError` for what is neither text nor pair; a `ValueError` for a text that has no tokens at all, for
    none that is short enough, and for a `max_length` that special tokens fill.
    """
    if longer not in ("truncate", "error", "skip"):
        raise ValueError(f"longer = {longer!r} must be 'truncate', 'error' or 'skip'.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length = {max_length} must be at least 1.")
    corpus = _corpus(texts)
    make = lambda: _tokenized(corpus, tokenizer, max_length, longer, place, progress)
    if cache is None:
        return make()
    # What raises an error is not kept, so that the same texts kept under "error" are those of any other option.
    file = Path(cache) / f"{key_of(corpus, tokenizer, (max_length, longer))}.tokens"
    found: Any = kept(file)
    if found is None:
        made = make()
        keep(file, {name: x for name, x in vars(made).items() if x is not None})
        return made
    skipped, truncated = int(found.pop("skipped")), int(found.pop("truncated"))
    return TokenizedTexts(**found, skipped=skipped, truncated=truncated)


def _tokenized(
    corpus: list[Any],
    tokenizer: Any,
    limit: int | None,
    longer: Longer,
    place: Callable[[int], str],
    progress: Callable[[int, int], None] | None,
) -> TokenizedTexts:
    bare, rows = _bare(tokenizer), []
    for at in range(0, len(corpus), AT_ONCE):
        rows += _tokenize(bare, corpus[at : at + AT_ONCE], None)
        if progress is not None:
            progress(len(rows), len(corpus))
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    _expect_some(lengths, corpus, place)
    long = np.flatnonzero(lengths > limit) if limit is not None else np.zeros(0, np.int64)
    if len(long) and longer == "error":
        raise ValueError(_too_long(lengths, long, limit or 0, place))
    if longer == "truncate":
        for i, row in zip(long, _truncated([corpus[i] for i in long], tokenizer, limit), strict=True):
            rows[i] = row
        return _joined(rows, np.arange(len(rows)), truncated=len(long))
    indices = np.setdiff1d(np.arange(len(rows)), long)
    if len(rows) and not len(indices):
        raise ValueError(f"All {len(rows)} texts are skipped: each has more than max_length = {limit} tokens.")
    return _joined([rows[i] for i in indices], indices, skipped=len(long))


def _bare(tokenizer: Any) -> Any:
    """A tokenizer that neither pads nor cuts: a copy, once, where it would be one for each chunk."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if all(getattr(backend, name, None) is None for name in ("padding", "truncation")):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return tokenizer


def _truncated(texts: list[Any], tokenizer: Any, limit: int | None) -> list[Tokens]:
    rows = _tokenize(tokenizer, texts, limit)
    if any(len(row.ids) > (limit or 0) for row in rows):
        raise ValueError(f"No text can be cut to {limit} tokens: the special tokens alone take as many.")
    return rows


def _joined(rows: list[Tokens], indices: Int[np.ndarray, " texts"], **counts: int) -> TokenizedTexts:
    join = lambda parts: np.concatenate(parts) if parts else np.zeros(0, np.int32)
    has_types = bool(rows) and rows[0].types is not None
    return TokenizedTexts(
        join([row.ids for row in rows]),
        np.cumsum([0, *(len(row.ids) for row in rows)]),
        types=join([row.types for row in rows]) if has_types else None,
        indices=indices,
        **counts,
    )


def _expect_some(lengths: Int[np.ndarray, " texts"], corpus: list[Any], place: Callable[[int], str]) -> None:
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        at = int(empty[0])
        raise ValueError(f"{place(at)}: {corpus[at]!r} has no tokens, for the tokenizer adds no special ones.")


def _too_long(lengths: Int[np.ndarray, " texts"], long: np.ndarray, limit: int, place: Callable[[int], str]) -> str:
    first = int(long[0])
    return (
        f"{place(first)}: {lengths[first]} tokens are more than max_length = {limit}; so are {len(long) - 1} more"
        f" texts of {len(lengths)}. Cut them (longer='truncate') or leave them out (longer='skip')."
    )
