"""Direct against through the gateway: the same requests give the same bytes and the same events, for every endpoint.

What differs by nature is masked on both sides: ids and moments. What the gateway adds on purpose, the cost in the last
usage of a stream, is taken out.
"""

import io
import json
import re
import wave
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gateway.apis.free import FREE_APIS
from gateway.apis.registry import APIS
from tests.gateway_process import Gateway, gateway_config, running_gateway
from tests.upstreams.demo import running_demo
from tests.upstreams.llama import MODEL_NAME

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "everything"
PRICES = {
    "image_prices": {"*": "0.04"},
    "second_price": "0.0001",
    "character_price": "15",
    "request_price": "0.0001",
    "image_input_token_price": "10",
    "context_window": 8192,
}
_VOLATILE = (
    (rb'"(id|item_id|response_id|event_id|previous_item_id|call_id|system_fingerprint)":\s?"[^"]*"', rb'"\1":"-"'),
    (rb'"(created|created_at|completed_at|expires_at)":\s?[0-9.]+', rb'"\1":0'),
    # llama.cpp tells them with the usage where it is asked for that, which the gateway does.
    (rb',"timings":\{[^}]*\}', b""),
)
_EVENT_END = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True)
class Case:
    """One request. form: text fields and files, in place of a body."""

    name: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    form: dict[str, str | bytes] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        return (
            self.body.get("stream") is True
            or self.body.get("stream_format") == "sse"
            or self.form.get("stream") == "true"
        )


