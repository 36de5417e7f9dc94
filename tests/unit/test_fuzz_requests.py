"""Requests of any shape: each is refused by name or priced, and what is priced is what is forwarded, no less.

The other side is read here by a reader of its own, which knows nothing of the gateway's: it takes the bytes as the
upstream gets them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from hypothesis import strategies as st

from gateway.apis.free import FREE_APIS
from gateway.apis.registry import APIS
from gateway.config.load import load
from gateway.config.model import GatewayConfig
from gateway.domain.request import InvalidRequest, worst_femto
from gateway.http.errors import Failure
from gateway.http.quote import Quote, forwarded_body, read_free, read_quote
from tests.gateway_process import gateway_config
from tests.unit.fuzzing import DEEP, FEW_OR_MANY, JSON, Json, fuzz, tampered

CONTEXT, MOST_OUTPUT, TEMPLATE = 4096, 1000, 256
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
SOURCE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "18 °C"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def said(*contents: Json) -> list[Json]:
    return [{"role": "user", "content": content} for content in contents]


BASES: dict[str, list[Json]] = {
    "/chat/completions": [
        {"model": "m", "messages": said("Hello!")},
        {"model": "m", "messages": said([{"type": "text", "text": "x"}, IMAGE]), "max_tokens": 50, "n": 3},
        {"model": "m", "messages": said("a", [{"type": "text", "text": "é" * 30}]), "max_completion_tokens": 7},
        {"model": "m", "messages": [{"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL], "stream": True},
        {"model": "m", "messages": said("x"), "stream": True, "stream_options": {"include_usage": True}, "n": 2},
        {"model": "m", "messages": said("x" * 3000), "max_tokens": 2000, "response_format": {"type": "json_object"}},
    ],
    "/completions": [
        {"model": "m", "prompt": "Hello!"},
        {"model": "m", "prompt": ["a", "b" * 40], "n": 2, "best_of": 3, "max_tokens": 9, "echo": True},
        {"model": "m", "prompt": [1, 2, 3], "stream": True},
        {"model": "m", "prompt": [[1, 2], [3]], "suffix": "end", "stream_options": {"include_usage": False}},
    ],
    "/embeddings": [
        {"model": "m", "input": "Hello!", "dimensions": 5},
        {"model": "m", "input": ["a", "b"], "encoding_format": "base64"},
        {"model": "m", "input": [[1, 2], [3]]},
        {"model": "m", "input": list(range(50))},
    ],
    "/images/generations": [
        {"model": "m", "prompt": "a cat", "n": 2, "size": "1024x1024", "quality": "high"},
        {"model": "m", "prompt": "a cat", "stream": True, "partial_images": 2, "user": "u"},
    ],
    "/audio/speech": [{"model": "m", "input": "Hello, é!", "voice": "v", "stream_format": "sse"}],
    "/messages": [
        {"model": "m", "messages": said("Hello!"), "max_tokens": 50},
        {"model": "m", "messages": said([{"type": "text", "text": "x"}, SOURCE]), "max_tokens": 5, "stream": True},
        {"model": "m", "messages": said([RESULT, {**RESULT, "content": [RESULT]}]), "max_tokens": 5},
        {"model": "m", "messages": said([{**RESULT, "content": [{**RESULT, "content": [SOURCE]}]}]), "max_tokens": 5},
        {"model": "m", "messages": said("x"), "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 99}},
        {"model": "m", "messages": said("x"), "max_tokens": 9, "tools": [{"name": "f", "input_schema": SCHEMA}],
         "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "5m"}}]},
    ],
    "/rerank": [
        {"model": "m", "query": "which?", "documents": ["a", {"text": "b"}], "top_n": 1},
        {"model": "m", "query": "q", "documents": ["a", {"text": DEEP}]},
        {"model": "m", "query": "q" * 90, "documents": ["x" * 50] * 9},
    ],
    "/responses": [
        {"model": "m", "input": "Hello!", "max_output_tokens": 20},
        {"model": "m", "input": said([{"type": "input_text", "text": "x"}]), "stream": True, "instructions": "Brief"},
        {"model": "m", "input": said([{"type": "input_image", "image_url": "https://example.com/a.png"}])},
        {"model": "m", "input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "text"}]}]},
        {"model": "m", "input": "x", "previous_response_id": "r", "tools": [{"type": "function", "name": "f"}]},
        {"model": "m", "input": [{"type": "item_reference", "id": "i"}], "reasoning": {"effort": "high"}},
    ],
}  # fmt: skip
#: What limits an answer, in any endpoint and at any server.
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> GatewayConfig:
    raw = gateway_config("http://127.0.0.1:1/v1", ["m"], context_window=CONTEXT, max_output_tokens=MOST_OUTPUT)
    raw["models"]["models"]["m"]["image_prices"] = {"*": "0.01"}
    raw["models"]["models"]["renamed"] = {**raw["models"]["models"]["m"], "upstream_model": "the/real-one"}
    path: Path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load(path, {})


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A request for the endpoint, most of its fields its own, as bytes that a client may have written."""
    names = tuple(sorted(APIS[path].fields))
    document = draw(tampered(st.sampled_from(BASES[path]), names))
    if isinstance(document, dict) and "model" in document and draw(st.integers(0, 5)) == 0:
        document["model"] = "renamed"
    raw = json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="replace")
    if raw.startswith(b'{"') and draw(st.integers(0, 5)) == 0:  # a field twice: the last one counts
        name = draw(st.sampled_from(["model", "n", "stream", *LIMITS, *names]))
        raw = b"{" + json.dumps({name: draw(JSON)}).encode()[1:-1] + b"," + raw[1:]
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(raw)))
        raw = raw[:place] + draw(st.binary(max_size=3)) + raw[place + draw(st.integers(0, 2)) :]
    return raw


