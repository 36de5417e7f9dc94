"""Answers as upstreams send them: well, oddly, and badly."""

import asyncio
from random import Random

import pytest

from gateway.upstream.client import UpstreamClient, UpstreamUnavailable
from tests.integration.upstream.conftest import MOST, ask
from tests.upstreams.wire import END, OK, Guest, chunk_of, chunked, playing, sized

EVENTS = [b"data: %d\n\n" % number for number in range(100)]


# --- well ------------------------------------------------------------------------------------------------------------

#: What is sent, the answer that it is, and whether the connection takes the next request.
ANSWERS: dict[str, tuple[bytes, tuple[int, bytes], bool]] = {
    "of a length": (sized(b"here"), (200, b"here"), True),
    "empty": (sized(b""), (200, b""), True),
    "in chunks": (chunked(b"he", b"r", b"e") + END, (200, b"here"), True),
    "chunks with extensions": (
        OK + b"Transfer-Encoding: chunked\r\n\r\n4;a=b\r\nhere\r\n0;c\r\n\r\n", (200, b"here"), True,
    ),
    "trailers": (chunked(b"here") + b"0\r\nX-Sum: 1\r\nContent-Type: text/plain\r\n\r\n", (200, b"here"), True),
    "an error": (b"HTTP/1.1 429 Slow down\r\nContent-Length: 2\r\n\r\nno", (429, b"no"), True),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", (200, b"ok"), True),
    "bare line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", (200, b"ok"), True),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b""), True),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", (304, b""), True),
    "interim answers first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Length: 7\r\n\r\n" + sized(b"here"),
        (200, b"here"), True,
    ),
    "said to be the last": (sized(b"here", b"Connection: close"), (200, b"here"), False),
    "as long as the connection": (OK + b"\r\nhere", (200, b"here"), False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nhere", (200, b"here"), False),
    "HTTP/1.0 that stays": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nhere", (200, b"here"), True,
    ),
    "more behind it": (sized(b"here") + sized(b"smuggled"), (200, b"here"), False),
    "garbage behind it": (chunked(b"here") + END + b"\0", (200, b"here"), False),
    "more than nothing": (b"HTTP/1.1 204 No Content\r\n\r\n" + sized(b"smuggled"), (204, b""), False),
}  # fmt: skip


@pytest.mark.parametrize("step", [1, 2**20], ids=["by byte", "at once"])
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_is_read(client: UpstreamClient, name: str, step: int) -> None:
    said, answer, stays = ANSWERS[name]

    async def part(guest: Guest) -> None:
        while True:
            await guest.request()
            for place in range(0, len(said), step):
                await guest.say(said[place : place + step])
                await asyncio.sleep(0)  # the bytes of one write may be sent by themselves
            if name == "as long as the connection":
                return await guest.hang_up()

    async with playing(part) as stage:
        upstream = stage.upstream()
        assert await ask(client, upstream) == answer
        if step > 1:  # what comes later finds the connection idle, if it was not closed before
            assert await ask(client, upstream) == answer
            assert len(stage.guests) == (1 if stays else 2)
        await client.close()
        await stage.all_left()


