"""Requests that begin like the one before are, in whatever pieces they come, what aiohttp alone makes of them."""

import asyncio
from collections.abc import Iterable

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http import server
from gateway.http.quote import body_at_hand, read_body
from gateway.http.server import DataServer
from gateway.http.whole import WholeAnswer
from tests.listening import listening

_MOST_BYTES = 3_000_000
_JSON = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
_END = b"GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def post(body: bytes, more: str = "", head: str = _JSON, name: str = "Content-Length") -> bytes:
    return f"{head}{name}: {len(body)}\r\n{more}\r\n".encode() + body


def text(size: int) -> bytes:
    return b'"' + b"x" * (size - 2) + b'"'


class Seeing:
    """Answers with a 200, and keeps what it sees of each request as the proxy reads it."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = body_at_hand(request, _MOST_BYTES) or await read_body(request, _MOST_BYTES)
        head = request.method, request.path, request.version, tuple(request.headers.items()), request.raw_headers
        self.seen.append((*head, request.content_length, request.keep_alive, body))
        return WholeAnswer(200, "", "text/plain", b"%d" % len(self.seen))


async def told(port: int, pieces: Iterable[bytes]) -> bytes:
    """What the server answers to pieces, each sent by itself, without its dates."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.001)
    async with asyncio.timeout(30):
        answers = await reader.read()
    writer.close()
    return b"\r\n".join(line for line in answers.split(b"\r\n") if not line.startswith((b"Date:", b"Server:")))


async def both(pieces: list[bytes]) -> tuple[Seeing, Seeing]:
    """What is seen of pieces by the gateway's connections and by aiohttp's own."""
    ours, plain = Seeing(), Seeing()
    async with (
        listening(DataServer(ours)) as port,  # type: ignore[arg-type]
        listening(web.Server(plain.handle)) as plain_port,
    ):
        await told(port, [*pieces, _END])
        await told(plain_port, [*pieces, _END])
    return ours, plain


_REQUESTS = [
    post(text(20)),
    post(text(20), more="X-Other: 1\r\n"),
    post(text(9)),
    post(text(1234), name="content-length"),
    post(text(120_000)),
    post(b""),
    post(text(20), head=_JSON.replace("chat/completions", "completions")),
    post(b"a=1", head="POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"),
    f'{_JSON}Transfer-Encoding: chunked\r\n\r\n5\r\n"xxx"\r\n0\r\n\r\n'.encode(),
    f"{_JSON}Content-Length: 0020\r\n\r\n".encode() + text(20),
    f"{_JSON}Content-Length: 20 \r\n\r\n".encode() + text(20),
    b"\r\n" + post(text(20)),
    b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    post(b'"\r\n\r\nPOST / HTTP/1.1\r\n\r\n"'),
]


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.sampled_from(_REQUESTS), min_size=1, max_size=7),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    each=st.booleans(),
)
def test_it_is_what_the_parser_would_make_of_it(requests: list[bytes], cuts: list[float], each: bool) -> None:
    whole = b"".join(requests)
    places = sorted({int(cut * len(whole)) for cut in cuts} - {0, len(whole)})
    pieces = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
    ours, plain = asyncio.run(both(requests if each else pieces))
    assert ours.seen == plain.seen


async def test_requests_alike_do_not_go_through_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    original = server._Connection._parse
    monkeypatch.setattr(server._Connection, "_parse", lambda self, data: (parsed.append(data), original(self, data)))
    head, body = post(text(20)).split(b"\r\n\r\n")
    first, second = head + b"\r\n\r\n", body
    large = post(text(400_000))
    # The head by itself, as most clients send it; then the same with other bodies, whole and in pieces.
    ours, plain = await both(
        [first, second, post(text(20)), post(text(31)), large[:150], large[150:90_000], large[90_000:]]
    )
    assert ours.seen == plain.seen
    assert parsed == [first, second, _END]
    assert [seen[-1] for seen in ours.seen[1:4]] == [text(20), text(31), text(400_000)]


async def test_a_head_that_was_refused_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Seeing):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            await super().handle(request)
            return WholeAnswer(401, "", "text/plain", b"")

    heads: list[object] = []
    monkeypatch.setattr(server.Head, "begins", lambda self, data: heads.append(data))
    async with listening(DataServer(refusing := Refusing())) as port:  # type: ignore[arg-type]
        await told(port, [post(text(20)), post(text(20)), _END])
    assert len(refusing.seen) == 3
    assert heads == []


async def test_a_head_that_came_behind_another_request_is_not_remembered_for_that_ones_answer() -> None:
    """A 200 of a request that costs nothing would have the bodies of a stranger's requests taken past the reader."""
    first_came = asyncio.Event()

    class Slow(Seeing):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            self.seen.append(())
            if request.method == "POST":
                return WholeAnswer(401, "", "text/plain", b"")
            first_came.set()
            while not request.protocol._messages:
                await asyncio.sleep(0.001)
            return WholeAnswer(200, "", "text/plain", b"")

    of = DataServer(slow := Slow())  # type: ignore[arg-type]
    async with listening(of) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(30):
            await first_came.wait()
            writer.write(post(text(20)))
            while len(slow.seen) < 2:
                await asyncio.sleep(0.001)
        assert [connection._head for connection in of.connections] == [None]  # type: ignore[attr-defined]
        writer.close()


@pytest.mark.parametrize(("status", "more"), [(401, ""), (200, f"X-Long: {'x' * 8100}\r\nX-Other: {'x' * 200}\r\n")])
async def test_an_idle_connection_keeps_no_head_that_was_refused_or_is_long(status: int, more: str) -> None:
    class Answering(Seeing):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            await super().handle(request)
            return WholeAnswer(status, "", "text/plain", b"")

    of = DataServer(Answering())  # type: ignore[arg-type]
    async with listening(of) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(text(20), more=more))
        async with asyncio.timeout(30):
            await reader.readuntil(b"\r\n\r\n")
        (connection,) = of.connections
        assert (connection._parsed_head, connection._head) == (None, None)  # type: ignore[attr-defined]
        writer.close()


async def test_a_client_that_hangs_up_amid_a_body_ends_its_request() -> None:
    ended: list[BaseException] = []

    class Waiting(Seeing):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await super().handle(request)
            except BaseException as error:
                ended.append(error)
                raise

    async with listening(DataServer(waiting := Waiting())) as port:  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(text(20)))
        await reader.readuntil(b"\r\n\r\n1")
        writer.write(post(text(5000))[:2000])
        await asyncio.sleep(0.1)
        writer.close()
        async with asyncio.timeout(30):
            while not ended:
                await asyncio.sleep(0.001)
    assert len(waiting.seen) == 1
    assert isinstance(ended[0], asyncio.CancelledError)


async def test_the_rest_of_a_body_that_nobody_wants_is_let_come() -> None:
    """Else the client, still sending, would lose the answer."""

    class Refusing(Seeing):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            if self.seen:
                self.seen.append(())
                return WholeAnswer(413, "", "text/plain", b"no")
            return await super().handle(request)

    async with listening(DataServer(Refusing())) as port:  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number, size in enumerate((20, 5000, 200_000)):
            request = post(text(size))
            writer.write(request[:200])
            if number:
                assert (await reader.readuntil(b"\r\n\r\nno")).startswith(b"HTTP/1.1 413 ")
            writer.write(request[200:])
            if not number:
                await reader.readuntil(b"\r\n\r\n1")
        writer.close()
