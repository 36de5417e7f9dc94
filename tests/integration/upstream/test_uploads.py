"""Request bodies that are not in memory."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from random import Random

import pytest

from gateway.upstream.client import Upload, UpstreamClient, UpstreamUnavailable
from tests.integration.upstream.conftest import Listener, send
from tests.upstreams.wire import HERE, REST, STREAM, Guest, Stage, playing

REFUSED = b"HTTP/1.1 413 Too large\r\nContent-Length: 2\r\n\r\nno"
PIECES = [Random(number).randbytes(2**16) for number in range(500)]


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
            await guest.say(STREAM)
            assert await guest.reader.readexactly(14) == b"4\r\nlast\r\n0\r\n\r\n"
            await guest.say(REST)

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
