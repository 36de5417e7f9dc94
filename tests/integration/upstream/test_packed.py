"""Answers that come packed although nobody asked for it."""

import gzip
import zlib
from random import Random

import pytest

from gateway.upstream.client import UpstreamClient, UpstreamUnavailable
from tests.integration.upstream.conftest import ask
from tests.upstreams.wire import END, OK, Guest, chunk_of, playing, sized

TEXT = Random(0).randbytes(1000) * 50


def raw_deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "packed", "text"),
    [(b"gzip", gzip.compress(TEXT), TEXT), (b"GZip", gzip.compress(TEXT), TEXT),
     (b"deflate", zlib.compress(TEXT), TEXT), (b"deflate", raw_deflated(TEXT), TEXT),
     (b"gzip", gzip.compress(TEXT) + gzip.compress(b"more"), TEXT + b"more"),
     (b"gzip", gzip.compress(b""), b""), (b"gzip", b"", b""), (b"identity", TEXT, TEXT), (b"utf-8", TEXT, TEXT),
     (b"gzip", gzip.compress(bytes(2**19)), bytes(2**19))],
    ids=["gzip", "upper case", "deflate", "raw deflate", "two members", "nothing packed", "nothing", "identity",
         "not an encoding", "much of little"],
)  # fmt: skip
@pytest.mark.parametrize("step", [7, 2**20])
async def test_a_packed_body_is_unpacked(
    client: UpstreamClient, encoding: bytes, packed: bytes, text: bytes, step: int
) -> None:
    async def part(guest: Guest) -> None:
        while True:
            await guest.request()
            pieces = [packed[place : place + step] for place in range(0, len(packed), step)]
            await guest.say(OK + b"Content-Encoding: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % encoding)
            await guest.say(b"".join(map(chunk_of, pieces)) + END)

    async with playing(part) as stage:
        assert await ask(client, stage.upstream()) == (200, text)
        async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
            assert answer.headers["Content-Encoding"] == encoding.decode()
            assert b"".join([piece async for piece in answer.chunks()]) == text
        assert len(stage.guests) == 1


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [(b"gzip", gzip.compress(TEXT)[:-20]), (b"gzip", b"garbage"), (b"gzip", gzip.compress(TEXT)[:-8] + bytes(8)),
     (b"gzip", gzip.compress(TEXT) + b"garbage"), (b"gzip", gzip.compress(b"") * 3000), (b"deflate", b"\x78\xff" * 50),
     (b"br", b"garbage"), (b"zstd", b"garbage")],
    ids=["cut", "not packed", "wrong sum", "garbage behind", "many members", "nonsense", "br", "zstd"],
)  # fmt: skip
async def test_what_cannot_be_unpacked_is_no_answer(client: UpstreamClient, encoding: bytes, packed: bytes) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(sized(packed, b"Content-Encoding: " + encoding))

    async with playing(part) as stage:
        with pytest.raises(UpstreamUnavailable):
            await ask(client, stage.upstream())


async def test_a_bomb_goes_off_at_the_limit(client: UpstreamClient) -> None:
    packed = gzip.compress(bytes(2**26), 1)

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(sized(packed, b"Content-Encoding: gzip"))

    async with playing(part) as stage:
        with pytest.raises(UpstreamUnavailable, match="more than"):
            await ask(client, stage.upstream())
        async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
            sizes = [len(piece) async for piece in answer.chunks()]
    assert sum(sizes) == 2**26
    assert max(sizes) < 2**17  # nothing is unpacked that was not read yet
