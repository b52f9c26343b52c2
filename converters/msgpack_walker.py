"""A walk over the bytes of a msgpack file: what lies between tensors is read, their own bytes are stepped over.

Format: msgpack's specification, and for tensors flax's serialization.py: an array is an extension of type 1, a NumPy
scalar one of type 3; its bytes are msgpack again, the list (shape, dtype's name, the array's bytes in C order).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NamedTuple

from eqx_transformers.tensor_file import Spec

from .errors import MalformedCheckpoint

MAX_DEPTH = 32  # maps inside maps
MAX_ITEMS = 100_000  # entries of all maps together
MAX_NAME = 1000  # characters of a joined name
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 1 << 48

ARRAY, COMPLEX, SCALAR = 1, 2, 3

# dtypes by their names in NumPy, with safetensors' names and bytes.
DTYPES = {
    f"{kind}{8 * size}": (f"{kind[0].upper()}{8 * size}", size) for kind in ("int", "uint") for size in (1, 2, 4, 8)
}
DTYPES |= {"bool": ("BOOL", 1), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
DTYPES |= {"float64": ("F64", 8), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1)}
DTYPES |= {"float8_e8m0fnu": ("F8_E8M0", 1)}

# What a first byte from 0xc0 to 0xdf starts: the kind, the bytes of the number that follows, or the number itself.
FORMATS: dict[int, tuple[str, int, int]] = {0xC0: ("nil", 0, 0), 0xC2: ("bool", 0, 0), 0xC3: ("bool", 0, 1)}
FORMATS |= {0xC4 + i: ("bytes", 1 << i, 0) for i in range(3)} | {0xC7 + i: ("extension", 1 << i, 0) for i in range(3)}
FORMATS |= {0xCA + i: ("float", 4 << i, 0) for i in range(2)} | {0xCC + i: ("number", 1 << i, 0) for i in range(4)}
FORMATS |= {0xD0 + i: ("signed", 1 << i, 0) for i in range(4)} | {0xD4 + i: ("extension", 0, 1 << i) for i in range(5)}
FORMATS |= {0xD9 + i: ("text", 1 << i, 0) for i in range(3)} | {0xDC + i: ("list", 2 << i, 0) for i in range(2)}
FORMATS |= {0xDE + i: ("map", 2 << i, 0) for i in range(2)}

WORDS = {"nil": "nothing (nil)", "bool": "true or false", "bytes": "plain bytes", "float": "a fraction"}
WORDS |= {"number": "a number", "text": "a text", "list": "a list", "map": "a map", "extension": "a tensor"}

ONLY = "Only nested maps of names to arrays are read, as save_pretrained of a Flax model writes them."
AGAIN = "The file is damaged, or no Flax model. Fetch it again."


@dataclass(frozen=True)
class Plain:
    """A value that is no tensor. Flax's maps of chunks have such, and files that are more than a model."""

    kind: str
    value: int


Map = dict[str, Any]  # of names, in the file's order, to trees
Tree = Map | Spec | Plain


class Head(NamedTuple):
    """A value's kind, and its length (of an extension, text, …), its count (list, map) or itself (numbers)."""

    kind: str
    value: int


