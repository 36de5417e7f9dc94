"""Large and odd request bodies through the real gateway process: what arrives, what is refused, and what neither costs
memory nor keeps others waiting."""

import asyncio
import base64
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.acceptance.conftest import Answer, funds_of
from tests.acceptance.memory import forget_peak, peak_bytes
from tests.acceptance.raw_http import RawAnswer, head_of, line_to
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "reader"
BODY_BYTES = 24_000_000
PROMPT_TOKENS, COMPLETION_TOKENS = 21, 4
MIB = 2**20
SECONDS = 60


class Reader(LocalUpstream):
    """Answers every request in the form of its endpoint. requests: path and decoded body of each."""

    def __init__(self) -> None:
        super().__init__(web.post("/v1/{path:.*}", self._answer))
        self.requests: list[tuple[str, Any]] = []

    async def _answer(self, request: web.Request) -> web.Response:
        path = "/" + request.match_info["path"]
        self.requests.append((path, await request.json()))
        return web.json_response(ANSWERS[path])


_SAID = {"role": "assistant", "content": "seen"}
_USAGE = {"input_tokens": PROMPT_TOKENS, "output_tokens": COMPLETION_TOKENS}
ANSWERS: dict[str, Any] = {
    "/chat/completions": {
        "choices": [{"index": 0, "message": _SAID, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS},
    },
    "/responses": {
        "status": "completed",
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "seen"}]}],
        "usage": _USAGE,
    },
    "/messages": {"type": "message", "content": [{"type": "text", "text": "seen"}], "usage": _USAGE},
}


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: Reader
    session: aiohttp.ClientSession

    async def send(self, body: bytes, path: str = "/chat/completions") -> Answer:
        headers = {"Authorization": f"Bearer {self.gateway.key}", "Content-Type": "application/json"}
        url = self.gateway.base_url + path
        async with self.session.post(url, data=io.BytesIO(body), headers=headers) as answer:
            return Answer(answer.status, answer.headers.copy(), await answer.read())

    async def send_raw(self, *headers: str, body: bytes, key: str | None = None) -> RawAnswer:
        """Header lines and bytes as they are."""
        async with line_to(self.gateway) as line:
            await line.say(head_of(self.gateway, *headers, key=key) + body)
            return await line.answer()

    async def send_packed(self, encoding: str, packed: bytes) -> RawAnswer:
        return await self.send_raw(f"Content-Encoding: {encoding}", f"Content-Length: {len(packed)}", body=packed)

    async def nothing_came_of_it(self, seen: int, asked: int) -> None:
        """Once the gateway has ended more requests than asked: the upstream has seen none, and nothing is held."""
        async with asyncio.timeout(SECONDS):
            while self.requests_logged() <= asked:
                await self.look()
        assert len(self.upstream.requests) == seen
        assert (funds_of(self.gateway).held, funds_of(self.gateway).balance_held) == (0, 0)

    def requests_logged(self) -> int:
        return sum('"message":"request"' in line for line in self.gateway.stderr.splitlines())

    async def look(self) -> None:
        """A round trip to the gateway that asks for nothing."""
        async with self.session.get(self.gateway.admin_url + "/livez") as answer:
            assert answer.status == 200


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("bodies") / "data"
    async with Reader() as upstream, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        config = gateway_config(upstream.base_url, [MODEL])
        config["limits"] = {"body": BODY_BYTES}
        with running_gateway(config, data_dir=data_dir) as gateway:
            yield Bench(gateway, upstream, session)


def chat(content: Any = "Hello!", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 50, **fields}


SMALL = json.dumps(chat()).encode()


# --- large bodies ----------------------------------------------------------------------------------------------------


