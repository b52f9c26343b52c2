"""The directory of a zip archive whose members are stored as they are: where each lies in the file.

The format, from PKWARE's APPNOTE.TXT: members, each behind a local header; then the directory, one entry a member;
then the end record, with a second one and its locator before it where sizes may need 64 bits. Readers differ in what
they make of an archive that contradicts itself, so here that is an error.
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .errors import MalformedCheckpoint

MAX_ENTRIES = 1 << 17
MAX_DIRECTORY = 1 << 25  # bytes
MAX_EXTRA = 1000  # bytes of an entry's extra fields; torch writes some 30
MAX_NAME = 500  # bytes; torch's own reader cuts a name off at 511
END, END_64, LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
ENTRY, LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit field"
KNOWN_FLAGS = 1 << 3 | 1 << 11  # sizes follow the data; names are UTF-8
DOS_DIRECTORY = 0x10  # a file attribute: torch reads such a member as nothing
AGAIN = "Fetch it, or save it, again."


@dataclass(frozen=True)
class _End:
    """What the end records say: how many entries, and where the directory lies."""

    count: int
    start: int
    end: int


@dataclass(frozen=True)
class _Entry:
    name: str
    raw: bytes
    header: int
    size: int


def entries(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """The byte range of each member, by name and in the directory's order; members must be stored uncompressed.

    Raises `MalformedCheckpoint` for a file that is not one whole zip archive, that compresses or encrypts a member,
    whose headers contradict each other, or whose members overlap or share a name (upper and lower case being one).
    """
    end = _end(file, os.fstat(file.fileno()).st_size)
    found = list(_directory(_read(file, end.start, end.end - end.start), end.count))
    _expect_distinct([entry.name for entry in found])
    ranges = {entry.name: _range(file, entry, end.start) for entry in found}
    _expect_apart(found, ranges)
    return ranges


def _end(file: BinaryIO, size: int) -> _End:
    at = size - END.size
    record = _read(file, at, END.size) if at > 0 else b""
    if not record.startswith(b"PK\5\6") or record[-2:] != b"\0\0":
        raise MalformedCheckpoint(
            f"It begins like a zip archive but has no end record at its end, after {size} bytes: a download or copy"
            f" that stopped early, or something was appended? {AGAIN}"
        )
    _, disk, first, here, count, length, start, _ = END.unpack(record)
    stated = (disk, first, here, count, length, start)
    if at >= LOCATOR.size and (locator := _read(file, at - LOCATOR.size, LOCATOR.size)).startswith(b"PK\6\7"):
        at, stated = _end_64(file, locator, at - LOCATOR.size, stated)
    disk, first, here, count, length, start = stated
    if disk or first or here != count:
        raise _broken("it is one part of several")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise _broken(f"it declares {count} members in a directory of {length} bytes")
    if start + length != at:
        raise _broken(f"its directory is said to end at byte {start + length}, but the end record starts at {at}")
    return _End(count, start, at)


def _end_64(file: BinaryIO, locator: bytes, end: int, short: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Where the 64-bit end record starts, and its numbers, which the short one must repeat or leave open."""
    _, disk, at, disks = LOCATOR.unpack(locator)
    if disk or disks != 1 or at != end - END_64.size:
        raise _broken("the locator of its 64-bit end record points elsewhere")
    signature, size, _, _, *stated = END_64.unpack(_read(file, at, END_64.size))
    if signature != b"PK\6\6" or size != END_64.size - 12:
        raise _broken("its 64-bit end record is damaged")
    full = (FULL_16,) * 4 + (FULL_32,) * 2
    if any(a not in (b, mark) for a, b, mark in zip(short, stated, full, strict=True)):
        raise _broken("its two end records disagree")
    return at, tuple(stated)


