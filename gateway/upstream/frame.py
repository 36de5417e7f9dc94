"""What stands around the text of a stream's events: by it, events that say nothing else are known at once."""

import re
from itertools import repeat, takewhile

from gateway.domain.value import value
from gateway.upstream.count import size_of

#: Finds what would end a JSON string or a line, or be an escape.
not_plain = re.compile(rb'["\\\r\n]').search
# What can stand between the quotes of a JSON string, but for nothing.
_text = re.compile(rb'(?!\Z)[^"\\\r\n]*(?:\\[^\r\n][^"\\\r\n]*)*').fullmatch


@value(frozen=True, slots=True)
class Frame:
    """What stands around the text of an event that holds nothing else; shown: of it, what the client is shown."""

    start: bytes
    end: bytes
    around_bytes: int
    shown: tuple[bytes, bytes] | None = None

    def texts_in(self, block: bytes) -> tuple[int, int, int]:
        """How many events with nothing but another text there are at the start of block; the bytes of their texts, once
        those are unescaped; and how many bytes of block that is."""
        *pieces, rest = block.split(self.end)
        texts = list(map(bytes.removeprefix, pieces, repeat(self.start)))
        told = b"".join(texts)
        length = len(block) - len(rest)
        if len(told) + len(texts) * self.around_bytes == length and b"" not in texts and not not_plain(told):
            return len(texts), len(told), length  # as nearly always
        texts = [piece[len(self.start) :] for piece in takewhile(self._is_whole, pieces)]
        return len(texts), sum(map(size_of, texts)), sum(map(len, texts)) + len(texts) * self.around_bytes

    def _is_whole(self, piece: bytes) -> bool:
        return piece.startswith(self.start) and _text(piece, len(self.start)) is not None
