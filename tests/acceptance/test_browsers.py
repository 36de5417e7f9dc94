"""What browsers and clients ask besides: whether anybody is there, and whether a page may ask and read."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio

from tests.acceptance.conftest import BODY, MODEL, STREAM, HeldUpstream
from tests.acceptance.raw_http import head_of, line_to
from tests.gateway_process import Gateway, gateway_config, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")

ORIGIN = {"Origin": "https://app.example.com"}
ENDPOINTS = ["/v1/chat/completions", "/api/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: HeldUpstream
    session: aiohttp.ClientSession

    @property
    def root(self) -> str:
        return self.gateway.base_url.removesuffix("/v1")

    @property
    def key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.gateway.key}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("browsers") / "data"
    async with HeldUpstream() as upstream, aiohttp.ClientSession() as session:
        with running_gateway(gateway_config(upstream.base_url, [MODEL]), data_dir=data_dir) as gateway:
            yield Bench(gateway, upstream, session)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/api", "/api/", "/api/v1", "/api/v1/"])
async def test_at_every_base_url_somebody_is_there(bench: Bench, path: str) -> None:
    async with bench.session.head(bench.root + path) as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with bench.session.get(bench.root + path) as answer:
        assert await answer.json() == {"name": "quota-gateway"}


@pytest.mark.parametrize("path", [*ENDPOINTS, "/v1/nothing", "/v1/models/nobody", "/metrics", "/v1x"])
async def test_an_answer_to_head_has_no_body_and_the_connection_goes_on(bench: Bench, path: str) -> None:
    seen = len(bench.upstream.requests)
    async with line_to(bench.gateway) as line:
        for _ in range(2):
            await line.say(
                f"HEAD {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bench.gateway.key}\r\n\r\n".encode()
            )
            status, headers = await line.head()
            assert status == 404 or (status == 405 and headers["allow"] in ("GET", "POST"))
        await line.say(head_of(bench.gateway, f"Content-Length: {len(BODY)}") + BODY)
        assert (await line.answer()).status == 200  # which would not be so if a body had come before it
    assert len(bench.upstream.requests) == seen + 1


@pytest.mark.parametrize("path", [*ENDPOINTS, "/v1/models", "/v1/models/x", "/v1/nothing", "/"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_page_may_ask_what_it_may_send(bench: Bench, path: str, method: str) -> None:
    wanted = "authorization, x-api-key, anthropic-version, anthropic-dangerous-direct-browser-access, x-stainless-os"
    asks = {**ORIGIN, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": wanted}
    async with bench.session.options(bench.root + path, headers=asks) as answer:
        assert (answer.status, await answer.read()) == (204, b"")
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["Access-Control-Allow-Headers"] == wanted
        assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST, HEAD, OPTIONS"
        assert int(answer.headers["Access-Control-Max-Age"]) > 0
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert "Access-Control-Allow-Private-Network" not in answer.headers


async def test_a_public_page_may_ask_a_gateway_on_a_private_network(bench: Bench) -> None:
    asks = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    async with bench.session.options(f"{bench.gateway.base_url}/chat/completions", headers=asks) as answer:
        assert (answer.status, answer.headers["Access-Control-Allow-Private-Network"]) == (204, "true")


async def test_what_a_page_wants_to_send_cannot_break_the_answer(bench: Bench) -> None:
    asks = ["Origin: null", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: a\xff, \u20ac"]
    async with line_to(bench.gateway) as line:
        await line.say(head_of(bench.gateway, *asks, method="OPTIONS"))
        status, headers = await line.head()
        assert (status, headers["access-control-allow-origin"]) == (204, "*")


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "streamed"])
async def test_a_page_may_read_the_answer_and_all_its_headers(bench: Bench, body: bytes) -> None:
    url = f"{bench.gateway.base_url}/chat/completions"
    for headers, allowed in (({**ORIGIN, **bench.key}, "*"), (bench.key, None)):
        async with bench.session.post(url, data=body, headers=headers) as answer:
            assert answer.status == 200
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed
            assert answer.headers.get("Access-Control-Expose-Headers") == allowed
            assert "x-credits-reserved" in answer.headers
            assert await answer.read()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [("POST", "/v1/chat/completions", b"{", 400), ("POST", "/v1/nothing", b"{}", 404),
     ("GET", "/v1/messages", None, 405),
     ("POST", "/v1/chat/completions", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404),
     ("OPTIONS", "/v1/chat/completions", None, 405), ("GET", "/v1/models", None, 200), ("GET", "/", None, 200)],
    ids=str,
)  # fmt: skip
async def test_a_page_may_read_errors_too(
    bench: Bench, method: str, path: str, body: bytes | None, status: int
) -> None:
    headers = {**ORIGIN, **bench.key}
    async with bench.session.request(method, bench.root + path, data=body, headers=headers) as answer:
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")
        assert status == 200 or json.loads(await answer.read())["error"]["message"]


async def test_a_page_may_read_that_its_stream_was_refused(bench: Bench) -> None:
    url = f"{bench.gateway.base_url}/chat/completions"
    for key, status in (("sk-nobody-has-this", 401), (str(bench.gateway.key), 413)):
        body = STREAM + b" " * (33 * 2**20 if status == 413 else 0)
        headers = {**ORIGIN, "Authorization": f"Bearer {key}", "Content-Length": str(len(body))}
        async with bench.session.post(url, data=iter_of(body[:1000]), headers=headers) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")


async def iter_of(data: bytes) -> AsyncIterator[bytes]:
    yield data
