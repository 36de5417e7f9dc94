"""Fallbacks: who answers where a model's upstream fails, what it costs then, and how often each upstream is asked."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from tests.acceptance.conftest import Answer, ask, funds_of, new_account
from tests.acceptance.media import PLANS, form
from tests.gateway_process import Gateway, running_gateway
from tests.upstreams.scripted import Script, ScriptedUpstream, says, streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: USD per million tokens of input and output, by the model that answers.
PRICES = {
    "first": (Decimal("0.5"), Decimal(1)),
    "second": (Decimal(2), Decimal("4.001")),
    "third": (Decimal(1), Decimal(2)),
}
NAMES = tuple(PRICES)
TEMPLATE, WINDOW, MOST = 256, 4096, 512


@dataclass
class Bench:
    gateway: Gateway
    upstreams: dict[str, ScriptedUpstream]
    session: aiohttp.ClientSession

    def will(self, **scripts: Script) -> None:
        """How each upstream answers from now on; those that are not named answer well. Forgets what was asked."""
        for name, upstream in self.upstreams.items():
            upstream.script = scripts.get(name, answer(name))
            upstream.asked.clear()

    @property
    def counts(self) -> list[int]:
        """How many requests each upstream got."""
        return [len(upstream.asked) for upstream in self.upstreams.values()]

    async def ask(self, body: dict[str, Any], path: str = "/chat/completions", key: str = "") -> Answer:
        return await ask(self.session, self.gateway, key or str(self.gateway.key), json.dumps(body).encode(), path)

    async def used(self) -> Decimal:
        """What was charged in all, once nothing is held."""
        async with asyncio.timeout(20):
            while (funds := await asyncio.to_thread(funds_of, self.gateway)).held:
                await asyncio.sleep(0.02)
        return funds.used


def answer(name: str) -> Script:
    text = f"This is {name}."
    return says({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": USAGE})


USAGE = {"prompt_tokens": 20, "completion_tokens": 10}
FAILS: dict[str, Script] = {
    str(status): says({"error": {"message": f"status {status}"}}, status)
    for status in (401, 402, 403, 429, 500, 502, 503, 529)
}


def cost_of(name: str, given: int = 20, made: int = 10) -> Decimal:
    into, out = PRICES[name]
    return ((given * into + made * out) / 1_000_000).quantize(Decimal("0.000000001"), ROUND_CEILING)


def body_of(model: str = "first", **members: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 100, **members}


def hold_of(name: str, body: dict[str, Any]) -> Decimal:
    named = {key: value for key, value in body.items() if key != "max_tokens"} | {"model": SENT_AS.get(name, name)}
    return cost_of(name, len(json.dumps(named, separators=(",", ":"))) + TEMPLATE, body["max_tokens"])


SENT_AS = {"second": "the/second-one"}


def config_of(upstreams: dict[str, ScriptedUpstream], fallbacks: Iterable[str] = ("second", "third")) -> dict[str, Any]:
    def model(name: str, **members: Any) -> dict[str, Any]:
        into, out = PRICES[name]
        prices = {"input_token_price": str(into), "output_token_price": str(out)}
        return {"upstream": name, **prices, "context_window": WINDOW, "max_output_tokens": MOST, **members}

    others: dict[str, dict[str, Any]] = {
        "nowhere": {**model("first"), "upstream": "nowhere", "fallbacks": ["second"]},
        "slow": {**model("first"), "upstream": "slow", "fallbacks": ["second"]},
        # What only one of them sells, or lets through.
        "voice": {"upstream": "first", "character_price": 15, "fallbacks": ["other-ears", "other-voice"]},
        "other-voice": {"upstream": "third", "character_price": 30},
        "open": {**model("first"), "upstream": "lets-through", "fallbacks": ["second", "open-too"]},
        "open-too": {**model("third"), "upstream": "lets-through-too"},
        "ears": {"upstream": "first", "second_price": "0.001", "fallbacks": ["other-ears"]},
        "other-ears": {"upstream": "second", "second_price": "0.002", "upstream_model": "real-ears"},
    }
    return {
        "upstreams": {
            **{
                name: {"base_url": upstream.base_url, "api_key": f"key-of-{name}"}
                for name, upstream in upstreams.items()
            },
            "nowhere": {"base_url": "http://127.0.0.1:1/v1"},
            "slow": {"base_url": upstreams["first"].base_url, "idle_timeout": "300ms"},
            "lets-through": {"base_url": upstreams["first"].base_url, "allow_fields": ["magic"]},
            "lets-through-too": {"base_url": upstreams["third"].base_url, "allow_fields": ["magic"]},
        },
        "plans": PLANS,
        "models": {
            "price_unit": "usd_per_million_tokens",
            "models": {
                "first": model("first", fallbacks=list(fallbacks)),
                "second": model("second", upstream_model=SENT_AS["second"]),
                "third": model("third"),
                **others,
            },
        },
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("fallbacks") / "data"
    async with AsyncExitStack() as stack:
        upstreams = {name: await stack.enter_async_context(ScriptedUpstream()) for name in NAMES}
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)))
        gateway = stack.enter_context(running_gateway(config_of(upstreams), data_dir=data_dir))
        yield Bench(gateway, upstreams, session)


async def test_a_model_that_answers_is_not_replaced(bench: Bench) -> None:
    bench.will()
    answer = await bench.ask(body_of())
    assert (answer.cost, bench.counts) == (cost_of("first"), [1, 0, 0])
    assert "x-credits-model" not in answer.headers
    # What it holds is enough for whichever will answer.
    assert Decimal(answer.headers["x-credits-reserved"]) == hold_of("second", body_of())


@pytest.mark.parametrize("failure", FAILS)
async def test_where_an_upstream_fails_the_next_answers_at_its_own_price(bench: Bench, failure: str) -> None:
    bench.will(first=FAILS[failure])
    before = await bench.used()
    answer = await bench.ask(body_of())
    assert (answer.status, bench.counts) == (200, [1, 1, 0])
    assert answer.document["choices"][0]["message"]["content"] == "This is second."
    assert answer.headers["x-credits-model"] == "second"
    assert answer.cost == cost_of("second")
    assert await bench.used() - before == cost_of("second")
    sent = bench.upstreams["second"].asked[0]
    assert sent.document["model"] == "the/second-one"
    assert sent.document["max_tokens"] == 100
    assert sent.headers["Authorization"] == "Bearer key-of-second"


async def test_the_third_answers_where_two_fail(bench: Bench) -> None:
    bench.will(first=FAILS["503"], second=FAILS["429"])
    answer = await bench.ask(body_of())
    assert (answer.headers["x-credits-model"], answer.cost, bench.counts) == ("third", cost_of("third"), [1, 1, 1])
    # Each is asked for by its own name, or by what its upstream calls it.
    names = [upstream.asked[-1].document["model"] for upstream in bench.upstreams.values()]
    assert names == ["first", "the/second-one", "third"]
    last = bench.gateway.cli("ledger", "tail", "default")["data"][-1]
    assert last["model"] == "first"
    assert last["extra"]["note"]["answered_by"] == "third"


async def test_an_upstream_that_nobody_reaches_is_replaced(bench: Bench) -> None:
    bench.will()
    answer = await bench.ask(body_of("nowhere"))
    assert (answer.headers["x-credits-model"], answer.cost, bench.counts) == ("second", cost_of("second"), [0, 1, 0])


async def test_an_upstream_that_hangs_up_before_it_answers_is_replaced(bench: Bench) -> None:
    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    bench.will(first=hang_up)
    answer = await bench.ask(body_of())
    assert (answer.headers["x-credits-model"], bench.counts) == ("second", [1, 1, 0])


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_what_is_the_clients_own_fault_is_not_asked_of_another(bench: Bench, status: int) -> None:
    bench.will(first=says({"error": {"message": "no"}}, status))
    before = await bench.used()
    answer = await bench.ask(body_of())
    assert (answer.status, answer.error["message"], bench.counts) == (status, "no", [1, 0, 0])
    assert await bench.used() == before


async def test_what_was_sent_and_not_answered_in_time_is_not_sent_again(bench: Bench) -> None:
    gate = asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        await gate.wait()
        return web.Response()

    bench.will(first=wait)
    before = await bench.used()
    answer = await bench.ask(body_of("slow"))
    gate.set()
    assert (answer.status, answer.error["code"], bench.counts) == (504, "upstream_timeout", [1, 0, 0])
    assert await bench.used() == before


async def test_a_useless_answer_is_not_asked_for_again(bench: Bench) -> None:
    bench.will(first=says(["no", "answer"]))
    answer = await bench.ask(body_of())
    assert (answer.status, bench.counts) == (502, [1, 0, 0])


@pytest.mark.parametrize(("failure", "shown"), [("429", 429), ("500", 500), ("503", 503), ("401", 502)])
async def test_the_last_ones_error_is_passed_on_and_nothing_is_charged(bench: Bench, failure: str, shown: int) -> None:
    bench.will(first=FAILS["500"], second=FAILS["503"], third=FAILS[failure])
    before = await bench.used()
    answer = await bench.ask(body_of())
    assert (answer.status, bench.counts) == (shown, [1, 1, 1])
    assert shown == 502 or answer.error["message"] == f"status {failure}"
    assert await bench.used() == before


async def test_streams_are_replaced_before_they_begin_and_not_afterwards(bench: Bench) -> None:
    def chunk(text: str) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        return (
            b"data: "
            + json.dumps({"id": "1", "object": "chat.completion.chunk", "choices": [choice]}).encode()
            + b"\n\n"
        )

    end = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\ndata: [DONE]\n\n"
    bench.will(first=FAILS["503"], second=streams(chunk("Hel"), chunk("lo"), end))
    before = await bench.used()
    key, url = str(bench.gateway.key), bench.gateway.base_url
    async with openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0) as client:
        stream = await client.chat.completions.create(**body_of(), stream=True)
        assert stream.response.headers["x-credits-model"] == "second"
        text = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
    assert (text, bench.counts) == (["Hel", "lo"], [1, 1, 0])
    assert await bench.used() - before == cost_of("second")

    bench.will(first=streams(chunk("Hel"), breaks=True))
    before = await bench.used()
    answer = await bench.ask(body_of(stream=True))
    assert b'"error"' in answer.body
    assert bench.counts == [1, 0, 0]
    assert await bench.used() == before


async def test_one_that_does_not_sell_it_is_passed_over(bench: Bench) -> None:
    async def sound(_: web.Request) -> web.Response:
        return web.Response(body=b"ID3", content_type="audio/mpeg")

    bench.will(first=FAILS["500"], third=sound)
    answer = await bench.ask({"model": "voice", "input": "x" * 100, "voice": "y"}, "/audio/speech")
    assert answer.status == 200, answer.body
    assert (answer.body, answer.headers["x-credits-model"], bench.counts) == (b"ID3", "other-voice", [1, 0, 1])
    assert answer.cost == Decimal(answer.headers["x-credits-reserved"]) == Decimal("0.003")


async def test_one_that_does_not_let_a_field_through_is_passed_over(bench: Bench) -> None:
    bench.will(first=FAILS["500"])
    answer = await bench.ask(body_of("open", magic=1))
    assert (answer.headers["x-credits-model"], bench.counts) == ("open-too", [1, 0, 1])
    assert bench.upstreams["third"].asked[0].document["magic"] == 1
    bench.will(first=FAILS["500"])
    assert (await bench.ask(body_of("open"))).headers["x-credits-model"] == "second"
    bench.will()
    answer = await bench.ask(body_of(magic=1))
    assert (answer.status, answer.error["param"], bench.counts) == (400, "magic", [0, 0, 0])


async def test_a_form_is_sent_again_whole(bench: Bench) -> None:
    sound = bytes(range(256)) * 4000
    bench.will(first=FAILS["503"], second=says({"text": "Hello!", "duration": 1.5}))
    body, content_type = form([("model", "ears"), ("language", "en")], [("file", "a.mp3", "audio/mpeg", sound)])
    headers = {"Authorization": f"Bearer {bench.gateway.key}", "Content-Type": content_type}
    url = f"{bench.gateway.base_url}/audio/transcriptions"
    async with bench.session.post(url, data=body, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["x-credits-model"] == "other-ears"
        assert Decimal(answer.headers["x-credits-cost"]) == Decimal("0.003")
        assert Decimal(answer.headers["x-credits-reserved"]) == len(sound) / Decimal(500) * Decimal("0.002")
    assert bench.counts == [1, 1, 0]
    for name, model in (("first", "ears"), ("second", "real-ears")):
        sent = bench.upstreams[name].asked[0]
        assert sent.fields == [("model", model), ("language", "en")]
        assert [part.content for part in sent.parts if part.filename] == [sound]


async def test_an_upstream_that_answers_before_it_has_read_the_form_is_replaced(bench: Bench) -> None:
    """While it is still being sent the form, the next one gets all of it."""
    sound = bytes(range(256)) * 40_000
    bench.will(first=FAILS["503"], second=says({"text": "Hello!", "duration": 1.5}))
    bench.upstreams["first"].early = True
    try:
        body, content_type = form([("model", "ears")], [("file", "a.mp3", "audio/mpeg", sound)])
        headers = {"Authorization": f"Bearer {bench.gateway.key}", "Content-Type": content_type}
        url = f"{bench.gateway.base_url}/audio/transcriptions"

        async def pieces() -> AsyncIterator[bytes]:
            yield body

        async with bench.session.post(url, data=pieces(), headers=headers) as answer:
            assert answer.status == 200
    finally:
        bench.upstreams["first"].early = False
    assert [part.content for part in bench.upstreams["second"].asked[0].parts if part.filename] == [sound]


async def test_who_cannot_pay_for_the_dearest_is_refused(bench: Bench) -> None:
    bench.will()
    key = new_account(bench.gateway, "cannot-pay-the-dearest", "small")
    sound = bytes(40_000)  # 80 s at most: 0.08 at the first, 0.16 at the other
    body, content_type = form([("model", "ears")], [("file", "a.mp3", "audio/mpeg", sound)])
    headers = {"Authorization": f"Bearer {key}", "Content-Type": content_type}
    url = f"{bench.gateway.base_url}/audio/transcriptions"
    async with bench.session.post(url, data=body, headers=headers) as answer:
        assert answer.status == 402
        assert (await answer.json())["error"]["metadata"]["required"] == "0.16"
    assert bench.counts == [0, 0, 0]


async def test_a_request_keeps_the_fallbacks_that_it_began_with(bench: Bench, tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def fail_later(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return await FAILS["503"](request)

    bench.will(first=fail_later)
    with running_gateway(config_of(bench.upstreams), data_dir=tmp_path / "data") as gateway:
        other = Bench(gateway, bench.upstreams, bench.session)
        begun = asyncio.create_task(other.ask(body_of()))
        await bench.upstreams["first"].wait_for(1)
        changed = config_of(bench.upstreams, ["third"])
        changed["models"]["models"]["second"]["output_token_price"] = "400"
        gateway.config.write_text(yaml.safe_dump(changed))
        async with bench.session.post(f"{gateway.admin_url}/admin/v1/reload") as reloaded:
            assert reloaded.status == 200
        gate.set()
        answer = await begun
        assert (answer.headers["x-credits-model"], answer.cost) == ("second", cost_of("second"))
        assert (await other.ask(body_of())).headers["x-credits-model"] == "third"
        assert bench.counts == [2, 1, 1]
