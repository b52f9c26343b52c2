"""A compressed file as a stream that is unpacked no further than it is read."""

import bz2
import io
import lzma
import zlib
from typing import Any

from .errors import MalformedCheckpoint

MAX_LZMA_MEMORY = 1 << 28  # the dictionary that a header may ask for; `xz -9` asks for 65 MiB
CHUNK = 1 << 18

DECOMPRESSORS = (
    (b"\x78", zlib.decompressobj),
    (b"\x1f\x8b", lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),  # gzip's header, and its checksum at the end
    (b"BZ", bz2.BZ2Decompressor),
    (b"\xfd7zXZ", lambda: lzma.LZMADecompressor(memlimit=MAX_LZMA_MEMORY)),
    (b"\x5d\x00", lambda: lzma.LZMADecompressor(memlimit=MAX_LZMA_MEMORY)),
)


class Unpacked(io.RawIOBase):
    """A compressed file as a stream, unpacked only as far as it is read.

    Not `gzip.open` and its like: they let a file pass that goes on after its end, and there is none for zlib.
    """

    def __init__(self, file: io.BufferedReader, decompressor: Any):
        self._file, self._decompressor = file, decompressor

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = b""
        while not data and not self._decompressor.eof:
            data = self._more(min(len(into), CHUNK))
        into[: len(data)] = data
        return len(data)

    def rest(self) -> bytes:
        """What follows the compressed data."""
        return self._decompressor.unused_data or self._file.read(1)

    def _more(self, size: int) -> bytes:
        # zlib hands back what it has not used yet; the others keep it.
        given = getattr(self._decompressor, "unconsumed_tail", b"")
        if asks := not given and getattr(self._decompressor, "needs_input", True):
            given = self._file.read(CHUNK)
        try:
            data = self._decompressor.decompress(given, size)
        except (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError) as error:
            raise MalformedCheckpoint(f"Its compression is damaged ({error}). Fetch it again.") from error
        if asks and not given and not data and not self._decompressor.eof:
            raise MalformedCheckpoint("Its compressed data is cut off: a download or copy that stopped early?")
        return data
