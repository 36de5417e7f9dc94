"""Paths that the configuration prices by the request: which they are, what goes through them, and what it costs."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import ClientPayloadError, web

from tests.acceptance.conftest import Answer, new_account
from tests.acceptance.media import UPSTREAM_KEY, Bench, media_bench
from tests.upstreams.scripted import gives, says, streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "chatter"
LIMIT = 2**20
PATHS: dict[str, dict[str, Any]] = {
    "/files": {"request_price": "0.001000001", "methods": ["GET", "POST"]},
    "/files/*": {"request_price": "0.002", "methods": ["GET", "POST", "PUT", "PATCH", "DELETE"]},
    "/files/batch/*": {"request_price": "0.003", "methods": ["POST"]},
    "/files/batch/free": {"request_price": 0, "methods": ["GET"]},
    "/dear": {"request_price": "0.2", "methods": ["POST"]},
    # All of them hold paths that the gateway meters itself.
    "/chat/*": {"request_price": 0, "methods": ["GET", "POST"]},
    "/images/*": {"request_price": 0, "methods": ["POST"]},
    "/chat/completions": {"request_price": 0, "methods": ["POST"]},
    "/models/*": {"request_price": 0, "methods": ["GET"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    prices = {"input_token_price": 1, "output_token_price": 1, "context_window": 4096, "max_output_tokens": 64}
    paths = {pattern: {"upstream": "test", **rule} for pattern, rule in PATHS.items()}
    data_dir = tmp_path_factory.mktemp("passthrough") / "data"
    limits = {"upload": str(LIMIT)}
    async with media_bench(data_dir, {MODEL: prices}, passthrough=paths, limits=limits) as bench:
        yield bench


@dataclass(frozen=True)
class Raw:
    """An answer as it came over the wire."""

    status: int
    head: bytes
    body: bytes


async def raw(bench: Bench, target: str, method: str = "GET", body: bytes = b"", headers: str = "") -> Raw:
    """A request whose target is sent exactly so, which no client library does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.gateway.base_url.split(":")[2].split("/")[0]))
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {bench.key}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + headers.encode() + b"\r\n" + body)
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    start, _, rest = said.partition(b"\r\n\r\n")
    return Raw(int(start.split()[1]), start, rest)


async def call(bench: Bench, method: str, path: str, *, key: str = "", headers: Any = None, **options: Any) -> Answer:
    sent = {"Authorization": f"Bearer {key or bench.key}", **(headers or {})}
    async with bench.session.request(method, bench.gateway.base_url + path, headers=sent, **options) as answer:
        return Answer(answer.status, answer.headers.copy(), await answer.read())


# --- which paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "cost"),
    [
        ("GET", "/files", "0.001000001"),
        ("POST", "/files", "0.001000001"),
        ("GET", "/files/a", "0.002"),
        ("PUT", "/files/a/b/c.txt", "0.002"),
        ("PATCH", "/files/a", "0.002"),
        ("DELETE", "/files/a%20b", "0.002"),
        ("POST", "/files/batch/7", "0.003"),
        ("GET", "/files/batch/free", "0"),
        ("GET", "/files/batch", "0.002"),
        ("GET", "/FILES/Batch/free", "0"),
    ],
)
@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
async def test_the_most_specific_entry_counts(bench: Bench, prefix: str, method: str, path: str, cost: str) -> None:
    bench.upstream.script = says({"ok": True})
    seen = len(bench.upstream.asked)
    async with bench.charging(cost):
        answer = await raw(bench, prefix + path, method)
    assert answer.status == 200
    assert len(bench.upstream.asked) == seen + 1
    assert (bench.asked.method, bench.asked.target) == (method, path)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("DELETE", "/files", "GET, POST"), ("GET", "/files/batch/7", "POST"), ("POST", "/files/batch/free", "GET"),
     ("GET", "/dear", "POST"), ("HEAD", "/files", "GET, POST")],
)  # fmt: skip
async def test_only_its_methods_are_forwarded(bench: Bench, method: str, path: str, allowed: str) -> None:
    seen = len(bench.upstream.asked)
    answer = await call(bench, method, path)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)
    assert len(bench.upstream.asked) == seen