async def test_there_is_no_body_where_none_was_asked_for(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        while True:
            assert (await guest.request()).lines[0] == "HEAD /v1/chat HTTP/1.1"
            await guest.say(OK + b"Content-Length: 4\r\n\r\n")

    async with playing(part) as stage:
        for _ in range(2):
            async with client.send(stage.upstream(), "HEAD", "/chat", {}) as answer:
                assert (answer.status, answer.headers["content-length"]) == (200, "4")
                assert await answer.body(MOST) == b""


async def test_headers_are_found_however_they_are_spelled(client: UpstreamClient) -> None:
    said = sized(b"{}", b"content-TYPE: Application/JSON ; charset=utf-8", b"retry-after:7", b"X-Empty:", b"X-\xe9: no")

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(said.replace(b"X-\xe9", b"X-Odd").replace(b": no", b": \xe9\xff"))

    async with playing(part) as stage, client.send(stage.upstream(), "GET", "/", {}) as answer:
        assert answer.content_type == "application/json"
        assert answer.content_type_header == "Application/JSON ; charset=utf-8"
        assert answer.headers["Retry-After"] == answer.headers["RETRY-AFTER"] == "7"
        assert answer.headers["x-empty"] == ""
        assert answer.headers["x-odd"].encode("utf-8", "surrogateescape") == b"\xe9\xff"
        assert "Content-Encoding" not in answer.headers


async def test_nothing_of_one_answer_is_found_in_the_next(client: UpstreamClient) -> None:
    first = OK + b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\nX-First: 1\r\n\r\n0\r\nX-Trailer: 1\r\n\r\n"
    second = sized(b"here", b"X-Second: 1")
    third = b"HTTP/1.1 103 Early Hints\r\nX-Interim: 1\r\n\r\n" + second

    async def part(guest: Guest) -> None:
        for said in (first, second, third):
            await guest.request()
            await guest.say(said)

    async with playing(part) as stage:
        assert await ask(client, stage.upstream()) == (200, b"")
        for _ in (second, third):
            async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
                assert sorted(answer.headers) == ["content-length", "x-second"]
                assert await answer.body(MOST) == b"here"
        assert len(stage.guests) == 1


async def test_an_answer_without_a_type_is_unknown_bytes_and_passed_on_as_json(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(sized(b"{}"))

    async with playing(part) as stage, client.send(stage.upstream(), "GET", "/", {}) as answer:
        assert answer.content_type == "application/octet-stream"
        assert answer.content_type_header == "application/json"


async def test_each_event_is_there_as_soon_as_it_was_sent(client: UpstreamClient) -> None:
    read = asyncio.Event()

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(chunked())
        for event in EVENTS:
            await guest.say(chunk_of(event))
            await read.wait()
            read.clear()
        await guest.say(END)

    async with playing(part) as stage, client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
        events = []
        async for piece in answer.chunks():
            events.append(piece)
            read.set()
    assert events == EVENTS


@pytest.mark.parametrize("behind", [b"", sized(b"smuggled")], ids=["nothing", "more"])
@pytest.mark.parametrize("came", range(4))
async def test_the_rest_of_a_body_comes_later(client: UpstreamClient, came: int, behind: bytes) -> None:
    said = sized(b"here")
    first = len(said) - 4 + came
    begun = asyncio.Event()

    async def part(guest: Guest) -> None:
        while True:
            await guest.request()
            await guest.say(said[:first])
            await begun.wait()
            begun.clear()
            await guest.say(said[first:] + behind)

    async with playing(part) as stage:
        for number in range(1, 3):
            async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
                read = await answer.read() if came else b""
                assert read == b"here"[:came]
                begun.set()
                assert read + await answer.body(MOST) == b"here"
                assert answer.headers["content-length"] == "4"
            assert len(stage.guests) == (number if behind else 1)


@pytest.mark.parametrize("came", [0, 2])
async def test_a_body_that_breaks_off_later_is_no_whole_one(client: UpstreamClient, came: int) -> None:
    said = sized(b"here")
    begun = asyncio.Event()

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(said[: len(said) - 4 + came])
        await begun.wait()
        await guest.say(b"r")
        await guest.hang_up()

    async with playing(part) as stage, client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
        begun.set()
        with pytest.raises(UpstreamUnavailable, match="before its answer was whole"):
            await answer.body(MOST)


@pytest.mark.parametrize("framed", ["in chunks", "of a length"])
async def test_the_upstream_waits_for_who_does_not_read(client: UpstreamClient, framed: str) -> None:
    pieces = [Random(number).randbytes(2**18) for number in range(200)]
    size_bytes = sum(map(len, pieces))
    sent = 0

    async def part(guest: Guest) -> None:
        nonlocal sent
        while True:
            if (await guest.request()).lines[0].startswith("GET"):
                await guest.say(sized(b"hello"))
                continue
            await guest.say(chunked() if framed == "in chunks" else OK + b"Content-Length: %d\r\n\r\n" % size_bytes)
            for piece in pieces:
                await guest.say(chunk_of(piece) if framed == "in chunks" else piece)
                sent += len(piece)
            await guest.say(END if framed == "in chunks" else b"")

    async with playing(part) as stage, client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
        first = await answer.read()
        still, before = 0, -1
        while still < 50:  # so many answers in a row in which it does not move are more than a pause
            await ask(client, stage.upstream(), "GET")
            still, before = (still + 1 if sent == before else 0), sent
        assert sent < 2**24  # what the buffers of a connection hold
        parts = [first]
        while piece := await answer.read():
            parts.append(piece)
    assert b"".join(parts) == b"".join(pieces)


# --- badly -----------------------------------------------------------------------------------------------------------

BAD = {
    "a length and chunks": OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhere\r\n0\r\n\r\n",
    "chunks and a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n4\r\nhere\r\n0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nhere!",
    "a length that is none": OK + b"Content-Length: +4\r\n\r\nhere",
    "a length beyond any": OK + b"Content-Length: 99999999999999999999999\r\n\r\nhere",
    "a negative chunk": chunked() + b"-4\r\nhere\r\n0\r\n\r\n",
    "a chunk that is longer than it says": chunked() + b"3\r\nhere\r\n0\r\n\r\n",
    "another transfer encoding": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n4\r\nhere\r\n0\r\n\r\n",
    "chunks that are not the last encoding": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\nhere",
    "a folded header": OK + b"X-A: b\r\n c\r\nContent-Length: 4\r\n\r\nhere",
    "a header without a name": OK + b": b\r\nContent-Length: 4\r\n\r\nhere",
    "a space before the colon": OK + b"Content-Length : 4\r\n\r\nhere",
    "a NUL in a header": OK + b"X-A: b\0c\r\nContent-Length: 4\r\n\r\nhere",
    "another protocol": b"220 mail.example.com ESMTP\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "a status that is none": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "a switch of protocols": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhere",
    "a switch of protocols to none": b"HTTP/1.1 101 Switching\r\n\r\n" + sized(b"here"),
    "an interim answer with a body": b"HTTP/1.1 150 Wait\r\nContent-Length: 4\r\n\r\nhere" + sized(b"here"),
    "a head without end": OK + b"X-Long: " + b"x" * 100_000,
    "many headers": OK + b"".join(b"X-%d: x\r\n" % number for number in range(10_000)),
    "a head that is too long": OK + b"X-Long: " + b"x" * 100_000 + b"\r\nContent-Length: 4\r\n\r\nhere",
    "interim answers without end": b"HTTP/1.1 102 Processing\r\n\r\n" * 5000,
    "trailers without end": chunked(b"here") + b"0\r\n" + b"X-A: b\r\n" * 50_000,
    "a trailer without end": chunked(b"here") + b"0\r\nX-A: " + b"x" * 400_000,
    "an extension without end": chunked(b"here") + b"4;" + b"x" * 400_000,
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_answer_is_none(client: UpstreamClient, name: str) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(BAD[name])
        await guest.left()  # it is the gateway that closes

    async with playing(part) as stage:
        with pytest.raises(UpstreamUnavailable):
            await ask(client, stage.upstream())
        await stage.all_left()


CUT = {
    "nothing": (b"", b""),
    "half a head": (OK + b"Content-Le", b""),
    "an interim answer": (b"HTTP/1.1 100 Continue\r\n\r\n", b""),
    "a head": (OK + b"Content-Length: 4\r\n\r\n", b""),
    "half of a length": (OK + b"Content-Length: 4\r\n\r\nhe", b"he"),
    "no last chunk": (chunked(b"he", b"re"), b"here"),
    "half a chunk": (chunked(b"he") + b"2\r\nr", b"her"),
    "half of the end": (chunked(b"here") + b"0\r\n", b"here"),
}


@pytest.mark.parametrize("name", CUT)
async def test_an_answer_that_breaks_off_is_no_whole_one(client: UpstreamClient, name: str) -> None:
    said, came = CUT[name]

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(said)
        await guest.hang_up()

    async with playing(part) as stage:
        with pytest.raises(UpstreamUnavailable):
            await ask(client, stage.upstream())
        pieces = b""
        with pytest.raises(UpstreamUnavailable):  # a stream's reader has what came until then
            async with client.send(stage.upstream(), "POST", "/chat", {}, b"{}") as answer:
                async for piece in answer.chunks():
                    pieces += piece
        assert pieces == came


async def test_a_connection_that_is_reset_is_no_end(client: UpstreamClient) -> None:
    begun = asyncio.Event()

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(OK + b"\r\nhere")
        await begun.wait()
        guest.reset()

    async with playing(part) as stage:
        with pytest.raises(UpstreamUnavailable):
            async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
                assert await answer.read() == b"here"
                begun.set()
                assert await answer.read()


@pytest.mark.parametrize("said", [sized(b"x" * 2000), chunked(b"x" * 2000) + END], ids=["of a length", "in chunks"])
async def test_a_body_may_be_as_large_as_it_may_and_no_larger(client: UpstreamClient, said: bytes) -> None:
    async def part(guest: Guest) -> None:
        while True:
            await guest.request()
            await guest.say(said)

    async with playing(part) as stage:
        async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
            assert len(await answer.body(2000)) == 2000
        async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
            with pytest.raises(UpstreamUnavailable, match="more than 1999 bytes"):
                await answer.body(1999)


async def test_a_body_without_end_is_left_where_it_is_too_large(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(OK + b"\r\n")
        while True:
            await guest.say(b"x" * 1000)

    async with playing(part) as stage, client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
        with pytest.raises(UpstreamUnavailable, match="more than"):
            await answer.body(MOST)
        await stage.all_left()
