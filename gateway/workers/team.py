"""The workers of a gateway, all together: started, told what to do, asked how they are, and replaced when they end."""

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from prometheus_client import Metric

from gateway.config.model import Address, GatewayConfig
from gateway.credits.journal import JournalError
from gateway.credits.service import CreditEngine
from gateway.http.admin import Check as HealthCheck
from gateway.lifetime import DRAIN_S, SETTLE_S, running
from gateway.listening import shared_sockets, stop_listening
from gateway.telemetry.metrics import Metrics, expose
from gateway.telemetry.sums import growing, summed
from gateway.workers.channel import Check, Gone, Hurry, Message, Stop, Use
from gateway.workers.process import WorkerProcess

log = logging.getLogger(__name__)

#: A worker that has not taken over a configuration by then is ended: none may go on at the prices of before.
USE_S = 10.0
#: A worker that has not told its figures by then is counted with the last that it told.
COUNT_S = 0.5
#: The same for how it is: less than the second that probes have.
CHECK_S = 0.8
#: How often workers are asked for their figures: what a killed one has counted since then is in no sum.
COUNT_EVERY_S = 5.0
#: Requests in flight, their settlements, and what else waits for the store; a little for the exit itself.
_STOP_S = DRAIN_S + 2 * SETTLE_S + 2.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 10.0
_STEADY_S = 60.0  # a worker that lived this long was not in a crash loop


class WorkerFailed(Exception):
    """A worker ended while the gateway started; where it had a reason of its own, its log has it."""


@dataclass
class _Seat:
    """What stays while workers come and go. sockets: what each of them listens on; connections wait there meanwhile."""

    number: int
    sockets: list[socket.socket]
    worker: WorkerProcess | None = None