ELSEWHERE = [
    "/v1/nothing",
    "/v1/files/",
    "/v1/filesystem",
    "/files",
    "/v2/files",
    "/v1/v1/files",
    "/v1/files/batch/",
    # dots
    "/v1/files/..",
    "/v1/files/../chat",
    "/v1/files/.",
    "/v1/files/a/../../secret",
    "/v1/files/%2e%2e/x",
    "/v1/files/.%2E/x",
    # slashes, and what some servers take for one
    "/v1/files//x",
    "//v1/files",
    "/v1//files",
    "/v1/files/a%2fb",
    "/v1/files/a%2F..%2Fb",
    "/v1/files/a\\b",
    "/v1/files/%5c",
    # signs that end, hide or split a path somewhere
    "/v1/files/a%00",
    "/v1/files/a%0d%0aX:1",
    "/v1/files/a;b=c",
    "/v1/files/a%3bb",
    "/v1/files/%252e%252e/x",
    "/v1/files/%7f",
    # a prefix that is not written out
    "/%761/files/x",
    "/%61pi/v1/files/x",
    "/v%31/files/x",
    "/api/v%31/files/x",
]


@pytest.mark.parametrize("target", ELSEWHERE)
async def test_what_could_be_another_path_for_the_upstream_is_refused(bench: Bench, target: str) -> None:
    seen = len(bench.upstream.asked)
    answer = await raw(bench, target)
    assert answer.status in (400, 404)
    assert len(bench.upstream.asked) == seen


METERED_IN_DISGUISE = [
    "/v1/chat/completions/",
    "/v1/chat/completions//",
    "/v1//chat/completions",
    "/v1/chat//completions",
    "/v1/chat/Completions",
    "/v1/CHAT/COMPLETIONS",
    "/v1/chat/./completions",
    "/v1/chat/x/../completions",
    "/v1/chat/completions%20",
    "/v1/chat/completions%09",
    "/v1/chat/completions%2f",
    "/v1/chat/completions;x=1",
    "/v1/chat/completions%3Bx",
    "/v1/images/generations/",
    "/v1/images/Generations",
    "/api/v1/chat/completions/",
    "/v1/chat/completions%00",
    "/v1/chat/completions/%20",
    "/v1/chat/%2563ompletions",
]


@pytest.mark.parametrize("target", METERED_IN_DISGUISE)
async def test_a_metered_path_cannot_be_reached_through_a_pattern(bench: Bench, target: str) -> None:
    seen = len(bench.upstream.asked)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
    answer = await raw(bench, target, "POST", body)
    assert answer.status in (400, 404)
    assert len(bench.upstream.asked) == seen


@pytest.mark.parametrize(
    "target", ["/v1/chat/completions", "/v1/%63hat/completions", "/v1/chat/complet%69ons?x=1", "/v1/chat%2fcompletions"]
)
async def test_a_metered_path_is_metered_however_it_is_written(bench: Bench, target: str) -> None:
    bench.upstream.script = says({"choices": [{"message": {"content": "x"}}], "usage": usage(7, 5)})
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
    async with bench.charging("0.000012"):
        assert (await raw(bench, target, "POST", body)).status == 200
    assert bench.asked.target == "/chat/completions"


async def test_the_models_list_stays_the_gateways_own(bench: Bench) -> None:
    seen = len(bench.upstream.asked)
    assert (await call(bench, "GET", f"/models/{MODEL}")).document["id"] == MODEL
    assert {asked.target for asked in bench.upstream.asked[seen:]} <= {"/models"}


