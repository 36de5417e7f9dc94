"""Of an answer that is read at one look the same is understood as llhttp does; whatever is odd is left to that."""

from random import Random

import httptools
import pytest

from gateway.upstream.plain import MOST_HEAD_BYTES, fields_of, read_plain

LINES = [b"Date: Sun, 29 Nov 2026 07:06:20 GMT", b"content-type: application/json; charset=utf-8", b"X-Id_1: a: b"]


def answer(*lines: bytes, body: bytes = b"here", status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([status, *lines, b"Content-Length: %d" % len(body), b"", b""]) + body


class Parsed:
    """What llhttp understands, as strictly as it can be asked to."""

    def __init__(self, data: bytes) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.whole = self.stays = False
        self.parser = httptools.HttpResponseParser(self)
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        assert not self.whole
        self.whole, self.stays = True, self.parser.should_keep_alive()


@pytest.mark.parametrize(
    ("said", "media_type"),
    [
        (answer(), None),
        (answer(*LINES), LINES[1].partition(b": ")[2]),
        (answer(*LINES).replace(b"Content-Length", b"CONTENT-length"), LINES[1].partition(b": ")[2]),
        (answer(b"Connection: keep-alive", b"Content-Type: a/a", b"Content-Type: b/b"), b"b/b"),
        (answer(b"Content-Type: a/a").replace(b"4\r\n", b"4\r\nContent-Type: b/b\r\n"), b"b/b"),
        (answer(body=b""), None),
        (answer(b"X-Long: " + b"x" * 60_000, body=b"\r\n\r\n" * 10_000), None),
    ],
)
def test_a_plain_answer_is_read(said: bytes, media_type: bytes | None) -> None:
    plain = read_plain(said)
    assert plain is not None
    head, found, size_bytes, body = plain
    assert found == media_type
    assert head + body == said
    assert len(body) == size_bytes
    assert (fields_of(head), body) == (Parsed(said).fields, Parsed(said).body)
    for came in range(size_bytes if size_bytes < 10 else 1):
        assert read_plain(head + body[:came]) == (head, found, size_bytes, body[:came])


ODD = {
    "nothing": b"",
    "half a head": answer()[:30],
    "more behind it": answer() + b"\r\n",
    "another status": answer(status=b"HTTP/1.1 204 No Content"),
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
    "no reason": answer(status=b"HTTP/1.1 200"),
    "an old version": answer(status=b"HTTP/1.0 200 OK"),
    "no length": b"HTTP/1.1 200 OK\r\n\r\n",
    "two lengths": answer(b"content-length: 4"),
    "a length that is none": answer(b"X: 1").replace(b"h: 4", b"h: +4"),
    "a length beyond any": answer(b"X: 1").replace(b"h: 4", b"h: 0000000000004"),
    "chunks": answer(b"Transfer-Encoding: chunked"),
    "the last": answer(b"connection: close"),
    "the last, and more": answer(b"connection: keep-alive, close"),
    "the last for a proxy": answer(b"Proxy-Connection: close"),
    "another protocol": answer(b"UPGRADE: x"),
    "packed": answer(b"content-Encoding: gzip"),
    "no blank": answer(b"X-A:b"),
    "two blanks": answer(b"X-A:  b"),
    "a blank before the colon": answer(b"X-A : b"),
    "no value": answer(b"X-A: "),
    "no name": answer(b": b"),
    "no header": answer(b"X-A"),
    "a folded header": answer(b"X-A: b\r\n c"),
    "a bare line feed": answer(b"X-A: b\nX-B: c"),
    "a bare carriage return": answer(b"X-A: b\rX-B: c"),
    "a NUL": answer(b"X-A: b\0"),
    "no ASCII": answer(b"X-A: \xe9"),
    "a tab": answer(b"X-A: b\tc"),
    "a head that is too long": answer(b"X-Long: " + b"x" * MOST_HEAD_BYTES),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_left_to_the_parser(name: str) -> None:
    assert read_plain(ODD[name]) is None


def test_whatever_is_taken_for_plain_is_what_the_parser_reads() -> None:
    random = Random(1)
    pieces = [
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b": ",
        b"\0",
        b"\xff",
        b"4",
        b"chunked",
        b"close",
        b"keep-alive",
    ]
    pieces += [
        b"Content-Length: 4\r\n",
        b"transfer-encoding: ",
        b"Connection: ",
        b"upgrade: ",
        b"X: y\r\n",
        b"HTTP/1.1 ",
    ]
    taken = 0
    for _ in range(20_000):
        said = bytearray(answer(*random.sample([*LINES, b"Connection: keep-alive"], random.randrange(5))))
        for _ in range(random.randrange(3)):
            start = random.randrange(len(said))
            said[start : start + random.choice((0, 0, 1, 2, 8))] = random.choice(pieces)
        plain = read_plain(bytes(said))
        if plain is None:
            continue
        taken += 1
        head, _, size_bytes, body = plain
        parsed = Parsed(bytes(said) + b"x" * (size_bytes - len(body)))
        assert (parsed.parser.get_status_code(), parsed.whole, parsed.stays) == (200, True, True)
        assert (fields_of(head), len(parsed.body)) == (parsed.fields, size_bytes)
        assert parsed.body.startswith(body)
    assert taken > 5000
