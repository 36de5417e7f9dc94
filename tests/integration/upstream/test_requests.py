"""Requests as upstreams get them."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from random import Random

import pytest
from multidict import CIMultiDict

from gateway import __version__
from gateway.config.model import Secret, Upstream
from gateway.upstream.client import Upload, UpstreamClient, UpstreamUnavailable
from tests.upstreams.wire import Guest, Request, Stage, playing

OK = b"HTTP/1.1 200 OK\r\n"
HERE = OK + b"Content-Length: 4\r\n\r\nhere"
REFUSED = b"HTTP/1.1 413 Too large\r\nContent-Length: 2\r\n\r\nno"
PIECES = [Random(number).randbytes(2**16) for number in range(500)]


class Listener:
    """An upstream that keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.stage: Stage

    async def part(self, guest: Guest) -> None:
        while True:
            self.requests.append(await guest.request())
            await guest.say(HERE)


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    async with playing(listener.part) as listener.stage:
        yield listener


async def send(
    client: UpstreamClient,
    listener: Listener,
    method: str = "POST",
    path: str = "/chat/completions",
    headers: Mapping[str, str] | None = None,
    body: bytes | Upload | None = b"{}",
    upstream: Upstream | None = None,
) -> Request:
    async with client.send(upstream or listener.stage.upstream(), method, path, headers or {}, body) as answer:
        assert await answer.body(100) == b"here"
    return listener.requests[-1]


# --- heads -----------------------------------------------------------------------------------------------------------


async def test_a_request_says_what_it_must_and_nothing_else(client: UpstreamClient, listener: Listener) -> None:
    request = await send(client, listener, body=b'{"a": 1}')
    assert request.lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert sorted(request.lines[1:]) == [
        "Accept-Encoding: identity",
        "Accept: */*",
        "Content-Length: 8",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{listener.stage.port}",
        f"User-Agent: quota-gateway/{__version__}",
    ]
    assert request.body == b'{"a": 1}'


async def test_of_the_customers_headers_those_pass_that_may(client: UpstreamClient, listener: Listener) -> None:
    passing = [
        ("accept", "application/json"), ("USER-AGENT", "OpenAI/Python"), ("OpenAI-Beta", "a"), ("OpenAI-Beta", "b"),
        ("traceparent", "00-1"), ("Anthropic-Version", "2023-06-01"),
    ]  # fmt: skip
    staying = [
        ("Host", "gateway"), ("Authorization", "Bearer sk-customer"), ("X-Api-Key", "sk-customer"), ("Cookie", "a=b"),
        ("Accept-Encoding", "br"), ("Connection", "close"), ("Transfer-Encoding", "chunked"), ("Content-Length", "99"),
        ("Content-Type", "text/plain"), ("Expect", "100-continue"), ("X-Forwarded-For", "::1"),
    ]  # fmt: skip
    request = await send(client, listener, headers=CIMultiDict(passing + staying))
    assert [line for line in request.lines if line.split(": ")[0] in dict(passing)] == [
        f"{name}: {value}" for name, value in passing
    ]
    assert "sk-customer" not in str(request.lines)
    assert (request.header("Accept"), request.header("User-Agent")) == (["application/json"], ["OpenAI/Python"])
    assert request.header("Content-Length") == ["2"]
    assert request.header("Accept-Encoding") == ["identity"]
    for name in ("Connection", "Transfer-Encoding", "Expect", "Cookie", "X-Forwarded-For"):
        assert request.header(name) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [({}, "Authorization: Bearer sk-ours"), ({"key_header": "x-api-key"}, "x-api-key: sk-ours")],
)
async def test_the_key_is_the_gateways_own(
    client: UpstreamClient, listener: Listener, settings: Mapping[str, str], line: str
) -> None:
    upstream = Upstream("keyed", listener.stage.upstream().base_url, Secret("sk-ours"), **settings)  # type: ignore[arg-type]
    request = await send(client, listener, upstream=upstream)
    assert [said for said in request.lines if "sk-" in said] == [line]