def recording(seconds: float = 1.5) -> bytes:
    """A real WAV file."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\x10\x00" * int(8000 * seconds))
    return content.getvalue()


QUESTION = [{"role": "user", "content": "How are you? ünïcödé 🙂"}]
ASKED_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
PICTURE = b"\x89PNG\r\n\x1a\n not really a picture"
CASES = [
    Case("chat", "/chat/completions", {"messages": QUESTION, "max_tokens": 50}),
    Case("chat-several", "/chat/completions", {"messages": QUESTION, "max_tokens": 50, "n": 3}),
    Case("chat-stream", "/chat/completions", {"messages": QUESTION, "max_tokens": 50, "stream": True}),
    Case("chat-stream-usage", "/chat/completions", {"messages": QUESTION, "max_tokens": 50, **ASKED_USAGE}),
    Case("text", "/completions", {"prompt": ["one", "two"], "max_tokens": 20}),
    Case("text-stream", "/completions", {"prompt": "one", "max_tokens": 20, "stream": True}),
    Case("text-stream-usage", "/completions", {"prompt": "one", "max_tokens": 20, **ASKED_USAGE}),
    Case("response", "/responses", {"input": "Hello!", "max_output_tokens": 30}),
    Case("response-stream", "/responses", {"input": QUESTION, "max_output_tokens": 30, "stream": True}),
    Case("message", "/messages", {"messages": QUESTION, "max_tokens": 30}),
    Case("message-stream", "/messages", {"messages": QUESTION, "max_tokens": 30, "stream": True}),
    Case("embedding", "/embeddings", {"input": "one"}),
    Case("embedding-list", "/embeddings", {"input": ["one", "two"]}),
    Case("embedding-ids", "/embeddings", {"input": [1, 2, 3]}),
    Case("embedding-id-lists", "/embeddings", {"input": [[1, 2], [3]]}),
    Case("embedding-base64", "/embeddings", {"input": "one", "encoding_format": "base64"}),
    Case("rerank", "/rerank", {"query": "which?", "documents": ["a", "b", "c"], "top_n": 2}),
    Case("moderation", "/moderations", {"input": "Hello!"}),
    Case("response-count", "/responses/input_tokens", {"input": "Hello!"}),
    Case("message-count", "/messages/count_tokens", {"messages": QUESTION}),
    Case("image", "/images/generations", {"prompt": "a cat", "size": "64x64", "n": 2}),
    Case("image-stream", "/images/generations", {"prompt": "a cat", "stream": True, "partial_images": 1}),
    Case("edit", "/images/edits", form={"prompt": "bluer", "size": "64x64", "image": PICTURE}),
    Case("edit-mask", "/images/edits", form={"prompt": "bluer", "size": "64x64", "image[]": PICTURE, "mask": PICTURE}),
    Case("variation", "/images/variations", form={"image": PICTURE, "size": "64x64", "n": "2"}),
    Case("speech", "/audio/speech", {"input": "Hello there!", "voice": "alloy", "response_format": "wav"}),
    Case("speech-stream", "/audio/speech", {"input": "Hello!", "voice": "alloy", "stream_format": "sse"}),
    Case("transcript", "/audio/transcriptions", form={"file": recording()}),
    Case("transcript-text", "/audio/transcriptions", form={"file": recording(), "response_format": "text"}),
    Case("transcript-srt", "/audio/transcriptions", form={"file": recording(), "response_format": "srt"}),
    Case("transcript-vtt", "/audio/transcriptions", form={"file": recording(), "response_format": "vtt"}),
    Case("transcript-verbose", "/audio/transcriptions", form={"file": recording(), "response_format": "verbose_json"}),
    Case("transcript-stream", "/audio/transcriptions", form={"file": recording(), "stream": "true"}),
    Case("translation", "/audio/translations", form={"file": recording()}),
]
#: What a server says last to an event.
LAST_OF = {
    "session.update": "session.updated",
    "conversation.item.create": "conversation.item.done",
    "response.create": "response.done",
}
ON_LLAMA = [case for case in CASES if case.path in ("/chat/completions", "/completions", "/responses", "/messages")]
EMBEDDING = "tiny-embedding"
ON_EMBEDDING = [case for case in CASES if case.path == "/embeddings"]


async def test_every_endpoint_is_compared() -> None:
    assert {case.path for case in CASES} == APIS.keys() | FREE_APIS.keys()


@dataclass(frozen=True)
class Pair:
    """A server, and a gateway in front of it."""

    direct: str
    gateway: Gateway
    model: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_demo([MODEL]) as upstream:
        config = gateway_config(upstream.base_url, [MODEL], **PRICES)
        config["plans"] = {"free": {"default": True, "allowance": {"per_window": 100, "refresh": "24h"}}}
        with running_gateway(config, data_dir=tmp_path_factory.mktemp("direct") / "data") as gateway:
            yield Pair(upstream.base_url, gateway, MODEL)


@pytest.fixture(scope="module")
def real(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = gateway_config(llama, [MODEL_NAME])
    config["upstreams"]["test"]["allow_fields"] = ["cache_prompt", "seed"]  # its own, on endpoints that know none such
    with running_gateway(config, data_dir=tmp_path_factory.mktemp("llama") / "data") as gateway:
        yield Pair(llama, gateway, MODEL_NAME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_the_demo_model_says_the_same_through_the_gateway(
    demo: Pair, session: aiohttp.ClientSession, case: Case
) -> None:
    await assert_same(demo, session, case)


@pytest.mark.parametrize("case", ON_LLAMA, ids=lambda case: case.name)
async def test_a_real_server_says_the_same_through_the_gateway(
    real: Pair, session: aiohttp.ClientSession, case: Case
) -> None:
    # What it kept of an earlier prompt would be told, and nothing may be left to chance.
    steady = {**case.body, "cache_prompt": False, "temperature": 0, "seed": 7}
    await assert_same(real, session, Case(case.name, case.path, steady))


@pytest.mark.parametrize("modality", ["text", "audio"])
async def test_a_talk_goes_the_same_through_the_gateway(
    demo: Pair, session: aiohttp.ClientSession, modality: str
) -> None:
    direct = await talk(session, demo.direct, "none", demo.model, modality)
    through = await talk(session, demo.gateway.base_url, str(demo.gateway.key), demo.model, modality)
    assert len(direct) > 20
    assert [without_cost(b"data:" + event) for event in through] == [without_cost(b"data:" + event) for event in direct]


async def talk(session: aiohttp.ClientSession, base_url: str, key: str, model: str, modality: str) -> list[bytes]:
    """All that a server says in two turns."""
    said = []
    headers = {"Authorization": f"Bearer {key}"}
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How are you?"}]}
    turns: list[dict[str, Any]] = [
        {"type": "session.update", "session": {"type": "realtime", "output_modalities": [modality]}},
        {"type": "conversation.item.create", "item": item},
        {"type": "response.create"},
        {"type": "conversation.item.create", "item": item},
        {"type": "response.create"},
    ]
    async with session.ws_connect(f"{base_url}/realtime?model={model}", headers=headers) as socket:
        said.append(masked((await socket.receive_str()).encode()))
        for event in turns:
            await socket.send_json(event)
            while True:
                answer = masked((await socket.receive_str()).encode())
                said.append(answer)
                kind = json.loads(answer)["type"]
                assert kind != "error", answer
                if kind == LAST_OF[event["type"]]:
                    break
    return said


@pytest.fixture(scope="module")
def embedding(llama_embedding: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = gateway_config(llama_embedding, [EMBEDDING])
    with running_gateway(config, data_dir=tmp_path_factory.mktemp("embedding") / "data") as gateway:
        yield Pair(llama_embedding, gateway, EMBEDDING)


@pytest.mark.parametrize("case", ON_EMBEDDING, ids=lambda case: case.name)
async def test_a_real_server_embeds_the_same_through_the_gateway(
    embedding: Pair, session: aiohttp.ClientSession, case: Case
) -> None:
    await assert_same(embedding, session, case)


async def assert_same(pair: Pair, session: aiohttp.ClientSession, case: Case) -> None:
    direct = await ask(session, pair.direct, "none", pair.model, case)
    through = await ask(session, pair.gateway.base_url, str(pair.gateway.key), pair.model, case)
    assert direct[0] == through[0] == 200, (direct, through)
    assert direct[1] == through[1]
    if case.streams:
        assert direct[1].startswith("text/event-stream")
        assert [without_cost(event) for event in events(through[2])] == [
            without_cost(event) for event in events(direct[2])
        ]
    else:
        assert masked(through[2]) == masked(direct[2])


async def ask(
    session: aiohttp.ClientSession, base_url: str, key: str, model: str, case: Case
) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    data: aiohttp.FormData | bytes
    if case.form:
        data = aiohttp.FormData({"model": model})
        for name, value in case.form.items():
            if isinstance(value, bytes):
                data.add_field(name, value, filename="a file.bin", content_type="application/octet-stream")
            else:
                data.add_field(name, value)
    else:
        data = json.dumps({"model": model, **case.body}).encode()
    headers = {"Authorization": f"Bearer {key}", **({} if case.form else {"Content-Type": "application/json"})}
    async with session.post(base_url + case.path, data=data, headers=headers) as answer:
        return answer.status, answer.headers["Content-Type"], await answer.read()


def masked(body: bytes) -> bytes:
    for pattern, word in _VOLATILE:
        body = re.sub(pattern, word, body)
    return body


def events(stream: bytes) -> list[bytes]:
    return [event for event in _EVENT_END.split(masked(stream)) if event]


def without_cost(event: bytes) -> object:
    """The event as it is, unless the cost is in it: then what else it says."""
    if b'"cost"' not in event and b'"usage"' not in event:
        return event
    name, _, data = event.rpartition(b"data:")
    document = json.loads(data)
    response = document.get("response")
    holder = response if isinstance(response, dict) else document
    if isinstance(usage := holder.get("usage"), dict):
        holder["usage"] = {name: value for name, value in usage.items() if name not in ("cost", "credits")}
    return name, document