def usage(given: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": made}


# --- what goes through -----------------------------------------------------------------------------------------------


async def test_query_and_body_arrive_as_they_were_sent_and_no_key_of_the_client_does(bench: Bench) -> None:
    bench.upstream.script = gives(b"\x00binary\xff", "application/x-thing", **{"Content-Disposition": "attachment"})
    query = "?a=1&a=2&b=%2B&c=x+y&d=a%20b&limit=5&purpose=fine-tune&e="
    keys = {"x-api-key": "other-secret", "token": "other-secret", "Cookie": "session=other-secret"}
    keys |= {"Proxy-Authorization": "Basic other-secret", "X-Forwarded-For": "203.0.113.7", "X-Anything": "1"}
    body = bytes(range(256)) * 16
    headers = {"Content-Type": "application/x-other; a=b", **keys}
    answer = await call(bench, "POST", f"/files{query}", data=body, headers=headers)
    assert (answer.status, answer.body) == (200, b"\x00binary\xff")
    assert answer.headers["Content-Type"] == "application/x-thing"
    assert answer.headers["Content-Disposition"] == "attachment"
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.cost == Decimal(answer.headers["x-credits-reserved"]) == Decimal("0.001000001")
    assert bench.asked.target == f"/files{query}"
    assert bench.asked.body == body
    assert bench.asked.headers["Content-Type"] == "application/x-other; a=b"
    assert bench.asked.headers.getall("Authorization") == [f"Bearer {UPSTREAM_KEY}"]
    assert not keys.keys() & set(bench.asked.headers)
    assert bench.key not in str(bench.asked.headers)


async def test_an_answer_without_a_body_is_one(bench: Bench) -> None:
    async def script(_: web.Request) -> web.Response:
        return web.Response(status=204)

    bench.upstream.script = script
    answer = await raw(bench, "/v1/files/a", "DELETE")
    assert (answer.status, answer.body) == (204, b"")
    bench.upstream.script = says({"id": "1"}, 201)
    answer = await raw(bench, "/v1/files", "POST", b"{}")
    assert (answer.status, json.loads(answer.body.strip())) == (201, {"id": "1"})
    assert b"x-credits-cost: 0.001000001" in answer.head


async def test_bodies_stream_both_ways(bench: Bench) -> None:
    """The client reads the answer's beginning while the upstream waits for the request's end."""

    async def talk(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        assert await request.content.readexactly(3) == b"one"
        while not request.content.is_eof():
            await response.write(b"more ")
            await asyncio.sleep(0.01)
        await response.write(await request.content.read())
        return response

    heard = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        await heard.wait()
        yield b"two"

    bench.upstream.script, bench.upstream.early = talk, True
    try:
        headers = {"Authorization": f"Bearer {bench.key}"}
        url = f"{bench.gateway.base_url}/files"
        sent = bench.session.post(url, data=pieces(), headers=headers)
        async with bench.charging("0.001000001"), sent as answer:
            assert await answer.content.readexactly(5) == b"more "
            heard.set()
            assert (await answer.content.read()).startswith(b"more ")
    finally:
        bench.upstream.early = False


async def test_a_packed_body_arrives_unpacked(bench: Bench) -> None:
    bench.upstream.script = says({})
    body = gzip.compress(b"x" * 10_000)
    await call(bench, "POST", "/files", data=body, headers={"Content-Encoding": "gzip"})
    assert bench.asked.body == b"x" * 10_000
    assert "Content-Encoding" not in bench.asked.headers


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["length", "chunked", "gzip"])
async def test_a_body_over_the_limit_is_refused(bench: Bench, how: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield bytes(LIMIT // 16)

    data: Any = {"length": io.BytesIO(bytes(LIMIT + 1)), "chunked": pieces(), "gzip": gzip.compress(bytes(LIMIT * 4))}[
        how
    ]
    headers = {"Content-Encoding": "gzip"} if how == "gzip" else {}
    bench.upstream.script = says({})
    async with bench.charging(0):
        answer = await call(bench, "POST", "/files", data=data, headers=headers)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert (await call(bench, "POST", "/files", data=io.BytesIO(bytes(LIMIT)))).status == 200


async def test_a_body_that_breaks_off_is_refused(bench: Bench) -> None:
    seen = len(bench.upstream.asked)
    bench.upstream.script = says({})
    async with bench.charging(0):
        broken = "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nno-number\r\n"
        answer = await raw(bench, "/v1/files", "POST", headers=broken)
    assert answer.status == 400
    assert len(bench.upstream.asked) == seen


async def test_who_sends_too_much_after_the_answer_has_begun_pays(bench: Bench) -> None:
    """Otherwise whoever has seen enough could have it for nothing."""

    async def talk(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(3):
            await response.write(b"answer" * 20_000)
        async for _ in request.content.iter_any():
            pass
        return response

    bench.upstream.script, bench.upstream.early = talk, True
    port = int(bench.gateway.base_url.split(":")[2].split("/")[0])
    try:
        async with bench.charging("0.001000001"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bench.key}\r\n"
            writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            await reader.readuntil(b"answeranswer")
            writer.write(b"100001\r\n" + bytes(LIMIT + 1) + b"\r\n0\r\n\r\n")
            assert not (await reader.read()).endswith(b"0\r\n\r\n")
            writer.close()
            await writer.wait_closed()
    finally:
        bench.upstream.early = False


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "shown"), [(400, 400), (404, 404), (409, 409), (429, 429), (500, 500), (401, 502),
                                               (302, 502)])  # fmt: skip
async def test_an_error_of_the_upstream_costs_nothing(bench: Bench, status: int, shown: int) -> None:
    bench.upstream.script = says({"error": {"message": "no such file"}}, status, Location="/elsewhere")
    async with bench.charging(0):
        answer = await call(bench, "GET", "/files/a")
    assert answer.status == shown
    assert "Location" not in answer.headers
    if shown == status:
        assert answer.error["message"] == "no such file"


async def test_who_cannot_pay_is_refused_before_anything_is_sent(bench: Bench) -> None:
    key = new_account(bench.gateway, "cannot-pay-for-paths", "small")
    seen = len(bench.upstream.asked)
    answer = await call(bench, "POST", "/dear", key=key, data=b"x")
    assert (answer.status, answer.error["code"]) == (402, "request_exceeds_balance")
    assert (await call(bench, "POST", "/dear", key="sk-nobody-has-this", data=b"x")).status == 401
    assert len(bench.upstream.asked) == seen
    bench.upstream.script = says({})
    answer = await call(bench, "GET", "/files/a", key=key)
    assert (answer.status, answer.cost) == (200, Decimal("0.002"))


async def test_what_costs_nothing_needs_no_credits(bench: Bench) -> None:
    bench.upstream.script = says({})
    key = new_account(bench.gateway, "for-nothing", "small")
    answer = await call(bench, "GET", "/files/batch/free", key=key)
    assert (answer.status, answer.cost) == (200, Decimal(0))


async def test_an_answer_that_breaks_off_has_no_clean_end_and_costs_nothing(bench: Bench) -> None:
    bench.upstream.script = streams(*[b"x" * 100_000] * 5, content_type="application/x-thing", breaks=True)
    async with bench.charging(0):
        with pytest.raises(ClientPayloadError):
            await call(bench, "GET", "/files/a")


async def test_who_leaves_an_answer_pays_for_it(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.upstream.script = streams(*[b"x" * 100_000] * 3, content_type="application/x-thing", held=gate)
    headers = {"Authorization": f"Bearer {bench.key}"}
    url = f"{bench.gateway.base_url}/files/a"
    async with bench.charging("0.002"), bench.session.get(url, headers=headers) as answer:
        await answer.content.readexactly(1000)
        answer.close()
    gate.set()


async def test_who_leaves_before_the_answer_pays_for_what_the_upstream_was_given(bench: Bench) -> None:
    """It may be a job, whose result can be fetched later."""
    gone = asyncio.Event()

    async def works(request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError

    seen = len(bench.upstream.asked)
    bench.upstream.script = works
    headers = {"Authorization": f"Bearer {bench.key}"}
    async with bench.charging("0.001000001"):
        asked = asyncio.create_task(bench.session.post(f"{bench.gateway.base_url}/files", data=b"do", headers=headers))
        await bench.upstream.wait_for(seen + 1)
        asked.cancel()
        await gone.wait()


async def test_the_ledger_names_the_path(bench: Bench) -> None:
    bench.upstream.script = says({})
    await call(bench, "GET", "/files/a")
    await bench.settled()
    last = bench.gateway.cli("ledger", "tail", "default")["data"][-1]
    assert last["model"] == "/files/*"