@FEW_OR_MANY
@pytest.mark.parametrize("path", BASES)
def test_a_request_is_refused_or_priced_as_it_is_forwarded(config: GatewayConfig, path: str, examples: int) -> None:
    priced = 0

    @fuzz(examples, bodies(path))
    def check(raw: bytes) -> None:
        nonlocal priced
        try:
            quote = read_quote(config, APIS[path], raw)
        except InvalidRequest as refused:
            assert refused.param is None or len(refused.param) < 200
            return
        if isinstance(quote, Failure):
            assert quote.code == "model_not_found"
            return
        priced += 1
        upstream = config.upstreams[quote.model.upstream]
        check_forwarded(path, quote, orjson.loads(raw), as_upstream_reads(bytes(forwarded_body(quote, upstream))))

    assert priced  # else this shows nothing


def as_upstream_reads(body: bytes) -> dict[str, Json]:
    """A body as any other reader takes it. Fails where a field is there twice: then there would be two readings."""

    def once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        assert len({name for name, _ in pairs}) == len(pairs)
        return dict(pairs)

    document = json.loads(body, object_pairs_hook=once)
    assert isinstance(document, dict)
    return document


def check_forwarded(path: str, quote: Quote, asked: dict[str, Json], sent: dict[str, Json]) -> None:
    ask, bound, model = quote.ask, quote.bound, quote.model
    assert model.name == asked["model"] == ask.model
    assert sent["model"] == (model.sent_as or model.name)
    # All that the client wrote arrives, but for what the gateway sets.
    anew = ("model", *APIS[path].set_fields, "stream_options")
    assert {name: sent[name] for name in sent if name not in anew} == {
        name: asked[name] for name in asked if name not in anew
    }
    assert (bool(sent.get("stream")) or sent.get("stream_format") == "sse") == ask.stream
    check_output(path, quote, sent)
    check_input(path, quote, sent)
    assert worst_femto(bound, model, bound.output_tokens_each) >= 0


