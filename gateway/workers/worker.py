"""One worker: a process that answers clients as its parent says, on sockets that the parent has bound.

It has an engine, a journal, a connection to the store and connections to upstreams of its own. When the parent is gone,
so is what tends the store: the worker cuts its requests, settles what was sent, and ends.
"""

import asyncio
import logging
import socket
import sys
from contextlib import AsyncExitStack
from typing import Any

from gateway.credits.errors import StoreError
from gateway.credits.journal import JournalError
from gateway.front import Front, credit_engine, store_check
from gateway.http.admin import Check as HealthCheck
from gateway.lifetime import event_loop_factory, running, stop_signals
from gateway.sessions import started_store
from gateway.telemetry.logs import setup_logging
from gateway.telemetry.metrics import Metrics
from gateway.workers.channel import Begin, Channel, Check, Count, Hurry, Stop, Use

log = logging.getLogger(__name__)


def main() -> int:
    """Run as ``team.py`` starts it; the arguments are the worker's number and the file descriptors of its end of the
    channel and of its listening sockets. The exit code."""
    number, channel, *listening = map(int, sys.argv[1:])
    setup_logging("info", number)
    sockets = [socket.socket(fileno=descriptor) for descriptor in listening]
    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(_work(socket.socket(fileno=channel), sockets))
    except (StoreError, JournalError) as error:
        log.error("the worker cannot start: %s", error)
        return 1
    return 0


async def _work(end: socket.socket, sockets: list[socket.socket]) -> None:
    stop, hurry = stop_signals()
    async with AsyncExitStack() as stack:
        channel = await Channel.over(end)
        stack.push_async_callback(channel.close)
        begin = await channel.receive()
        if begin is None:
            return
        assert isinstance(begin.message, Begin)
        config = begin.message.config
        metrics = Metrics(config.plans, config.models)
        stack.callback(lambda: channel.say_farewell(metrics.families()))
        store = await stack.enter_async_context(started_store(config.store, metrics))
        engine = await stack.enter_async_context(credit_engine(config, store, metrics))
        front = Front(metrics)
        stack.push_async_callback(front.close)
        await front.open_on(config, engine, sockets)
        await channel.reply(begin, None)
        worker = _Worker(front, metrics, store_check(store), stop, hurry)
        await stack.enter_async_context(running(worker.obey(channel)))
        await stop.wait()
        await front.drain(hurry)


class _Worker:
    """Does what the parent says."""

    def __init__(
        self, front: Front, metrics: Metrics, check: HealthCheck, stop: asyncio.Event, hurry: asyncio.Event
    ) -> None:
        self._front = front
        self._metrics = metrics
        self._check = check
        self._stop = stop
        self._hurry = hurry

    async def obey(self, channel: Channel) -> None:
        """Answer the parent until it is gone, or an answer fails: then stop at once."""
        try:
            await channel.answer_all(self._answer)
            log.error("the gateway's first process is gone: requests in flight are cut")
        except Exception:
            log.exception("the worker cannot do what it is told, and ends")
        finally:
            self._stop.set()
            self._hurry.set()

    async def _answer(self, message: Any) -> object:
        match message:
            case Use(config):
                await self._front.use(config)
            case Check():
                return "stopping" if self._stop.is_set() else await self._check()
            case Count():
                return self._metrics.families()
            case Stop():
                self._stop.set()
            case Hurry():
                self._stop.set()
                self._hurry.set()
        return None