class Walker:
    """The file as a sequence of values; `at` is where it stands, `end` where what it reads must end."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.at, self.end, self.items = file, 0, end, 0
        self.size = end

    def take(self, count: int) -> bytes:
        self.expect(count)
        self.at += count
        found = self.file.read(count)
        if len(found) != count:
            raise MalformedCheckpoint("It became shorter while it was read. Is it still being written?")
        return found

    def skip(self, count: int) -> None:
        self.expect(count)
        self.at += count
        self.file.seek(self.at)

    def expect(self, count: int) -> None:
        if self.at + count <= self.end:
            return
        if self.end < self.size:
            raise MalformedCheckpoint(
                f"A tensor that ends at byte {self.end} says that its parts end at {self.at + count}. {AGAIN}"
            )
        raise MalformedCheckpoint(
            f"It ends at byte {self.end}, inside something that goes on to byte {self.at + count}: a download or copy"
            " that stopped early? Fetch it again."
        )

    @contextmanager
    def within(self, count: int) -> Iterator[None]:
        """The next `count` bytes, exactly."""
        self.expect(count)
        outer, self.end = self.end, self.at + count
        yield
        if self.at != self.end:
            raise MalformedCheckpoint(f"A tensor has {self.end - self.at} bytes more than its parts. {AGAIN}")
        self.end = outer

    def head(self) -> Head:
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return Head("number", first if first < 0x80 else first - 256)
        if first < 0xC0:
            short = "map" if first < 0x90 else "list" if first < 0xA0 else "text"
            return Head(short, first & (15 if first < 0xA0 else 31))
        if first not in FORMATS:
            raise MalformedCheckpoint(f"Byte {self.at - 1} is 0xc1, which msgpack does not use. {AGAIN}")
        kind, width, value = FORMATS[first]
        if kind == "signed":
            return Head("number", int.from_bytes(self.take(width), "big", signed=True))
        return Head(kind, int.from_bytes(self.take(width), "big") if width else value)

    def value(self, path: str, depth: int) -> Tree:
        kind, value = self.head()
        if kind == "map":
            return self.map(value, path, depth)
        if kind == "extension":
            return self.extension(value, path)
        if kind == "list":
            raise MalformedCheckpoint(f"{named(path)} is a list. {ONLY}")
        if kind in ("text", "bytes"):
            self.skip(value)
        return Plain(kind, value)

    def map(self, count: int, path: str, depth: int) -> Map:
        self.items += count
        if depth == MAX_DEPTH:
            raise MalformedCheckpoint(f"{named(path)} lies in {depth} maps inside each other, and holds another.")
        if self.items > MAX_ITEMS:
            raise MalformedCheckpoint(f"Its maps have {self.items} entries, of which {MAX_ITEMS} are the most. {AGAIN}")
        entries: Map = {}
        for _ in range(count):
            name = self.name(path)
            if name in entries:
                raise MalformedCheckpoint(f"{named(joined(path, name))} is there twice. Save the model again.")
            entries[name] = self.value(joined(path, name), depth + 1)
        return entries

    def name(self, path: str) -> str:
        kind, length = self.head()
        if kind != "text":
            raise MalformedCheckpoint(f"{named(path)} has {WORDS[kind]} as a name; names are texts. {ONLY}")
        return self.text(length, MAX_NAME - len(path), f"A name in {named(path)}")

    def text(self, length: int, most: int, what: str) -> str:
        self.expect(length)
        if length > most:
            raise MalformedCheckpoint(f"{what} has {length} bytes: too long for a checkpoint. {AGAIN}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise MalformedCheckpoint(f"{what} is not UTF-8. {AGAIN}") from error

    def extension(self, length: int, path: str) -> Spec:
        code = self.take(1)[0]
        if code not in (ARRAY, SCALAR):
            what = "a complex number" if code == COMPLEX else f"an extension of type {code}"
            raise MalformedCheckpoint(f"{named(path)} is {what}; arrays are extensions of type 1, scalars of type 3.")
        with self.within(length):
            spec = self.tensor(path)
        if code == SCALAR and spec.shape:
            raise MalformedCheckpoint(f"{named(path)} is a scalar of shape {list(spec.shape)}. {AGAIN}")
        return spec

    def tensor(self, path: str) -> Spec:
        """A `Spec` of shape, dtype and bytes; the bytes are stepped over."""
        kind, count = self.head()
        if (kind, count) != ("list", 3):
            raise MalformedCheckpoint(f"{named(path)} is not made of a shape, a dtype and bytes. {AGAIN}")
        shape = self.shape(path)
        dtype, size = self.dtype(path)
        kind, length = self.head()
        if kind != "bytes" or length != prod(shape) * size:
            what = f"{dtype}{list(shape)}, {prod(shape) * size} bytes"
            held = f"{length} bytes" if kind == "bytes" else WORDS[kind]
            raise MalformedCheckpoint(f"{named(path)} is declared as {what}, but holds {held}. {AGAIN}")
        start = self.at
        self.skip(length)
        return Spec(shape, dtype, start, self.at)

    def shape(self, path: str) -> tuple[int, ...]:
        kind, count = self.head()
        if kind != "list" or count > MAX_DIMENSIONS:
            found = f"a list of {count} sizes" if kind == "list" else WORDS[kind]
            raise MalformedCheckpoint(
                f"{named(path)} has {found} for a shape; expected a list of at most {MAX_DIMENSIONS}. {AGAIN}"
            )
        return sizes_of([Plain(*self.head()) for _ in range(count)], path)

    def dtype(self, path: str) -> tuple[str, int]:
        kind, length = self.head()
        name = self.text(length, 30, f"The dtype of {named(path)}") if kind == "text" else WORDS[kind]
        if name not in DTYPES:
            raise MalformedCheckpoint(f"{named(path)} is of dtype {name!r}; read are {', '.join(DTYPES)}.")
        return DTYPES[name]


def sizes_of(sizes: list[Plain], path: str) -> tuple[int, ...]:
    """Its elements, of which there are not more than NumPy can count even where one size is 0."""
    if any(n.kind != "number" or n.value < 0 for n in sizes) or prod(n.value or 1 for n in sizes) >= MAX_ELEMENTS:
        raise MalformedCheckpoint(f"{named(path)} has a shape that is not a list of sizes. {AGAIN}")
    return tuple(n.value for n in sizes)


def joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def kind(value: Tree) -> str:
    return "a tensor" if isinstance(value, Spec) else "a map" if isinstance(value, dict) else WORDS[value.kind]


def named(path: str) -> str:
    return quoted(path) if path else "The map of the file"


def quoted(name: str) -> str:
    """For messages: a hostile name may be long, or hold line breaks."""
    return repr(name if len(name) < 100 else f"{name[:80]}…")