async def test_an_upstream_whose_configuration_was_read_again_is_told_the_new_key(
    client: UpstreamClient, listener: Listener
) -> None:
    for key in ("sk-old", "sk-new"):
        upstream = Upstream("keyed", listener.stage.upstream().base_url, Secret(key))
        assert (await send(client, listener, upstream=upstream)).header("Authorization") == [f"Bearer {key}"]
    assert len(listener.stage.guests) == 1


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\0"])
@pytest.mark.parametrize("where", ["header", "name", "type", "key", "method"])
async def test_nothing_is_sent_that_would_be_read_as_more_than_it_is(
    client: UpstreamClient, listener: Listener, end: str, where: str
) -> None:
    evil = f"a{end}X-Evil: 1"
    headers = {"header": {"user-agent": evil}, "name": {f"anthropic-{evil}": "x"}}.get(where, {})
    body = Upload(evil, 0, lambda: pieces_of(b"")) if where == "type" else None
    upstream = Upstream("keyed", listener.stage.upstream().base_url, Secret(evil)) if where == "key" else None
    method = f"POST / HTTP/1.1{end}X: " if where == "method" else "POST"
    with pytest.raises(UpstreamUnavailable, match="cannot be sent"):
        await send(client, listener, method, headers=headers, body=body, upstream=upstream)
    assert listener.stage.guests == []


async def test_bytes_that_are_no_text_pass_as_they_came(client: UpstreamClient, listener: Listener) -> None:
    odd = b"caf\xe9 \xc3\xa9".decode("utf-8", "surrogateescape")
    request = await send(client, listener, headers={"user-agent": odd})
    assert request.header("User-Agent") == [odd]


@pytest.mark.parametrize(
    ("path", "sent"),
    [("/models", "/v1/models"), ("/a%20b?c=d&e=%26", "/v1/a%20b?c=d&e=%26"), ("/a b?c d", "/v1/a%20b?c+d"),
     ("/\xe9", "/v1/%C3%A9"), ("/a/../b", "/v1/b"), ("/a\r\nX: y", "/v1/aX:%20y")],
)  # fmt: skip
async def test_a_path_is_sent_as_one(client: UpstreamClient, listener: Listener, path: str, sent: str) -> None:
    request = await send(client, listener, "GET", path, body=None)
    assert request.lines[0] == f"GET {sent} HTTP/1.1"


@pytest.mark.parametrize(("method", "length"), [("GET", []), ("POST", ["0"]), ("DELETE", ["0"]), ("PUT", ["0"])])
async def test_a_request_without_a_body_has_no_type(
    client: UpstreamClient, listener: Listener, method: str, length: list[str]
) -> None:
    request = await send(client, listener, method, body=None)
    assert (request.header("Content-Length"), request.header("Content-Type")) == (length, [])


@pytest.mark.parametrize("size", [0, 1, 2**14, 2**14 + 1, 20_000_000])
async def test_a_body_arrives_whole(client: UpstreamClient, listener: Listener, size: int) -> None:
    body = Random(size).randbytes(size)
    assert (await send(client, listener, body=body)).body == body
    assert (await send(client, listener)).body == b"{}"
    assert len(listener.stage.guests) == 1


# --- uploads ---------------------------------------------------------------------------------------------------------


async def pieces_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("pieces", [[], [b""], [b"one"], [b"a", b"", b"bc"], PIECES], ids=len)
async def test_an_upload_arrives_whole(
    client: UpstreamClient, listener: Listener, sized: bool, pieces: list[bytes]
) -> None:
    whole = b"".join(pieces)
    for _ in range(2):
        upload = Upload("multipart/form-data; boundary=x", len(whole) if sized else None, lambda: pieces_of(*pieces))
        request = await send(client, listener, body=upload)
        assert request.body == whole
        assert request.header("Content-Type") == ["multipart/form-data; boundary=x"]
        assert request.header("Content-Length") == ([str(len(whole))] if sized else [])
        assert request.header("Transfer-Encoding") == ([] if sized else ["chunked"])
    assert len(listener.stage.guests) == 1


async def broken() -> AsyncIterator[bytes]:
    yield b"abc"
    raise RuntimeError("its sender has left")


