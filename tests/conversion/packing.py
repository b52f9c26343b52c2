"""A packer of msgpack: what flax.serialization.to_bytes writes, and what it never would."""

import struct
from dataclasses import dataclass

import numpy as np

CHUNKED = "__msgpack_chunked_array__"


@dataclass(frozen=True)
class Raw:
    """Bytes that go into the file as they are."""

    content: bytes


@dataclass(frozen=True)
class Extension:
    code: int
    payload: bytes


@dataclass(frozen=True)
class Pairs:
    """A map of any keys, in any number."""

    pairs: tuple


def packed(value) -> bytes:
    match value:
        case Raw(content):
            return content
        case Extension(code, payload):
            fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(payload))
            start = bytes([fixed]) if fixed else sized(len(payload), {1: 0xC7, 2: 0xC8, 4: 0xC9})
            return start + bytes([code]) + payload
        case dict():
            return packed(Pairs(tuple(value.items())))
        case Pairs(pairs):
            start = few(len(pairs), 0x80, 16) or sized(len(pairs), {2: 0xDE, 4: 0xDF})
            return start + b"".join(packed(k) + packed(v) for k, v in pairs)
        case str():
            text = value.encode()
            return (few(len(text), 0xA0, 32) or sized(len(text), {1: 0xD9, 2: 0xDA, 4: 0xDB})) + text
        case bytes():
            return sized(len(value), {1: 0xC4, 2: 0xC5, 4: 0xC6}) + value
        case None | bool():
            return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
        case np.ndarray():
            return packed(Extension(1, parts(value)))
        case np.generic():
            return packed(Extension(3, parts(np.asarray(value))))
        case int():
            return few(value, 0, 128) or whole(value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case list() | tuple():
            start = few(len(value), 0x90, 16) or sized(len(value), {2: 0xDC, 4: 0xDD})
            return start + b"".join(map(packed, value))
    raise TypeError(value)


def few(count, first, limit) -> bytes:
    return bytes([first + count]) if 0 <= count < limit else b""


def sized(count, codes) -> bytes:
    width = next(width for width in codes if count < 1 << 8 * width)
    return bytes([codes[width]]) + count.to_bytes(width, "big")


def whole(value) -> bytes:
    if value >= 0:
        return sized(value, {1: 0xCC, 2: 0xCD, 4: 0xCE, 8: 0xCF})
    if value >= -32:
        return bytes([value + 256])
    width, code = next((w, c) for w, c in ((1, 0xD0), (2, 0xD1), (4, 0xD2), (8, 0xD3)) if value >= -(1 << 8 * w - 1))
    return bytes([code]) + value.to_bytes(width, "big", signed=True)


def parts(x, shape=None, dtype=None, content=None) -> bytes:
    """An array's payload, or one with a lie in it."""
    return packed(
        [list(x.shape) if shape is None else shape, dtype or x.dtype.name, x.tobytes() if content is None else content]
    )


def chunked(x, size, **changes) -> dict:
    pieces = [x.reshape(-1)[i : i + size] for i in range(0, x.size, size)]
    numbered = lambda values: {str(i): value for i, value in enumerate(values)}
    return {CHUNKED: True, "shape": numbered(x.shape), "chunks": numbered(pieces)} | changes