def check_output(path: str, quote: Quote, sent: dict[str, Json]) -> None:
    """No more answers, and no longer ones, than were priced."""
    if path in ("/embeddings", "/rerank"):
        return
    if path in ("/images/generations", "/audio/speech"):
        assert sum(images.count for images in quote.bound.units.images) == (sent.get("n") or 1) * (path[1] == "i")
        assert quote.bound.units.characters == (len(sent["input"]) if path[1] == "a" else 0)
        assert quote.bound.answers >= (sent.get("n") or 1)
        return
    limits = {name: sent[name] for name in LIMITS if sent.get(name) is not None}
    assert len(limits) == 1
    assert limits.popitem()[1] == quote.bound.output_tokens_each
    answers = max(sent.get("n") or 1, sent.get("best_of") or 1) * prompts_of(path, sent)
    assert quote.bound.answers >= answers
    if (thinking := sent.get("thinking")) and path == "/messages":
        budget = thinking.get("budget_tokens") or 0
        asked = quote.ask.max_tokens or 0
        assert thinking["type"] != "enabled" or budget < sent["max_tokens"] or budget >= asked


def check_input(path: str, quote: Quote, sent: dict[str, Json]) -> None:
    """A token is a byte of text at least, and what is not text fills the context window."""
    prompts, bound = prompts_of(path, sent), quote.bound
    window = CONTEXT * prompts
    if any(is_media(node) for node in nodes(sent.get("messages") or sent.get("input"))):
        assert bound.input_tokens == window
    shown = {name: value for name, value in sent.items() if name not in APIS[path].set_fields}
    size = sum(len(text.encode()) for text in texts(shown)) + sum(type(node) is int for node in nodes(shown))
    if path == "/rerank":
        size += (prompts - 1) * len(sent["query"].encode())
    assert bound.input_tokens >= min(window, size + TEMPLATE * prompts)
    if isinstance(sent.get("prompt", sent.get("input")), list) and path in ("/completions", "/embeddings"):
        ids = sum(type(node) is int for node in nodes(sent.get("prompt", sent.get("input"))))
        assert quote.ask.least_input_tokens >= (ids if bound.answers > 1 or prompts > 1 else 0)


def prompts_of(path: str, sent: dict[str, Json]) -> int:
    given = sent.get({"/completions": "prompt", "/embeddings": "input", "/rerank": "documents"}.get(path, ""))
    if not isinstance(given, list):
        return 1
    return 1 if given and all(type(item) is int for item in given) else len(given)


def nodes(value: Json) -> Iterator[Json]:
    """The value and all that is in it."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from nodes(item)


def texts(value: Json) -> Iterator[str]:
    """All that is written in it, names too."""
    for node in nodes(value):
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            yield from node


def is_media(node: Json) -> bool:
    """Whether an upstream would look for an image elsewhere: its address says nothing about its tokens."""
    if not isinstance(node, dict):
        return False
    return (
        (node.get("type") == "image_url" and isinstance(node.get("image_url"), dict))
        or (node.get("type") == "input_image" and isinstance(node.get("image_url"), str))
        or (node.get("type") == "image" and isinstance(node.get("source"), dict))
    )


@FEW_OR_MANY
@pytest.mark.parametrize("path", FREE_APIS)
def test_what_is_free_is_refused_or_forwarded_as_it_is(config: GatewayConfig, path: str, examples: int) -> None:
    base: Any = {"model": "m", "input": "x", "messages": said("Hello!")}

    @fuzz(examples, tampered(st.just(base), ("model", "input", "stream")))
    def check(document: Json) -> None:
        raw = json.dumps(document).encode()
        try:
            read = read_free(config, FREE_APIS[path], raw)
        except InvalidRequest:
            return
        if isinstance(read, Failure):
            assert read.code == "model_not_found"
            return
        assert as_upstream_reads(read[1]) == orjson.loads(raw)


@FEW_OR_MANY
def test_no_bytes_are_too_strange(config: GatewayConfig, examples: int) -> None:
    pieces = st.sampled_from([b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\ud800", b"1e999", b"\0", b"\xff"])

    @fuzz(examples, st.sampled_from(sorted(APIS)), st.lists(pieces | st.binary(max_size=6), max_size=30).map(b"".join))
    def check(path: str, raw: bytes) -> None:
        with pytest.raises(InvalidRequest):
            read_quote(config, APIS[path], raw)
