"""Bodies that come packed although nobody asked for it: unpacked piece by piece, never more than is read."""

import zlib

from gateway.upstream.errors import UpstreamUnavailable

#: What is unpacked at a time: a small piece may become a thousand times as much.
_PIECE_BYTES = 2**16
#: Each member copies what is left of its piece, so that thousands of tiny ones would cost more than they hold.
_MOST_MEMBERS = 100
_UNREADABLE = frozenset({"br", "zstd", "compress"})


class Decoder:
    """Unpacks one body."""

    __slots__ = ("_encoding", "_members", "_packed", "_unpacker")

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._unpacker: zlib._Decompress | None = None
        self._packed = b""
        self._members = 0

    @property
    def hungry(self) -> bool:
        """Whether nothing more can be unpacked of what was fed."""
        return not self._packed

    def feed(self, packed: bytes) -> None:
        """Take a piece of the body; only while it is hungry."""
        self._packed = packed

    def unpack(self) -> bytes:
        """A part of what was fed, of at most 64 KiB. Raises UpstreamUnavailable."""
        if self._unpacker is None or self._unpacker.eof:
            self._begin_member()
        assert self._unpacker is not None
        try:
            unpacked = self._unpacker.decompress(self._packed, _PIECE_BYTES)
        except zlib.error as error:
            raise UpstreamUnavailable(f"the answer cannot be unpacked: {error}") from error
        self._packed = self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
        if not self._packed and len(unpacked) == _PIECE_BYTES and not self._unpacker.eof:
            unpacked += self._unpacker.decompress(b"", 0)  # what the unpacker itself still holds: at most its window
        return unpacked

    def end(self) -> None:
        """The body is at its end. Raises UpstreamUnavailable if it was cut."""
        if self._unpacker is not None and not self._unpacker.eof:
            raise UpstreamUnavailable("the packed answer ended too early")

    def _begin_member(self) -> None:
        self._members += 1
        if self._members > _MOST_MEMBERS:
            raise UpstreamUnavailable("the packed answer has too many members")
        self._unpacker = zlib.decompressobj(_window_bits(self._encoding, self._packed))


def decoder_for(encoding: str) -> Decoder | None:
    """What unpacks a body of this Content-Encoding; None where it is passed on as it is.

    Raises UpstreamUnavailable for an encoding that a client may take for granted and that is not read here.
    """
    encoding = encoding.strip().lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        return Decoder(encoding)
    if encoding in _UNREADABLE:
        raise UpstreamUnavailable(f"the answer is packed with {encoding}, which was not asked for")
    return None


def _window_bits(encoding: str, packed: bytes) -> int:
    if encoding != "deflate":
        return 16 + zlib.MAX_WBITS
    # Some servers leave out the two bytes before it, whose first always ends in 8.
    return zlib.MAX_WBITS if packed[0] & 0x0F == 8 else -zlib.MAX_WBITS
