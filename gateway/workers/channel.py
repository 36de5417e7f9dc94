"""What the parent asks a worker, over a socket pair that ends with either of them.

A frame is the length of its pickle in 4 bytes, then the pickle of a number and a message; the answer has the same
number. Pickles are safe here: nobody but the two processes can write to the pair.
"""

import asyncio
import copyreg
import io
import itertools
import logging
import pickle
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from gateway.config.model import GatewayConfig

log = logging.getLogger(__name__)

_LENGTH_BYTES = 4
#: The number of what nobody has asked for: a worker's last words.
_FAREWELL = -1


@dataclass(frozen=True, slots=True)
class Begin:
    """Take requests by this configuration; answered once the worker does. The first message, and sent once."""

    config: GatewayConfig


@dataclass(frozen=True, slots=True)
class Use:
    """Take new requests by this configuration; answered once the worker does."""

    config: GatewayConfig


class Check:
    """Answered with None where the worker can take requests, else with what is wrong."""


class Count:
    """Answered with the worker's metrics."""


class Stop:
    """Take no more requests, and end once those in flight have. Answered at once."""


class Hurry:
    """Stop, and cut the requests in flight. Answered at once."""


Message = Begin | Use | Check | Count | Stop | Hurry


class Gone(Exception):
    """The other process has ended, or is about to."""


class Received(NamedTuple):
    """A message and the number that its answer has."""

    number: int
    message: Any


class Channel:
    """One end. The parent asks; the worker receives, and replies in any order.

    last_words: what the worker said before it ended, None where it could not.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._gone = False
        self.last_words: Any = None

    @classmethod
    async def over(cls, end: socket.socket) -> "Channel":
        """The channel over one end of a socket pair, which it closes."""
        return cls(*await asyncio.open_unix_connection(sock=end))

    async def ask(self, message: Message) -> Any:
        """The answer to a message, as long as hear_answers runs. Raises Gone."""
        if self._gone or self._writer.is_closing():
            raise Gone
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(number, message)
            return await answer
        finally:
            del self._asked[number]

    async def hear_answers(self) -> None:
        """Take in answers until the other process is gone; then nobody waits for any more."""
        try:
            while received := await self.receive():
                if received.number == _FAREWELL:
                    self.last_words = received.message
                answer = self._asked.get(received.number)
                if answer is not None and not answer.done():
                    answer.set_result(received.message)
        finally:
            self._gone = True
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(Gone())

    async def receive(self) -> Received | None:
        """The next frame; None when the other process is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES))
            frame = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        try:
            return Received(*pickle.loads(frame))  # noqa: S301
        except Exception:  # whatever it is: the other process runs another version of this program
            log.exception("a message of another process cannot be read")
            self._writer.close()
            return None

    async def reply(self, received: Received, answer: object) -> None:
        """Answer what was received; nothing happens where nobody hears it any more."""
        self._send(received.number, answer)
        with suppress(ConnectionError):
            await self._writer.drain()

    async def answer_all(self, answer: Callable[[Any], Awaitable[object]]) -> None:
        """Answer every message, each as soon as its answer is there, until the other process is gone."""

        async def answer_one(received: Received) -> None:
            await self.reply(received, await answer(received.message))

        async with asyncio.TaskGroup() as answering:
            while received := await self.receive():
                answering.create_task(answer_one(received))

    def say_farewell(self, words: object) -> None:
        """Leave last words; close sends them."""
        self._send(_FAREWELL, words)

    async def close(self) -> None:
        """Send what waits, and end."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def _send(self, number: int, message: object) -> None:
        if self._writer.is_closing():  # nobody hears it any more
            return
        text = _pickled((number, message))
        self._writer.write(len(text).to_bytes(_LENGTH_BYTES) + text)


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {MappingProxyType: _reduce_view}
    pickler.dump(value)
    return file.getvalue()


def _reduce_view(view: MappingProxyType[Any, Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How read-only mappings travel, which the configuration is made of and pickle does not know."""
    return _view, (dict(view),)


def _view(content: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(content)
