"""Lines of text as samples: where they come from, and which of them are held out."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from ..text import read_texts
from ..tokens import tokenize
from ._options import WrongUsage

# No code of the library itself: what others installed beside it, and what tests it.
FOREIGN = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Lines:
    """Different lines as token ids, each with its end, in two shares that have no line in common.

    `texts` are those that are short enough, `ids` (`lines length`, padded) their tokens, `held` which are held out.
    `repeated` and `skipped` are how many there were more than once, and with more tokens than `length`.
    """

    texts: list[str]
    ids: Int[np.ndarray, "lines length"]
    held: Bool[np.ndarray, " lines"]
    repeated: int
    skipped: int


def read(path: str | os.PathLike[str] | None, limit: int | None) -> tuple[list[str], int]:
    """(the different lines of a file or a directory, how many were repetitions); without a path, `library_lines`.

    `limit` keeps so many of them: a sample of all, the same every time, in their order. Lines are without white space
    at their ends, and those without anything else are left out. Raises a `DataError` for what cannot be read.
    """
    found = library_lines() if path is None else read_texts(path).texts
    lines = list(dict.fromkeys(found))
    repeated = len(found) - len(lines)
    if limit is not None and limit < len(lines):
        numbers = [_number(line, b"sample") for line in lines]
        last = sorted(numbers)[limit - 1]
        lines = [line for line, number in zip(lines, numbers, strict=True) if number <= last]
    return lines, repeated


def library_lines() -> list[str]:
    """The lines of Python's standard library on this machine, its files sorted, without its tests.

    Raises a `WrongUsage` where it is not there as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if not FOREIGN & set(file.relative_to(root).parts))
    stripped = (line.strip() for file in files for line in _utf8(file).splitlines())
    lines = [line for line in stripped if line]
    if not lines:
        raise WrongUsage(f"There are no files of the standard library in {root}: name a file of lines.")
    return lines


def split(
    lines: list[str], repeated: int, tokenizer: object, *, length: int, share: float, padding_id: int, end_id: int
) -> Lines:
    """Lines as tokens, `end_id` behind each. Longer ones than `length` tokens, its end counted, are skipped.

    Which are held out is decided by a hash of the line alone: the `share` of them, whatever others there are. Raises a
    `WrongUsage` where that is none or all.
    """
    texts = tokenize(lines, tokenizer)
    rows = [_ended(texts[i], end_id) for i in range(len(texts))]
    kept = [i for i, row in enumerate(rows) if len(row) <= length]
    if not kept:
        shortest = min(map(len, rows))
        raise WrongUsage(
            f"All {len(lines)} lines have more than {length} tokens, the shortest {shortest}: give a larger --length,"
            " or a tokenizer with more tokens."
        )
    ids = np.full((len(kept), length), padding_id, np.int32)
    for place, i in enumerate(kept):
        ids[place, : len(rows[i])] = rows[i]
    chosen = [lines[i] for i in kept]
    return Lines(chosen, ids, held_out(chosen, share), repeated, len(lines) - len(kept))


def held_out(texts: Sequence[str], share: float, least: int = 1) -> Bool[np.ndarray, " texts"]:
    """Which are held out: decided by a hash of each alone, so that of equal ones all are, whatever others there are.

    Raises a `WrongUsage` where it is fewer than `least`, or all.
    """
    found = np.array(list(map(is_held_out(share), texts)))
    if found.all() or found.sum() < least:
        raise WrongUsage(
            f"--hold-out {share} holds out {found.sum()} of {len(found)} texts (equal ones together); {least} at least"
            f" must be, and some not. Give more texts, or a {'smaller' if found.all() else 'larger'} share."
        )
    return found


def is_held_out(share: float) -> Callable[[str], bool]:
    """Whether a line is one of the held-out share, by its hash."""
    return lambda line: _number(line, b"held out") < share * 2**64


def train_lines(lines: Iterable[str], share: float) -> list[str]:
    """Those that a tokenizer may be made of, where a share is held out."""
    held = is_held_out(share)
    return [line for line in lines if not held(line)]


def _number(line: str, purpose: bytes) -> int:
    """A hash of 64 bits: another one for each purpose, so that a sample has its part of what is held out."""
    found = hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8, person=purpose)
    return int.from_bytes(found.digest(), "big")


def _utf8(file: Path) -> str:
    """What a file of Python says; the few in another encoding are left out."""
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _ended(row: Int[np.ndarray, " tokens"], end_id: int) -> Int[np.ndarray, " tokens"]:
    return row if len(row) and row[-1] == end_id else np.append(row, np.int32(end_id))
