"""The upstreams that other tests rely on do what they say."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.upstreams import faulty
from tests.upstreams.faulty import BEHAVIOURS, FaultyUpstream, running_faulty
from tests.upstreams.llama import MODEL_NAME, llama_process, running_llama

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with running_llama() as base_url:
        yield base_url


@pytest.fixture
async def llama_client(llama: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=llama, api_key="none", max_retries=0) as client:
        yield client


async def test_llama_answers_with_usage(llama_client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in llama_client.models.list()] == [MODEL_NAME]
    chat = await llama_client.chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=12)
    assert chat.choices[0].message.content
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 12
    assert chat.usage.prompt_tokens > 5
    text = await llama_client.completions.create(model=MODEL_NAME, prompt="Hello", max_tokens=8)
    assert text.choices[0].text
    assert text.usage is not None and text.usage.completion_tokens == 8


async def test_llama_streams_with_usage(llama_client: openai.AsyncOpenAI) -> None:
    stream = await llama_client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


def test_llama_embeds_and_can_be_killed() -> None:
    with llama_process(embedding=True, alias="tiny-embedder") as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        with client:
            answer = client.embeddings.create(model="tiny-embedder", input=["Hello", "there"])
            assert len(answer.data) == 2
            assert answer.usage.prompt_tokens > 2
            server.process.kill()
            server.process.wait()
            with pytest.raises(openai.APIConnectionError):
                client.models.list()


@pytest.fixture
async def upstream() -> AsyncIterator[FaultyUpstream]:
    async with FaultyUpstream() as upstream:
        yield upstream


@pytest.fixture
async def http(upstream: FaultyUpstream) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(upstream.base_url + "/") as session:
        yield session


def ask(http: aiohttp.ClientSession, model: str, **fields: object) -> aiohttp.client._RequestContextManager:
    return http.post("chat/completions", json={"model": model, "messages": HELLO, **fields})


async def stream_of(http: aiohttp.ClientSession, model: str, **fields: object) -> bytes:
    async with ask(http, model, stream=True, **fields) as response:
        assert response.content_type == "text/event-stream"
        return await response.read()


def values_in(stream: bytes) -> list[dict[str, object]]:
    """The JSON events of a well-formed stream, which must end in [DONE]."""
    data = [line.removeprefix(b"data: ") for line in stream.splitlines() if line.startswith(b"data: ")]
    assert data.pop() == b"[DONE]"
    return [json.loads(item) for item in data]


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
ASKED = {"stream_options": {"include_usage": True}}


def test_the_table_lists_every_behaviour() -> None:
    assert faulty.__doc__ is not None
    table = faulty.__doc__.split("=\n")
    listed = re.findall(r"^([a-z0-9-]+) {2,}", "\n".join(table[2:]), re.MULTILINE)
    assert sorted(listed) == sorted(BEHAVIOURS)


async def test_the_openai_client_reads_the_sane_behaviours(upstream: FaultyUpstream) -> None:
    async with openai.AsyncOpenAI(base_url=upstream.base_url, api_key="none", max_retries=0) as client:
        for model in ("ok", "gzip-body"):
            answer = await client.chat.completions.create(model=model, messages=HELLO)
            assert answer.choices[0].message.content == faulty.TEXT
            assert answer.usage is not None and answer.usage.total_tokens == 12
        for model in ("ok-stream", "crlf-stream", "split-events", "two-events-in-one-write", "comments"):
            stream = await client.chat.completions.create(model=model, messages=HELLO, stream=True, extra_body=ASKED)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == faulty.TEXT
            assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 12
        vectors = await client.embeddings.create(model="ok", input="x", encoding_format="float")
        assert vectors.data[0].embedding == [0.6, 0.8]
    assert upstream.disconnects == []


async def test_usage_comes_when_asked_for_and_as_the_behaviour_says(http: aiohttp.ClientSession) -> None:
    async def usages(model: str, **fields: object) -> list[object]:
        return [value["usage"] for value in values_in(await stream_of(http, model, **fields)) if "usage" in value]

    assert await usages("ok-stream") == []
    assert await usages("ok-stream", **ASKED) == [USAGE]
    assert await usages("no-usage-stream", **ASKED) == []
    assert await usages("usage-on-finish-chunk") == [USAGE]
    assert await usages("usage-null-every-chunk") == [*[None] * 6, USAGE]
    assert await usages("two-usage-chunks") == [USAGE, USAGE]
    assert len(await usages("usage-cumulative-every-chunk")) == 6
    assert await usages("negative-usage-stream") == [
        {"prompt_tokens": -7, "completion_tokens": -5, "total_tokens": -12}
    ]


@pytest.mark.parametrize("status", [400, 401, 429, 500])
async def test_statuses(http: aiohttp.ClientSession, status: int) -> None:
    async with ask(http, f"status-{status}") as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]
        assert response.headers.get("Retry-After") == ("7" if status == 429 else None)


async def test_bodies(http: aiohttp.ClientSession) -> None:
    async with ask(http, "garbage-body") as response:
        with pytest.raises(ValueError):
            await response.json()
    async with ask(http, "empty-body") as response:
        assert (response.status, await response.read()) == (200, b"")
    async with ask(http, "huge-body") as response:
        assert len(await response.read()) > faulty.HUGE_BYTES
    async with ask(http, "many-choices") as response:
        assert len((await response.json())["choices"]) == 1000
    async with ask(http, "absurd-usage") as response:
        assert (await response.json())["usage"]["completion_tokens"] == 10**18
    assert len(await stream_of(http, "big-event")) > faulty.BIG_EVENT_BYTES


async def test_cuts_and_ends(http: aiohttp.ClientSession, upstream: FaultyUpstream) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        await ask(http, "reset-before-headers")
    async with ask(http, "cut-stream") as response:
        received = b""
        with pytest.raises(aiohttp.ClientError):
            while True:
                received += await response.content.readany()
    assert received.count(b"\n\n") == 3
    assert not received.endswith(b"\n\n")
    for model in ("clean-eof-no-done", "error-event-in-stream"):
        stream = await stream_of(http, model)
        assert stream.endswith(b"\n\n")
        assert b"[DONE]" not in stream
    assert upstream.disconnects == []


@pytest.mark.parametrize("model", ["hang-mid-stream", "slow-stream", "huge-body"])
async def test_a_client_that_leaves_midway_is_recorded(
    http: aiohttp.ClientSession, upstream: FaultyUpstream, model: str
) -> None:
    async with ask(http, model) as response:
        assert await response.content.readany()
        response.close()
    [record] = await upstream.wait_for_disconnects()
    assert record.model == model
    assert record.finished


async def test_a_client_that_gives_up_waiting_is_recorded(
    http: aiohttp.ClientSession, upstream: FaultyUpstream
) -> None:
    waiting = asyncio.ensure_future(ask(http, "hang-before-headers"))
    [record] = await upstream.wait_for_requests()
    assert not record.disconnected
    waiting.cancel()
    assert await upstream.wait_for_disconnects() == [record]
    assert record.bytes_sent == 0


async def test_echo_and_the_record_tell_what_was_sent(http: aiohttp.ClientSession, upstream: FaultyUpstream) -> None:
    raw = b'{"model": "echo", "n": 1, "n": 2}'
    async with http.post("chat/completions?x=1", data=raw, headers={"Authorization": "Bearer secret"}) as response:
        echoed = json.loads((await response.json())["choices"][0]["message"]["content"])
    [record] = upstream.requests
    assert echoed["body"].encode() == record.body == raw
    assert record.path == "/v1/chat/completions?x=1"
    assert record.header("Authorization") == "Bearer secret"
    assert ["authorization", "Bearer secret"] in echoed["headers"]


async def test_the_behaviour_can_be_set_for_every_model(http: aiohttp.ClientSession, upstream: FaultyUpstream) -> None:
    upstream.behaviour = "status-500"
    async with ask(http, "ok") as response:
        assert response.status == 500
    upstream.behaviour = None
    async with ask(http, "ok") as response:
        assert response.status == 200
    async with ask(http, "no-such-behaviour") as response:
        assert response.status == 404


async def test_as_a_process_its_records_are_served() -> None:
    with running_faulty() as server:
        async with aiohttp.ClientSession(server.base_url + "/") as http:
            async with ask(http, "hang-mid-stream", stream=True) as response:
                await response.content.readany()
                response.close()
            async with http.get("/_log") as response:
                [record] = (await response.json())["requests"]
    assert record["method"] == "POST"
    assert json.loads(record["body"])["model"] == "hang-mid-stream"
    assert record["events_sent"] >= 1
