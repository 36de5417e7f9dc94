"""Says to the store how reservations end, however often that takes.

A settlement or void that the store does not take is written to the journal and repeated until it is taken; one whose
reply was lost, or which another primary may not have heard of, is said again. Ids make each repeat harmless.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from gateway.credits import scripts
from gateway.credits.errors import EngineError, StoreError, StoreRefused, UnknownReservation
from gateway.credits.journal import Journal, JournalEntry, JournalError
from gateway.credits.reservations import LEASE_MS, Reservation
from gateway.credits.store import Store
from gateway.credits.wording import Wording
from gateway.domain.decision import Settlement
from gateway.domain.plan import Plan
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 5.0
_MOST_TAKEN_BACK = 1000
_SAID_AT_ONCE = 50
_DUE_AT_ONCE = 200
_ADOPT_S = 30.0
# A replica that takes over may lack the last moments: what ended in them is said again.
_FAILOVER_S = 60.0
_MOST_RECENT = 100_000  # of some 450 bytes each
_REMEMBERED = 1 + len(JournalEntry._fields)
_FORGOTTEN_AT_ONCE = 4
#: Makes a named tuple of values that are in its order, for half of what its own constructor takes.
_entry = tuple.__new__


class Ends:
    """The ends of this process's reservations, and of those that other processes left."""

    def __init__(self, store: Store, metrics: Metrics, journal: Journal, configured: Callable[[str], Plan]) -> None:
        """configured: the plan of a name as it is configured now, or one without windows."""
        self._store = store
        self._metrics = metrics
        self._settle_seconds = metrics.store_seconds("settle")
        self._journal = journal
        self._configured = configured
        self._background: set[asyncio.Task[None]] = set()
        # Of each its time and its fields, one after the other: kept as tuples, they would have the collector of cycles
        # look at all of them after every 5,000 requests, for 3 ms.
        self._recent: deque[Any] = deque(maxlen=_MOST_RECENT * _REMEMBERED)
        store.on_failover = self._say_again
        metrics.watch_journal_pending(lambda: journal.pending)

    async def charge(self, reservation: Reservation, payg_nano: int, plan_nano: int, note: str) -> Settlement:
        """Tell the store what a reservation is charged, now or as soon as can be: at list price and at the plan's rate.

        If the caller is cancelled, it goes on in the background. If StoreError is raised, it is in the journal, and
        goes on too. Raises EngineError where the store cannot charge it.
        """
        reserved, plan = reservation.reserved, reservation.plan
        entry = _entry(
            JournalEntry,
            (
                "settle",
                reservation.account,
                reserved.reservation_id,
                payg_nano,
                plan_nano,
                note,
                plan.name,
                plan.rate_ppm,
                plan.payg,
                reservation.created_ms,
                reservation.key_id,
                reservation.model,
            ),
        )
        store = self._store
        try:
            # ``_end_once`` and the store's coroutine, written out because each coroutine of a request takes 2,000
            # instructions.
            wording, command = self._call(entry)
            started, way = time.perf_counter(), store.primary_of(wording.key)
            try:
                reply = await way.write(command)
            except StoreRefused as refusal:
                reply = await store.run_again("settle", way, refusal, wording.key, command)
            self._settle_seconds.observe(time.perf_counter() - started)
        except asyncio.CancelledError:
            self._in_background(self._end_somehow(entry))
            raise
        except StoreError:
            await self._put_off(entry)
            raise
        settlement = self._settled(entry, reply)
        left = reserved.from_allowance_nano - settlement.from_allowance_nano
        left += reserved.from_balance_nano - settlement.from_balance_nano
        if left > 0:
            self._metrics.released("settled", left)
        return settlement

    async def void(self, account: str, reservation: str) -> None:
        """Tell the store that nothing is charged, on the same terms. Raises UnknownReservation, too."""
        entry = JournalEntry("void", account, reservation)
        try:
            await self._end_once(entry)
        except asyncio.CancelledError:
            self._in_background(self._end_somehow(entry))
            raise
        except StoreError:
            await self._put_off(entry)
            raise

    async def _put_off(self, entry: JournalEntry) -> None:
        """Leave it to the background, and return once it is in the journal."""
        written = asyncio.Event()
        self._in_background(self._end_later(entry, written))
        await written.wait()

    async def _end_once(self, entry: JournalEntry, *, again: bool = False) -> None:
        """Say it to the store. again: it was said, and counted, before."""
        if entry.verb == "void":
            await scripts.release(self._store, entry.account, entry.reservation, "void")
            if not again:
                self._remember_end(entry)
            return
        wording, command = self._call(entry)
        reply = await self._store.run_packed("settle", wording.key, command)
        self._settled(entry, reply, again=again)

    def _call(self, entry: JournalEntry) -> tuple[Wording, bytes]:
        """The settlement's script call, packed."""
        # All at once: a field at a time, they take 1,000 instructions more.
        _, account, reservation, payg_nano, plan_nano, note, name, rate_ppm, payg, created_ms, key_id, model = entry
        plan = self._configured(name)
        if plan.rate_ppm != rate_ppm or plan.payg != payg:  # it is charged at those that it was made at
            plan = replace(plan, rate_ppm=rate_ppm, payg=payg)
        wording = self._store.wording(account, key_id, model, plan.name, plan.terms)
        return wording, wording.settle(reservation, payg_nano, plan_nano, note, created_ms)

    def _settled(self, entry: JournalEntry, reply: list[Any], *, again: bool = False) -> Settlement:
        """What the script's reply says; remembered and counted, unless it was before. Raises EngineError."""
        settlement = scripts.read_settlement(reply, entry.account, entry.reservation)
        if not again:
            self._remember_end(entry)
            self._count_settlement(entry, settlement)
        return settlement

    def _remember_end(self, entry: JournalEntry) -> None:
        now, recent = time.monotonic(), self._recent
        # A few at a time: to forget all that a busy minute has left would hold up the first request after it for 50 ms.
        for _ in range(_FORGOTTEN_AT_ONCE):
            if not recent or recent[0] >= now - _FAILOVER_S:
                break
            for _ in range(_REMEMBERED):
                recent.popleft()
        recent.extend((now, *entry))

    def _count_settlement(self, entry: JournalEntry, settlement: Settlement) -> None:
        if settlement.from_allowance_nano:
            self._metrics.settled(entry.plan, entry.model, "allowance", settlement.from_allowance_nano)
        if settlement.from_balance_nano:
            self._metrics.settled(entry.plan, entry.model, "payg", settlement.from_balance_nano)
        if settlement.written_off_nano:
            self._metrics.written_off(settlement.written_off_nano)
            log.error("wrote off %d nano-credits of %s", settlement.written_off_nano, entry.reservation)

    # --- repeating ----------------------------------------------------------------------------------------------

    async def replay(self) -> int:
        """Say to the store what processes before this one could not; how many. It goes on in the background.
        Raises JournalError."""
        entries = await self._journal.adopt()
        if entries:
            self._in_background(self._all_until_done(entries))
        return len(entries)

    async def adopt_journals(self) -> None:
        """Replay what other processes leave behind in the journal's directory, for ever."""
        while True:
            await asyncio.sleep(_ADOPT_S)
            try:
                await self.replay()
            except JournalError as error:
                log.error("the journals of other processes cannot be read: %s", error)

    def _say_again(self) -> None:
        """Another primary answers, which may not have heard of what ended last: their ids make that harmless."""
        since, words = time.monotonic() - _FAILOVER_S, list(self._recent)
        starts = range(0, len(words), _REMEMBERED)
        first = next((start for start in starts if words[start] >= since), len(words))
        if first < len(words):
            starts = range(first, len(words), _REMEMBERED)
            log.warning("another primary answers: telling it again of the last %d reservations that ended", len(starts))
            again = (_entry(JournalEntry, words[start + 1 : start + _REMEMBERED]) for start in starts)
            self._in_background(self._all_until_done(again, again=True))

    async def _all_until_done(self, entries: Iterable[JournalEntry], *, again: bool = False) -> None:
        # A few at a time: they share the connection with the requests of now.
        left = iter(entries)
        while some := list(islice(left, _SAID_AT_ONCE)):
            await asyncio.gather(*(self._until_done(entry, again=again) for entry in some))

    async def _end_somehow(self, entry: JournalEntry) -> None:
        """In the background: at once, or by way of the journal."""
        try:
            await self._end_once(entry)
        except StoreError:
            await self._end_later(entry, asyncio.Event())
        except asyncio.CancelledError:
            # The process is about to end, and the store has not answered.
            await self._write_down(entry)
            raise

    async def _end_later(self, entry: JournalEntry, written: asyncio.Event) -> None:
        try:
            await self._write_down(entry)
        finally:
            written.set()
        await self._until_done(entry)

    async def _write_down(self, entry: JournalEntry) -> None:
        try:
            await self._journal.add(entry)
        except JournalError as error:
            self._metrics.journal_failed()
            log.error("%s of %s is in memory alone: %s", entry.verb, entry.reservation, error)

    async def _until_done(self, entry: JournalEntry, *, again: bool = False) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                await self._end_once(entry, again=again)
            except StoreError as error:
                # Also a store that answers and refuses: full, read-only, busy. It may take the call later.
                level = logging.WARNING if pause_s == _RETRY_FIRST_S else logging.DEBUG
                log.log(level, "the store did not take the %s of %s yet: %s", entry.verb, entry.reservation, error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MOST_S)
                continue
            except EngineError as error:
                if entry.verb != "void":
                    log.error("the settlement of %s is impossible: %s", entry.reservation, error)
            await self._journal.done(entry.reservation)
            return

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a call in the background failed: %s", error, exc_info=error)

    # --- what nobody will end ------------------------------------------------------------------------------------

    def take_back(self, account: str, reservation: str) -> None:
        """Void in the background what may be held, for as long as its lease; by then it has ended by itself."""
        if len(self._background) < _MOST_TAKEN_BACK:
            self._in_background(self._void_for_a_lease(account, reservation))

    async def _void_for_a_lease(self, account: str, reservation: str) -> None:
        pause_s = _RETRY_FIRST_S
        with suppress(TimeoutError, UnknownReservation):  # it was never made
            async with asyncio.timeout(LEASE_MS / 1000):
                while True:
                    try:
                        await scripts.release(self._store, account, reservation, "void")
                    except StoreError as error:
                        log.debug("%s is not taken back yet: %s", reservation, error)
                    else:
                        return
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, _RETRY_MOST_S)

    async def expire_due(self, shard: int) -> int:
        """End the shard's reservations whose lease has run out; how many."""
        ended = 0
        while True:
            looked_at, overdue = await scripts.due(self._store, shard, limit=_DUE_AT_ONCE)
            for reservation, account in overdue:
                ended += await self._expire(reservation, account)
            if looked_at < _DUE_AT_ONCE:
                return ended

    async def _expire(self, reservation: str, account: str) -> bool:
        try:
            settlement = await scripts.release(self._store, account, reservation, "expire")
        except (EngineError, StoreRefused) as error:
            log.error("the lease of %s ran out and cannot be ended: %s", reservation, error)
            return False
        if settlement is None or settlement.repeated:
            return False
        self._metrics.lease_expired()
        self._count_settlement(JournalEntry("void", account, reservation), settlement)
        log.warning(
            "the lease of %s (account %s) ran out; %d nano-credits were charged",
            reservation,
            account,
            settlement.cost_nano,
        )
        return True

    async def close(self, timeout_s: float) -> int:
        """Wait for calls in the background; the number that did not finish. What those had to say is in the journal."""
        if self._background:
            await asyncio.wait(self._background, timeout=timeout_s)
        left = list(self._background)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)  # each writes down what it could not say
        return len(left)
