"""The openai SDK's ``client.realtime`` through the real gateway process: every response charged, none for nothing.

The upstream is a stand-in, as no realtime server can be had here.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import ROUND_CEILING, Decimal
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.acceptance.conftest import NOON, TEMPLATE_TOKENS, Funds, funds_of, hanging_store, new_account
from tests.gateway_process import INPUT_PRICE, OUTPUT_PRICE, Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock
from tests.upstreams.realtime import INPUT_TOKENS, SOUND, RealtimeUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 4096
SECONDS = 30
PLENTY = Decimal(1)
#: What a response of a model that nothing is known of holds first.
SLICE = 256
UPSTREAM_KEY = "sk-upstream-of-the-operator"
PRICES = {
    "input": INPUT_PRICE,
    "output": OUTPUT_PRICE,
    "cache_read": Decimal("0.01"),
    "audio_input": Decimal("3.1"),
    "image_input": Decimal("1.7"),
    "audio_output": Decimal("6.3"),
}
#: The dearest of each, which is what is held.
DEAREST_INPUT, DEAREST_OUTPUT = PRICES["audio_input"], PRICES["audio_output"]
#: A gateway learns how long a model's answers are: so a test that needs to know has a model of its own.
MODELS = ["speaker", *(f"speaker-{number}" for number in range(9))]


def config_for(upstream: RealtimeUpstream, plans: dict[str, Any] | None = None) -> dict[str, Any]:
    prices = {f"{kind}_token_price": str(price) for kind, price in PRICES.items()}
    config = gateway_config(upstream.base_url, MODELS, plans=plans or {"prepaid": {"default": True}}, **prices)
    config["upstreams"]["test"]["api_key"] = UPSTREAM_KEY
    config["upstreams"]["impatient"] = {"base_url": upstream.base_url, "idle_timeout": "1s"}
    config["models"]["models"]["impatient"] = {**config["models"]["models"]["speaker"], "upstream": "impatient"}
    config["models"]["models"]["by-the-second"] = {"upstream": "test", "second_price": "0.0001"}
    config["models"]["models"]["by-the-token"] = {
        "upstream": "test",
        "upstream_model": "whisper-9",
        "input_token_price": 2,
        "audio_input_token_price": 6,
        "output_token_price": 10,
        "context_window": 4096,
        "max_output_tokens": 2048,
    }
    config["models"]["models"]["speech"] = {"upstream": "test", "character_price": 15}
    return config


def priced(**tokens: int) -> Decimal:
    """Credits for tokens by kind, computed apart from the gateway: exact, then rounded up once."""
    exact = sum(PRICES[kind] * number for kind, number in tokens.items()) / 1_000_000
    return Decimal(exact).quantize(Decimal("1e-9"), ROUND_CEILING)


def held_for(input_tokens: int, output_tokens: int) -> Decimal:
    """What is held for so many tokens, of which the gateway does not know the kind."""
    return priced(audio_input=input_tokens, audio_output=output_tokens)


@dataclass
class Account:
    """A prepaid account, whose balance is all that it has, and the SDK with its key."""

    gateway: Gateway
    name: str
    key: str
    client: AsyncOpenAI
    grant: Decimal

    @property
    def funds(self) -> Funds:
        return funds_of(self.gateway, self.name)

    async def spent(self) -> Decimal:
        """What is gone of the grant, once nothing is held; the ledger is to agree."""
        async with asyncio.timeout(SECONDS):
            while (funds := self.funds).balance_held:
                await asyncio.sleep(0.02)
        assert self.gateway.cli("reservations", "list", self.name)["data"] == []
        assert self.gateway.cli("ledger", "verify")["ok"]
        return self.grant - funds.balance

    @asynccontextmanager
    async def session(self, model: str = "speaker", **options: Any) -> AsyncIterator[AsyncRealtimeConnection]:
        async with asyncio.timeout(SECONDS), self.client.realtime.connect(model=model, **options) as connection:
            created = await connection.recv()
            assert created.type == "session.created"
            yield connection


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: RealtimeUpstream
    numbers: Any = field(default_factory=count)

    @asynccontextmanager
    async def account(self, grant: Decimal = PLENTY, plan: str = "prepaid") -> AsyncIterator[Account]:
        name = f"a{next(self.numbers)}"
        key = new_account(self.gateway, name, plan, grant=grant)
        async with AsyncOpenAI(base_url=self.gateway.base_url, api_key=key, max_retries=0, timeout=SECONDS) as client:
            yield Account(self.gateway, name, key, client, grant)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with RealtimeUpstream() as upstream:
        data_dir = tmp_path_factory.mktemp("realtime") / "data"
        with running_gateway(config_for(upstream), data_dir=data_dir) as gateway:
            yield Bench(gateway, upstream)
            assert "Traceback" not in gateway.stderr


async def say(connection: AsyncRealtimeConnection, **plan: Any) -> None:
    """Tell the upstream, in an item, what its next response is to be."""
    part = {"type": "input_text", "text": json.dumps(plan)}
    await connection.send({"type": "conversation.item.create", "item": _message(part)})
    assert (await connection.recv()).type == "conversation.item.added"


def _message(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": list(parts)}


async def until(connection: AsyncRealtimeConnection, kind: str) -> list[Any]:
    """The events up to the first of that kind."""
    events: list[Any] = []
    while not events or events[-1].type != kind:
        events.append(await connection.recv())
    return events


async def respond(connection: AsyncRealtimeConnection, **plan: Any) -> list[Any]:
    """Ask for one response, and read it."""
    await say(connection, **plan)
    await connection.response.create()
    return await until(connection, "response.done")


async def closed(connection: AsyncRealtimeConnection) -> tuple[list[Any], int, str]:
    """The events up to the end, and the code and reason that it came with."""
    events: list[Any] = []
    with pytest.raises(ConnectionClosed) as ending:
        while True:
            events.append(await connection.recv())
    frame = ending.value.rcvd
    assert frame is not None, "the connection broke"
    return events, frame.code, frame.reason


def cost_in(done: Any) -> Decimal:
    """What the event says that the response cost."""
    extra = done.response.usage.model_extra
    assert Decimal(str(extra["cost"])).quantize(Decimal("1e-9")) == Decimal(extra["credits"]["cost"])
    return Decimal(extra["credits"]["cost"])


# --- what is charged -------------------------------------------------------------------------------------------------


async def test_a_response_costs_its_usage_by_kind(bench: Bench) -> None:
    usage = {
        "total_tokens": 190,
        "input_tokens": 130,
        "output_tokens": 60,
        "input_token_details": {
            "text_tokens": 60,
            "audio_tokens": 50,
            "image_tokens": 20,
            "cached_tokens": 45,
            "cached_tokens_details": {"text_tokens": 30, "audio_tokens": 10, "image_tokens": 5},
        },
        "output_token_details": {"text_tokens": 20, "audio_tokens": 40},
    }
    async with bench.account() as account:
        async with account.session() as connection:
            events = await respond(connection, words=20, sounds=40, usage=usage)
            cost = cost_in(events[-1])
        assert [event.type for event in events].count("response.output_audio.delta") == 40
        assert events[-1].response.usage.input_tokens == 130
        assert cost == priced(input=30, audio_input=40, image_input=15, cache_read=45, output=20, audio_output=40)
        assert await account.spent() == cost


async def test_each_response_of_a_session_is_charged_by_itself(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            costs = [cost_in((await respond(connection, words=words))[-1]) for words in (10, 300, 5)]
        assert costs == [cost_of(INPUT_TOKENS, words) for words in (10, 300, 5)]
        assert await account.spent() == sum(costs)
        entries = bench.gateway.cli("ledger", "tail", account.name)["data"]
        assert sum(entry["kind"] == "settle" for entry in entries) == 3
        # Each is a request of its own in the log, too, and the session one more.
        lines = [json.loads(line) for line in bench.gateway.stderr.splitlines()]
        told = [line for line in lines if line.get("account") == account.name]
        assert [line["status"] for line in told] == [200, 200, 200, 101]
        assert [Decimal(line["cost"]) for line in told[:3]] == costs


async def test_responses_are_in_the_metrics_of_their_model(bench: Bench) -> None:
    async with bench.account() as account, account.session("speaker-5") as connection:
        await respond(connection, words=7)
    async with aiohttp.ClientSession() as session, session.get(f"{bench.gateway.admin_url}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    labels = {"gen_ai_request_model": "speaker-5", "gen_ai_operation_name": "realtime", "gen_ai_token_type": "output"}
    sums = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "gen_ai_client_token_usage_sum" and labels.items() <= sample.labels.items()
    ]
    assert sums == [7]


async def test_what_is_held_for_the_next_response_follows_what_the_last_one_told(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session("speaker-0") as connection:
            assert account.funds.balance_held == held_for(TEMPLATE_TOKENS, SLICE)
            usage = {"input_tokens": 700, "output_tokens": 100, "total_tokens": 800}
            instructions = "Be brief. " * 60
            await connection.session.update(session={"type": "realtime", "instructions": instructions})
            await until(connection, "session.updated")
            await respond(connection, words=10, usage=usage)
            plan = json.dumps({"words": 10, "pause_at": 0, "name": account.name})
            item = _message({"type": "input_text", "text": plan})
            await connection.send({"type": "conversation.item.create", "item": item})
            await connection.response.create()
            await until(connection, "response.created")
            # The item's own bytes, and what the conversation was: the instructions are in that.
            told = bench.upstream.told[-1].events[-2]["item"]
            size = len(json.dumps(told, separators=(",", ":")).encode())
            assert account.funds.balance_held == held_for(800 + size + TEMPLATE_TOKENS, SLICE)
            bench.upstream.go(account.name)
            await until(connection, "response.done")
        assert await account.spent() == cost_of(700, 100) + cost_of(INPUT_TOKENS, 10)


async def test_a_session_that_says_nothing_costs_nothing(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            response = connection._connection.response
            assert response is not None
            assert response.headers["x-request-id"].startswith("req_")
            assert Decimal(response.headers["x-credits-reserved"]) == account.funds.balance_held > 0
        assert await account.spent() == 0


@pytest.mark.parametrize(("status", "cost"), [("failed", 0), ("cancelled", None), ("completed", None)])
async def test_a_response_without_a_usage_costs_what_was_counted(bench: Bench, status: str, cost: int | None) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await respond(connection, words=12, usage=None, status=status)
        item = bench.upstream.told[-1].events[-2]["item"]
        size = len(json.dumps(item, separators=(",", ":")).encode())
        assert await account.spent() == (cost_of(-(-size // 4), 12) if cost is None else cost)


async def test_an_upstream_that_does_not_stream_its_output_is_held_for_and_paid_all_the_same(bench: Bench) -> None:
    async with bench.account() as account, account.session() as connection:
        await say(connection, words=800, done_only=True, stay=account.name)
        await connection.response.create()
        await until(connection, "response.output_item.done")
        connection._connection.transport.abort()
        assert await account.spent() == cost_of(INPUT_TOKENS, 400)  # two bytes a word, four a token


async def test_a_usage_beyond_the_bound_is_charged_up_to_the_bound(bench: Bench) -> None:
    absurd = {"input_tokens": 10**9, "output_tokens": 10**9, "total_tokens": 2 * 10**9}
    async with bench.account() as account:
        async with account.session() as connection:
            await respond(connection, words=1, usage=absurd)
        item = bench.upstream.told[-1].events[-2]["item"]
        size = len(json.dumps(item, separators=(",", ":")).encode())
        assert await account.spent() == cost_of(TEMPLATE_TOKENS + size, 2048)
        assert "more than the bound" in bench.gateway.stderr


async def test_what_the_upstream_hears_is_answered_by_itself_and_charged(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            detection = {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
            await connection.session.update(session={"type": "realtime", **detection})
            await until(connection, "session.updated")
            await say(connection, words=30)
            for _ in range(45):  # 2.25 s: two turns of speech
                await connection.input_audio_buffer.append(audio=SOUND)
            first = await until(connection, "response.done")
            second = await until(connection, "response.done")
        assert [cost_in(events[-1]) for events in (first, second)] == [cost_of(INPUT_TOKENS, 30)] * 2
        assert await account.spent() == 2 * cost_of(INPUT_TOKENS, 30)


@pytest.mark.parametrize(
    ("model", "usage", "cost"),
    [
        ("by-the-second", {"type": "duration", "seconds": 1.25}, "0.000125"),
        ("by-the-second", {"type": "duration", "seconds": 10**9}, "0.0002"),  # what was sent: 2 s
        ("by-the-second", None, "0.0002"),
        (
            "by-the-token",
            {
                "type": "tokens",
                "input_tokens": 15,
                "output_tokens": 4,
                "total_tokens": 19,
                "input_token_details": {"text_tokens": 3, "audio_tokens": 12},
            },
            "0.000118",  # 3 × 2 + 12 × 6 + 4 × 10
        ),
    ],
)
async def test_a_transcription_is_charged_at_the_prices_of_its_own_model(
    bench: Bench, model: str, usage: Any, cost: str
) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            audio = {"input": {"transcription": {"model": model, "language": "en"}, "turn_detection": None}}
            await connection.session.update(session={"type": "realtime", "audio": audio})  # type: ignore[typeddict-item]
            await until(connection, "session.updated")
            await say(connection, words=3, transcript=usage)
            for _ in range(40):
                await connection.input_audio_buffer.append(audio=SOUND)
            await connection.input_audio_buffer.commit()
            events = await until(connection, "conversation.item.input_audio_transcription.completed")
            assert Decimal(events[-1].usage.credits["cost"]) == Decimal(cost)
            await connection.response.create()
            await until(connection, "response.done")
        told = bench.upstream.told[-1].events[0]["session"]["audio"]["input"]["transcription"]
        assert told["model"] == ("whisper-9" if model == "by-the-token" else model)
        assert await account.spent() == Decimal(cost) + cost_of(INPUT_TOKENS, 3)


@pytest.mark.parametrize("usage", [{"type": "duration", "seconds": 1}, None])
async def test_audio_that_is_committed_before_the_last_transcript_came_is_charged_once(
    bench: Bench, usage: Any
) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            audio = {"input": {"transcription": {"model": "by-the-second"}, "turn_detection": None}}
            await connection.session.update(session={"type": "realtime", "audio": audio})  # type: ignore[typeddict-item]
            await until(connection, "session.updated")
            await say(connection, words=1, late=True, transcript=usage)
            for _ in range(2):
                for _ in range(20):
                    await connection.input_audio_buffer.append(audio=SOUND)
                await connection.input_audio_buffer.commit()
                await until(connection, "conversation.item.input_audio_transcription.delta")
            await connection.response.create()
            await until(connection, "response.done")
        assert await account.spent() == 2 * Decimal("0.0001") + cost_of(INPUT_TOKENS, 1)


async def test_a_transcript_that_was_shown_is_charged_though_its_client_left(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            audio = {"input": {"transcription": {"model": "by-the-second"}}}
            await connection.session.update(session={"type": "realtime", "audio": audio})
            await connection.input_audio_buffer.append(audio=SOUND)
            await connection.input_audio_buffer.commit()
            await until(connection, "conversation.item.input_audio_transcription.delta")
        assert await account.spent() == Decimal("0.000005")


async def test_responses_beside_each_other_are_each_held_for_and_charged(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await say(connection, words=10, pause_at=5, name=account.name)
            for _ in range(5):
                await connection.send({"type": "response.create", "response": {"conversation": "none"}})
            refusal = (await until(connection, "error"))[-1]
            assert (refusal.error.code, "4 responses" in refusal.error.message) == ("unsupported", True)
            assert account.funds.balance_held >= 4 * held_for(TEMPLATE_TOKENS, 5)
            bench.upstream.go(account.name)
            for _ in range(4):
                await until(connection, "response.done")
        assert bench.upstream.told[-1].kinds().count("response.create") == 4
        assert await account.spent() == 4 * cost_of(INPUT_TOKENS, 10)


async def test_a_response_that_the_upstream_refuses_costs_nothing(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await say(connection, refuse=True)
            await connection.response.create()
            await until(connection, "error")
            await respond(connection, words=3)
        assert await account.spent() == cost_of(INPUT_TOKENS, 3)


def own_input(**plan: Any) -> dict[str, Any]:
    """A response that answers a text of its own, of some thousand tokens, beside the conversation."""
    item = _message({"type": "input_text", "text": "word " * 600})
    return {"conversation": "none", "input": [item], "metadata": {"plan": json.dumps(plan)}}


async def test_a_refusal_of_another_event_by_the_same_id_does_not_make_a_response_cheaper(bench: Bench) -> None:
    usage = {"input_tokens": 2000, "output_tokens": 1, "total_tokens": 2001}
    async with bench.account() as account:
        async with account.session() as connection:
            await connection.send({"type": "conversation.item.delete", "item_id": "none", "event_id": "mine"})
            create = {"type": "response.create", "event_id": "mine", "response": own_input(words=1, usage=usage)}
            await connection.send(create)  # type: ignore[arg-type]
            await until(connection, "response.done")
        assert await account.spent() == cost_of(2000, 1)


async def test_a_response_that_the_upstream_begins_meanwhile_does_not_make_another_cheaper(bench: Bench) -> None:
    usage = {"input_tokens": 2000, "output_tokens": 1, "total_tokens": 2001}
    async with bench.account() as account:
        async with account.session() as connection:
            detection = {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
            await connection.session.update(session={"type": "realtime", **detection})
            await until(connection, "session.updated")
            await say(connection, words=1, late=True)
            for _ in range(20):
                await connection.input_audio_buffer.append(audio=SOUND)
            await connection.send({"type": "response.create", "response": own_input(words=1, usage=usage)})
            for _ in range(2):
                await until(connection, "response.done")
        assert await account.spent() == cost_of(INPUT_TOKENS, 1) + cost_of(2000, 1)


async def test_a_refusal_names_the_event_as_its_client_does(bench: Bench) -> None:
    async with bench.account() as account, account.session() as connection:
        await say(connection, refuse=True)
        await connection.send({"type": "response.create", "event_id": 'my "own"'})
        assert (await until(connection, "error"))[-1].error.event_id == 'my "own"'


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_the_customers_key_stays_here(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session(extra_headers={"OpenAI-Beta": "realtime=v1"}, extra_query={"trace": "1"}):
            pass
        told = bench.upstream.told[-1]
        assert account.key not in json.dumps([told.headers, told.query])
        assert told.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert told.headers["openai-beta"] == "realtime=v1"
        assert told.query == {"model": "speaker"}


@pytest.mark.parametrize("others", [("realtime",), ()])
async def test_a_key_in_a_subprotocol_is_as_good_as_one_in_a_header(bench: Bench, others: tuple[str, ...]) -> None:
    async with bench.account() as account, aiohttp.ClientSession() as session:
        protocols = [
            *others,
            f"openai-insecure-api-key.{account.key}",
            "openai-organization.o",
            "openai-beta.realtime-v1",
        ]
        url = f"{bench.gateway.base_url}/realtime?model=speaker"
        async with session.ws_connect(url, protocols=protocols) as socket:
            assert socket.protocol == (others[0] if others else None)
            assert (await socket.receive_json())["type"] == "session.created"
        told = bench.upstream.told[-1]
        assert account.key not in json.dumps([told.headers, told.query])
        assert told.headers["sec-websocket-protocol"].split(",") == [*others, "openai-beta.realtime-v1"]
        assert account.key not in bench.gateway.stderr
        assert await account.spent() == 0


# --- handshakes that are refused --------------------------------------------------------------------------------------


async def refused(bench: Bench, key: str, query: str) -> tuple[int, Any]:
    """Status and error of a handshake; nothing may reach the upstream unless it is the one who refuses."""
    before = len(bench.upstream.told)
    headers = {
        "Authorization": f"Bearer {key}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{bench.gateway.base_url}/realtime{query}", headers=headers) as answer,
    ):
        assert len(bench.upstream.told) == before
        return answer.status, (await answer.json())["error"]


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("?model=nobody", 404, "model_not_found", "model"),
        ("", 400, "invalid_request", "model"),
        ("?model=speech", 400, "invalid_request", "model"),
        ("?model=speaker&intent=transcription", 400, "invalid_request", "intent"),
        ("?model=speaker&call_id=rtc_1", 400, "invalid_request", "call_id"),
    ],
)
async def test_what_has_no_price_is_refused_before_the_upgrade(
    bench: Bench, query: str, status: int, code: str, param: str
) -> None:
    async with bench.account() as account:
        assert (await refused(bench, account.key, query))[0] == status
        error = (await refused(bench, account.key, query))[1]
        assert (error["code"], error["param"]) == (code, param)
        assert await account.spent() == 0


async def test_a_bad_key_is_refused_before_the_upgrade(bench: Bench) -> None:
    async with AsyncOpenAI(base_url=bench.gateway.base_url, api_key="sk-nobody's") as client:
        with pytest.raises(InvalidStatus) as refusal:
            async with client.realtime.connect(model="speaker"):
                pass
    assert refusal.value.response.status_code == 401
    assert json.loads(refusal.value.response.body)["error"]["code"] == "invalid_api_key"


async def test_without_credits_there_is_no_upgrade(bench: Bench) -> None:
    async with bench.account(held_for(TEMPLATE_TOKENS, 15)) as account:
        status, error = await refused(bench, account.key, "?model=speaker")
        assert (status, error["code"]) == (402, "request_exceeds_balance")
        assert await account.spent() == 0


async def test_a_plain_request_is_told_to_upgrade(bench: Bench) -> None:
    url = f"{bench.gateway.base_url}/realtime?model=speaker"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert (answer.status, answer.headers["Upgrade"]) == (426, "websocket")
        assert (await answer.json())["error"]["code"] == "upgrade_required"


@pytest.mark.parametrize(("status", "seen", "code"), [(401, 502, "upstream_auth"), (429, 429, "refused")])
async def test_what_the_upstream_says_to_the_handshake_is_told(bench: Bench, status: int, seen: int, code: str) -> None:
    async with bench.account() as account:
        bench.upstream.refuse = status
        try:
            got, error = await refused(bench, account.key, "?model=speaker")
        finally:
            bench.upstream.refuse = None
        assert (got, error["code"]) == (seen, code)
        assert await account.spent() == 0


async def test_an_upstream_that_is_away_is_told_before_the_upgrade(tmp_path: Path) -> None:
    async with RealtimeUpstream() as upstream:
        config = config_for(upstream)
    with running_gateway(config, data_dir=tmp_path / "data") as gateway:
        bench = Bench(gateway, upstream)
        async with bench.account() as account:
            status, error = await refused(bench, account.key, "?model=speaker")
            assert (status, error["code"]) == (502, "upstream_unavailable")
            assert await account.spent() == 0


async def test_an_upstream_that_does_not_answer_the_handshake_is_told(bench: Bench) -> None:
    async with bench.account() as account:
        bench.upstream.silent = True
        try:
            status, error = await refused(bench, account.key, "?model=impatient")
        finally:
            bench.upstream.silent = False
        assert (status, error["code"]) == (504, "upstream_timeout")
        assert await account.spent() == 0


# --- events that are refused -----------------------------------------------------------------------------------------

_SESSION = {"type": "session.update"}
_TOOLS = [{"type": "mcp", "server_label": "x", "server_url": "https://x.example"}]


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({**_SESSION, "session": {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}}, "transcription"),
        ({**_SESSION, "session": {"tools": _TOOLS}}, "session.tools[0].type"),
        ({**_SESSION, "session": {"model": "a-dearer-one"}}, "model"),
        ({**_SESSION, "session": {"type": "transcription"}}, "type"),
        ({**_SESSION, "session": {"audio": {"input": {"format": {"type": "audio/opus"}}}}}, "format"),
        ({**_SESSION, "session": {"service_tier": "priority"}}, "service_tier"),
        ({"type": "response.create", "response": {"tools": _TOOLS}}, "response.tools[0].type"),
        ({"type": "transcription_session.update", "session": {}}, "type"),
    ],
)
async def test_an_event_whose_cost_is_not_known_is_refused_and_the_session_goes_on(
    bench: Bench, event: dict[str, Any], param: str
) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await connection.send({**event, "event_id": "mine"})  # type: ignore[arg-type]
            error = (await connection.recv()).error  # type: ignore[union-attr]
            assert (error.type, error.code, error.event_id) == ("invalid_request_error", "unsupported", "mine")
            assert param in error.param
            await respond(connection, words=2)
        assert event["type"] not in [kind for kind in bench.upstream.told[-1].kinds() if kind != "response.create"]
        assert await account.spent() == cost_of(INPUT_TOKENS, 2)


@pytest.mark.parametrize(("frame", "code"), [("{no event", 1007), ("[]", 1007), (b"\x00\x01", 1003)])
async def test_what_is_no_event_ends_the_session(bench: Bench, frame: str | bytes, code: int) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await connection._connection.send(frame)
            events, got, reason = await closed(connection)
        assert (events[-1].type, events[-1].error.code) == ("error", "invalid_event")
        assert (got, reason.partition(":")[0]) == (code, "invalid_event")
        assert await account.spent() == 0


# --- how sessions end ------------------------------------------------------------------------------------------------


async def test_credits_that_end_in_mid_response_stop_it_and_say_so(bench: Bench) -> None:
    async with bench.account(held_for(TEMPLATE_TOKENS + 200, 700)) as account:
        async with account.session() as connection:
            await say(connection, words=2000)
            await connection.response.create()
            events, code, reason = await closed(connection)
        error = events[-1]
        assert (error.type, error.error.type, error.error.code) == ("error", *["insufficient_quota"] * 2)
        assert (code, reason.partition(":")[0]) == (1008, "insufficient_quota")
        told = bench.upstream.told[-1]
        await told.over.wait()
        assert told.kinds()[-1] == "response.cancel"
        words = sum(event.type == "response.output_text.delta" for event in events)
        assert 700 <= words < 1000
        assert await account.spent() == cost_of(INPUT_TOKENS, words) <= account.grant


async def test_a_session_whose_next_response_cannot_be_paid_ends(bench: Bench) -> None:
    async with bench.account(held_for(TEMPLATE_TOKENS + 350, 20)) as account:
        async with account.session("speaker-1") as connection:
            usage = {"input_tokens": 400, "output_tokens": 10, "total_tokens": 410}
            details = {"input_token_details": {"audio_tokens": 400}}
            done = await respond(connection, words=10, usage={**usage, **details})
            await connection.send({"type": "conversation.item.create", "item": _message()})
            events, code, reason = await closed(connection)
        assert events[-1].error.code in ("request_exceeds_balance", "insufficient_quota")
        assert (code, reason.partition(":")[0]) == (1008, events[-1].error.code)
        assert await account.spent() == cost_in(done[-1]) <= account.grant


async def test_a_client_that_leaves_in_mid_response_pays_for_what_it_got(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await say(connection, words=2000, pause_at=300, name=account.name)
            await connection.response.create()
            for _ in range(301):  # response.created first
                await connection.recv()
        told = bench.upstream.told[-1]
        await told.over.wait()
        assert told.kinds()[-1] == "response.cancel"
        assert await account.spent() == cost_of(INPUT_TOKENS, 300)


async def test_a_client_that_breaks_off_pays_for_what_it_got(bench: Bench) -> None:
    async with bench.account() as account, account.session() as connection:
        await say(connection, words=2000, pause_at=50, name=account.name)
        await connection.response.create()
        for _ in range(51):
            await connection.recv()
        connection._connection.transport.abort()
        assert await account.spent() == cost_of(INPUT_TOKENS, 50)


async def test_whenever_a_client_breaks_off_nothing_stays_held(bench: Bench) -> None:
    async with bench.account() as account:

        async def break_off_after(events: int) -> None:
            async with account.session("speaker-4") as connection:
                item = _message({"type": "input_text", "text": json.dumps({"words": 3})})
                for _ in range(3):
                    await connection.send({"type": "conversation.item.create", "item": item})
                    await connection.response.create()
                for _ in range(events):
                    await connection.recv()
                connection._connection.transport.abort()

        for events in range(22):
            await break_off_after(events)
        # A hold that nobody ended would last a minute.
        assert 0 < await account.spent() <= 22 * 3 * cost_of(INPUT_TOKENS, 3)


async def test_a_client_that_leaves_during_the_handshake_holds_nothing(bench: Bench) -> None:
    async with bench.account() as account:
        bench.upstream.silent = True
        try:
            handshake = asyncio.ensure_future(refused(bench, account.key, "?model=speaker"))
            async with asyncio.timeout(SECONDS):
                while not account.funds.balance_held:
                    await asyncio.sleep(0.02)
            handshake.cancel()
            assert await account.spent() == 0
        finally:
            bench.upstream.silent = False


async def test_a_response_that_breaks_at_the_upstream_costs_nothing(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            first = await respond(connection, words=5)
            await say(connection, words=20, break_at=10)
            await connection.response.create()
            events, code, reason = await closed(connection)
        assert events[-1].error.code == "upstream_unavailable"
        assert (code, reason.partition(":")[0]) == (1011, "upstream_unavailable")
        assert await account.spent() == cost_in(first[-1])


async def test_an_upstream_that_ends_the_session_in_good_order_is_paid(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session() as connection:
            await say(connection, words=20, close_at=8, code=4001)
            await connection.response.create()
            _, code, reason = await closed(connection)
        assert (code, reason) == (4001, "that is all")
        item = bench.upstream.told[-1].events[-2]["item"]
        size = len(json.dumps(item, separators=(",", ":")).encode())
        assert await account.spent() == cost_of(-(-size // 4), 8)


async def test_a_gateway_that_ends_lets_a_response_end_first(tmp_path: Path) -> None:
    async with RealtimeUpstream() as upstream:
        with running_gateway(config_for(upstream), data_dir=tmp_path / "data") as gateway:
            async with Bench(gateway, upstream).account() as account:
                async with account.session() as idle, account.session() as busy:
                    await say(busy, words=20, pause_at=10, name="end")
                    await busy.response.create()
                    await until(busy, "response.output_text.delta")
                    gateway.process.send_signal(signal.SIGTERM)
                    events, code, _ = await closed(idle)
                    assert (events[-1].error.code, code) == ("session_expired", 1001)
                    upstream.go("end")
                    events, code, _ = await closed(busy)
                    assert [event.type for event in events[-2:]] == ["response.done", "error"]
                    assert code == 1001
                assert await asyncio.to_thread(gateway.wait) == 0
                assert await account.spent() == cost_of(INPUT_TOKENS, 20)


async def test_a_gateway_that_must_end_at_once_charges_what_was_handed_out(tmp_path: Path) -> None:
    async with RealtimeUpstream() as upstream:
        with running_gateway(config_for(upstream), data_dir=tmp_path / "data") as gateway:
            async with Bench(gateway, upstream).account() as account:
                async with account.session() as connection:
                    await say(connection, words=20, pause_at=10, name="never")
                    await connection.response.create()
                    for _ in range(11):
                        await connection.recv()
                    gateway.process.send_signal(signal.SIGTERM)
                    while "stopping" not in gateway.stderr:
                        await asyncio.sleep(0.02)
                    gateway.process.send_signal(signal.SIGTERM)  # a second one at the same time would not be seen
                    _, code, _ = await closed(connection)
                    assert code == 1001
                assert await asyncio.to_thread(gateway.wait) == 0
                assert await account.spent() == cost_of(INPUT_TOKENS, 10)


async def test_a_session_in_which_nothing_moves_ends(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session("impatient") as connection:
            events, code, reason = await closed(connection)
        assert (events[-1].error.code, code, reason.partition(":")[0]) == ("session_expired", 1001, "session_expired")
        assert await account.spent() == 0


async def test_sessions_beside_each_other_spend_no_more_than_there_is(bench: Bench) -> None:
    async with bench.account(held_for(4 * (TEMPLATE_TOKENS + 200), 2500)) as account:

        async def talk() -> Decimal:
            paid = Decimal(0)
            try:
                async with account.session("speaker-3") as connection:
                    for _ in range(3):
                        paid += cost_in((await respond(connection, words=900))[-1])
            except InvalidStatus as refusal:
                assert refusal.response.status_code in (402, 429)
            except (AssertionError, ConnectionClosed):
                pass  # the session was ended, which the event before said
            return paid

        paid = sum(await asyncio.gather(*(talk() for _ in range(10))))
        spent = await account.spent()
        assert paid <= spent <= account.grant  # what was cut is charged too, though no response tells its cost
        assert spent > 0
        assert "wrote off" not in bench.gateway.stderr


async def test_a_store_that_goes_away_ends_the_session_once_its_hold_is_used_up(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session("speaker-2") as connection:
            await say(connection, words=2000, pause_at=100, name=account.name)
            await connection.response.create()
            for _ in range(101):
                await connection.recv()
            with hanging_store(bench.gateway):
                bench.upstream.go(account.name)
                events, code, reason = await closed(connection)
        assert events[-1].error.code == "quota_store_unavailable"
        assert (code, reason.partition(":")[0]) == (1013, "quota_store_unavailable")
        words = 100 + sum(event.type == "response.output_text.delta" for event in events)
        assert await account.spent() == cost_of(INPUT_TOKENS, words)


async def test_what_the_store_cannot_take_now_is_charged_later_and_once(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.session("speaker-6") as connection:
            await say(connection, words=20, pause_at=10, name=account.name)
            await connection.response.create()
            await until(connection, "response.output_text.delta")
            with hanging_store(bench.gateway):
                bench.upstream.go(account.name)
                done = (await until(connection, "response.done"))[-1]
                assert "cost" not in done.response.usage.model_extra
        assert await account.spent() == cost_of(INPUT_TOKENS, 20)


async def test_a_killed_gateways_sessions_are_charged_as_far_as_was_seen(tmp_path: Path) -> None:
    async with RealtimeUpstream() as upstream:
        config = config_for(upstream)
        with running_gateway(config, data_dir=tmp_path / "data") as gateway:
            async with Bench(gateway, upstream).account() as account, account.session() as connection:
                await say(connection, words=2000, pause_at=600, name="never")
                await connection.response.create()
                for _ in range(601):
                    await connection.recv()
                gateway.kill()
        item = upstream.told[-1].events[-2]["item"]
        size = len(json.dumps(item, separators=(",", ":")).encode())
        with running_gateway(config, data_dir=tmp_path / "data") as again:
            account.gateway = again
            # Up to the last time that the hold was extended: half a slice before its end, or later.
            assert cost_of(-(-size // 4), 256) <= await account.spent() <= cost_of(-(-size // 4), 600)


async def test_responses_on_either_side_of_a_refresh_are_paid_by_their_own_windows(
    tmp_path: Path, clock: MovableClock
) -> None:
    plans = {"daily": {"default": True, "allowance": {"per_window": "0.01", "refresh": "24h"}}}
    async with RealtimeUpstream() as upstream:
        config = config_for(upstream, plans)
        with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
            key = new_account(gateway, "daily", "daily")
            async with AsyncOpenAI(base_url=gateway.base_url, api_key=key) as client:
                account = Account(gateway, "daily", key, client, Decimal(0))
                async with account.session() as connection:
                    first = await respond(connection, words=40)
                    assert funds_of(gateway, "daily").used == cost_in(first[-1])
                    assert funds_of(gateway, "daily").held == 0
                    clock.set_to(NOON + timedelta(days=1))
                    second = await respond(connection, words=50)
                    assert funds_of(gateway, "daily").used == cost_in(second[-1]) == cost_of(INPUT_TOKENS, 50)
                assert await account.spent() == 0
