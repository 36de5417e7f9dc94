"""An upstream that misbehaves exactly as asked: the requested model's name is the behaviour.

In a test's own loop: ``async with FaultyUpstream() as upstream``. As a process: ``python -m tests.upstreams.faulty
--port N`` (``running_faulty()`` starts one), whose records ``GET /_log`` returns. Whatever the request's path and its
``stream`` flag, the behaviour decides. A usage is 7 input and 5 output tokens unless said otherwise; "usage if asked"
means a last chunk with empty ``choices`` if the request had ``stream_options.include_usage``. Streams are chunked,
end in ``[DONE]`` and leave the connection open, unless said otherwise.

================================== ==================================================================================
model                              what happens
================================== ==================================================================================
ok                                 JSON answer (on a path ending in /embeddings: one vector, 7 tokens)
ok-stream                          five chunks, finish chunk, usage if asked
status-400                         OpenAI-shaped error
status-401                         same; its message repeats the Authorization header it was sent
status-429                         same, with ``Retry-After: 7``
status-500                         same
reset-before-headers               reads the request, resets the connection
cut-stream                         three chunks and half of a fourth event, then a reset
clean-eof-no-done                  three chunks, then a proper end of the body: no finish, no usage, no ``[DONE]``
hang-before-headers                never answers
hang-mid-stream                    three chunks, then silence
garbage-body                       200, ``application/json``, not JSON
garbage-stream                     events whose data is no JSON, no object, or no UTF-8
empty-body                         200 with ``Content-Length: 0``
empty-stream                       200, ``text/event-stream``, only ``[DONE]``
empty-choices                      JSON with no choices, usage 7 and 0
empty-content                      JSON with one choice of empty text, usage 7 and 0
no-usage                           JSON answer without usage
no-usage-stream                    five chunks and finish, never a usage
negative-usage                     JSON, usage -7 and -5
negative-usage-stream              the same on a last chunk, asked or not
absurd-usage                       JSON, usage 10**18 and 10**18
absurd-usage-stream                the same on a last chunk, asked or not
usage-bool-or-string               JSON, usage ``true`` and ``"5"``
usage-bool-or-string-stream        the same on a last chunk, asked or not
usage-null-every-chunk             ``"usage": null`` on every chunk, then the usage chunk, asked or not
usage-on-finish-chunk              usage on the chunk with the finish reason, asked or not
usage-cumulative-every-chunk       usage so far on every chunk: 1, 2 … 5 output tokens
two-usage-chunks                   two choices; per choice a finish chunk and a usage chunk with 7 and 5 (llama.cpp)
crlf-stream                        ok-stream with CRLF line ends
split-events                       ok-stream in pieces of 1, 2, 3, 5 and 7 bytes, which split events, lines, characters
two-events-in-one-write            ok-stream, two events per write
big-event                          ok-stream with one event of 1 MB
comments                           ok-stream with a comment and an empty line before every event
slow-stream                        100 chunks, one per 100 ms, usage if asked: 7 and 100
error-event-in-stream              three chunks, ``data: {"error": …}``, then a proper end without ``[DONE]``
huge-body                          JSON answer of 32 MB
gzip-body                          JSON answer, gzip-compressed whether accepted or not
many-choices                       JSON with 1,000 choices, usage 7 and 5,000
echo                               JSON answer whose content is JSON: method, path, headers, body as received
================================== ==================================================================================

Any other model, and a body that is no JSON, gets a 404. Paths under /v1/models list the behaviours as models.
"""

import argparse
import asyncio
import gzip
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Self

from tests.upstreams.process import READY, ServerProcess, server_process

PROMPT_TOKENS = 7
PIECES = ("Fault", "y", " üpstream", " spoke", ".")
COMPLETION_TOKENS = len(PIECES)
TEXT = "".join(PIECES)
SLOW_CHUNKS = 100
SLOW_SECONDS = 0.1
HUGE_BYTES = 32 * 1024 * 1024
BIG_EVENT_BYTES = 1024 * 1024

_MAX_HEAD_BYTES = 64 * 1024
_DONE = b"data: [DONE]\n\n"
# A reset throws away what the peer's kernel has not handed over yet, so it waits until it probably has.
_BEFORE_RESET_SECONDS = 0.05

Json = dict[str, Any]


