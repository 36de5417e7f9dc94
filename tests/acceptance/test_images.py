"""Images: what each picture costs, and what the client and the upstream get of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.acceptance.conftest import new_account
from tests.acceptance.media import UPSTREAM_KEY, Bench, media_bench
from tests.upstreams.scripted import event, gives, says, streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAINTER, TOKENS, PLAIN, BOTH = "painter", "token-painter", "any-painter", "painter-by-both"
PRICES = {
    "1024x1024/standard": "0.040000001",
    "1024x1024/hd": "0.08",
    "1024x1792/hd": "0.12",
    "512x512": "0.018",
}
# USD per million tokens.
TEXT_IN, IMAGE_IN, IMAGE_OUT = Decimal(5), Decimal(10), Decimal(40)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    tokens = {
        "input_token_price": str(TEXT_IN),
        "output_token_price": str(IMAGE_OUT),
        "image_input_token_price": str(IMAGE_IN),
        "image_output_token_price": str(IMAGE_OUT),
        "context_window": 32_000,
        "max_output_tokens": 8_000,
    }
    models = {
        PAINTER: {"image_prices": PRICES},
        TOKENS: tokens,
        PLAIN: {"image_prices": {"*": "0.07", "1024x1024": "0.05", "*/high": "0.19"}},
        BOTH: {**tokens, "image_prices": {"*": "0.01"}},
        "chat-only": {key: value for key, value in tokens.items() if not key.startswith("image")},
    }
    async with media_bench(tmp_path_factory.mktemp("images") / "data", models) as bench:
        yield bench


def pictures(count: int, **members: Any) -> dict[str, Any]:
    return {"created": 1, "data": [{"b64_json": f"cGljdHVyZQ{number}"} for number in range(count)], **members}


def usage(text: int, image: int, made: int) -> dict[str, Any]:
    details = {"text_tokens": text, "image_tokens": image}
    given = text + image
    return {"input_tokens": given, "output_tokens": made, "total_tokens": given + made, "input_tokens_details": details}


def token_cost(text: int, image: int, made: int) -> Decimal:
    return (text * TEXT_IN + image * IMAGE_IN + made * IMAGE_OUT) / 1_000_000


# --- by the picture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "quality", "each"),
    [("1024x1024", "standard", "0.040000001"), ("1024x1024", "hd", "0.08"), ("1024x1792", "hd", "0.12"),
     ("512x512", "anything", "0.018"), ("512x512", None, "0.018")],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 3])
async def test_pictures_cost_their_price_each(bench: Bench, size: Any, quality: Any, each: str, count: int) -> None:
    bench.upstream.script = says(pictures(count))
    asked = {"model": PAINTER, "prompt": "a cat", "size": size, "n": count} | ({"quality": quality} if quality else {})
    cost = Decimal(each) * count
    async with bench.charging(cost):
        raw = await bench.client.images.with_raw_response.generate(**asked)
    assert Decimal(raw.headers["x-credits-cost"]) == Decimal(raw.headers["x-credits-reserved"]) == cost
    assert len(raw.parse().data or ()) == count
    assert (bench.asked.target, bench.asked.document) == ("/images/generations", asked)
    assert bench.asked.headers["Authorization"] == f"Bearer {UPSTREAM_KEY}"


@pytest.mark.parametrize(("came", "paid"), [(0, 0), (1, 1), (2, 2), (3, 3), (7, 3)])
async def test_only_pictures_that_came_are_paid_for_and_no_more_than_were_asked_for(
    bench: Bench, came: int, paid: int
) -> None:
    body = {"model": PAINTER, "prompt": "a cat", "size": "1024x1024", "quality": "hd", "n": 3}
    answer = await bench.ask("/images/generations", body, says(pictures(came)))
    assert answer.status == 200
    assert answer.cost == paid * Decimal("0.08")
    assert Decimal(answer.headers["x-credits-reserved"]) == 3 * Decimal("0.08")
    assert answer.document == pictures(came)


async def test_a_picture_that_is_none_is_not_paid_for(bench: Bench) -> None:
    body = {"model": PAINTER, "prompt": "a cat", "size": "512x512", "n": 3}
    answer = await bench.ask("/images/generations", body, says({"data": [None, {}, {"url": "https://x.example/1"}]}))
    assert answer.cost == Decimal("0.018")


@pytest.mark.parametrize(
    ("asked", "said", "cost", "held"),
    [
        ({}, {}, "0.12", "0.12"),  # the dearest that it can mean
        ({}, {"size": "1024x1024", "quality": "standard"}, "0.040000001", "0.12"),
        ({"size": "auto", "quality": "auto"}, {"size": "1024x1024", "quality": "hd"}, "0.08", "0.12"),
        ({"size": "1024x1024"}, {"quality": "standard"}, "0.040000001", "0.08"),
        ({"size": "1024x1024"}, {}, "0.08", "0.08"),
        ({"size": "1024x1024"}, {"size": "512x512", "quality": "hd"}, "0.08", "0.08"),  # as it was asked for
        ({"size": "auto", "quality": "hd"}, {"size": "1024x1792"}, "0.12", "0.12"),
        ({}, {"size": "4096x4096", "quality": "hd"}, "0.12", "0.12"),  # never more than is held
        ({}, {"size": 7, "quality": {"x": 1}}, "0.12", "0.12"),
    ],
)
async def test_the_upstream_says_what_auto_became(
    bench: Bench, asked: dict[str, Any], said: dict[str, Any], cost: str, held: str
) -> None:
    answer = await bench.ask(
        "/images/generations", {"model": PAINTER, "prompt": "x", **asked}, says(pictures(1, **said))
    )
    assert (answer.cost, Decimal(answer.headers["x-credits-reserved"])) == (Decimal(cost), Decimal(held))


@pytest.mark.parametrize(
    ("asked", "cost"),
    [({"size": "1024x1024", "quality": "high"}, "0.05"), ({"size": "64x64", "quality": "high"}, "0.19"),
     ({"size": "64x64", "quality": "low"}, "0.07"), ({"size": "64x64"}, "0.07")],
)  # fmt: skip
async def test_the_closest_price_counts_a_size_before_a_quality(bench: Bench, asked: dict[str, Any], cost: str) -> None:
    answer = await bench.ask("/images/generations", {"model": PLAIN, "prompt": "x", **asked}, says(pictures(1)))
    assert answer.cost == Decimal(cost)
    assert Decimal(answer.headers["x-credits-reserved"]) >= answer.cost


@pytest.mark.parametrize(
    "asked", [{"size": "256x256"}, {"size": "1024x1792", "quality": "standard"}, {"size": "1792x1024", "quality": "hd"}]
)
async def test_a_kind_without_a_price_is_refused(bench: Bench, asked: dict[str, Any]) -> None:
    seen = len(bench.upstream.asked)
    async with bench.charging(0):
        with pytest.raises(openai.BadRequestError) as refusal:
            await bench.client.images.generate(model=PAINTER, prompt="x", **asked)
    assert refusal.value.param == "size"
    assert len(bench.upstream.asked) == seen


async def test_who_cannot_pay_for_all_gets_none(bench: Bench) -> None:
    """Fewer pictures are another answer, not a shorter one: nothing is lowered."""
    key = new_account(bench.gateway, "cannot-pay-for-all", "small")
    seen = len(bench.upstream.asked)
    body = {"model": PAINTER, "prompt": "a cat", "size": "1024x1024", "quality": "hd", "n": 2}
    answer = await bench.ask("/images/generations", body, key=key)
    assert (answer.status, answer.error["code"]) == (402, "request_exceeds_balance")
    assert answer.error["metadata"]["required"] == "0.16"
    assert len(bench.upstream.asked) == seen
    answer = await bench.ask("/images/generations", body | {"n": 1}, says(pictures(1)), key=key)
    assert (answer.status, answer.cost, bench.asked.document["n"]) == (200, Decimal("0.08"), 1)


# --- by tokens -------------------------------------------------------------------------------------------------------


async def test_tokens_are_charged_by_their_kind(bench: Bench) -> None:
    said = pictures(1, usage=usage(11, 300, 1056), size="1024x1024", quality="high")
    cost = token_cost(11, 300, 1056)
    bench.upstream.script = says(said)
    async with bench.charging(cost):
        raw = await bench.client.images.with_raw_response.generate(model=TOKENS, prompt="a cat", quality="high")
    assert Decimal(raw.headers["x-credits-cost"]) == cost
    assert Decimal(raw.headers["x-credits-reserved"]) >= cost
    assert json.loads(raw.content) == said


async def test_more_tokens_than_were_held_cost_what_was_held(bench: Bench) -> None:
    body = {"model": TOKENS, "prompt": "x"}
    answer = await bench.ask("/images/generations", body, says(pictures(1, usage=usage(10**9, 10**9, 10**9))))
    assert answer.cost == Decimal(answer.headers["x-credits-reserved"])


async def test_a_price_by_picture_and_one_by_token_add_up(bench: Bench) -> None:
    body = {"model": BOTH, "prompt": "x", "n": 2}
    answer = await bench.ask("/images/generations", body, says(pictures(2, usage=usage(9, 0, 500))))
    assert answer.cost == token_cost(9, 0, 500) + Decimal("0.02")


@pytest.mark.parametrize("told", [None, {}, {"input_tokens": -5, "output_tokens": 9}, {"input_tokens": 5}])
async def test_pictures_without_usage_cost_all_that_they_could(bench: Bench, told: Any) -> None:
    body = {"model": TOKENS, "prompt": "x"}
    answer = await bench.ask("/images/generations", body, says(pictures(1, usage=told)))
    size = len(json.dumps(body, separators=(",", ":")))
    assert answer.cost == token_cost(size + 256, 0, 8000)
    assert (await bench.ask("/images/generations", body, says(pictures(0, usage=told)))).cost == 0


# --- what is refused, and what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [({"prompt": None}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": ""}, "prompt"), ({"n": 0}, "n"),
     ({"n": 11}, "n"), ({"n": True}, "n"), ({"n": "2"}, "n"), ({"n": 1.0}, "n"), ({"size": 1024}, "size"),
     ({"size": "big"}, "size"), ({"size": "1024X1024"}, "size"), ({"size": "01024x1024"}, "size"),
     ({"quality": ["hd"]}, "quality"), ({"quality": "HD"}, "quality"), ({"stream": "true"}, "stream"),
     ({"partial_images": 4}, "partial_images"), ({"model": 7}, "model"), ({"video": True}, "video")],
    ids=str,
)  # fmt: skip
async def test_a_request_that_cannot_be_priced_is_refused(bench: Bench, change: dict[str, Any], param: str) -> None:
    seen = len(bench.upstream.asked)
    body = {"model": PAINTER, "prompt": "x", "size": "512x512"} | change
    answer = await bench.ask("/images/generations", body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, "invalid_body")
    assert len(bench.upstream.asked) == seen


async def test_a_model_without_any_price_for_images_is_known_for_something_else(bench: Bench) -> None:
    answer = await bench.ask("/images/generations", {"model": "nobody", "prompt": "x"})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    body = {"model": PAINTER, "messages": [{"role": "user", "content": "x"}]}
    answer = await bench.ask("/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("script", "status"),
    [(says({"error": {"message": "not that", "code": "moderation_blocked"}}, 400), 400),
     (says({"error": {"message": "later"}}, 429), 429), (says({"error": {"message": "oh"}}, 500), 500),
     (says({"error": {"message": "200, but no"}}), 502), (gives(b"<html>", "text/html"), 502),
     (says([1, 2]), 502), (says({}, 401), 502)],
    ids=["400", "429", "500", "error with 200", "html", "list", "401"],
)  # fmt: skip
async def test_a_failure_costs_nothing(bench: Bench, script: Any, status: int) -> None:
    async with bench.charging(0):
        answer = await bench.ask("/images/generations", {"model": PAINTER, "prompt": "x", "n": 2}, script)
    assert answer.status == status
    assert "message" in answer.error


# --- streams ---------------------------------------------------------------------------------------------------------


def partial(number: int) -> dict[str, Any]:
    kind = {"size": "1024x1024", "quality": "hd", "background": "opaque", "output_format": "png"}
    made = {"type": "image_generation.partial_image", "b64_json": "cGFydA" * 20_000, "created_at": 1}
    return {**made, **kind, "partial_image_index": number}


def completed(**members: Any) -> dict[str, Any]:
    done = {**partial(0), "type": "image_generation.completed", "b64_json": "d2hvbGU" * 20_000, **members}
    del done["partial_image_index"]
    return done


async def test_a_streamed_picture_costs_what_it_became_and_says_so_in_its_usage(bench: Bench) -> None:
    last = completed(usage=usage(11, 0, 1056))
    bench.upstream.script = streams(event(partial(0)), event(partial(1)), event(last))
    cost = token_cost(11, 0, 1056)
    async with bench.charging(cost):
        stream = await bench.client.images.generate(model=TOKENS, prompt="x", stream=True, partial_images=2)
        events = [one async for one in stream]
    assert [one.type for one in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [one.b64_json for one in events] == [partial(0)["b64_json"], partial(1)["b64_json"], last["b64_json"]]
    assert Decimal(str(events[-1].usage.model_dump()["credits"]["cost"])) == cost  # type: ignore[union-attr]
    assert bench.asked.document["stream"] is True


async def test_a_stream_passes_on_every_byte_but_the_cost(bench: Bench) -> None:
    sent = b": hello\r\n\r\n" + event(partial(0)) + event(completed())
    body = {"model": PAINTER, "prompt": "x", "stream": True}
    async with bench.charging("0.08"):
        answer = await bench.ask("/images/generations", body, streams(sent[:70_001], sent[70_001:]))
    assert answer.body == sent  # no usage in it, so nothing to write a cost into
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert Decimal(answer.headers["x-credits-reserved"]) == Decimal("0.12")


async def test_two_streamed_pictures_are_paid_each(bench: Bench) -> None:
    one, two = completed(quality="standard"), completed()
    body = {"model": PAINTER, "prompt": "x", "stream": True, "n": 2, "size": "1024x1024"}
    async with bench.charging("0.120000001"):
        answer = await bench.ask("/images/generations", body, streams(event(partial(0)), event(one), event(two)))
    assert answer.body.endswith(event(two))
    async with bench.charging("0.040000001"):  # the second never came
        answer = await bench.ask("/images/generations", body, streams(event(partial(0)), event(one)))
    assert b'"error"' not in answer.body


async def test_who_leaves_after_a_preview_pays_for_the_picture(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.upstream.script = streams(event(partial(0)), event(completed()), held=gate)
    async with bench.charging("0.08"):
        stream = await bench.client.images.generate(
            model=PAINTER, prompt="x", size="1024x1024", quality="hd", stream=True
        )
        assert (await anext(aiter(stream))).type == "image_generation.partial_image"
        await stream.close()
    gate.set()


async def test_who_leaves_between_two_pictures_pays_for_the_first(bench: Bench) -> None:
    gate = asyncio.Event()
    body = {"model": PAINTER, "prompt": "x", "size": "1024x1024", "quality": "hd", "stream": True, "n": 2}
    bench.upstream.script = streams(event(partial(0)), event(completed()), event(completed()), held=gate)
    headers = {"Authorization": f"Bearer {bench.key}"}
    url = f"{bench.gateway.base_url}/images/generations"
    async with bench.charging("0.08"), bench.session.post(url, json=body, headers=headers) as answer:
        seen = b""
        while not seen.endswith(event(completed())):
            seen += await answer.content.readany()
    gate.set()


async def test_an_upstream_that_breaks_in_mid_stream_is_not_paid_and_the_client_hears_of_it(bench: Bench) -> None:
    bench.upstream.script = streams(event(partial(0)), event(completed())[:1000], breaks=True)
    async with bench.charging(0):
        stream = await bench.client.images.generate(model=PAINTER, prompt="x", stream=True)
        with pytest.raises(openai.APIError) as failure:
            async for _ in stream:
                pass
    assert failure.value.code == "upstream_unavailable"


async def test_an_error_event_of_the_upstream_is_passed_on_and_costs_nothing(bench: Bench) -> None:
    error = {"type": "error", "error": {"type": "image_generation_user_error", "message": "not that"}}
    bench.upstream.script = streams(event(partial(0)), event(error))
    async with bench.charging(0):
        stream = await bench.client.images.generate(model=PAINTER, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="not that"):
            async for _ in stream:
                pass


# --- forms -----------------------------------------------------------------------------------------------------------


async def test_an_edit_sends_all_its_pictures_and_fields(bench: Bench) -> None:
    bench.upstream.script = says(pictures(2, usage=usage(20, 700, 2000)))
    cost = token_cost(20, 700, 2000)
    files = [("one.png", PNG, "image/png"), ("two.png", PNG[::-1], "image/png")]
    async with bench.charging(cost):
        raw = await bench.client.images.with_raw_response.edit(
            model=TOKENS,
            image=files,
            mask=("mask.png", b"mask", "image/png"),
            prompt="more\r\ncats ✓",
            n=2,
            size="auto",
        )
    assert Decimal(raw.headers["x-credits-cost"]) == cost
    assert Decimal(raw.headers["x-credits-reserved"]) == (32_000 * IMAGE_IN + 16_000 * IMAGE_OUT) / 1_000_000
    assert bench.asked.target == "/images/edits"
    expected = {"model": TOKENS, "prompt": "more\r\ncats ✓", "n": "2", "size": "auto"}
    assert dict(bench.asked.fields) == expected
    sent = [(part.name, part.filename, part.content_type, part.content) for part in bench.asked.parts if part.filename]
    assert sorted(sent) == [
        ("image[]", "one.png", "image/png", PNG),
        ("image[]", "two.png", "image/png", PNG[::-1]),
        ("mask", "mask.png", "image/png", b"mask"),
    ]
    assert bench.asked.headers["Content-Length"] == str(len(bench.asked.body))


async def test_an_edit_may_stream(bench: Bench) -> None:
    done = {**completed(usage=usage(5, 90, 100)), "type": "image_edit.completed"}
    bench.upstream.script = streams(event({**partial(0), "type": "image_edit.partial_image"}), event(done))
    async with bench.charging(token_cost(5, 90, 100)):
        stream = await bench.client.images.edit(model=TOKENS, image=PNG, prompt="x", stream=True, partial_images=1)
        assert [one.type async for one in stream] == ["image_edit.partial_image", "image_edit.completed"]


async def test_a_variation_costs_its_picture(bench: Bench) -> None:
    bench.upstream.script = says(pictures(2))
    async with bench.charging("0.036"):
        with pytest.deprecated_call():
            made = await bench.client.images.create_variation(model=PAINTER, image=PNG, n=2, size="512x512")
    assert len(made.data or ()) == 2
    assert bench.asked.target == "/images/variations"
    assert [part.content for part in bench.asked.parts if part.filename] == [PNG]


PICTURE = ("image", "a.png", "image/png", PNG)


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ([("model", PAINTER), ("prompt", "x")], [], "image"),
        ([("model", PAINTER)], [PICTURE], "prompt"),
        ([("prompt", "x")], [PICTURE], "model"),
        ([("model", PAINTER), ("prompt", "x"), ("n", "2"), ("n", "1")], [PICTURE], "n"),
        ([("model", PAINTER), ("prompt", "x"), ("n[]", "2")], [PICTURE], "n"),
        ([("model", PAINTER), ("prompt", "x"), ("n", "1"), ("n[]", "9")], [PICTURE], "n"),
        ([("model", PAINTER), ("prompt", "x"), ("n", "two")], [PICTURE], "n"),
        ([("model", PAINTER), ("prompt", "x"), ("n", "99")], [PICTURE], "n"),
        ([("model", PAINTER), ("prompt", "x"), ("stream", "maybe")], [PICTURE], "stream"),
        ([("model", PAINTER), ("prompt", "x"), ("image", "https://x.example/a.png")], [], "image"),
        ([("model", PAINTER), ("prompt", "x")], [PICTURE] * 17, "image"),
        ([("model", PAINTER), ("prompt", "x")], [PICTURE, ("mask", "m", "image/png", b"m")] * 2, "mask"),
        ([("model", PAINTER), ("prompt", "x"), ("tool", "x")], [PICTURE], "tool"),
        ([("model", PAINTER), ("prompt", "x")], [PICTURE, ("more", "m", "image/png", b"m")], "more"),
        ([("model", PAINTER)], [PICTURE, ("prompt", "p.txt", "text/plain", b"x")], "prompt"),
        ([("model[]", PAINTER), ("prompt", "x")], [PICTURE], "model"),
        ([("model", PAINTER), ("prompt", "x"), ("size", "9x9")], [PICTURE], "size"),
    ],
    ids=range(17),
)
async def test_an_edit_that_cannot_be_priced_is_refused(bench: Bench, fields: Any, files: Any, param: str) -> None:
    seen = len(bench.upstream.asked)
    answer = await bench.ask_form("/images/edits", fields, files)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert len(bench.upstream.asked) == seen