@pytest.mark.parametrize(
    ("upload", "reason"),
    [(Upload("text/plain", 4, lambda: pieces_of(b"abc")), "shorter"),
     (Upload("text/plain", 2, lambda: pieces_of(b"a", b"bc")), "longer"),
     (Upload("text/plain", 9, broken), "its sender has left"), (Upload("text/plain", None, broken), "its sender")],
)  # fmt: skip
async def test_an_upload_that_breaks_is_no_request(
    client: UpstreamClient, listener: Listener, upload: Upload, reason: str
) -> None:
    with pytest.raises(UpstreamUnavailable, match=reason):
        await send(client, listener, body=upload)
    await listener.stage.all_left()
    assert listener.requests == []


class Source:
    """An upload without end. ended: once nobody wants more of it."""

    def __init__(self) -> None:
        self.given = 0
        self.ended = asyncio.Event()

    def upload(self) -> Upload:
        return Upload("application/octet-stream", None, self._pieces)

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            for piece in endless():
                self.given += len(piece)
                yield piece
        finally:
            self.ended.set()


def endless() -> Iterator[bytes]:
    while True:
        yield PIECES[0]


async def test_an_upload_waits_for_an_upstream_that_does_not_read(client: UpstreamClient) -> None:
    source = Source()

    async def part(guest: Guest) -> None:
        if (await guest.head())[0].startswith("POST"):
            await asyncio.Event().wait()
        while True:
            await guest.say(HERE)
            await guest.head()

    async with playing(part) as stage:
        sending = asyncio.create_task(send_to(client, stage, source.upload()))
        still, before = 0, -1
        while still < 50:  # so many answers in a row in which it does not move are more than a pause
            async with client.send(stage.upstream(), "GET", "/", {}) as answer:
                await answer.body(100)
            still, before = (still + 1 if source.given == before else 0), source.given
        assert source.given < 2**24  # what the buffers of a connection hold
        sending.cancel()
        await asyncio.wait((sending,))
        assert source.ended.is_set()


async def send_to(client: UpstreamClient, stage: Stage, upload: Upload) -> tuple[int, bytes]:
    async with client.send(stage.upstream(), "POST", "/", {}, upload) as answer:
        return answer.status, await answer.body(100)


@pytest.mark.parametrize("reads_on", [True, False])
async def test_an_answer_that_comes_before_the_upload_is_through_ends_it(
    client: UpstreamClient, reads_on: bool
) -> None:
    source = Source()

    async def part(guest: Guest) -> None:
        await guest.head()
        await guest.say(REFUSED)
        if reads_on:
            await guest.left()

    async with playing(part) as stage:
        assert await send_to(client, stage, source.upload()) == (413, b"no")
        assert source.ended.is_set()
        if reads_on:
            await stage.all_left()


async def test_an_answer_may_come_while_the_upload_goes_on(client: UpstreamClient) -> None:
    heard = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        await heard.wait()
        yield b"last"

    async def part(guest: Guest) -> None:
        while True:
            await guest.head()
            assert await guest.reader.readexactly(10) == b"5\r\nfirst\r\n"
            await guest.say(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n")
            assert await guest.reader.readexactly(14) == b"4\r\nlast\r\n0\r\n\r\n"
            await guest.say(b"2\r\nre\r\n0\r\n\r\n")

    async with playing(part) as stage:
        for _ in range(2):
            heard.clear()
            async with client.send(stage.upstream(), "POST", "/", {}, Upload("text/plain", None, pieces)) as answer:
                assert await answer.read() == b"he"
                heard.set()
                assert await answer.body(100) == b"re"
        assert len(stage.guests) == 1


async def test_an_upload_whose_upstream_closes_ends(client: UpstreamClient) -> None:
    source = Source()

    async def part(guest: Guest) -> None:
        await guest.head()
        await guest.hang_up()

    async with playing(part) as stage:
        with pytest.raises(UpstreamUnavailable):
            await send_to(client, stage, source.upload())
    assert source.ended.is_set()


async def test_an_upload_may_take_longer_than_an_upstream_may_be_silent(client: UpstreamClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0.05)
            yield b"piece"

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(HERE)

    async with playing(part) as stage:
        upload = Upload("text/plain", 20, pieces)
        async with client.send(stage.upstream(idle_timeout_ms=100), "POST", "/", {}, upload) as answer:
            assert await answer.body(100) == b"here"
