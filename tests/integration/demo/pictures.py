"""Decodes what a PNG says, so that a test does not take the drawing code's word for it."""

import struct
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """colours: those that its pixels have. transparent: pixels may be seen through."""

    width: int
    height: int
    colours: set[bytes]
    transparent: bool


def decoded(data: bytes) -> Picture:
    """Check every chunk and pixel of a picture that has a palette of one bit per pixel and no filters."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks: dict[bytes, bytes] = {}
    place = 8
    while place < len(data):
        [length] = struct.unpack_from(">I", data, place)
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        place += 12 + length
    assert place == len(data)
    first, *_, last = chunks
    assert (first, last) == (b"IHDR", b"IEND")
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [1, 3, 0, 0, 0]
    rows, row_bytes = zlib.decompress(chunks[b"IDAT"]), 1 + -(-width // 8)
    assert len(rows) == height * row_bytes
    assert set(rows[::row_bytes]) == {0}
    palette = [chunks[b"PLTE"][place : place + 3] for place in range(0, len(chunks[b"PLTE"]), 3)]
    used = {0} | ({1} if any(rows) else set())
    return Picture(width, height, {palette[index] for index in used}, b"tRNS" in chunks)