def with_image(path: str, size: int) -> dict[str, Any]:
    """A request with an image of about size bytes in it, as the endpoint writes one."""
    data = base64.b64encode(Random(size).randbytes(size * 3 // 4)).decode()
    url = f"data:image/png;base64,{data}"
    if path == "/chat/completions":
        return chat([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}])
    if path == "/responses":
        parts = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": url}]
        return {"model": MODEL, "input": [{"role": "user", "content": parts}], "max_output_tokens": 50}
    source = {"type": "base64", "media_type": "image/png", "data": data}
    return chat([{"type": "text", "text": "What is it?"}, {"type": "image", "source": source}])


@pytest.mark.parametrize("size", [100_000, 1_000_000, 20_000_000])
@pytest.mark.parametrize("path", ANSWERS)
async def test_a_large_body_arrives_as_it_was_sent(bench: Bench, path: str, size: int) -> None:
    body = with_image(path, size)
    answer = await bench.send(json.dumps(body).encode(), path)
    assert (answer.status, answer.cost) == (200, cost_of(PROMPT_TOKENS, COMPLETION_TOKENS))
    came_to, came = bench.upstream.requests[-1]
    assert came_to == path
    assert came == body  # nothing limits it but what it says itself


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_a_body_may_be_as_large_as_the_limit_and_no_larger(bench: Bench, packed: bool) -> None:
    for size, status in ((BODY_BYTES, 200), (BODY_BYTES + 1, 413)):
        body = SMALL + b" " * (size - len(SMALL))
        seen = len(bench.upstream.requests)
        if packed:
            answer: Answer | RawAnswer = await bench.send_packed("gzip", gzip.compress(body, 1))
        else:
            answer = await bench.send(body)
        assert answer.status == status
        assert len(bench.upstream.requests) - seen == (status == 200)
    assert json.loads(answer.body)["error"]["code"] == "request_too_large"
    assert str(BODY_BYTES) in json.loads(answer.body)["error"]["message"]


# --- JSON that is none, or hard to read ------------------------------------------------------------------------------


def with_field(name: str, value: bytes) -> bytes:
    """SMALL with a field whose value is any bytes."""
    return SMALL[:-1] + b', "' + name.encode() + b'": ' + value + b"}"


def keys(count: int) -> bytes:
    return b"{" + b",".join(b'"%d":1' % number for number in range(count)) + b"}"


ODD_BODIES: dict[str, bytes] = {
    "brackets": b"[" * 200_000,
    "brackets that close": b"[" * 100_000 + b"]" * 100_000,
    "more brackets than are taken": b"[" * 300_000,
    "braces": b'{"a":' * 100_000,
    "commas": b'{"model":[' + b"," * 10_000_000,
    "nested as deep as is read": with_field("metadata", b"[" * 1000 + b"]" * 1000),
    "nested deeper than is written": with_field("metadata", b'{"a":' * 260 + b"1" + b"}" * 260),
    "nested schema": with_field("tools", b'[{"type":"function","a":' + b"[" * 65 + b"]" * 65 + b"}]"),
    "a million keys": keys(1_000_000),
    "a million keys before it breaks off": with_field("metadata", keys(1_000_000))[:-1],
    "infinite": with_field("temperature", b"1e999"),
    "an integer of ten thousand digits": with_field("seed", b"9" * 10_000),
    "a limit beyond any": with_field("n", b"1" + b"0" * 30),
    "not a number": with_field("temperature", b"NaN"),
    "half a character": with_field("user", rb'"\ud800"'),
    "two halves in the wrong order": with_field("user", rb'"\udc00\ud800"'),
    "a byte order mark": b"\xef\xbb\xbf" + SMALL,
    "UTF-16": SMALL.decode().encode("utf-16"),
    "UTF-32": SMALL.decode().encode("utf-32-le"),
    "a NUL behind": SMALL + b"\0",
    "a NUL in a text": with_field("user", b'"\0"'),
    "NULs": b"\0" * 10_000,
    "overlong UTF-8": with_field("user", b'"\xc0\x80"'),
    "two documents": SMALL + SMALL,
    "form": b"model=reader&messages=Hello",
    "a number of twenty million digits": with_field("seed", b"9" * 20_000_000),
}


@pytest.mark.parametrize("name", ODD_BODIES)
async def test_what_is_not_json_is_refused(bench: Bench, name: str) -> None:
    seen = len(bench.upstream.requests)
    answer = await bench.send(ODD_BODIES[name])
    assert (answer.status, answer.error["code"]) == (400, "invalid_body")
    assert len(answer.body) < 1000
    assert len(bench.upstream.requests) == seen


async def test_who_sends_what_is_hard_to_read_does_not_keep_others_waiting(bench: Bench) -> None:
    """They send one after the other, without a pause, until somebody else was answered."""
    answered = asyncio.Event()
    refused = 0

    async def send_on(body: bytes) -> None:
        nonlocal refused
        while not answered.is_set():
            assert (await bench.send(body)).status == 400
            refused += 1

    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
        for name in ("a million keys", "commas", "brackets"):
            tasks.create_task(send_on(ODD_BODIES[name]))
        while not refused:
            await bench.look()
        assert (await bench.send(SMALL)).status == 200
        answered.set()


async def test_a_text_may_hold_any_character(bench: Bench) -> None:
    text = "\0\x7f\ufeff\u2028\U0001f600" + "é" * 100
    assert (await bench.send(json.dumps(chat(text)).encode())).status == 200
    assert bench.upstream.requests[-1][1] == chat(text)
    assert (await bench.send(json.dumps(chat(text), ensure_ascii=False).encode())).status == 200
    assert bench.upstream.requests[-1][1] == chat(text)


# --- packed bodies ---------------------------------------------------------------------------------------------------


def raw_deflated(data: bytes) -> bytes:
    """Without the two bytes before and the four behind, as some clients understand "deflate"."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [("gzip", gzip.compress(SMALL)), ("GZip", gzip.compress(SMALL)), ("deflate", zlib.compress(SMALL)),
     ("deflate", raw_deflated(SMALL)), ("identity", SMALL),
     ("gzip", gzip.compress(SMALL[:9]) + gzip.compress(SMALL[9:]))],
    ids=["gzip", "upper case", "deflate", "raw deflate", "identity", "two members"],
)  # fmt: skip
async def test_a_packed_body_is_unpacked(bench: Bench, encoding: str, packed: bytes) -> None:
    answer = await bench.send_packed(encoding, packed)
    assert answer.status == 200
    assert bench.upstream.requests[-1][1] == chat()
    assert answer.headers["x-credits-cost"] == format(cost_of(PROMPT_TOKENS, COMPLETION_TOKENS), "f")


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [("gzip", gzip.compress(SMALL)[:40]), ("gzip", gzip.compress(SMALL) + b"garbage"), ("gzip", SMALL),
     ("gzip", zlib.compress(SMALL)), ("gzip", gzip.compress(SMALL)[:-8] + b"\0" * 8), ("gzip", b""),
     ("gzip", gzip.compress(gzip.compress(SMALL))), ("deflate", gzip.compress(SMALL)), ("deflate", b"\xff" * 50),
     ("identity", gzip.compress(SMALL))],
    ids=["cut", "garbage behind", "not packed", "deflate as gzip", "wrong sum", "empty", "packed twice",
         "gzip as deflate", "nonsense", "gzip as it is"],
)  # fmt: skip
async def test_what_cannot_be_unpacked_is_refused(bench: Bench, encoding: str, packed: bytes) -> None:
    seen = len(bench.upstream.requests)
    answer = await bench.send_packed(encoding, packed)
    assert (answer.status, answer.code) == (400, "invalid_body")
    assert len(bench.upstream.requests) == seen


@pytest.mark.parametrize("encoding", ["compress", "x-gzip", "gzip, gzip", "gzip, identity", "zip", "é"])
@pytest.mark.parametrize("body", [SMALL, gzip.compress(gzip.compress(SMALL))], ids=["plain", "packed twice"])
async def test_an_encoding_that_is_not_read_is_named(bench: Bench, encoding: str, body: bytes) -> None:
    seen = len(bench.upstream.requests)
    answer = await bench.send_packed(encoding, body)
    assert (answer.status, answer.code) == (415, "unsupported_encoding")
    assert answer.headers["x-should-retry"] == "false"
    assert len(bench.upstream.requests) == seen


async def test_an_encoding_that_is_said_twice_is_refused(bench: Bench) -> None:
    packed = gzip.compress(gzip.compress(SMALL))
    twice = ["Content-Encoding: gzip", "Content-Encoding: gzip"]
    answer = await bench.send_raw(*twice, f"Content-Length: {len(packed)}", body=packed)
    assert (answer.status, answer.code) == (415, "unsupported_encoding")


@pytest.mark.parametrize("encoding", ["br", "zstd"])
async def test_an_encoding_of_browsers_is_refused_and_the_connection_ends(bench: Bench, encoding: str) -> None:
    seen = len(bench.upstream.requests)
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, f"Content-Encoding: {encoding}", "Content-Length: 5") + b"abcde")
        answer = await line.answer()
        assert answer.status in (400, 415)
        assert answer.code in ("invalid_request", "unsupported_encoding")
        assert await line.rest() == b""
    assert len(bench.upstream.requests) == seen


def bomb(encoding: str, members: int) -> bytes:
    """What becomes members times 16 MiB of brackets."""
    if encoding == "gzip":
        return gzip.compress(b"[" * (16 * MIB), 1) * members
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(b"[" * (16 * MIB)) for _ in range(members)) + packer.flush()


@pytest.mark.parametrize(("encoding", "members"), [("gzip", 64), ("gzip", 2), ("deflate", 16)])
async def test_a_bomb_goes_off_at_the_limit(bench: Bench, encoding: str, members: int) -> None:
    packed = bomb(encoding, members)
    assert len(packed) < 6 * MIB
    before = forget_peak(bench.gateway)
    answer = await bench.send_packed(encoding, packed)
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert peak_bytes(bench.gateway) - before < 4 * BODY_BYTES


async def test_bombs_of_many_are_no_worse(bench: Bench) -> None:
    """None of them is unpacked beyond the limit: what they hold together is that many bodies and no more."""
    packed = bomb("gzip", 16)
    before = forget_peak(bench.gateway)
    answers = await asyncio.gather(*(bench.send_packed("gzip", packed) for _ in range(6)))
    assert {answer.status for answer in answers} == {413}
    assert peak_bytes(bench.gateway) - before < 6 * 2 * BODY_BYTES


# --- how bodies come -------------------------------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
BY_BYTE = b"".join(b"1\r\n%c\r\n" % byte for byte in SMALL)


@pytest.mark.parametrize(
    "body",
    [BY_BYTE + b"0\r\n\r\n", BY_BYTE + b"0\r\nX-Sum: 1\r\nX-Other: 2\r\n\r\n",
     b"%x;name=value\r\n%b\r\n0\r\n\r\n" % (len(SMALL), SMALL), b"000%X\r\n%b\r\n0\r\n\r\n" % (len(SMALL), SMALL)],
    ids=["by byte", "trailers", "extension", "leading zeros"],
)  # fmt: skip
async def test_a_body_may_come_in_chunks(bench: Bench, body: bytes) -> None:
    assert (await bench.send_raw(CHUNKED, body=body)).status == 200
    assert bench.upstream.requests[-1][1] == chat()


async def test_a_body_may_come_slowly(bench: Bench) -> None:
    """Each byte by itself, with the gateway having answered others in between."""
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, f"Content-Length: {len(SMALL)}"))
        for byte in SMALL:
            await line.say(bytes([byte]))
            await bench.look()
        assert (await line.answer()).status == 200
    assert bench.upstream.requests[-1][1] == chat()


async def test_who_waits_to_be_asked_for_the_body_is_asked(bench: Bench) -> None:
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, "Expect: 100-continue", f"Content-Length: {len(SMALL)}"))
        assert (await line.head())[0] == 100
        await line.say(SMALL)
        assert (await line.answer()).status == 200
    assert bench.upstream.requests[-1][1] == chat()


@pytest.mark.parametrize(
    ("key", "length", "status"), [("sk-nobody-has-this", len(SMALL), 401), (None, BODY_BYTES + 1, 413)]
)
async def test_who_waits_in_vain_hears_why_at_once(bench: Bench, key: str | None, length: int, status: int) -> None:
    headers = ["Expect: 100-continue", f"Content-Length: {length}"]
    assert (await bench.send_raw(*headers, body=b"", key=key)).status == status


@pytest.mark.parametrize(
    ("headers", "part"),
    [([f"Content-Length: {len(SMALL)}"], b""), ([f"Content-Length: {len(SMALL)}"], SMALL[:40]),
     ([f"Content-Length: {len(SMALL) + 1}"], SMALL), ([CHUNKED], BY_BYTE[:60]), ([CHUNKED], BY_BYTE),
     (["Content-Encoding: gzip", CHUNKED], b"5\r\n" + gzip.compress(SMALL)[:5] + b"\r\n")],
    ids=["nothing", "half", "a byte less than was said", "half of the chunks", "no last chunk", "half a packed one"],
)  # fmt: skip
async def test_who_hangs_up_before_the_body_is_whole_holds_nothing(
    bench: Bench, headers: list[str], part: bytes
) -> None:
    await bench.look()
    seen, asked = len(bench.upstream.requests), bench.requests_logged()
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, *headers) + part)
        await bench.look()
        line.hang_up()
        await bench.nothing_came_of_it(seen, asked)


async def test_a_length_that_is_too_short_cuts_the_body(bench: Bench) -> None:
    """What comes behind is no request, and not taken for one."""
    seen = len(bench.upstream.requests)
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, f"Content-Length: {len(SMALL) - 5}") + SMALL)
        assert (await line.answer()).status == 400
        await line.rest()
    assert len(bench.upstream.requests) == seen


SIZED = f"Content-Length: {len(SMALL)}"
#: Each could be read as one request by one server and as two by another.
SMUGGLING: dict[str, tuple[list[str], bytes]] = {
    "length and chunks": ([SIZED, CHUNKED], BY_BYTE + b"0\r\n\r\n"),
    "chunks and length": ([CHUNKED, SIZED], BY_BYTE + b"0\r\n\r\n"),
    "two lengths": ([SIZED, "Content-Length: 5"], SMALL),
    "the same length twice": ([SIZED, SIZED], SMALL),
    "two lengths in one": ([f"{SIZED}, {len(SMALL)}"], SMALL),
    "signed length": ([f"Content-Length: +{len(SMALL)}"], SMALL),
    "negative length": (["Content-Length: -1"], SMALL),
    "hexadecimal length": ([f"Content-Length: {len(SMALL):#x}"], SMALL),
    "space before the colon": ([f"Content-Length : {len(SMALL)}"], SMALL),
    "folded line": (["X-Note: a", f" {SIZED}", SIZED], SMALL),
    "chunked, but not last": (["Transfer-Encoding: chunked, identity"], BY_BYTE + b"0\r\n\r\n"),
    "chunked twice": ([CHUNKED, CHUNKED], BY_BYTE + b"0\r\n\r\n"),
    "almost chunked": (["Transfer-Encoding: xchunked"], BY_BYTE + b"0\r\n\r\n"),
    "chunked behind a tab": (["Transfer-Encoding:\x0bchunked"], BY_BYTE + b"0\r\n\r\n"),
    "size that is none": ([CHUNKED], b"zz\r\n" + SMALL + b"\r\n0\r\n\r\n"),
    "size beyond any": ([CHUNKED], b"f" * 17 + b"\r\n" + SMALL),
    "negative size": ([CHUNKED], b"-5\r\n" + SMALL),
    "size without its line end": ([CHUNKED], b"5\n" + SMALL),
    "chunk that is longer than it says": ([CHUNKED], b"5\r\n" + SMALL + b"\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_a_request_that_can_be_read_in_two_ways_is_refused(bench: Bench, name: str) -> None:
    headers, body = SMUGGLING[name]
    seen = len(bench.upstream.requests)
    hidden = head_of(bench.gateway, SIZED) + SMALL
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, *headers) + body + hidden)
        answer = await line.answer()
        assert (answer.status, answer.code) == (400, "invalid_request")
        await line.rest()  # the gateway hangs up, and what is behind is not answered
    await bench.look()
    assert len(bench.upstream.requests) == seen


async def test_nothing_of_this_was_a_mistake_of_the_gateway(bench: Bench) -> None:
    lines = [json.loads(line) for line in bench.gateway.stderr.splitlines()]
    assert not [line for line in lines if line.get("reason") == "internal_error"]
    assert not [line for line in lines if line["level"] == "error" and "aiohttp" not in line["logger"]]
    assert (await bench.send(SMALL)).status == 200