class Team:
    """Worker processes that answer at one address. ``start``, ``open``, ``drain``, ``close``, in this order."""

    def __init__(self, count: int, address: Address, metrics: Metrics) -> None:
        """count: of workers. metrics: the parent's own. Raises ListenError."""
        self._address, sockets = shared_sockets(address, count, "listen")
        self._seats = [_Seat(number, own) for number, own in enumerate(sockets, 1)]
        self._metrics = metrics
        self._of_ended: Sequence[Metric] = ()
        self._beside = AsyncExitStack()
        metrics.watch_workers(lambda: sum(worker.ready for worker in self._workers))

    @property
    def _workers(self) -> list[WorkerProcess]:
        return [seat.worker for seat in self._seats if seat.worker is not None]

    @property
    def checks(self) -> Mapping[str, HealthCheck]:
        """That a worker can take requests; which one a client meets is the kernel's choice."""
        return {"workers": self._check}

    async def start(self) -> None:
        """Start the processes, which take no requests yet but read the program. Raises OSError."""
        for seat in self._seats:
            seat.worker = await WorkerProcess.start(seat.number, seat.sockets)

    async def open(self, served: GatewayConfig, engine: CreditEngine) -> Address:
        """Have them take requests; their address, once all do. engine: the parent's own, which says to the store what
        a worker that ended left in its journal. Raises WorkerFailed."""
        self._served, self._engine = served, engine
        await asyncio.gather(*(self._begin(seat) for seat in self._seats))
        for seat in self._seats:
            await self._beside.enter_async_context(running(self._keep_manned(seat)))
        await self._beside.enter_async_context(running(self._keep_count()))
        return self._address

    async def _begin(self, seat: _Seat) -> None:
        assert seat.worker is not None
        try:
            await seat.worker.begin(self._served)
        except Gone:
            await seat.worker.ended()
            raise WorkerFailed(f"worker {seat.number} ended while it started: {seat.worker.obituary}") from None

    async def use(self, served: GatewayConfig) -> None:
        """Answer new requests by another configuration: all workers do once this returns."""
        self._engine.use(served.plans, served.default_plan)
        self._metrics.use(served.plans, served.models)
        self._served = served  # a worker that is started from here on begins with it
        await asyncio.gather(*(self._have_use(seat, served) for seat in self._seats))

    async def _have_use(self, seat: _Seat, served: GatewayConfig) -> None:
        if seat.worker is None:
            return
        try:
            await seat.worker.ask(Use(served), USE_S)
        except Gone:
            pass
        except TimeoutError:
            log.error("worker %d does not take over the configuration, and is ended", seat.number)
            seat.worker.kill()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let requests in flight end, for DRAIN_S or until hurry is set, and the workers with them."""
        await self._beside.aclose()
        await self._tell(Stop())
        ends = asyncio.gather(*(self._end(seat) for seat in self._seats))
        async with running(self._pass_on(hurry)):
            await ends

    async def _pass_on(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        await self._tell(Hurry())

    async def _tell(self, message: Message) -> None:
        answers = (worker.ask(message, COUNT_S) for worker in self._workers)
        await asyncio.gather(*answers, return_exceptions=True)

    async def _end(self, seat: _Seat) -> None:
        if seat.worker is None:
            return
        try:
            await self._gone(seat, seat.worker, _STOP_S)
        except TimeoutError:
            log.error("worker %d does not end, and is killed", seat.number)
            seat.worker.kill()

    async def close(self) -> None:
        """End what is left. May be repeated."""
        await self._beside.aclose()
        for seat in self._seats:
            if seat.worker is not None:
                await seat.worker.close()
            for sock in seat.sockets:
                sock.close()

    # --- one that ends ------------------------------------------------------------------------------------------

    async def _keep_manned(self, seat: _Seat) -> None:
        """Start another worker whenever one ends, for ever."""
        loop = asyncio.get_running_loop()
        backoff_s, since_s = _FIRST_BACKOFF_S, loop.time()
        while True:
            if seat.worker is not None:
                cause = await self._gone(seat, seat.worker)
                self._metrics.worker_ended()
                log.error("worker %d ended (%s); another is started", seat.number, cause)
            if loop.time() - since_s > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            elif backoff_s > _FIRST_BACKOFF_S:
                # Clients shall not wait for one that ends again and again: the kernel gives them to the others.
                for sock in seat.sockets:
                    stop_listening(sock)
            await self._adopt_journal()
            await asyncio.sleep(backoff_s)
            backoff_s, since_s = min(backoff_s * 2, _LONGEST_BACKOFF_S), loop.time()
            try:
                await self._replace(seat)
            except Exception:  # whatever it is, the gateway is of less use without this worker: try again
                log.exception("worker %d could not be started again", seat.number)

    async def _replace(self, seat: _Seat) -> None:
        seat.worker = await WorkerProcess.start(seat.number, seat.sockets)
        try:
            await seat.worker.begin(self._served)
        except Gone:
            return  # its end is seen next
        log.warning("worker %d runs again (pid %d)", seat.number, seat.worker.pid)

    async def _adopt_journal(self) -> None:
        """What a worker that ended could not say to the store is said now. Its open requests end with their leases."""
        try:
            await self._engine.replay()
        except JournalError as error:
            log.error("the journal of an ended worker cannot be read: %s", error)

    async def _gone(self, seat: _Seat, worker: WorkerProcess, within_s: float | None = None) -> str:
        """Wait for a worker's end, and leave its seat empty; how it ended. Raises TimeoutError."""
        await worker.ended(within_s)
        # Without an await between them: what it counted is in every sum, and once.
        self._of_ended = summed([self._of_ended, growing(worker.figures)])
        seat.worker = None
        await worker.close()
        return worker.obituary

    # --- how they are -------------------------------------------------------------------------------------------

    async def _check(self) -> str | None:
        wrong = "none takes requests"
        asked = [asyncio.create_task(_check_one(worker)) for worker in self._workers if worker.ready]
        try:
            for answer in asyncio.as_completed(asked):
                if (said := await answer) is None:
                    return None
                wrong = said
        finally:
            for answer in asked:
                answer.cancel()
        return wrong

    async def scrape(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics of parent and workers, added up."""
        await self._count()
        each = [worker.figures for worker in self._workers]
        return expose(summed([self._metrics.families(), self._of_ended, *each]), accept)

    async def _keep_count(self) -> None:
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            await self._count()

    async def _count(self) -> None:
        await asyncio.gather(*map(_count_one, self._workers))


async def _count_one(worker: WorkerProcess) -> None:
    with suppress(Gone, TimeoutError):
        await worker.count(COUNT_S)


async def _check_one(worker: WorkerProcess) -> str | None:
    try:
        answer: str | None = await worker.ask(Check(), CHECK_S)
    except (Gone, TimeoutError):
        return "none answers"
    return answer
