"""The model behind all proxies: answers every chat request at once, or streams events at an even pace.

Written on the bare protocol, so that it takes as little as possible of the two cores. ``python -m … EVENTS PAUSE_MS``.
With ``told`` for a pause, no stream goes on before the events of all have arrived: whoever reads them says so, with a
byte for each on a connection of its own. So every event is surely read alone, however slow the proxy is.
"""

import asyncio
import re
import sys
from collections.abc import Callable

import uvloop

from tests.upstreams.process import READY

TOLD = "told"
#: Of an event that has arrived.
ARRIVED = b"+"
_STREAMED = re.compile(rb'"stream": ?true')
_USAGE_WANTED = re.compile(rb'"include_usage": ?true')
_WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"A short answer, as most are, of about a dozen words or so."},'
    b'"finish_reason":"stop","logprobs":null}],"usage":{"prompt_tokens":31,"completion_tokens":14,"total_tokens":45}}'
)
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_WHOLE), _WHOLE)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_FRAME = b'"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench"'


def _event(rest: bytes) -> bytes:
    data = b"data: {" + _FRAME + rest + b"}\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


_TOKEN = _event(b',"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]')
_FINISH = _event(b',"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]')
_USAGE = b',"choices":[],"usage":{"prompt_tokens":31,"completion_tokens":%d,"total_tokens":%d}'
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Pace:
    """When streams go on: each after a pause, or all together once they are told that their events have arrived."""

    def __init__(self, pause_s: float | None) -> None:
        self._pause_s = pause_s
        self._resting: list[Callable[[], None]] = []
        self._under_way = 0

    def rest(self, go_on: Callable[[], None], *, sent: int) -> None:
        """Call go_on in its time; sent: how many events are under way since the last rest."""
        loop = asyncio.get_running_loop()
        if self._pause_s is not None:
            loop.call_later(self._pause_s, go_on)
            return
        self._resting.append(go_on)
        self._under_way += sent
        if not self._under_way:
            loop.call_soon(self.arrived, 0)

    def arrived(self, events: int) -> None:
        """So many events have come to whom they were meant for."""
        self._under_way -= events
        if not self._under_way:
            resting, self._resting = self._resting, []
            for go_on in resting:
                go_on()


class Model(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self, events: int, pace: Pace) -> None:
        self._events, self._pace = events, pace
        self._received = bytearray()
        self._left = 0
        self._usage = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if data.startswith(ARRIVED):
            self._pace.arrived(len(data))
            return
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        lower = self._received[:head].lower()
        at = lower.find(b"content-length:")
        end = head + 4 + int(lower[at + 15 : lower.find(b"\r\n", at) if b"\r\n" in lower[at:] else None])
        if len(self._received) >= end:
            body = bytes(self._received[head:end])
            self._received.clear()
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        assert self._transport is not None
        tail = body[-200:] + body[:200]
        if not _STREAMED.search(tail):
            self._transport.write(_ANSWER)
            return
        self._usage = _USAGE_WANTED.search(tail) is not None
        self._left = self._events
        self._transport.write(_STREAM_HEAD)
        self._pace.rest(self._go_on, sent=0)

    def _go_on(self) -> None:
        if self._transport is None:
            return
        if self._left:
            self._left -= 1
            self._transport.write(_TOKEN)
            self._pace.rest(self._go_on, sent=1)
            return
        usage = _event(_USAGE % (self._events, self._events + 31)) if self._usage else b""
        self._transport.write(_FINISH + usage + _DONE)


async def serve(events: int, pace: Pace) -> None:
    """Answer on a free loopback port, and say on which, until the process is ended."""
    server = await asyncio.get_running_loop().create_server(lambda: Model(events, pace), "127.0.0.1", 0, backlog=4096)
    print(f"{READY}http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), Pace(None if sys.argv[2] == TOLD else float(sys.argv[2]) / 1000)))
