"""Requests as upstreams get them."""

from collections.abc import AsyncIterator, Mapping
from random import Random

import pytest
from multidict import CIMultiDict

from gateway import __version__
from gateway.config.model import Secret, Upstream
from gateway.upstream.client import Pieces, Upload, UpstreamClient, UpstreamUnavailable
from tests.integration.upstream.conftest import Listener, send


async def nothing() -> AsyncIterator[bytes]:
    yield b""


async def test_a_request_says_what_it_must_and_nothing_else(client: UpstreamClient, listener: Listener) -> None:
    request = await send(client, listener, body=b'{"a": 1}')
    assert request.lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert sorted(request.lines[1:]) == [
        "Accept-Encoding: identity",
        "Accept: */*",
        "Content-Length: 8",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{listener.stage.port}",
        f"User-Agent: quota-gateway/{__version__}",
    ]
    assert request.body == b'{"a": 1}'


async def test_of_the_customers_headers_those_pass_that_may(client: UpstreamClient, listener: Listener) -> None:
    passing = [
        ("accept", "application/json"), ("USER-AGENT", "OpenAI/Python"), ("OpenAI-Beta", "a"), ("OpenAI-Beta", "b"),
        ("traceparent", "00-1"), ("Anthropic-Version", "2023-06-01"),
    ]  # fmt: skip
    staying = [
        ("Host", "gateway"), ("Authorization", "Bearer sk-customer"), ("X-Api-Key", "sk-customer"), ("Cookie", "a=b"),
        ("Accept-Encoding", "br"), ("Connection", "close"), ("Transfer-Encoding", "chunked"), ("Content-Length", "99"),
        ("Content-Type", "text/plain"), ("Expect", "100-continue"), ("X-Forwarded-For", "::1"),
    ]  # fmt: skip
    request = await send(client, listener, headers=CIMultiDict(passing + staying))
    assert [line for line in request.lines if line.split(": ")[0] in dict(passing)] == [
        f"{name}: {value}" for name, value in passing
    ]
    assert "sk-customer" not in str(request.lines)
    assert (request.header("Accept"), request.header("User-Agent")) == (["application/json"], ["OpenAI/Python"])
    assert request.header("Content-Length") == ["2"]
    assert request.header("Accept-Encoding") == ["identity"]
    for name in ("Connection", "Transfer-Encoding", "Expect", "Cookie", "X-Forwarded-For"):
        assert request.header(name) == []


async def test_each_request_says_its_own(client: UpstreamClient, listener: Listener) -> None:
    """However alike they are."""
    once = CIMultiDict([("Accept", "a/a"), ("X-Other", "1")])
    again = CIMultiDict([("Accept", "b/b"), ("X-Other", "2")])
    twice = CIMultiDict([("Accept", "a/a"), ("accept", "b/b")])
    traced = CIMultiDict([("Accept", "a/a"), ("traceparent", "00-1")])
    long = CIMultiDict([("Accept", "a" * 2000)])
    cases: list[tuple[Mapping[str, str], list[str]]] = [
        (once, ["a/a"]), (again, ["b/b"]), (once, ["a/a"]), (twice, ["a/a", "b/b"]), ({}, ["*/*"]), (traced, ["a/a"]),
        (long, ["a" * 2000]),
    ]  # fmt: skip
    for headers, said in cases:
        for path in ("/a", "/b"):
            for body in (b"{}", b"{ }"):
                request = await send(client, listener, path=path, headers=headers, body=body)
                assert request.header("Accept") == said
                assert request.lines[0] == f"POST /v1{path} HTTP/1.1"
                assert request.body == body


@pytest.mark.parametrize(
    ("settings", "line"),
    [({}, "Authorization: Bearer sk-ours"), ({"key_header": "x-api-key"}, "x-api-key: sk-ours")],
)
async def test_the_key_is_the_gateways_own(
    client: UpstreamClient, listener: Listener, settings: Mapping[str, str], line: str
) -> None:
    upstream = Upstream("keyed", listener.stage.upstream().base_url, Secret("sk-ours"), **settings)  # type: ignore[arg-type]
    request = await send(client, listener, upstream=upstream)
    assert [said for said in request.lines if "sk-" in said] == [line]


async def test_an_upstream_whose_configuration_was_read_again_is_told_the_new_key(
    client: UpstreamClient, listener: Listener
) -> None:
    for key in ("sk-old", "sk-new"):
        upstream = Upstream("keyed", listener.stage.upstream().base_url, Secret(key))
        assert (await send(client, listener, upstream=upstream)).header("Authorization") == [f"Bearer {key}"]
    assert len(listener.stage.guests) == 1


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\0"])
@pytest.mark.parametrize("where", ["header", "name", "type", "key", "method"])
async def test_nothing_is_sent_that_would_be_read_as_more_than_it_is(
    client: UpstreamClient, listener: Listener, end: str, where: str
) -> None:
    evil = f"a{end}X-Evil: 1"
    headers = {"header": {"user-agent": evil}, "name": {f"anthropic-{evil}": "x"}}.get(where, {})
    body = Upload(evil, 0, nothing) if where == "type" else None
    upstream = Upstream("keyed", listener.stage.upstream().base_url, Secret(evil)) if where == "key" else None
    method = f"POST / HTTP/1.1{end}X: " if where == "method" else "POST"
    with pytest.raises(UpstreamUnavailable, match="cannot be sent"):
        await send(client, listener, method, headers=headers, body=body, upstream=upstream)
    assert listener.stage.guests == []


async def test_bytes_that_are_no_text_pass_as_they_came(client: UpstreamClient, listener: Listener) -> None:
    odd = b"caf\xe9 \xc3\xa9".decode("utf-8", "surrogateescape")
    request = await send(client, listener, headers={"user-agent": odd})
    assert request.header("User-Agent") == [odd]


@pytest.mark.parametrize(
    ("path", "sent"),
    [("/models", "/v1/models"), ("/a%20b?c=d&e=%26", "/v1/a%20b?c=d&e=%26"), ("/a b?c d", "/v1/a%20b?c+d"),
     ("/\xe9", "/v1/%C3%A9"), ("/a/../b", "/v1/b"), ("/a\r\nX: y", "/v1/aX:%20y")],
)  # fmt: skip
async def test_a_path_is_sent_as_one(client: UpstreamClient, listener: Listener, path: str, sent: str) -> None:
    request = await send(client, listener, "GET", path, body=None)
    assert request.lines[0] == f"GET {sent} HTTP/1.1"


@pytest.mark.parametrize(("method", "length"), [("GET", []), ("POST", ["0"]), ("DELETE", ["0"]), ("PUT", ["0"])])
async def test_a_request_without_a_body_has_no_type(
    client: UpstreamClient, listener: Listener, method: str, length: list[str]
) -> None:
    request = await send(client, listener, method, body=None)
    assert (request.header("Content-Length"), request.header("Content-Type")) == (length, [])


@pytest.mark.parametrize("size", [0, 1, 2**14, 2**14 + 1, 20_000_000])
async def test_a_body_arrives_whole(client: UpstreamClient, listener: Listener, size: int) -> None:
    body = Random(size).randbytes(size)
    assert (await send(client, listener, body=body)).body == body
    pieces = Pieces((body[:7], b",", memoryview(body)[7:]))
    request = await send(client, listener, body=pieces)
    assert request.body == bytes(pieces) == body[:7] + b"," + body[7:]
    assert request.header("Content-Length") == [str(size + 1)]
    assert (await send(client, listener)).body == b"{}"
    assert len(listener.stage.guests) == 1
