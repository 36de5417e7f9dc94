"""One worker as its parent sees it: a process, and the parent's end of the channel to it."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from prometheus_client import Metric

from gateway.config.model import GatewayConfig
from gateway.lifetime import SETTLE_S
from gateway.workers.channel import Begin, Channel, Count, Message

_LOOK_S = 0.005
#: Requests that are cut, what else waits for the store, and a little for the exit itself.
_CUT_S = 2 * SETTLE_S + 2.0

#: Run as a file and without the working directory in its path (-P): a start by name might find another package.
_PROGRAM = Path(__file__).with_name("start.py")


class WorkerProcess:
    """A worker from its start to its end. ready: it takes requests. figures: its metrics when it last told them."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.ready = False
        self.figures: Sequence[Metric] = ()
        self._process = process
        self._channel = channel
        self._hearing = asyncio.create_task(channel.hear_answers())

    @classmethod
    async def start(cls, number: int, sockets: Sequence[socket.socket]) -> Self:
        """Start a process that will listen on these sockets. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), *(sock.fileno() for sock in sockets)]
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - it takes a millisecond; a fixed command, no shell
                [sys.executable, "-P", str(_PROGRAM), str(number), *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                # Ctrl-C reaches the terminal's whole process group: the parent alone says what it means.
                start_new_session=True,
            )
        return cls(process, await Channel.over(ours))

    @property
    def pid(self) -> int:
        """Its process id, which is another's after its end."""
        return self._process.pid

    @property
    def obituary(self) -> str:
        """How it ended."""
        code = self._process.returncode
        return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"

    async def begin(self, config: GatewayConfig) -> None:
        """Have it take requests by this configuration; returns once it does. Raises Gone."""
        await self._channel.ask(Begin(config))
        self.ready = True

    async def ask(self, message: Message, within_s: float) -> Any:
        """Its answer. Raises Gone and TimeoutError."""
        async with asyncio.timeout(within_s):
            return await self._channel.ask(message)

    async def count(self, within_s: float) -> None:
        """Have it tell its figures. Raises Gone and TimeoutError: they are as they were."""
        self.figures = await self.ask(Count(), within_s)

    async def ended(self, within_s: float | None = None) -> None:
        """Wait for its end; figures are then its last, if it could tell them. Raises TimeoutError: it lives."""
        async with asyncio.timeout(within_s):
            await asyncio.shield(self._hearing)  # until its end of the channel is closed
            self.ready = False
            while self._process.poll() is None:  # noqa: ASYNC110 - looked at as the store's server is
                await asyncio.sleep(_LOOK_S)
        if self._channel.last_words is not None:
            self.figures = self._channel.last_words

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()

    async def close(self) -> None:
        """Let it go: it ends as if its parent had, and is killed if it does not. May be repeated."""
        await self._channel.close()
        try:
            await self.ended(_CUT_S)
        except TimeoutError:
            self.kill()
            await self.ended()
