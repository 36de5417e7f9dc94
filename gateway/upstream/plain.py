"""Answers whose head is as plain as most, read at one look; whatever is odd is left to llhttp.

A parser of its own for each answer and the calls that it makes take 17 k instructions of the shortest head and 73 k of
one with twenty headers; this takes 10 k and 42 k.
"""

import re
from typing import TypeAlias

#: The longest head of an answer.
MOST_HEAD_BYTES = 2**16
# The headers that say where an answer ends, how it is packed, and what becomes of its connection.
_TELLING = (
    rb"(?=[CTPUctpu])"
    rb"(?i:content-length|content-encoding|transfer-encoding|connection(?!: keep-alive\r)|proxy-connection|upgrade)"
)
_TYPE = rb"(?i:content-type): ([!-~][ -~]*+)\r\n"
_OTHER = rb"(?!" + _TELLING + rb")[-0-9A-Za-z_]+: [!-~][ -~]*+\r\n"
# Each header on a line of its own, as strictly as anybody may read it; of the telling ones the length alone, and once.
_FIELDS = rb"(?:" + _TYPE + rb"|" + _OTHER + rb")*+"
_PLAIN = re.compile(
    rb"HTTP/1\.1 200 [ -~]*+\r\n" + _FIELDS + rb"(?i:content-length): ([0-9]{1,12})\r\n" + _FIELDS + rb"\r\n"
)
_FIELD = re.compile(rb"([-0-9A-Za-z_]+): ([ -~]+)\r\n")


#: An answer of status 200 that is not packed: its head, its Content-Type as it came, how long its body is, and what of
#: that has come.
PlainAnswer: TypeAlias = tuple[bytes, bytes | None, int, bytes]


def read_plain(data: bytes) -> PlainAnswer | None:
    """The answer that begins with data, which is all of its head; None where it is not plain, or more came than it."""
    plain = _PLAIN.match(data)
    if plain is None:
        return None
    end = plain.end()
    before, length, behind = plain.groups()
    size_bytes = int(length)
    if len(data) - end > size_bytes or end > MOST_HEAD_BYTES:
        return None
    return data[:end], before if behind is None else behind, size_bytes, data[end:]


def fields_of(head: bytes) -> list[tuple[bytes, bytes]]:
    """The headers in a plain head, in their order, their names in lower case."""
    return [(name.lower(), value) for name, value in _FIELD.findall(head, head.index(b"\n") + 1)]
