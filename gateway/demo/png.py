"""A PNG of one colour."""

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH, _PALETTE = 1, 3


def png(width: int, height: int, colour: bytes, *, transparent: bool = False) -> bytes:
    """The picture, of width times height pixels. colour: three bytes, red, green and blue.

    With a palette of one colour a pixel is one bit, so that a large picture is as cheap to make as to send.
    """
    row = b"\x00" + bytes(-(-width // 8))
    header = struct.pack(">IIBBBBB", width, height, _BIT_DEPTH, _PALETTE, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", colour)]
    if transparent:
        chunks.append((b"tRNS", b"\x00"))
    chunks += [(b"IDAT", zlib.compress(row * height)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
