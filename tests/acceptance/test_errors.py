"""Every error of the contract, through the real gateway process: status, body, headers, and that nothing was forwarded.

Clients decide by these whether they try again, when, and what they tell their user.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.acceptance.conftest import NOON, Answer, at, funds_of, hold_of, new_account
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock, valkey_server
from tests.upstreams.faulty import BEHAVIOURS, COMPLETION_TOKENS, PROMPT_TOKENS, FaultyUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY_BYTES = 20_000
MAX_TOKENS = 100
#: What the plan "daily" grants a day: more than the least that a request must hold, less than it asks for.
DAILY = Decimal("0.00005")
#: Models that are not behaviours: of an upstream that waits only briefly, and of one that is not there.
#: Nobody listens where the upstream "refused" should be: on port 1, which no other process gets meanwhile.
HASTY, REFUSED = "hasty", "refused"
MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC)

NEVER = {"x-should-retry": "false"}
RETRY_HEADERS = ("Retry-After", "retry-after-ms", "x-should-retry")

INVALID = "invalid_request_error"


@dataclass(frozen=True)
class Bench:
    """A gateway whose clock the tests move, before a hostile upstream.

    The account ``default`` has 1 credit, ``poor`` nothing; both have no allowance. ``daily`` has DAILY a day. The plans
    "hourly" and "tight" grant DAILY an hour, less than twice that a day; "frugal" is "daily" without prepaid credits.
    """

    gateway: Gateway
    upstream: FaultyUpstream
    session: aiohttp.ClientSession
    clock: MovableClock
    keys: Mapping[str, str]

    async def send(
        self, body: bytes | None, path: str = "/v1/chat/completions", *, key: str | None = None, method: str = "POST"
    ) -> Answer:
        """key: of the account ``default`` unless given; an empty one is not sent."""
        secret = self.keys["default"] if key is None else key
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        root = self.gateway.base_url.removesuffix("/v1")
        async with asyncio.timeout(30), self.session.request(method, root + path, data=body, headers=headers) as answer:
            return Answer(answer.status, answer.headers.copy(), await answer.read())

    async def requests_logged(self) -> int:
        """How many requests the gateway has answered. A line is written in the turn after its request's end."""
        async with self.session.get(self.gateway.admin_url + "/livez") as answer:
            assert answer.status == 200
        return sum('"message":"request"' in line for line in self.gateway.stderr.splitlines())


def body_of(model: str = "ok", *, stream: bool = False, **fields: Any) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": MAX_TOKENS, **fields}
    return json.dumps({**body, "stream": True} if stream else body).encode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory, module_clock: MovableClock) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("errors") / "data"
    async with FaultyUpstream() as upstream, aiohttp.ClientSession() as session:
        with running_gateway(_config(upstream.base_url), data_dir=data_dir, clock=module_clock) as gateway:
            gateway.cli("credits", "grant", "default", "1")
            keys = {
                "default": str(gateway.key),
                "poor": new_account(gateway, "poor", "prepaid"),
                "daily": new_account(gateway, "daily", "daily"),
                "frugal": new_account(gateway, "frugal", "frugal"),
            }
            yield Bench(gateway, upstream, session, module_clock, keys)


def _config(base_url: str) -> dict[str, Any]:
    daily = {"per_window": str(DAILY), "refresh": "24h"}
    plans = {
        "prepaid": {"default": True},
        "daily": {"allowance": daily},
        "frugal": {"allowance": daily, "payg": "false"},
        "hourly": {"allowance": [{**daily, "per_window": str(DAILY * 8 / 5)}, {**daily, "refresh": "1h"}]},
        "tight": {"allowance": [{**daily, "per_window": str(DAILY * 11 / 10)}, {**daily, "refresh": "1h"}]},
        "closed": {"allowance": {**daily, "per_window": "0"}, "payg": "false"},
    }
    config = gateway_config(base_url, [*BEHAVIOURS, HASTY, REFUSED], plans=plans)
    config["upstreams"] = {
        "test": {"base_url": base_url},
        HASTY: {"base_url": base_url, "idle_timeout": "300ms"},
        REFUSED: {"base_url": "http://127.0.0.1:1/v1"},
    }
    for name in (HASTY, REFUSED):
        config["models"]["models"][name]["upstream"] = name
    config["limits"] = {"body": BODY_BYTES}
    return config


