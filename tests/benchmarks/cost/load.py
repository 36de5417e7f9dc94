"""The clients: as many connections as asked for, on the bare protocol, each sending its next request when its answer
has come."""

import asyncio
import gzip
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

_CHUNKED_END = b"\r\n0\r\n\r\n"
_LONGEST_S = 30.0
_EVENT = b'"delta":{"content"'
_PROMPT = "Say in a dozen words what a quota gateway is, please; be short and plain. "


@dataclass(frozen=True)
class Target:
    """Where the requests go, and as whom."""

    base_url: str
    key: str = "none"

    def request(
        self, *, stream: bool = False, prompt_bytes: int = 76, messages: int = 1, compressed: bool = False
    ) -> bytes:
        """A chat request as it goes over the wire; its prompt in so many messages of the same length, its body as gzip
        if it is to be compressed."""
        each = prompt_bytes // messages
        prompt = _PROMPT * (each // len(_PROMPT) + 1)
        document = {
            "model": "bench",
            "messages": [{"role": "user", "content": prompt[:each]}] * messages,
            "max_tokens": 1024,
            "stream": stream,
        }
        body = json.dumps(document, separators=(",", ":")).encode()
        encoding = ""
        if compressed:
            body, encoding = gzip.compress(body), "Content-Encoding: gzip\r\n"
        place = urlsplit(self.base_url)
        head = (
            f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
            f"Authorization: Bearer {self.key}\r\nAccept: application/json\r\n"
            "User-Agent: OpenAI/Python 2.8.0\r\nContent-Type: application/json\r\n"
            f"Accept-Encoding: gzip, deflate\r\n{encoding}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Client(asyncio.Protocol):
    """One connection. answered: called when a whole answer has come, with its status line if it is not a 200.

    events: how many pieces of an answer came in all; heard: called with how many came at once."""

    def __init__(self, answered: Callable[["Client", bytes], None], heard: Callable[[int], None] | None = None) -> None:
        self._answered = answered
        self._heard = heard
        self._head = b""
        self._left = 0
        self._tail = b""
        self.events = 0
        self.sent_at = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def send(self, request: bytes, *, since: float | None = None) -> None:
        """since: when it was due, if that was earlier."""
        assert self.transport is not None, "the server closed the connection"
        self.sent_at = time.perf_counter() if since is None else since
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._head:
            end = data.find(b"\r\n\r\n")
            assert end > 0, "a head in pieces"
            self._head, data = data[:end].lower(), data[end + 4 :]
            at = self._head.find(b"content-length:")
            self._left = -1 if at < 0 else int(self._head[at + 15 :].split(b"\r\n", 1)[0])
        if self._left < 0:
            events = data.count(_EVENT)
            self.events += events
            if events and self._heard is not None:
                self._heard(events)
            self._tail = (self._tail + data)[-len(_CHUNKED_END) :]
            ended = self._tail.endswith(_CHUNKED_END) or (self._tail == data == _CHUNKED_END[2:])
        else:
            self._left -= len(data)
            ended = self._left == 0
        if ended:
            status, self._head, self._tail = self._head.split(b"\r\n", 1)[0], b"", b""
            self._answered(self, b"" if b" 200" in status else status)


async def connected(
    target: Target, count: int, answered: Callable[[Client, bytes], None], heard: Callable[[int], None] | None = None
) -> list[Client]:
    """So many connections, of which none has sent anything."""
    place = urlsplit(target.base_url)
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(count):
        _, client = await loop.create_connection(lambda: Client(answered, heard), place.hostname, place.port)
        clients.append(client)
    return clients


async def closed_loop(
    target: Target, request: bytes, connections: int, requests: int, heard: Callable[[int], None] | None = None
) -> float:
    """Send so many requests, the next one on a connection as soon as it is answered; the seconds that took. heard: told
    how many events have come. Raises RuntimeError for an answer other than 200."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = answers = requests

    def answered(client: Client, wrong: bytes) -> None:
        nonlocal left, answers
        answers -= 1
        if wrong and not done.done():
            done.set_exception(RuntimeError(wrong.decode()))
        if left:
            left -= 1
            client.send(request)
        elif not answers and not done.done():
            done.set_result(None)

    clients = await connected(target, connections, answered, heard)
    started = time.perf_counter()
    left -= len(clients)
    for client in clients:
        client.send(request)
    try:
        await done
        return time.perf_counter() - started
    finally:
        close(clients)


async def open_loop(target: Target, request: bytes, rate: float, seconds: float) -> list[float]:
    """Send at an even rate (requests/s), whether or not earlier ones were answered; how long each took, s: from when it
    was sent, or where all connections waited for an answer, from when it would have been. Those of the first second
    are left out, while the server takes the connections. Raises RuntimeError for an answer other than 200, or none."""
    took: list[tuple[float, float]] = []
    free: list[Client] = []
    late: deque[float] = deque()
    wrong_ones: list[bytes] = []

    def answered(client: Client, wrong: bytes) -> None:
        took.append((client.sent_at, time.perf_counter() - client.sent_at))
        if wrong:
            wrong_ones.append(wrong)
        if late:
            client.send(request, since=late.popleft())
        else:
            free.append(client)

    clients = await connected(target, 256, answered)
    free += clients
    started, count = time.perf_counter(), int(rate * (seconds + 1))
    for number in range(count):
        ahead = started + number / rate - time.perf_counter()
        if ahead > 0:
            await asyncio.sleep(ahead)
        if free:
            free.pop().send(request)
        else:
            late.append(time.perf_counter())
    until = time.perf_counter() + _LONGEST_S
    while len(took) < count and time.perf_counter() < until:
        await asyncio.sleep(0.01)
    close(clients)
    if wrong_ones or len(took) < count:
        raise RuntimeError(f"{len(took)} of {count} were answered, {len(wrong_ones)} wrongly: {wrong_ones[:1]}")
    return [each for sent_at, each in took if sent_at >= started + 1]


def close(clients: list[Client]) -> None:
    """Hang up."""
    for client in clients:
        if client.transport is not None:
            client.transport.abort()
