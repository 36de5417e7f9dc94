"""What the gateway and its verbs do with credits. Everything here survives a lost reply or a cancelled caller.

A reservation that nobody waits for any more is voided; a settlement that the store does not take is written to the
journal and repeated until it is. The reservation's lease is the backstop for both.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from gateway.credits import scripts
from gateway.credits.ends import Ends
from gateway.credits.errors import (
    ReplyLost,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    UnknownPlan,
    UnknownReservation,
)
from gateway.credits.identities import Identities, Identity
from gateway.credits.journal import Journal
from gateway.credits.keyspace import reservation_id
from gateway.credits.reservations import LEASE_MS, Refused, Reservation, Seen
from gateway.credits.scripts import NotReserved, RepeatKey
from gateway.credits.store import Store
from gateway.credits.wording import Wording
from gateway.domain.decision import Denied, Extended, Repeated, Reserved, Settlement, deny
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import FULL_RATE_PPM, Plan
from gateway.domain.price import FEMTO_PER_NANO, Cost, cost_of
from gateway.telemetry.metrics import Metrics

__all__ = ["LEASE_MS", "CreditEngine", "Identity", "Refused", "RepeatKey", "Reservation", "Seen"]

log = logging.getLogger(__name__)

T = TypeVar("T")
_Outcome = Reservation | Denied | Refused | Repeated | NotReserved
#: Whose request, its reservation's id, the model, the amount (list price, femto-credits), the minimum and what is
#: enough alone (nano-credits), whether it grows, its lease and the client's idempotency key.
_Wanted = tuple[Identity, str, str, int, int, int, bool, int, RepeatKey | None]
_OTHER_PLAN = NotReserved("other_plan")

#: How often the leases of live reservations are renewed, with what was seen of their cost by then.
RENEW_S = 10.0
_REPLY_LOST_WAIT_S = 1.0
#: After so long without a new request there is time for other things.
_QUIET_S = 0.1
_MOST_PLAN_NAMES = 10_000


async def repeat_if_lost(store: Store, attempt: Callable[[], Awaitable[T]]) -> T:
    """Once more after a lost connection, if there is a new one soon; ids make the repeat harmless."""
    try:
        return await attempt()
    except StoreUnavailable:
        if not await store.wait_connected(_REPLY_LOST_WAIT_S):
            raise
        return await attempt()


class CreditEngine:
    """The use cases. One per process; ``close`` waits for the settlements that are still on their way."""

    def __init__(
        self, store: Store, plans: Mapping[str, Plan], default_plan: str, metrics: Metrics, journal: Journal
    ) -> None:
        self._store = store
        self._plans = plans
        self._default_plan = default_plan
        self._metrics = metrics
        self._identities = Identities(store)
        #: Whose secret a text is, if that was asked lately.
        self.known = self._identities.known
        self._reserve_seconds = metrics.store_seconds("reserve")
        self._plan_names: OrderedDict[str, str] = OrderedDict()
        self._live: dict[str, Reservation] = {}
        self._asked_at = 0.0
        self._ends = Ends(store, metrics, journal, lambda name: self._plans.get(name) or Plan(name))

    @property
    def open_reservations(self) -> int:
        """How many requests of this process hold credits."""
        return len(self._live)

    @property
    def quiet(self) -> bool:
        """Whether no request has asked this process for credits for 0.1 s; those in flight may be many."""
        return time.perf_counter() - self._asked_at > _QUIET_S

    def use(self, plans: Mapping[str, Plan], default_plan: str) -> None:
        """Decide by other plans from now on; what is reserved keeps the rate that it was made at."""
        self._plans, self._default_plan = plans, default_plan

    async def close(self, timeout_s: float) -> int:
        """Wait for calls in the background; the number that did not finish. What those had to say is in the journal."""
        return await self._ends.close(timeout_s)

    async def replay(self) -> int:
        """Say to the store what processes before this one could not; how many. It goes on in the background.
        Raises JournalError."""
        return await self._ends.replay()

    async def adopt_journals(self) -> None:
        """Replay what other processes leave behind in the journal's directory, for ever."""
        await self._ends.adopt_journals()

    async def expire_due(self, shard: int) -> int:
        """End the shard's reservations whose lease has run out; how many. The reaper calls it."""
        return await self._ends.expire_due(shard)

    # --- requests -----------------------------------------------------------------------------------------------

    async def authenticate(self, secret: str) -> Identity | None:
        """Whose secret this is. Raises StoreUnavailable."""
        return self._identities.known(secret) or await self._identities.look_up(secret)

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
        grows: bool = False,
        repeat: RepeatKey | None = None,
    ) -> Reservation | Denied | Refused | Repeated:
        """Hold up to amount_femto and at least minimum_femto (list prices); alone_femto (default: the minimum) is
        enough where no other request of the account holds credits. grows: the hold will be extended; it is made only if
        the holds of others can grow, too.

        request: 24 hex digits, unique per request; the same one again answers the same. repeat: the client's own
        idempotency key. Raises StoreUnavailable (nothing is held, or not for longer than the lease) and UnknownPlan.
        """
        account, store = identity.account, self._store
        reservation = reservation_id(account, request)
        minimum_nano = _payg_nano(minimum_femto)
        alone_nano = minimum_nano if alone_femto in (None, minimum_femto) else _payg_nano(alone_femto)
        wanted = (identity, reservation, model, amount_femto, minimum_nano, alone_nano, grows, lease_ms, repeat)
        try:
            # The first try, nearly always the only one: ``_reserve_once`` and the store's coroutine, written out
            # because each coroutine of a request takes 2,000 instructions.
            plan = self._plan_of(account)
            wording, command = self._call(plan, wanted)
            self._asked_at = started = time.perf_counter()
            way = store.primary_of(wording.key)
            try:
                reply = await way.write(command)
            except StoreRefused as refusal:
                reply = await store.run_again("reserve", way, refusal, wording.key, command)
            self._reserve_seconds.observe(time.perf_counter() - started)
            outcome = self._answer(plan, wanted, reply)
            if outcome is _OTHER_PLAN:
                outcome = await self._reserve_once(wanted)
        except asyncio.CancelledError:  # the script may have run, or run yet, and nobody will settle it
            self._ends.take_back(account, reservation)
            raise
        except StoreUnavailable as error:
            outcome = await self._reserve_again(error, wanted)
        if isinstance(outcome, Reservation):
            self._live[reservation] = outcome
            self._metrics.reserved(outcome.reserved.held_nano)
        elif isinstance(outcome, NotReserved):
            if outcome.outcome == "skewed":
                raise StoreUnavailable("the clocks of store and gateway differ by more than a minute")
            raise StoreUnavailable(f"reservation {reservation} cannot be made again ({outcome.outcome})")
        return outcome

    async def _reserve_again(self, error: StoreUnavailable, wanted: _Wanted) -> _Outcome:
        """Once more after a lost connection, if there is a new one soon; the id makes the repeat harmless. error: what
        came of the first time. Raises StoreUnavailable."""
        lost, outcome = isinstance(error, ReplyLost), None
        try:
            if not await self._store.wait_connected(_REPLY_LOST_WAIT_S):
                raise error
            try:
                outcome = await self._reserve_once(wanted)
            except (asyncio.CancelledError, ReplyLost):
                lost = True
                raise
            return outcome
        finally:
            if lost and not isinstance(outcome, Reservation):
                identity, reservation, *_ = wanted
                self._ends.take_back(identity.account, reservation)

    async def _reserve_once(self, wanted: _Wanted) -> _Outcome:
        account = wanted[0].account
        outcome: _Outcome = _OTHER_PLAN
        while outcome is _OTHER_PLAN:
            plan = self._plan_of(account)
            wording, command = self._call(plan, wanted)
            reply = await self._store.run_packed("reserve", wording.key, command)
            outcome = self._answer(plan, wanted, reply)
        return outcome

    def _call(self, plan: Plan, wanted: _Wanted) -> tuple[Wording, bytes]:
        """The script's call, packed."""
        identity, reservation, model, amount_femto, minimum_nano, alone_nano, grows, lease_ms, repeat = wanted
        wording = self._store.wording(identity.account, identity.key_id, model, plan.name, plan.terms)
        key_hash, body_hash = ("", "") if repeat is None else (repeat.key_hash, repeat.body_hash)
        listed, rated = _nano(amount_femto, plan.rate_ppm)
        asked = scripts.asked(listed, rated, minimum_nano, alone_nano, grows, key_hash)
        return wording, wording.reserve(reservation, asked, lease_ms, scripts.gateway_ms(), body_hash)

    def _answer(self, plan: Plan, wanted: _Wanted, reply: list[Any]) -> _Outcome:
        """What the script's reply means; _OTHER_PLAN where the account's plan is another one, known from now on. Raises
        UnknownPlan if that is not configured."""
        identity, reservation, model, _, _, alone_nano, _, _, _ = wanted
        if held := scripts.read_held(reply, reservation):
            reserved, created_ms = held
            return Reservation(identity.account, plan, model, identity.key_id, created_ms, reserved)
        outcome = scripts.read_not_held(reply)
        if isinstance(outcome, Repeated):
            return outcome
        match outcome.outcome:
            case "denied":
                assert outcome.funds is not None
                return deny(alone_nano, outcome.funds, plan)
            case "other_plan":
                self._plan(outcome.plan)
                self._remember_plan(identity.account, outcome.plan)
                return _OTHER_PLAN
            case "unknown_account" | "unknown_key":
                self._identities.forget()  # rare: a key was revoked
                return Refused()
        return outcome

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
        wanted = Cost(*_nano(max(target_femto, before.payg_nano * FEMTO_PER_NANO), rate_ppm))
        try:
            extended = await scripts.extend(
                self._store,
                reservation.account,
                reservation.id,
                plan=self._terms_of(reservation),
                wanted=wanted,
                seen=Cost(*_nano(reservation.seen.cost_femto, rate_ppm)),
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
            self._ends.take_back(reservation.account, reservation.id)
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

    def settle(self, reservation: Reservation, cost_femto: int, note: str) -> Coroutine[Any, Any, Settlement]:
        """Charge the actual cost (list price, femto-credits) and give back the rest of the hold.

        If the caller is cancelled, the settlement goes on in the background. If StoreError is raised, it is in the
        journal, and goes on too.
        """
        self._live.pop(reservation.reserved.reservation_id, None)
        return self._ends.charge(reservation, *_nano(cost_femto, reservation.plan.rate_ppm), note)

    async def void(self, reservation: Reservation) -> None:
        """Give the whole hold back. Never raises StoreError: it goes on in the background."""
        self._live.pop(reservation.id, None)
        self._metrics.released("voided", reservation.reserved.held_nano)
        try:
            await self._ends.void(reservation.account, reservation.id)
        except StoreError as error:
            log.warning("voiding %s is put off: %s", reservation.id, error)
        except UnknownReservation:
            log.warning("the store has lost %s, which was to be voided: nothing is held for it", reservation.id)

    # --- plans --------------------------------------------------------------------------------------------------

    def _plan_of(self, account: str) -> Plan:
        """The account's plan as far as is known here."""
        return self._plan(self._plan_names.get(account, self._default_plan))

    def _plan(self, name: str) -> Plan:
        try:
            return self._plans[name]
        except KeyError:
            raise UnknownPlan(name) from None

    def _remember_plan(self, account: str, plan: str) -> None:
        self._plan_names[account] = plan
        if len(self._plan_names) > _MOST_PLAN_NAMES:
            self._plan_names.popitem(last=False)


def _held_now(reservation: str, extended: Extended) -> Reserved:
    return Reserved(
        reservation,
        extended.payg_nano,
        extended.from_allowance_nano,
        extended.from_balance_nano,
        extended.funds,
    )


def _nano(femto: int, rate_ppm: int) -> tuple[int, int]:
    """A cost in nano-credits, at list price and at the plan's rate. No account can hold more than MAX_NANO: a dearer
    request is denied like any that is too dear."""
    if rate_ppm == FULL_RATE_PPM:  # as of most plans
        listed_nano = _payg_nano(femto)
        return listed_nano, listed_nano
    cost = cost_of(femto, rate_ppm)
    return min(cost.payg_nano, MAX_NANO), min(cost.plan_nano, MAX_NANO)


def _payg_nano(femto: int) -> int:
    """The same of the list price alone."""
    nano = (femto + FEMTO_PER_NANO - 1) // FEMTO_PER_NANO
    return nano if nano < MAX_NANO else MAX_NANO  # min() takes four times as long