@dataclass
class Record:
    """One request as it arrived and what became of it.

    headers: names in lower case, in order, repeats kept. bytes_sent: of the response, framing included.
    disconnected: the client left before the behaviour had said everything. finished: the behaviour is over.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    model: str | None = None
    bytes_sent: int = 0
    events_sent: int = 0
    disconnected: bool = False
    finished: bool = False

    def header(self, name: str) -> str | None:
        """The first value of the header, or None."""
        return next((value for key, value in self.headers if key == name.lower()), None)

    def json(self) -> Any:
        """The body, parsed. Raises ValueError if it is no JSON."""
        return json.loads(self.body)

    def as_json(self) -> Json:
        """The record for GET /_log. The body's bytes are the code points of a text (Latin-1)."""
        return {**vars(self), "body": self.body.decode("latin-1")}


class _ClientGone(Exception):
    """The client closed or reset the connection."""


class _Reader(asyncio.StreamReader):
    """Notices that the client left without reading from it: the next request's bytes stay where they are."""

    def __init__(self) -> None:
        super().__init__(limit=_MAX_HEAD_BYTES)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


@dataclass
class Exchange:
    """A request being answered, byte by byte."""

    record: Record
    reader: _Reader
    writer: asyncio.StreamWriter
    chunk_sizes: Iterator[int] | None = None
    line_end: bytes = b"\n"
    before_event: bytes = b""
    asked_for_usage: bool = False

    async def write(self, data: bytes) -> None:
        if self.reader.gone.is_set():
            raise _ClientGone
        self.writer.write(data)
        self.record.bytes_sent += len(data)
        try:
            await self.writer.drain()
        except ConnectionError:
            raise _ClientGone from None

    async def respond(self, status: int, body: bytes, *headers: str) -> None:
        head = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Fault'}", "Content-Type: application/json"]
        await self.write("\r\n".join([*head, *headers, f"Content-Length: {len(body)}", "\r\n"]).encode() + body)

    async def answer(self, value: Json) -> None:
        await self.respond(200, json.dumps(value).encode())

    async def error(self, status: int, message: str, *headers: str) -> None:
        error = {"message": message, "type": "faulty", "param": None, "code": None}
        await self.respond(status, json.dumps({"error": error}).encode(), *headers)

    async def start_stream(self) -> None:
        await self.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"Cache-Control: no-cache\r\n\r\n"
        )

    async def part(self, data: bytes) -> None:
        """Stream bytes as one transfer chunk, or as many small ones if chunk_sizes says so."""
        if self.chunk_sizes is None:
            await self.write(b"%x\r\n%b\r\n" % (len(data), data))
            return
        while data:
            size = next(self.chunk_sizes)
            piece, data = data[:size], data[size:]
            await self.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0)  # let the kernel send it by itself

    async def events(self, *values: Json) -> None:
        """Stream the values as events, all in one write."""
        encoded = [b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" for value in values]
        self.record.events_sent += len(encoded)
        text = b"".join(self.before_event + event for event in encoded)
        await self.part(text.replace(b"\n", self.line_end))

    async def end(self, *, done: bool = True) -> None:
        """The proper end of a stream."""
        if done:
            await self.part(_DONE.replace(b"\n", self.line_end))
        await self.write(b"0\r\n\r\n")

    async def reset(self) -> None:
        """A TCP reset, after which nothing more can be said."""
        await asyncio.sleep(_BEFORE_RESET_SECONDS)
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def hang(self) -> None:
        """Say nothing until the client leaves or the upstream is stopped."""
        await self.reader.gone.wait()
        raise _ClientGone


Behaviour = Callable[[Exchange], Awaitable[None]]
BEHAVIOURS: dict[str, Behaviour] = {}


def _behaviour(name: str) -> Callable[[Behaviour], Behaviour]:
    def register(function: Behaviour) -> Behaviour:
        BEHAVIOURS[name] = function
        return function

    return register


class FaultyUpstream:
    """The upstream on a loopback port (0: a free one) while its ``async with`` block runs.

    base_url ends in /v1. requests: a record per request, in order of arrival. behaviour: when set, what every
    request gets whatever model it asks for.
    """

    base_url: str

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Record] = []
        self.behaviour: str | None = None
        self._port = port
        self._connections: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._stopping = False

    @property
    def disconnects(self) -> list[Record]:
        """The requests whose client left before the answer was complete."""
        return [record for record in self.requests if record.disconnected]

    async def wait_for_disconnects(self, count: int = 1, timeout_seconds: float = 10) -> list[Record]:
        """The disconnects, once there are count of them. Raises TimeoutError."""
        await self._wait_until(lambda: len(self.disconnects) >= count, timeout_seconds)
        return self.disconnects

    async def wait_for_requests(self, count: int = 1, timeout_seconds: float = 10) -> list[Record]:
        """The requests, once count of them have arrived. Raises TimeoutError."""
        await self._wait_until(lambda: len(self.requests) >= count, timeout_seconds)
        return self.requests

    async def _wait_until(self, reached: Callable[[], bool], timeout_seconds: float) -> None:
        async with asyncio.timeout(timeout_seconds), self._changed:
            await self._changed.wait_for(reached)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: asyncio.StreamReaderProtocol(_Reader(), self._accept), "127.0.0.1", self._port
        )
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._stopping = True
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, _Reader)
        task = asyncio.ensure_future(self._connection(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connection(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        try:
            while record := await _read_request(reader):
                exchange = Exchange(record, reader, writer)
                if record.path.startswith("/v1"):
                    await self._misbehave(exchange)
                else:
                    await self._report(exchange)
        except (_ClientGone, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            # Whatever is still unsent has nobody who would read it; an orderly close could wait for ever.
            if self._stopping or reader.gone.is_set():
                writer.transport.abort()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _report(self, exchange: Exchange) -> None:
        if exchange.record.path != "/_log":
            await exchange.error(404, "no such path")
            return
        await exchange.answer({"requests": [record.as_json() for record in self.requests]})

    async def _misbehave(self, exchange: Exchange) -> None:
        record = exchange.record
        self.requests.append(record)
        await self._notify()
        try:
            if record.path.startswith("/v1/models"):
                await exchange.answer(
                    {"object": "list", "data": [{"id": name, "object": "model"} for name in BEHAVIOURS]}
                )
                return
            record.model, exchange.asked_for_usage = _asked(record.body)
            behaviour = BEHAVIOURS.get(self.behaviour or record.model or "")
            await (behaviour(exchange) if behaviour else exchange.error(404, f"no behaviour {record.model!r}"))
        except _ClientGone:
            record.disconnected = True
            raise
        finally:
            record.finished = True
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


async def _read_request(reader: _Reader) -> Record | None:
    """The next request of a connection; None where the client closed it instead."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, path, _ = first.split(" ", 2)
    pairs = (line.partition(":") for line in lines)
    record = Record(method, path, [(name.lower(), value.strip()) for name, _, value in pairs], b"")
    if "chunked" in (record.header("transfer-encoding") or ""):
        record.body = b"".join([chunk async for chunk in _chunks(reader)])
    else:
        record.body = await reader.readexactly(int(record.header("content-length") or 0))
    return record


async def _chunks(reader: _Reader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


def _asked(body: bytes) -> tuple[str | None, bool]:
    """Model and whether usage was asked for, from a body that may be anything."""
    try:
        asked = json.loads(body)
        return asked.get("model"), bool((asked.get("stream_options") or {}).get("include_usage"))
    except (ValueError, AttributeError):
        return None, False


# --- bodies ---------------------------------------------------------------------------------------------------------


def _usage(prompt: int = PROMPT_TOKENS, completion: int = COMPLETION_TOKENS) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_MISTYPED_USAGE: Json = {"prompt_tokens": True, "completion_tokens": "5", "total_tokens": "6"}


def _whole(*texts: str, **members: Any) -> Json:
    """An answer that chat and completions clients can both read."""
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "stop"}
        for index, text in enumerate(texts)
    ]
    frame = {"id": "faulty-1", "object": "chat.completion", "created": 1, "model": "faulty"}
    return {**frame, "choices": choices, **members}


def _chunk(text: str, *, index: int = 0, finish: str | None = None, **members: Any) -> Json:
    delta = {"content": text} if text else {}
    return _frame([{"index": index, "delta": delta, "text": text, "finish_reason": finish}], **members)


def _frame(choices: list[Json], **members: Any) -> Json:
    frame = {"id": "faulty-1", "object": "chat.completion.chunk", "created": 1, "model": "faulty"}
    return {**frame, "choices": choices, **members}


def _values(exchange: Exchange) -> list[Json]:
    """The events of ok-stream."""
    values = [*(_chunk(piece) for piece in PIECES), _chunk("", finish="stop")]
    return [*values, _frame([], usage=_usage())] if exchange.asked_for_usage else values


async def _stream(exchange: Exchange, values: list[Json], *, per_write: int = 1, done: bool = True) -> None:
    await exchange.start_stream()
    for start in range(0, len(values), per_write):
        await exchange.events(*values[start : start + per_write])
    await exchange.end(done=done)


# --- answers that are not streams -----------------------------------------------------------------------------------


@_behaviour("ok")
async def _ok(exchange: Exchange) -> None:
    if exchange.record.path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
        usage = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS}
        await exchange.answer({"object": "list", "data": data, "model": "faulty", "usage": usage})
        return
    await exchange.answer(_whole(TEXT, usage=_usage()))


@_behaviour("status-400")
async def _status_400(exchange: Exchange) -> None:
    await exchange.error(400, "this upstream dislikes the request")


@_behaviour("status-401")
async def _status_401(exchange: Exchange) -> None:
    await exchange.error(401, f"Incorrect API key provided: {exchange.record.header('authorization')}")


@_behaviour("status-429")
async def _status_429(exchange: Exchange) -> None:
    await exchange.error(429, "this upstream is busy", "Retry-After: 7")


@_behaviour("status-500")
async def _status_500(exchange: Exchange) -> None:
    await exchange.error(500, "this upstream broke")


@_behaviour("reset-before-headers")
async def _reset_before_headers(exchange: Exchange) -> None:
    await exchange.reset()


@_behaviour("hang-before-headers")
async def _hang_before_headers(exchange: Exchange) -> None:
    await exchange.hang()


@_behaviour("garbage-body")
async def _garbage_body(exchange: Exchange) -> None:
    await exchange.respond(200, b'{"choices": [{"mess\xff\x00<html>')


@_behaviour("empty-body")
async def _empty_body(exchange: Exchange) -> None:
    await exchange.respond(200, b"")


@_behaviour("empty-choices")
async def _empty_choices(exchange: Exchange) -> None:
    await exchange.answer(_whole(usage=_usage(completion=0)))


@_behaviour("empty-content")
async def _empty_content(exchange: Exchange) -> None:
    await exchange.answer(_whole("", usage=_usage(completion=0)))


@_behaviour("no-usage")
async def _no_usage(exchange: Exchange) -> None:
    await exchange.answer(_whole(TEXT))


@_behaviour("negative-usage")
async def _negative_usage(exchange: Exchange) -> None:
    await exchange.answer(_whole(TEXT, usage=_usage(-7, -5)))


@_behaviour("absurd-usage")
async def _absurd_usage(exchange: Exchange) -> None:
    await exchange.answer(_whole(TEXT, usage=_usage(10**18, 10**18)))


@_behaviour("usage-bool-or-string")
async def _usage_bool_or_string(exchange: Exchange) -> None:
    await exchange.answer(_whole(TEXT, usage=_MISTYPED_USAGE))


@_behaviour("huge-body")
async def _huge_body(exchange: Exchange) -> None:
    await exchange.answer(_whole("x" * HUGE_BYTES, usage=_usage()))


@_behaviour("gzip-body")
async def _gzip_body(exchange: Exchange) -> None:
    body = gzip.compress(json.dumps(_whole(TEXT, usage=_usage())).encode())
    await exchange.respond(200, body, "Content-Encoding: gzip")


@_behaviour("many-choices")
async def _many_choices(exchange: Exchange) -> None:
    await exchange.answer(_whole(*[TEXT] * 1000, usage=_usage(completion=1000 * COMPLETION_TOKENS)))


@_behaviour("echo")
async def _echo(exchange: Exchange) -> None:
    received = exchange.record.as_json()
    content = json.dumps({name: received[name] for name in ("method", "path", "headers", "body")})
    await exchange.answer(_whole(content, usage=_usage()))


# --- streams --------------------------------------------------------------------------------------------------------


@_behaviour("ok-stream")
async def _ok_stream(exchange: Exchange) -> None:
    await _stream(exchange, _values(exchange))


@_behaviour("cut-stream")
async def _cut_stream(exchange: Exchange) -> None:
    await exchange.start_stream()
    for piece in PIECES[:3]:
        await exchange.events(_chunk(piece))
    await exchange.part(b'data: {"id":"faulty-1","choices":[{"ind')
    await exchange.reset()


@_behaviour("clean-eof-no-done")
async def _clean_eof_no_done(exchange: Exchange) -> None:
    await _stream(exchange, [_chunk(piece) for piece in PIECES[:3]], done=False)


@_behaviour("hang-mid-stream")
async def _hang_mid_stream(exchange: Exchange) -> None:
    await exchange.start_stream()
    for piece in PIECES[:3]:
        await exchange.events(_chunk(piece))
    await exchange.hang()


@_behaviour("garbage-stream")
async def _garbage_stream(exchange: Exchange) -> None:
    await exchange.start_stream()
    for data in (b"{not json", b"null", b"[]", b"5", b'"text"', b"\xff\xfe\x00", b'{"usage": [], "choices": 3}'):
        await exchange.part(b"data: " + data + b"\n\n")
    await exchange.part(b"event: what\nid\nno field at all\n\n")
    await exchange.end()


@_behaviour("empty-stream")
async def _empty_stream(exchange: Exchange) -> None:
    await _stream(exchange, [])


@_behaviour("no-usage-stream")
async def _no_usage_stream(exchange: Exchange) -> None:
    exchange.asked_for_usage = False
    await _stream(exchange, _values(exchange))


async def _stream_with_usage(exchange: Exchange, usage: Json) -> None:
    exchange.asked_for_usage = False
    await _stream(exchange, [*_values(exchange), _frame([], usage=usage)])


@_behaviour("negative-usage-stream")
async def _negative_usage_stream(exchange: Exchange) -> None:
    await _stream_with_usage(exchange, _usage(-7, -5))


@_behaviour("absurd-usage-stream")
async def _absurd_usage_stream(exchange: Exchange) -> None:
    await _stream_with_usage(exchange, _usage(10**18, 10**18))


@_behaviour("usage-bool-or-string-stream")
async def _usage_bool_or_string_stream(exchange: Exchange) -> None:
    await _stream_with_usage(exchange, _MISTYPED_USAGE)


@_behaviour("usage-null-every-chunk")
async def _usage_null_every_chunk(exchange: Exchange) -> None:
    chunks = [*(_chunk(piece, usage=None) for piece in PIECES), _chunk("", finish="stop", usage=None)]
    await _stream(exchange, [*chunks, _frame([], usage=_usage())])


@_behaviour("usage-on-finish-chunk")
async def _usage_on_finish_chunk(exchange: Exchange) -> None:
    await _stream(exchange, [*(_chunk(piece) for piece in PIECES), _chunk("", finish="stop", usage=_usage())])


@_behaviour("usage-cumulative-every-chunk")
async def _usage_cumulative_every_chunk(exchange: Exchange) -> None:
    chunks = [_chunk(piece, usage=_usage(completion=count)) for count, piece in enumerate(PIECES, 1)]
    await _stream(exchange, [*chunks, _chunk("", finish="stop", usage=_usage())])


@_behaviour("two-usage-chunks")
async def _two_usage_chunks(exchange: Exchange) -> None:
    values = [_chunk(piece, index=index) for piece in PIECES for index in (0, 1)]
    for index in (0, 1):
        values += [_chunk("", index=index, finish="stop"), _frame([], usage=_usage())]
    await _stream(exchange, values)


@_behaviour("crlf-stream")
async def _crlf_stream(exchange: Exchange) -> None:
    exchange.line_end = b"\r\n"
    await _stream(exchange, _values(exchange))


@_behaviour("split-events")
async def _split_events(exchange: Exchange) -> None:
    exchange.chunk_sizes = cycle((1, 2, 3, 5, 7))
    await _stream(exchange, _values(exchange))


@_behaviour("two-events-in-one-write")
async def _two_events_in_one_write(exchange: Exchange) -> None:
    await _stream(exchange, _values(exchange), per_write=2)


@_behaviour("big-event")
async def _big_event(exchange: Exchange) -> None:
    await _stream(exchange, [_chunk("x" * BIG_EVENT_BYTES), *_values(exchange)])


@_behaviour("comments")
async def _comments(exchange: Exchange) -> None:
    exchange.before_event = b": keep-alive\n\n"
    await _stream(exchange, _values(exchange))


@_behaviour("slow-stream")
async def _slow_stream(exchange: Exchange) -> None:
    await exchange.start_stream()
    for number in range(SLOW_CHUNKS):
        await exchange.events(_chunk(f" {number}"))
        await asyncio.sleep(SLOW_SECONDS)
    await exchange.events(_chunk("", finish="stop"))
    if exchange.asked_for_usage:
        await exchange.events(_frame([], usage=_usage(completion=SLOW_CHUNKS)))
    await exchange.end()


@_behaviour("error-event-in-stream")
async def _error_event_in_stream(exchange: Exchange) -> None:
    error = {"error": {"message": "this upstream broke midway", "type": "faulty", "param": None, "code": 500}}
    await _stream(exchange, [*(_chunk(piece) for piece in PIECES[:3]), error], done=False)


# --- as a process ---------------------------------------------------------------------------------------------------


@contextmanager
def running_faulty(port: int = 0) -> Iterator[ServerProcess]:
    """The upstream in a process of its own, which a test can kill. Raises RuntimeError if it does not get ready."""
    with server_process("tests.upstreams.faulty", f"--port={port}") as server:
        yield server


async def _serve(port: int) -> None:
    async with FaultyUpstream(port) as upstream:
        print(f"{READY}{upstream.base_url}", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:  # a test run that dies by SIGKILL leaves no server behind
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="an upstream that misbehaves as the requested model's name says")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    asyncio.run(_serve(parser.parse_args().port))
