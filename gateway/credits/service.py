"""What the gateway and its verbs do with credits. Everything here survives a lost reply or a cancelled caller.

A reservation that nobody waits for any more is voided; a settlement that the store does not take is written to the
journal and repeated until it is. The reservation's lease is the backstop for both.
"""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from gateway.credits import scripts
from gateway.credits.api_keys import KeyDigest, digest_of
from gateway.credits.errors import (
    EngineError,
    ReplyLost,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    UnknownPlan,
    UnknownReservation,
)
from gateway.credits.journal import Journal, JournalEntry, JournalError
from gateway.credits.keyspace import reservation_id, shard_keys
from gateway.credits.scripts import NotReserved, RepeatKey
from gateway.credits.store import Store
from gateway.domain.decision import Denied, Extended, Repeated, Reserved, Settlement, deny
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import Plan
from gateway.domain.price import FEMTO_PER_NANO, Cost, cost_of
from gateway.telemetry.metrics import Metrics

__all__ = ["CreditEngine", "Identity", "Refused", "RepeatKey", "Reservation", "Seen"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A reservation of a gateway that died ends this long after its last renewal.
LEASE_MS = 60_000
#: How often the leases of live reservations are renewed, with what was seen of their cost by then.
RENEW_S = 10.0
_IDENTITY_TTL_S = 60.0  # a revoked key is refused at once by the reservation itself; this bounds the free endpoints
_IDENTITIES = 10_000
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 5.0
_REPLY_LOST_WAIT_S = 1.0
_MOST_TAKEN_BACK = 1000
_SAID_AT_ONCE = 50
_DUE_AT_ONCE = 200
_ADOPT_S = 30.0
# A replica that takes over may lack the last moments: what ended in them is said again.
_FAILOVER_S = 60.0
_MOST_RECENT = 20_000


async def repeat_if_lost(store: Store, attempt: Callable[[], Awaitable[T]]) -> T:
    """Once more after a lost connection, if there is a new one soon; ids make the repeat harmless."""
    try:
        return await attempt()
    except StoreUnavailable:
        if not await store.wait_connected(_REPLY_LOST_WAIT_S):
            raise
        return await attempt()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sends a request. source: what its key is for."""

    account: str
    key_id: str
    source: Literal["api", "chat"] = "api"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a request has cost so far (list price, femto-credits), and the ledger's note, were that to be charged."""

    cost_femto: int = 0
    note: str = ""


@dataclass(slots=True, eq=False)
class Reservation:
    """A live hold, with what was pinned when it was made. reserved: as it is now; ``extend`` renews it.

    look: tells what the request has cost by now, for the renewals of its lease; None where that shows only at its end.
    """

    account: str
    plan: Plan
    model: str
    key_id: str
    created_ms: int
    reserved: Reserved
    seen: Seen = field(default_factory=Seen)
    look: Callable[[], Seen] | None = None
    renewed_at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The reservation's id."""
        return self.reserved.reservation_id


@dataclass(frozen=True, slots=True)
class Refused:
    """No decision about credits was possible: the key is not (or no longer) valid."""


class CreditEngine:
    """The use cases. One per process; ``close`` waits for the settlements that are still on their way."""

    def __init__(
        self, store: Store, plans: Mapping[str, Plan], default_plan: str, metrics: Metrics, journal: Journal
    ) -> None:
        self._store = store
        self._plans = plans
        self._default_plan = default_plan
        self._metrics = metrics
        self._journal = journal
        self._identities: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._plan_names: OrderedDict[str, str] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()
        self._live: dict[str, Reservation] = {}
        self._recent: deque[tuple[float, JournalEntry]] = deque(maxlen=_MOST_RECENT)
        store.on_failover = self._say_again
        metrics.watch_journal_pending(lambda: journal.pending)

    @property
    def open_reservations(self) -> int:
        """How many requests of this process hold credits."""
        return len(self._live)

    def use(self, plans: Mapping[str, Plan], default_plan: str) -> None:
        """Decide by other plans from now on; what is reserved keeps the rate that it was made at."""
        self._plans, self._default_plan = plans, default_plan

    async def close(self, timeout_s: float) -> int:
        """Wait for calls in the background; the number that did not finish. What those had to say is in the journal."""
        if self._background:
            await asyncio.wait(self._background, timeout=timeout_s)
        left = list(self._background)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)  # each writes down what it could not say
        return len(left)

    # --- requests -----------------------------------------------------------------------------------------------

    async def authenticate(self, secret: str) -> Identity | None:
        """Whose secret this is. Raises StoreUnavailable."""
        digest = digest_of(secret)
        known = self._identities.get(digest.hex)
        if known and known[1] > time.monotonic():
            return known[0]
        identity = await self._look_up(digest)
        if identity is not None:
            self._identities[digest.hex] = (identity, time.monotonic() + _IDENTITY_TTL_S)
            if len(self._identities) > _IDENTITIES:
                self._identities.popitem(last=False)
        return identity

    async def _look_up(self, digest: KeyDigest) -> Identity | None:
        entry = await self._store.call("HGET", shard_keys(digest.shard).api_keys, digest.id)
        if entry is None:
            return None
        account, stored_hex, *source = entry.decode().split("|")
        if not digest.matches(stored_hex):
            return None
        return Identity(account, digest.id, "chat" if source == ["chat"] else "api")

    async def reserve(
        self,
        identity: Identity,
        request: str,
        model: str,
        amount_femto: int,
        minimum_femto: int,
        lease_ms: int = LEASE_MS,
        *,
        alone_femto: int | None = None,
        repeat: RepeatKey | None = None,
    ) -> Reservation | Denied | Refused | Repeated:
        """Hold up to amount_femto and at least minimum_femto (list prices); alone_femto (default: the minimum) is
        enough where no other request of the account holds credits.

        request: 24 hex digits, unique per request; the same one again answers the same. repeat: the client's own
        idempotency key. Raises StoreUnavailable (nothing is held, or not for longer than the lease) and UnknownPlan.
        """
        reservation = reservation_id(identity.account, request)
        wanted = _Wanted(model, amount_femto, minimum_femto, minimum_femto if alone_femto is None else alone_femto)
        lost = False

        async def attempt() -> Reservation | Denied | Refused | Repeated | NotReserved:
            nonlocal lost
            try:
                return await self._reserve_once(identity, reservation, wanted, lease_ms, repeat)
            except (asyncio.CancelledError, ReplyLost):
                lost = True  # the script may have run, or run yet
                raise

        outcome = None
        try:
            outcome = await repeat_if_lost(self._store, attempt)
        finally:
            if lost and not isinstance(outcome, Reservation):  # nobody will settle it
                self._take_back(identity.account, reservation)
        if isinstance(outcome, NotReserved):
            if outcome.outcome == "skewed":
                raise StoreUnavailable("the clocks of store and gateway differ by more than a minute")
            raise StoreUnavailable(f"reservation {reservation} cannot be made again ({outcome.outcome})")
        if isinstance(outcome, Reservation):
            self._live[outcome.id] = outcome
            self._metrics.reserved(outcome.reserved.held_nano)
        return outcome

    async def _reserve_once(
        self, identity: Identity, reservation: str, wanted: "_Wanted", lease_ms: int, repeat: RepeatKey | None
    ) -> Reservation | Denied | Refused | Repeated | NotReserved:
        account = identity.account
        plan = self._plan(self._plan_names.get(account, self._default_plan))
        while True:
            alone = _within_range(cost_of(wanted.alone_femto, plan.rate_ppm))
            outcome = await scripts.reserve(
                self._store,
                account,
                reservation,
                plan=plan,
                amount=_within_range(cost_of(wanted.amount_femto, plan.rate_ppm)),
                minimum_nano=_within_range(cost_of(wanted.minimum_femto, plan.rate_ppm)).payg_nano,
                alone_nano=alone.payg_nano,
                lease_ms=lease_ms,
                key_id=identity.key_id,
                model=wanted.model,
                repeat=repeat,
            )
            if isinstance(outcome, Reserved):
                return Reservation(account, plan, wanted.model, identity.key_id, outcome.funds.now_ms, outcome)
            if isinstance(outcome, Repeated):
                return outcome
            match outcome.outcome:
                case "denied":
                    assert outcome.funds is not None
                    return deny(alone.payg_nano, outcome.funds, plan)
                case "other_plan":
                    plan = self._plan(outcome.plan)
                    self._remember_plan(account, outcome.plan)
                case "unknown_account" | "unknown_key":
                    self._identities.clear()  # rare: a key was revoked
                    return Refused()
                case _:
                    return outcome

    def _take_back(self, account: str, reservation: str) -> None:
        """Void what may be held, for as long as its lease; by then it has ended by itself."""
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

    # --- while an answer streams --------------------------------------------------------------------------------

    async def extend(self, reservation: Reservation, target_femto: int, seen: Seen) -> Reservation:
        """Hold target_femto (list price) in all, as far as there are credits, and renew the lease; seen is what a
        request costs that gets no further. reservation.reserved says what is held now: less than before only where the
        store lost the hold, or ended it, and not all of it was to be had again.

        Raises StoreError: the hold may have grown, and is as it was as far as anybody here knows.
        """
        if seen.cost_femto >= reservation.seen.cost_femto:
            reservation.seen = seen
        rate_ppm = reservation.plan.rate_ppm
        before = reservation.reserved
        # One whose lease ran out meanwhile holds nothing: it is to hold again what it held.
        wanted = _within_range(cost_of(max(target_femto, before.payg_nano * FEMTO_PER_NANO), rate_ppm))
        try:
            extended = await scripts.extend(
                self._store,
                reservation.account,
                reservation.id,
                plan=self._terms_of(reservation),
                wanted=wanted,
                seen=_within_range(cost_of(reservation.seen.cost_femto, rate_ppm)),
                seen_note=reservation.seen.note,
                lease_ms=LEASE_MS,
            )
        except UnknownReservation:
            return await self._hold_again(reservation, wanted)
        reservation.renewed_at = time.monotonic()
        if extended.open:
            reservation.reserved = _held_now(reservation.id, extended)
            self._metrics.reserved(max(0, extended.held_nano - before.held_nano))
        return reservation

    async def _hold_again(self, reservation: Reservation, wanted: Cost) -> Reservation:
        """The store has lost a live reservation in a failover: hold for it what is free now. Raises StoreError."""
        if reservation.id not in self._live:  # it ended meanwhile
            return reservation
        outcome = await scripts.reserve(
            self._store,
            reservation.account,
            reservation.id,
            plan=self._terms_of(reservation),
            amount=wanted,
            minimum_nano=0,
            alone_nano=0,
            lease_ms=LEASE_MS,
            key_id=reservation.key_id,
            model=reservation.model,
        )
        if not isinstance(outcome, Reserved):
            raise StoreUnavailable(f"the store has lost {reservation.id}")
        log.warning("the store had lost %s, which is held again", reservation.id)
        reservation.reserved, reservation.renewed_at = outcome, time.monotonic()
        if reservation.id not in self._live:  # it ended while this was under way, and the store knew nothing to end
            self._take_back(reservation.account, reservation.id)
        return reservation

    async def keep_leases(self) -> None:
        """Renew the leases of this process's live reservations, for ever."""
        while True:
            await asyncio.sleep(RENEW_S / 4)
            oldest = time.monotonic() - RENEW_S * 3 / 4
            stale = [one for one in self._live.values() if one.renewed_at < oldest]
            for outcome in await asyncio.gather(*map(self._renew, stale), return_exceptions=True):
                if isinstance(outcome, StoreError):
                    log.debug("a lease was not renewed: %s", outcome)
                elif isinstance(outcome, Exception):
                    log.error("a lease was not renewed", exc_info=outcome)

    async def _renew(self, reservation: Reservation) -> None:
        await self.extend(reservation, 0, reservation.look() if reservation.look else reservation.seen)

    def _terms_of(self, reservation: Reservation) -> Plan:
        """The plan's windows as they are configured now, at the reservation's own rate."""
        pinned = reservation.plan
        return replace(self._plans.get(pinned.name, pinned), rate_ppm=pinned.rate_ppm, payg=pinned.payg)

    # --- ends ---------------------------------------------------------------------------------------------------

    async def settle(self, reservation: Reservation, cost_femto: int, note: str) -> Settlement:
        """Charge the actual cost (list price, femto-credits) and give back the rest of the hold.

        If the caller is cancelled, the settlement goes on in the background. If StoreError is raised, it is in the
        journal, and goes on too.
        """
        cost = _within_range(cost_of(cost_femto, reservation.plan.rate_ppm))
        plan = reservation.plan
        entry = JournalEntry(
            verb="settle",
            account=reservation.account,
            reservation=reservation.id,
            cost_payg_nano=cost.payg_nano,
            cost_plan_nano=cost.plan_nano,
            note=note,
            plan=plan.name,
            rate_ppm=plan.rate_ppm,
            payg=plan.payg,
            created_ms=reservation.created_ms,
            key_id=reservation.key_id,
            model=reservation.model,
        )
        self._live.pop(reservation.id, None)
        settlement = await self._end(entry)
        assert settlement is not None
        if left := reservation.reserved.held_nano - settlement.from_allowance_nano - settlement.from_balance_nano:
            self._metrics.released("settled", max(0, left))
        return settlement

    async def void(self, reservation: Reservation) -> None:
        """Give the whole hold back. Never raises StoreError: it goes on in the background."""
        self._live.pop(reservation.id, None)
        self._metrics.released("voided", reservation.reserved.held_nano)
        try:
            await self._end(JournalEntry("void", reservation.account, reservation.id))
        except StoreError as error:
            log.warning("voiding %s is put off: %s", reservation.id, error)
        except UnknownReservation:
            log.warning("the store has lost %s, which was to be voided: nothing is held for it", reservation.id)

    async def _end(self, entry: JournalEntry) -> Settlement | None:
        try:
            return await self._end_once(entry)
        except asyncio.CancelledError:
            self._in_background(self._end_somehow(entry))
            raise
        except StoreError:
            written = asyncio.Event()
            self._in_background(self._end_later(entry, written))
            await written.wait()
            raise

    async def _end_once(self, entry: JournalEntry, *, again: bool = False) -> Settlement | None:
        """Say it to the store. again: it was said, and counted, before."""
        if entry.verb == "void":
            released = await scripts.release(self._store, entry.account, entry.reservation, "void")
            if not again:
                self._remember_end(entry)
            return released
        configured = self._plans.get(entry.plan, Plan(entry.plan))
        settlement = await scripts.settle(
            self._store,
            entry.account,
            entry.reservation,
            plan=replace(configured, rate_ppm=entry.rate_ppm, payg=entry.payg),
            cost=Cost(entry.cost_payg_nano, entry.cost_plan_nano),
            note=entry.note,
            created_ms=entry.created_ms,
            key_id=entry.key_id,
            model=entry.model,
        )
        if not again:
            self._remember_end(entry)
            self._count_settlement(entry, settlement)
        return settlement

    def _remember_end(self, entry: JournalEntry) -> None:
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - _FAILOVER_S:
            self._recent.popleft()
        self._recent.append((now, entry))

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
        since = time.monotonic() - _FAILOVER_S
        again = [entry for at, entry in self._recent if at >= since]
        if again:
            log.warning("another primary answers: telling it again of the last %d reservations that ended", len(again))
            self._in_background(self._all_until_done(again, again=True))

    async def _all_until_done(self, entries: list[JournalEntry], *, again: bool = False) -> None:
        # A few at a time: they share the connection with the requests of now.
        for first in range(0, len(entries), _SAID_AT_ONCE):
            some = entries[first : first + _SAID_AT_ONCE]
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

    # --- plans --------------------------------------------------------------------------------------------------

    def _plan(self, name: str) -> Plan:
        try:
            return self._plans[name]
        except KeyError:
            raise UnknownPlan(name) from None

    def _remember_plan(self, account: str, plan: str) -> None:
        self._plan_names[account] = plan
        if len(self._plan_names) > _IDENTITIES:
            self._plan_names.popitem(last=False)

    async def expire_due(self, shard: int) -> int:
        """End the shard's reservations whose lease has run out; how many. The reaper calls it."""
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


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a request would hold, at list prices."""

    model: str
    amount_femto: int
    minimum_femto: int
    alone_femto: int


def _held_now(reservation: str, extended: Extended) -> Reserved:
    return Reserved(
        reservation,
        extended.payg_nano,
        extended.from_allowance_nano,
        extended.from_balance_nano,
        extended.funds,
    )


def _within_range(cost: Cost) -> Cost:
    """No account can hold more than MAX_NANO: a dearer request is denied like any that is too dear."""
    return Cost(min(cost.payg_nano, MAX_NANO), min(cost.plan_nano, MAX_NANO))