def _directory(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if len(directory) - at < ENTRY.size:
            raise _broken(f"its directory ends before the {count} members that it declares")
        fields = ENTRY.unpack_from(directory, at)
        length, extra, comment = fields[10:13]
        at += ENTRY.size
        if fields[0] != b"PK\1\2" or len(directory) - at < length + extra + comment:
            raise _broken("an entry of its directory is damaged")
        yield _entry(fields, directory[at : at + length], directory[at + length : at + length + extra])
        at += length + extra + comment
    if at != len(directory):
        raise _broken(f"its directory goes on after the {count} members that it declares")


def _entry(fields: tuple, raw: bytes, extra: bytes) -> _Entry:
    name = _name(raw)
    _, _, _, flags, method, _, _, _, packed, size, _, _, _, disk, _, attributes, header = fields
    size, packed, header, disk = _wide(name, extra, (size, packed, header, disk))
    if method or packed != size:
        raise MalformedCheckpoint(
            f"Its member {name} is compressed ({packed} bytes for {size}). torch never writes that, and a small archive"
            " could unpack to more than there is memory: was it zipped again? Unpack it, or save it again with torch."
        )
    if flags & ~KNOWN_FLAGS:
        raise _broken(f"its member {name} is encrypted, or of a kind that torch never writes (flags {flags:#x})")
    if disk or attributes & DOS_DIRECTORY:
        raise _broken(f"its member {name} is a directory, or lies in another file")
    return _Entry(name, raw, header, size)


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _broken("a member's name is not UTF-8") from error
    if not name or len(raw) > MAX_NAME or not name.isprintable() or "\\" in name:
        raise _broken(f"a member has the name {name[:80]!r}")
    # An empty part is an absolute name, a directory, or one name spelt in two ways.
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise _broken(f"a member has the name {name[:80]!r}, which is no plain path")
    return name


def _wide(name: str, extra: bytes, short: tuple[int, ...]) -> list[int]:
    """(size, packed, header, disk), those that are left open in the entry from the field of 64-bit numbers."""
    fields = _extra_fields(name, extra)
    wide, at = fields.get(1, b""), 0
    full = ((FULL_32, "<Q"), (FULL_32, "<Q"), (FULL_32, "<Q"), (FULL_16, "<I"))
    numbers = []
    for number, (mark, form) in zip(short, full, strict=True):
        if number == mark:
            number, at = _number(name, wide, at, form)
        numbers.append(number)
    if at != len(wide):
        raise _broken(f"the 64-bit numbers of its member {name} are more than needed")
    return numbers


def _number(name: str, data: bytes, at: int, form: str) -> tuple[int, int]:
    end = at + struct.calcsize(form)
    if end > len(data):
        raise _broken(f"the 64-bit numbers of its member {name} are missing")
    return struct.unpack(form, data[at:end])[0], end


def _extra_fields(name: str, extra: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    if len(extra) > MAX_EXTRA:
        raise _broken(f"its member {name} has {len(extra)} bytes of extra fields in the directory")
    while extra:
        kind, length = struct.unpack("<2H", extra[:4]) if len(extra) >= 4 else (0, FULL_16)
        if kind in fields or len(extra) < 4 + length:
            raise _broken(f"the extra fields of its member {name} are damaged")
        fields[kind], extra = extra[4 : 4 + length], extra[4 + length :]
    return fields


def _expect_distinct(names: list[str]) -> None:
    counts = Counter(name.lower() for name in names)
    if twice := [name for name in names if counts[name.lower()] > 1]:
        raise _broken(f"it has two members of one name, {twice[0]} and {twice[1]}")


def _range(file: BinaryIO, entry: _Entry, limit: int) -> tuple[int, int]:
    """Of the member's bytes, once its local header says the same as the directory."""
    if entry.header + LOCAL.size + len(entry.raw) + entry.size > limit:
        raise _broken(f"its member {entry.name} lies outside it")
    local = _read(file, entry.header, LOCAL.size + len(entry.raw))
    signature, _, flags, method, *_, length, extra = LOCAL.unpack_from(local)
    if signature != b"PK\3\4" or method or flags & ~KNOWN_FLAGS or local[LOCAL.size :] != entry.raw:
        raise _broken(f"the header of its member {entry.name} is not what the directory says")
    start = entry.header + LOCAL.size + length + extra
    if length != len(entry.raw) or start + entry.size > limit:
        raise _broken(f"its member {entry.name} lies outside it")
    return start, start + entry.size


def _expect_apart(found: list[_Entry], ranges: dict[str, tuple[int, int]]) -> None:
    end = 0
    for entry in sorted(found, key=lambda entry: entry.header):
        if entry.header < end:
            raise _broken(f"its member {entry.name} overlaps another")
        end = ranges[entry.name][1]


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise _broken(f"it has no {size} bytes at {start}")
    return data


def _broken(why: str) -> MalformedCheckpoint:
    return MalformedCheckpoint(f"It is a damaged zip archive: {why}. {AGAIN}")
