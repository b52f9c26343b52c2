"""Texts and labels out of files as people have them: TSV, CSV, JSON lines, plain lines, or a directory of these."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ._tables import DataError as DataError, Row, csv_rows, decoded, json_rows, lines_of, nearest, said, tsv_rows

# What is read of a directory; a file that is named itself is plain lines whatever its name ends with.
TABLES: dict[str, Callable[[Path], list[Row]]] = {
    ".tsv": tsv_rows,
    ".csv": csv_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
}
PLAIN = (".txt", ".text", ".md", ".rst", ".py")


@dataclass(frozen=True)
class Records:
    """Texts in the order of the files and their lines.

    `texts`: strings, or pairs of them. `labels` (int32, ` texts`): places in `names`, or None where no label was asked
    for. `files` and `lines`: where each text came from; `blank`: how many blank lines were skipped.
    """

    texts: list[Any]
    labels: Int[np.ndarray, " texts"] | None
    names: tuple[str, ...]
    files: list[Path]
    lines: list[int]
    blank: int

    def __len__(self) -> int:
        return len(self.texts)

    def place(self, text: int) -> str:
        """Where a text came from, for messages."""
        return f"{self.files[text]}, line {self.lines[text]}"


def read_texts(
    path: str | os.PathLike[str],
    *,
    text: str | tuple[str, str] = "text",
    label: str | None = None,
    labels: Sequence[str] | Mapping[str, int] | None = None,
    least_classes: int = 2,
    pattern: str | None = None,
) -> Records:
    """The texts of a file or of all files of a directory (sorted), in UTF-8, and their labels.

    - `.tsv`: a header line, then fields between tabs; nothing is quoted. `.csv`: a header line, fields between commas,
      quoted as RFC 4180 has it (a field may have line breaks). `.jsonl`, `.ndjson`: one JSON object a line. All else is
      plain: one text a line, without white space at its ends. Blank lines are skipped and counted.
    - `text`: the column of the texts, or two columns, for pairs. Columns mean nothing for plain lines.
    - `label`: the column of the labels, which are strings, whatever they look like.
    - `labels`: the labels that there may be, in the order of their numbers (or their numbers). None: those that occur,
      sorted, as numbers if all are.
    - `least_classes`: of which so many must occur. 1 for what is only evaluated.
    - `pattern`: which files of a directory, `**/*.py` say; None: all below it whose names end as a text's do.
      Never hidden ones.

    Raises a `DataError` (a `ValueError`) with file and line number for what cannot be read as it is meant.
    """
    files = _files(Path(path), pattern)
    tables = [TABLES.get(file.suffix.lower(), plain_rows)(file) for file in files]
    rows = [row for table in tables for row in table if row.fields is not None]
    if not rows:
        raise DataError(f"{path} has no text: {'its lines are' if len(files) == 1 else 'all its files have'} blank.")
    texts = [_text(row, text) for row in rows]
    found = None if label is None else [row.field(label).strip() for row in rows]
    names = () if found is None else _names(found, labels)
    numbers = None if found is None else _numbers(rows, found, names, least_classes)
    blank = sum(row.fields is None for table in tables for row in table)
    return Records(texts, numbers, names, [row.file for row in rows], [row.line for row in rows], blank)


def read_text(path: str | os.PathLike[str], *, pattern: str | None = None) -> str:
    """All that stands in a file, or in the plain files of a directory, one after the other: a language model's text.

    Raises a `DataError` as `read_texts` does.
    """
    texts = [decoded(file) for file in _files(Path(path), pattern, PLAIN)]
    if not any(text.strip() for text in texts):
        raise DataError(f"{path} has no text: there is nothing but white space in it.")
    return "\n".join(texts)


def plain_rows(file: Path) -> list[Row]:
    stripped = [line.strip() for line in lines_of(file)]
    return [Row(file, i, line or None) for i, line in enumerate(stripped, 1)]


def _files(path: Path, pattern: str | None, endings: tuple[str, ...] = (*TABLES, *PLAIN)) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"There is no file {path}.{nearest(path.name, _beside(path))}")
    inside = sorted(file for file in path.glob(pattern or "**/*") if file.is_file())
    own = lambda file: not any(part.startswith(".") for part in file.relative_to(path).parts)
    found = [file for file in inside if own(file) and (pattern or file.suffix.lower() in endings)]
    if not found:
        wanted = f"that match {pattern!r}" if pattern else f"that end in {', '.join(endings)}"
        raise DataError(f"The directory {path} has no files {wanted}.")
    return found


def _beside(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []


def _text(row: Row, columns: str | tuple[str, str]) -> Any:
    if isinstance(columns, str):
        return row.field(columns)
    return row.field(columns[0]), row.field(columns[1])


def _names(found: list[str], labels: Sequence[str] | Mapping[str, int] | None) -> tuple[str, ...]:
    if labels is None:
        seen = set(found)
        return tuple(sorted(seen, key=int if all(name.lstrip("-").isdecimal() for name in seen) else None))
    if isinstance(labels, str) or len(set(labels)) != len(labels):
        raise ValueError(f"labels = {labels!r} must be different names.")
    if not isinstance(labels, Mapping):
        return tuple(labels)
    if sorted(labels.values()) != list(range(len(labels))):
        raise ValueError(f"labels = {labels!r} must have the numbers 0 to {len(labels) - 1}, each once.")
    return tuple(sorted(labels, key=labels.__getitem__))


def _numbers(rows: list[Row], found: list[str], names: tuple[str, ...], least: int) -> Int[np.ndarray, " texts"]:
    numbers = {name: i for i, name in enumerate(names)}
    for row, name in zip(rows, found, strict=True):
        if name not in numbers:
            raise DataError(
                f"{row.place}: the label {said(name)} is none of {said(names)}.{nearest(name, names)} Correct the"
                " line, or add the label to those that are known: those of the training texts, or `labels`."
            )
    if len(set(found)) < least:
        raise DataError(
            f"{rows[0].place} to {rows[-1].place}: all {len(rows)} texts have"
            f" {'the label' if least < 3 else 'labels of'} {said(tuple(sorted(set(found))))}, but at"
            f" least {least} classes are needed to learn from. Is the file sorted and cut, or is the label elsewhere?"
        )
    return np.array([numbers[name] for name in found], np.int32)
