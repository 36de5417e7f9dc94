"""What the tests over HTTP share: upstreams, a clock that stands at noon, and one way to ask and to look at credits."""

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis
from aiohttp import web

from gateway.credits.embedded import running_url
from tests.gateway_process import Gateway, cost_of
from tests.servers import MovableClock
from tests.upstreams.llama import running_llama
from tests.upstreams.local import LocalUpstream

#: What the gateway adds to a request's bytes for the upstream's chat template, unless configured.
TEMPLATE_TOKENS = 256
MODEL = "held"
NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def at(moment: datetime) -> int:
    """Milliseconds since 1970."""
    return round(moment.timestamp() * 1000)


class HeldUpstream(LocalUpstream):
    """An upstream whose answers wait between ``hold`` and ``release``.

    Every answer reports prompt_tokens and completion_tokens; with no completion_tokens its text is empty. A streamed
    one sends its first chunk before it waits. models: what GET /v1/models lists, with status models_status. requests:
    the decoded bodies in order of arrival.
    """

    def __init__(self) -> None:
        super().__init__(web.get("/v1/models", self._list), web.post("/v1/{path:.*}", self._answer))
        self.prompt_tokens, self.completion_tokens = 20, 10
        self.models: list[Any] = []
        self.models_status = 200
        self.requests: list[dict[str, Any]] = []
        self._arrived = asyncio.Condition()
        self._gate = asyncio.Event()
        self._gate.set()

    @property
    def cost(self) -> Decimal:
        """What one answer costs at list price."""
        return cost_of(self.prompt_tokens, self.completion_tokens)

    def hold(self) -> None:
        """Let answers wait from now on."""
        self._gate.clear()

    def release(self) -> None:
        """Let all answers go."""
        self._gate.set()

    async def wait_for_requests(self, count: int) -> None:
        """Return once count requests have arrived. Raises TimeoutError after 20 s."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models}, status=self.models_status)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        async with self._arrived:
            self.requests.append(body)
            self._arrived.notify_all()
        if body.get("stream"):
            return await self._stream(request)
        await self._gate.wait()
        text = "held" if self.completion_tokens else ""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "text": text, "finish_reason": "stop"}
        return web.json_response({"id": "held-1", "choices": [choice], "usage": self._usage()})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(_event([{"index": 0, "delta": {"content": "held"}, "finish_reason": None}]))
        await self._gate.wait()
        await response.write(_event([{"index": 0, "delta": {"content": " back"}, "finish_reason": None}]))
        await response.write(_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        await response.write(_event([], usage=self._usage()))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self) -> dict[str, int]:
        given, made = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def _event(choices: list[dict[str, Any]], **members: Any) -> bytes:
    document = {"id": "held-1", "object": "chat.completion.chunk", "choices": choices, **members}
    return f"data: {json.dumps(document)}\n\n".encode()


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.document["error"]

    @property
    def cost(self) -> Decimal:
        """What the answer says it cost."""
        return Decimal(self.headers["x-credits-cost"])

    @property
    def source(self) -> str:
        return self.headers["x-credits-source"]

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, parsed; the last must be [DONE], which is left out."""
        data = [line[6:] for line in self.body.splitlines() if line.startswith(b"data: ")]
        assert data[-1] == b"[DONE]", self.body
        return [json.loads(line) for line in data[:-1]]


def chat_body(max_tokens: int | None = 100, *, stream: bool = False) -> bytes:
    """A chat request for MODEL, exactly as it is sent; streamed ones ask for the usage."""
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


#: The request that most tests send, whole and streamed.
MAX_TOKENS = 100
BODY = chat_body(MAX_TOKENS)
STREAM = chat_body(MAX_TOKENS, stream=True)


def input_bound(body: bytes) -> int:
    """The most input tokens that a request can have: a byte of its JSON, without spaces and without what limits its
    output or reports on it, is a token at most; and the template."""
    document = json.loads(body)
    for name in ("max_tokens", "max_completion_tokens", "stream_options"):
        document.pop(name, None)
    return len(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()) + TEMPLATE_TOKENS


def hold_of(body: bytes, max_tokens: int) -> Decimal:
    """What a request must hold to be admitted with max_tokens."""
    return cost_of(input_bound(body), max_tokens)


#: What BODY holds.
HOLD = hold_of(BODY, MAX_TOKENS)


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, key: str, body: bytes, path: str = "/chat/completions"
) -> Answer:
    """Send body and read the answer."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    async with session.post(gateway.base_url + path, data=body, headers=headers) as response:
        return Answer(response.status, response.headers.copy(), await response.read())


async def ask_default(session: aiohttp.ClientSession, gateway: Gateway, body: bytes = BODY) -> Answer:
    """The same with the key of the account that the gateway made when it first started."""
    assert gateway.key is not None
    return await ask(session, gateway, gateway.key, body)


def new_account(gateway: Gateway, name: str, plan: str, *, grant: Decimal | None = None) -> str:
    """Open an account, with a balance if grant is given; its key's secret."""
    gateway.cli("accounts", "create", name, "--plan", plan)
    if grant is not None:
        gateway.cli("credits", "grant", name, f"{grant:f}")
    secret: str = gateway.cli("keys", "create", name, "--name", "test")["secret"]
    return secret


@dataclass(frozen=True)
class Funds:
    """What ``credits show --json`` says, in credits."""

    granted: Decimal
    used: Decimal
    held: Decimal
    remaining: Decimal
    balance: Decimal
    balance_held: Decimal
    window: int | None
    resets_at: str | None


def funds_of(gateway: Gateway, account: str = "default") -> Funds:
    """The account's credits as of now."""
    shown = gateway.cli("credits", "show", account)
    allowance = shown["allowance"]
    granted, used, held, remaining = (Decimal(allowance[name]) for name in ("granted", "used", "held", "remaining"))
    balance, balance_held = Decimal(shown["balance"]), Decimal(shown["balance_held"])
    return Funds(granted, used, held, remaining, balance, balance_held, allowance["window"], allowance["resets_at"])


def store_pid(gateway: Gateway) -> int | None:
    """The embedded server's process id; None while none answers."""
    url = running_url(gateway.data_dir)
    if url is None:
        return None
    try:
        with redis.Redis.from_url(url, socket_timeout=5) as client:
            return int(client.info("server")["process_id"])
    except redis.RedisError:
        return None


@contextmanager
def hanging_store(gateway: Gateway) -> Iterator[None]:
    """The embedded server takes commands and answers none."""
    pid = store_pid(gateway)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def clock(tmp_path: Path) -> MovableClock:
    """A clock that runs from noon: no test meets a real midnight."""
    clock = MovableClock(tmp_path / "clock")
    clock.set_to(NOON)
    return clock


@pytest.fixture(scope="module")
def module_clock() -> Iterator[MovableClock]:
    """The same for a gateway that serves a whole module."""
    with tempfile.TemporaryDirectory(prefix="qg-clock-") as directory:
        clock = MovableClock(Path(directory) / "clock")
        clock.set_to(NOON)
        yield clock


@pytest.fixture
async def upstream() -> AsyncIterator[HeldUpstream]:
    async with HeldUpstream() as upstream:
        yield upstream


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that opens as many connections as it is asked to."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture(scope="session")
def llama() -> Iterator[str]:
    """The base URL of a real llama.cpp server."""
    with running_llama() as base_url:
        yield base_url


@pytest.fixture(scope="session")
def llama_embedding() -> Iterator[str]:
    """The base URL of one that makes embeddings."""
    with running_llama(alias="tiny-embedding", embedding=True) as base_url:
        yield base_url