@dataclass(frozen=True)
class Expected:
    """An error of the contract. headers: all those that say whether and when to try again."""

    status: int
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: NEVER)


def check(answer: Answer, expected: Expected) -> None:
    """The answer has the contract's shape, and everything that is expected of it."""
    document = answer.document
    assert set(document) == {"type", "error", "request_id"}
    assert document["type"] == "error"
    error = document["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["metadata"], dict)
    assert (answer.status, error["type"], error["code"], error["param"]) == (
        expected.status,
        expected.type,
        expected.code,
        expected.param,
    )
    assert {name: answer.headers[name] for name in RETRY_HEADERS if name in answer.headers} == expected.headers
    assert document["request_id"] == answer.headers["x-request-id"] == answer.headers["request-id"]
    assert answer.headers["Content-Type"].split(";")[0] == "application/json"
    # One client parses these two names and takes them for something else.
    assert not {"x-ratelimit-reset", "ratelimit-reset"} & {name.lower() for name in answer.headers}


# --- refused before anything is held ---------------------------------------------------------------------------------

BAD_KEY = Expected(401, INVALID, "invalid_api_key")


@dataclass(frozen=True)
class Call:
    """A request that is refused."""

    name: str
    expected: Expected
    body: bytes | None = field(default_factory=body_of)
    path: str = "/v1/chat/completions"
    method: str = "POST"
    key: str | None = None

    def __str__(self) -> str:
        return self.name


def invalid(param: str | None) -> Expected:
    return Expected(400, INVALID, "invalid_body", param)


UNKNOWN_PATH = Expected(404, INVALID, "unknown_url")
UNKNOWN_MODEL = Expected(404, INVALID, "model_not_found", "model")
WRONG_METHOD = Expected(405, INVALID, "method_not_allowed")
TOO_LARGE = Expected(413, INVALID, "request_too_large")
#: More levels than the gateway can write again.
NESTED = b"[" * 300 + b"]" * 300

REFUSED_CALLS = [
    Call("no key", BAD_KEY, key=""),
    Call("unknown key", BAD_KEY, key="sk-nobody-has-this-one"),
    Call("no key for the models", BAD_KEY, None, "/v1/models", "GET", key=""),
    Call("streamed without a key", BAD_KEY, body_of(stream=True), key=""),
    Call("unknown model", UNKNOWN_MODEL, body_of("gpt-nobody")),
    Call("unknown model, streamed", UNKNOWN_MODEL, body_of("gpt-nobody", stream=True)),
    Call("unknown model, looked up", UNKNOWN_MODEL, None, "/v1/models/gpt-nobody", "GET"),
    Call("unpriced endpoint", UNKNOWN_PATH, path="/v1/batches"),
    Call("files", UNKNOWN_PATH, path="/v1/files"),
    Call("no prefix", UNKNOWN_PATH, path="/chat/completions"),
    Call("path within", UNKNOWN_PATH, path="/v1/chat/completions/chat"),
    Call("slash behind", UNKNOWN_PATH, path="/v1/chat/completions/"),
    Call("root", UNKNOWN_PATH, path="/"),
    Call("admin path", UNKNOWN_PATH, None, "/metrics", "GET"),
    Call("odd path", UNKNOWN_PATH, None, "/v1/%ff%0d%0a", "GET"),
    Call("GET of a chat", WRONG_METHOD, None, method="GET"),
    Call("POST of models", WRONG_METHOD, path="/v1/models"),
    Call("PROPFIND", WRONG_METHOD, None, method="PROPFIND"),
    Call("too large", TOO_LARGE, body_of(user="x" * BODY_BYTES)),
    Call("too large, streamed", TOO_LARGE, body_of(user="x" * BODY_BYTES, stream=True)),
    Call("empty", invalid(None), b""),
    Call("not JSON", invalid(None), b'{"model": "ok"'),
    Call("not UTF-8", invalid(None), b'{"model": "\xff"}'),
    Call("not an object", invalid(None), b"[]"),
    Call("lone surrogate", invalid(None), body_of(user="\ud800")),
    Call("nested too deep", invalid(None), body_of()[:-1] + b', "metadata": ' + NESTED + b"}"),
    Call("model of the wrong type", invalid("model"), body_of(model=5)),  # type: ignore[arg-type]
    Call("messages of the wrong type", invalid("messages"), body_of(messages="Hello!")),
    Call("max_tokens of the wrong type", invalid("max_tokens"), body_of(max_tokens="many")),
    Call("negative n, streamed", invalid("n"), body_of(n=-1, stream=True)),
    Call("unknown field", invalid("n_predict"), body_of(n_predict=5)),
    Call("no prompt", invalid("prompt"), b'{"model": "ok"}', "/v1/completions"),
    Call("no input", invalid("input"), b'{"model": "ok"}', "/v1/embeddings"),
]


@pytest.mark.parametrize("call", REFUSED_CALLS, ids=str)
async def test_what_cannot_be_priced_is_refused_and_not_forwarded(bench: Bench, call: Call) -> None:
    before, seen = funds_of(bench.gateway), len(bench.upstream.requests)
    answer = await bench.send(call.body, call.path, key=call.key, method=call.method)
    check(answer, call.expected)
    assert len(bench.upstream.requests) == seen
    assert funds_of(bench.gateway) == before


@pytest.mark.parametrize(("path", "allowed"), [("/v1/completions", "POST"), ("/v1/models", "GET, HEAD")])
async def test_a_wrong_method_is_told_the_right_one(bench: Bench, path: str, allowed: str) -> None:
    answer = await bench.send(None, path, method="DELETE")
    check(answer, WRONG_METHOD)
    assert answer.headers["Allow"] == allowed


async def test_a_body_without_a_length_is_measured_as_it_comes(bench: Bench) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    headers = {"Authorization": f"Bearer {bench.gateway.key}"}
    async with bench.session.post(
        f"{bench.gateway.base_url}/chat/completions", data=pieces(), headers=headers
    ) as answer:
        check(Answer(answer.status, answer.headers.copy(), await answer.read()), TOO_LARGE)


async def test_a_body_that_cannot_be_unpacked_is_invalid(bench: Bench) -> None:
    headers = {"Authorization": f"Bearer {bench.gateway.key}", "Content-Encoding": "gzip", "Connection": "close"}
    body = b"\x1f\x8b nonsense"
    async with bench.session.post(f"{bench.gateway.base_url}/chat/completions", data=body, headers=headers) as answer:
        check(Answer(answer.status, answer.headers.copy(), await answer.read()), invalid(None))


async def raw_get(bench: Bench, header: bytes) -> tuple[bytes, bytes]:
    """Head and body of what GET /v1/models answers to a header line of any bytes."""
    address = urlsplit(bench.gateway.base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return head, body


@pytest.mark.parametrize("key", [b"k\xc3\xa9y", b"\xff\xfe", b""], ids=["UTF-8", "no UTF-8", "empty"])
@pytest.mark.parametrize("header", [b"Authorization: Bearer ", b"x-api-key: ", b"token: "])
async def test_a_key_of_any_bytes_is_only_unknown(bench: Bench, header: bytes, key: bytes) -> None:
    head, body = await raw_get(bench, header + key)
    assert head.startswith(b"HTTP/1.1 401 ")
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


async def test_a_key_in_a_malformed_request_is_not_logged(bench: Bench) -> None:
    secret = bench.keys["default"]
    # A key that was pasted with a control character behind it.
    head, _ = await raw_get(bench, f"Authorization: Bearer {secret}\0".encode())
    assert head.split()[1] == b"400"
    assert secret not in bench.gateway.stderr


async def test_a_revoked_key_is_refused_at_once(bench: Bench) -> None:
    made = bench.gateway.cli("keys", "create", "default", "--name", "short-lived")
    assert (await bench.send(body_of(), key=made["secret"])).status == 200
    bench.gateway.cli("keys", "revoke", made["id"])
    seen = len(bench.upstream.requests)
    check(await bench.send(body_of(stream=True), key=made["secret"]), BAD_KEY)
    assert len(bench.upstream.requests) == seen


# --- upstreams -------------------------------------------------------------------------------------------------------

UNAVAILABLE = Expected(502, "api_error", "upstream_unavailable", headers={"Retry-After": "1"})
TIMEOUT = Expected(504, "api_error", "upstream_timeout")
REFUSES_KEY = Expected(502, "api_error", "upstream_auth")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("model", "behaviour", "expected"),
    [
        (REFUSED, None, UNAVAILABLE),
        ("reset-before-headers", None, UNAVAILABLE),
        (HASTY, "hang-before-headers", TIMEOUT),
        ("status-401", None, REFUSES_KEY),
    ],
)
async def test_a_failure_of_the_upstream_is_told_apart(
    bench: Bench, model: str, behaviour: str | None, expected: Expected, stream: bool
) -> None:
    before = funds_of(bench.gateway)
    bench.upstream.behaviour = behaviour
    answer = await bench.send(body_of(model, stream=stream))
    bench.upstream.behaviour = None
    check(answer, expected)
    assert funds_of(bench.gateway) == before


# --- credits ---------------------------------------------------------------------------------------------------------

NO_CREDITS = Expected(402, "insufficient_quota", "insufficient_quota")
TOO_DEAR = Expected(402, "insufficient_quota", "request_exceeds_balance")
SPENT = "usage_limit_reached"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_without_credits_a_request_is_refused_for_good(bench: Bench, stream: bool) -> None:
    seen = len(bench.upstream.requests)
    answer = await bench.send(body_of(stream=stream), key=bench.keys["poor"])
    check(answer, NO_CREDITS)
    metadata = answer.error["metadata"]
    assert Decimal(metadata["required"]) == hold_of(body_of(stream=stream), 16)
    assert (metadata["limit"], metadata["available"], metadata["held"]) == ("credits", "0", "0")
    assert metadata["resets_at"] is None and metadata["window"] is None
    assert answer.headers["x-credits-balance"] == "0"
    assert len(bench.upstream.requests) == seen


async def test_a_request_dearer_than_the_balance_is_told_what_it_can_afford(bench: Bench) -> None:
    key = new_account(bench.gateway, "modest", "prepaid", grant=Decimal("0.00002"))
    body = body_of(max_tokens=500)
    answer = await bench.send(body, key=key)
    check(answer, TOO_DEAR)
    affordable = next(count for count in range(500, -1, -1) if hold_of(body, count) <= Decimal("0.00002"))
    assert 0 < affordable < 16
    assert (
        "requires more credits, or fewer max_tokens. "
        f"You requested up to 500 tokens, but can only afford {affordable}" in answer.error["message"]
    )
    assert answer.error["metadata"]["available"] == "0.00002"
    # As it said: with so many it is let through.
    assert (await bench.send(body_of(max_tokens=affordable), key=key)).status == 200


async def test_credits_held_by_a_request_in_flight_are_worth_waiting_for(bench: Bench) -> None:
    grant = Decimal("0.00005")
    key = new_account(bench.gateway, "busy", "prepaid", grant=grant)
    seen = len(bench.upstream.requests)
    first = asyncio.create_task(bench.send(body_of("hang-before-headers"), key=key))
    await bench.upstream.wait_for_requests(seen + 1)
    try:
        answer = await bench.send(body_of(stream=True), key=key)
        check(
            answer,
            Expected(
                429,
                "rate_limit_error",
                "credits_in_flight",
                headers={"Retry-After": "1", "retry-after-ms": "1000"},
            ),
        )
        metadata = answer.error["metadata"]
        assert Decimal(metadata["held"]) + Decimal(metadata["available"]) == grant
        assert Decimal(metadata["available"]) < Decimal(metadata["required"]) <= grant
        assert len(bench.upstream.requests) == seen + 1
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    # It was true: once the first has ended there is enough.
    async with asyncio.timeout(20):
        while (await bench.send(body_of(), key=key)).status != 200:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def standing_at(bench: Bench, moment: datetime) -> AsyncIterator[None]:
    """The clock stands still meanwhile."""
    bench.clock.freeze_at(at(moment))
    try:
        yield
    finally:
        bench.clock.set_to(NOON + timedelta(hours=1))


@pytest.mark.parametrize("account", ["daily", "frugal"])
async def test_a_spent_allowance_says_when_it_refreshes(bench: Bench, account: str) -> None:
    key = bench.keys[account]
    async with standing_at(bench, NOON + timedelta(minutes=1)):
        assert (await bench.send(body_of("absurd-usage"), key=key)).status == 200
        answer = await bench.send(body_of(stream=True), key=key)
        wait_s = round((MIDNIGHT - NOON).total_seconds()) - 60
        check(answer, Expected(429, SPENT, "insufficient_quota", headers={"Retry-After": str(wait_s), **NEVER}))
        assert answer.error["resets_at"] == round(MIDNIGHT.timestamp())
        assert "2026-11-24T00:00:00Z" in answer.error["message"]
        assert ("IO Credits" in answer.error["message"]) == (account == "daily")
        assert answer.error["metadata"]["resets_at"] == "2026-11-24T00:00:00Z"
        assert answer.error["metadata"]["limit"] == "allowance"
        assert answer.error["metadata"]["plan"] == account

    async with standing_at(bench, MIDNIGHT - timedelta(seconds=60.001)):
        answer = await bench.send(body_of(), key=key)
        check(answer, Expected(429, SPENT, "insufficient_quota", headers={"Retry-After": "61", **NEVER}))


async def test_of_several_windows_the_spent_one_is_named(bench: Bench) -> None:
    key = new_account(bench.gateway, "hourly", "hourly")
    for hour, window, resets_at in ((15, "1h", "2026-11-23T16:00:00Z"), (16, "24h", "2026-11-24T00:00:00Z")):
        async with standing_at(bench, NOON.replace(hour=hour, minute=1)):
            assert (await bench.send(body_of("absurd-usage"), key=key)).status == 200
            answer = await bench.send(body_of(), key=key)
            assert (answer.status, answer.error["type"]) == (429, SPENT)
            assert f"The {window} allowance of plan 'hourly' is spent until {resets_at}." in answer.error["message"]
            assert (answer.error["metadata"]["window"], answer.error["metadata"]["resets_at"]) == (window, resets_at)

    async with standing_at(bench, MIDNIGHT - timedelta(seconds=30)):
        answer = await bench.send(body_of(), key=key)
        assert answer.error["code"] == "rate_limit_exceeded"
        assert answer.error["message"] == "The 24h allowance of plan 'hourly' is spent; it refreshes in 30 s."
        assert answer.error["metadata"]["window"] == "24h"


async def test_a_request_is_told_to_wait_for_the_refresh_that_brings_enough(bench: Bench) -> None:
    key = new_account(bench.gateway, "tight", "tight")
    async with standing_at(bench, NOON.replace(hour=15, minute=1)):
        assert (await bench.send(body_of("absurd-usage"), key=key)).status == 200
        # The hour's window has nothing left and the day's a tenth, which is too little for any hour to come.
        answer = await bench.send(body_of(), key=key)
    assert (answer.status, answer.error["type"]) == (429, SPENT)
    metadata = answer.error["metadata"]
    assert (metadata["window"], metadata["resets_at"]) == ("24h", "2026-11-24T00:00:00Z")
    assert answer.headers["Retry-After"] == str(8 * 3600 + 59 * 60)


async def test_a_plan_without_prepaid_credits_does_not_ask_for_them(bench: Bench) -> None:
    key = new_account(bench.gateway, "thrifty", "frugal", grant=Decimal(1))
    large = body_of(messages=[{"role": "user", "content": "x" * 2000}])
    assert hold_of(large, 16) > DAILY
    closed = new_account(bench.gateway, "outsider", "closed", grant=Decimal(1))
    reason = (
        "Plan 'frugal' does not use prepaid credits, and also after its 24h allowance refreshes at "
        "2026-11-24T00:00:00Z it has too little for this request."
    )
    async with standing_at(bench, NOON + timedelta(minutes=1)):
        answer = await bench.send(large, key=key)
        check(answer, TOO_DEAR)
        # The first half is what clients read the number out of.
        assert answer.error["message"] == (
            "This request requires more credits, or fewer max_tokens. "
            f"You requested up to {MAX_TOKENS} tokens, but can only afford 0. {reason}"
        )
        answer = await bench.send(body_of(), key=closed)
        check(answer, NO_CREDITS)
        assert answer.error["message"] == f"The 24h allowance is spent. {reason.replace('frugal', 'closed')}"
        assert answer.error["metadata"]["window"] == "24h"
        assert (await bench.send(body_of("absurd-usage"), key=key)).status == 200
        # A request that the next window can pay for is told to wait for it.
        answer = await bench.send(body_of(), key=key)
        assert answer.error["type"] == SPENT
        assert answer.error["message"] == (
            "The 24h allowance of plan 'frugal' is spent until 2026-11-24T00:00:00Z. Access pauses until then."
        )


@pytest.mark.parametrize(("before_ms", "retry_s"), [(60_000, 60), (29_500, 30), (1, 1)])
async def test_a_refresh_within_a_minute_is_worth_waiting_for(bench: Bench, before_ms: int, retry_s: int) -> None:
    key = new_account(bench.gateway, f"patient-{before_ms}", "daily")
    async with standing_at(bench, MIDNIGHT - timedelta(milliseconds=before_ms)):
        assert (await bench.send(body_of("absurd-usage"), key=key)).status == 200
        answer = await bench.send(body_of(stream=True), key=key)
        headers = {"Retry-After": str(retry_s), "retry-after-ms": str(before_ms)}
        check(answer, Expected(429, "rate_limit_error", "rate_limit_exceeded", headers=headers))
        assert answer.error["resets_at"] == round(MIDNIGHT.timestamp())
        assert answer.error["metadata"]["resets_at"] == "2026-11-24T00:00:00Z"
    # It was true: who has waited so long gets an answer.
    async with standing_at(bench, MIDNIGHT):
        assert (await bench.send(body_of(), key=key)).status == 200


# --- the store -------------------------------------------------------------------------------------------------------


async def test_while_the_store_is_down_nothing_is_admitted(tmp_path: Path) -> None:
    async with FaultyUpstream() as upstream, aiohttp.ClientSession() as session:
        with valkey_server() as store:
            config = gateway_config(upstream.base_url, ["ok"]) | {"store": {"url": store.url, "timeout": "1500ms"}}
            with running_gateway(config, data_dir=tmp_path / "data") as gateway:
                key = new_account(gateway, "someone", "standard")
                bench = Bench(gateway, upstream, session, MovableClock(tmp_path / "clock"), {"default": key})
                assert (await bench.send(body_of())).status == 200
                store.kill()
                expected = Expected(503, "api_error", "quota_store_unavailable", headers={"Retry-After": "2"})
                for stream in (False, True):
                    check(await bench.send(body_of(stream=stream)), expected)
                check(await bench.send(body_of(), key="sk-nobody-has-this-one"), expected)
                assert len(upstream.requests) == 1
                store.start()
                async with asyncio.timeout(20):
                    while (answer := await bench.send(body_of())).status != 200:
                        check(answer, expected)
                        await asyncio.sleep(0.05)
                assert funds_of(gateway, "someone").used == 2 * cost_of(PROMPT_TOKENS, COMPLETION_TOKENS)
                assert gateway.cli("reservations", "list")["data"] == []


# --- what the SDK makes of it ----------------------------------------------------------------------------------------


async def sent_by_the_sdk(bench: Bench, status: int, model: str, account: str = "default", **fields: Any) -> int:
    """How many requests the openai SDK, allowed two repeats, sends for one that fails with status."""
    before = await bench.requests_logged()
    async with openai.AsyncOpenAI(
        base_url=bench.gateway.base_url, api_key=bench.keys.get(account, account), max_retries=2
    ) as client:
        with pytest.raises(openai.APIStatusError) as failed:
            await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello!"}], max_tokens=MAX_TOKENS, **fields
            )
    assert failed.value.status_code == status
    assert isinstance(failed.value.body, dict)
    assert isinstance(failed.value.body["message"], str)
    assert failed.value.request_id is not None
    return await bench.requests_logged() - before


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("status", "model", "account"),
    [
        (401, "ok", "sk-nobody-has-this-one"),
        (402, "ok", "poor"),
        (404, "gpt-nobody", "default"),
        (502, "status-401", "default"),
    ],
)
async def test_the_sdk_does_not_repeat_what_cannot_succeed(
    bench: Bench, status: int, model: str, account: str, stream: bool
) -> None:
    assert await sent_by_the_sdk(bench, status, model, account, stream=stream) == 1


async def test_the_sdk_does_not_repeat_what_the_upstream_may_still_be_doing(bench: Bench) -> None:
    bench.upstream.behaviour = "hang-before-headers"
    try:
        assert await sent_by_the_sdk(bench, 504, HASTY) == 1
    finally:
        bench.upstream.behaviour = None


async def test_the_sdk_does_not_wait_for_a_distant_refresh(bench: Bench) -> None:
    key = new_account(bench.gateway, "spent", "daily")
    async with standing_at(bench, NOON + timedelta(hours=1)):
        assert (await bench.send(body_of("absurd-usage"), key=key)).status == 200
        assert await sent_by_the_sdk(bench, 429, "ok", key) == 1


async def test_the_sdk_repeats_what_may_succeed(bench: Bench) -> None:
    assert await sent_by_the_sdk(bench, 502, REFUSED) == 3


async def test_nothing_of_this_was_a_mistake_of_the_gateway(bench: Bench) -> None:
    lines = [json.loads(line) for line in bench.gateway.stderr.splitlines()]
    assert [line for line in lines if "exception" in line and line["logger"].startswith("gateway")] == []
