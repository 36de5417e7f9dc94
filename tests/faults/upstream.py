"""An upstream that a test drives token by token, and that counts what it wrote."""

import asyncio
import contextlib
import json
import random
import socket
from types import TracebackType
from typing import Any, Self

#: What every answer reports as its input.
PROMPT_TOKENS = 20
_HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
_WAIT_S = 30


class Exchange:
    """One request as it arrived, and what was written to it so far.

    customer: the text of its message. tokens: output tokens written; one for each event of a stream. whole: whether all
    of the answer was written.
    """

    def __init__(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.body = body
        self.customer: str = body["messages"][0]["content"]
        self.tokens = 0
        self.whole = False
        self._writer = writer

    async def headers(self) -> None:
        """Begin a stream."""
        await self._write(_HEAD + b"Content-Type: text/event-stream\r\n\r\n")

    async def emit(self, count: int) -> None:
        """Write so many tokens of a stream, an event each."""
        choice = {"index": 0, "delta": {"content": "tok "}, "finish_reason": None}
        await self._write(_event({"choices": [choice]}) * count)
        self.tokens += count

    async def finish(self) -> None:
        """Write all of a stream's end but ``[DONE]``."""
        choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await self._write(_event({"choices": [choice]}) + _event({"choices": [], "usage": self._usage()}))

    async def done(self) -> None:
        """Write ``[DONE]``."""
        await self._write(b"data: [DONE]\n\n")
        self.whole = True
        self._writer.close()

    async def answer(self, tokens: int) -> None:
        """Write a whole answer of so many tokens."""
        self.tokens = tokens
        message = {"role": "assistant", "content": "tok " * tokens}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        text = json.dumps({"id": "counted", "choices": [choice], "usage": self._usage()}).encode()
        await self._write(_HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        self.whole = True
        self._writer.close()

    def break_off(self) -> None:
        """End the connection in the middle."""
        self._writer.transport.abort()

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": self.tokens,
            "total_tokens": PROMPT_TOKENS + self.tokens,
        }


class CountingUpstream:
    """Serves ``base_url`` in the test's loop. ``next`` gives the requests in order of arrival; while ``busy`` is set
    they are answered at once instead, with a random number of tokens. exchanges: all of them.

    ``deaf_url`` is an upstream whose connections nobody takes.
    """

    def __init__(self) -> None:
        self.base_url = self.deaf_url = ""
        self.busy = False
        self.exchanges: list[Exchange] = []
        self._arrived: asyncio.Queue[Exchange] = asyncio.Queue()
        self._random = random.Random(1)
        self._server: asyncio.Server | None = None
        self._deaf: socket.socket | None = None
        self._handlers: set[asyncio.Task[None]] = set()

    async def next(self) -> Exchange:
        """The next request. Raises TimeoutError after half a minute."""
        async with asyncio.timeout(_WAIT_S):
            return await self._arrived.get()

    async def __aenter__(self) -> Self:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        # The kernel takes its connections, and nobody here does.
        self._deaf = socket.create_server(("127.0.0.1", 0), backlog=16)
        self._server = server
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self.deaf_url = f"http://127.0.0.1:{self._deaf.getsockname()[1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._deaf is not None
        self._server.close()
        self._deaf.close()
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                exchange = Exchange(json.loads(await reader.readexactly(length)), writer)
                self.exchanges.append(exchange)
                if self.busy:
                    await self._answer_at_once(exchange)
                else:
                    self._arrived.put_nowait(exchange)
                    await reader.read()
        finally:
            writer.close()

    async def _answer_at_once(self, exchange: Exchange) -> None:
        tokens = self._random.randint(1, 400)
        if not exchange.body.get("stream"):
            await exchange.answer(tokens)
            return
        await exchange.headers()
        for _ in range(tokens // 40):
            await exchange.emit(40)
            await asyncio.sleep(0.005)
        await exchange.emit(tokens % 40 + 1)
        await exchange.finish()
        await exchange.done()


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'id': 'counted', 'object': 'chat.completion.chunk', **document})}\n\n".encode()
