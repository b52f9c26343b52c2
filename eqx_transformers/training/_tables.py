"""Files as rows of named fields, each of which knows its line."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip archive", b"\x1f\x8b": "gzip"}
PACKED = ("a zip archive", "gzip")


class DataError(ValueError):
    """A data file that cannot be read as it is meant; the message has the file and the line."""


class NoColumn(DataError):
    """A file has no such `column`."""

    def __init__(self, text: str, column: str):
        super().__init__(text)
        self.column = column


@dataclass(frozen=True, slots=True)
class Row:
    """One text's line: its fields by column; a string, where there are no columns; None, where the line is blank."""

    file: Path
    line: int
    fields: dict[str, Any] | str | None

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"

    def field(self, column: str) -> str:
        """What stands in a column. Raises a `DataError` where nothing does."""
        fields = self.fields
        if isinstance(fields, str):
            if column == "text":
                return fields
            said = (
                f"{self.file} is read as plain lines, which have no column {column!r}: columns are in files that end in"
                " .tsv, .csv or .jsonl."
            )
            raise NoColumn(said, column)
        if fields is None or column not in fields:
            said = f"{self.place}: there is no column {column!r}, {_instead(column, tuple(fields or ()))}"
            raise NoColumn(said, column)
        return self._filled(column, fields[column])

    def _filled(self, column: str, value: Any) -> str:
        if isinstance(value, bool | int | float):
            value = json.dumps(value)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: the field {column!r} must be text or a number, but it is {said(value)}.")
        if not value.strip():
            raise DataError(f"{self.place}: the field {column!r} is empty. Fill it, or leave the line out.")
        return value


def said(value: Any) -> str:
    """A value for a message, cut where it is long."""
    found = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
    return found if len(found) <= 100 else found[:99] + "…"


def _instead(column: str, columns: tuple[str, ...]) -> str:
    if len(columns) == 1 and any(mark in columns[0] for mark in ",;\t|"):
        return f"for the header is one field, {columns[0]!r}: another separator than the file's name says."
    return f"but {said(columns)}.{nearest(column, columns)} Is the first line a header?"


def nearest(name: str, others: Sequence[str]) -> str:
    """A sentence that says which of the others is most like a name, if one is."""
    near = [x for x in others if x.lower() == name.lower()] or get_close_matches(name, others, 1)
    return f" The nearest is {near[0]!r}." if near else ""


def decoded(file: Path) -> str:
    """A file's text, its lines ended by `\\n` alone. Raises a `DataError` if it is empty or not UTF-8."""
    raw = file.read_bytes()
    if not raw:
        raise DataError(f"{file} is empty: it has 0 bytes.")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        at = error.start + raw.startswith(b"\xef\xbb\xbf") * 3
        line, start = raw.count(b"\n", 0, at) + 1, raw.rfind(b"\n", 0, at) + 1
        likely = next((name for mark, name in ENCODINGS.items() if raw.startswith(mark)), "Latin-1 or Windows-1252")
        fix = "unpack it" if likely in PACKED else "convert it, with iconv say"
        raise DataError(
            f"{file}, line {line}: byte 0x{raw[at]:02x}, number {at - start + 1} of the line, is not UTF-8"
            f" ({error.reason}). The file is likely {likely}: {fix}."
        ) from None


def lines_of(file: Path) -> list[str]:
    """Between `\\n` alone: other characters that end lines, of which Unicode has many, stand in texts."""
    lines = decoded(file).split("\n")
    return lines[:-1] if not lines[-1] else lines


def tsv_rows(file: Path) -> list[Row]:
    return _table(file, [(i, line.split("\t") if line.strip() else []) for i, line in enumerate(lines_of(file), 1)])


def csv_rows(file: Path) -> list[Row]:
    reader, found, line = csv.reader(io.StringIO(decoded(file), newline=""), strict=True), [], 1
    try:
        for fields in reader:
            found.append((line, fields if any(field.strip() for field in fields) else []))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}, line {line}: the record that begins here is not CSV: {error}. A quote in a quoted field is"
            ' written "", and every quoted field ends.'
        ) from None
    return _table(file, found)


def json_rows(file: Path) -> list[Row]:
    return [Row(file, i, _parsed(file, i, line) if line.strip() else None) for i, line in enumerate(lines_of(file), 1)]


def _parsed(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: not JSON: {error.msg} at character {error.colno}.") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}, line {number}: must be a JSON object with named fields, but it is {said(found)}.")
    return found


def _table(file: Path, lines: list[tuple[int, list[str]]]) -> list[Row]:
    """Rows of the lines after the header, which is the first one that is not blank."""
    filled = [(number, fields) for number, fields in lines if fields]
    if not filled:
        return [Row(file, number, None) for number, _ in lines]
    at, header = filled[0]
    _expect_header(file, at, header)
    if len(filled) == 1:
        raise DataError(f"{file}, line {at}: a header ({said(tuple(header))}) with no line of data after it.")
    rest = [(number, fields) for number, fields in lines if number != at]
    return [Row(file, number, _named(file, number, fields, header) if fields else None) for number, fields in rest]


def _expect_header(file: Path, line: int, header: list[str]) -> None:
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise DataError(
            f"{file}, line {line}: the header has {said(tuple(double))} more than once: {said(tuple(header))}."
        )


def _named(file: Path, number: int, fields: list[str], header: list[str]) -> dict[str, str]:
    if len(fields) != len(header):
        raise DataError(
            f"{file}, line {number}: {len(fields)} fields, but the header has {len(header)} ({said(tuple(header))})."
            f" {'One is missing' if len(fields) < len(header) else 'A separator stands in a field'}."
        )
    return dict(zip(header, fields, strict=True))
