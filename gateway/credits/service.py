"""What the gateway and its verbs do with credits. Everything here survives a lost reply or a cancelled caller.

A reservation that nobody waits for any more is voided; a settlement is repeated until the store has taken it.
The reservation's lease is the backstop for both.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TypeVar

from gateway.credits import scripts
from gateway.credits.api_keys import KeyDigest, digest_of
from gateway.credits.errors import EngineError, StoreError, StoreUnavailable, UnknownPlan, UnknownReservation
from gateway.credits.keyspace import (
    reservation_id,
    shard_keys,
)
from gateway.credits.scripts import NotReserved
from gateway.credits.store import Store
from gateway.domain.decision import Denied, Reserved, Settlement, deny
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import Plan
from gateway.domain.price import Cost, cost_of
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

_IDENTITY_TTL_S = 60.0  # a revoked key is refused at once by the reservation itself; this bounds the free endpoints
_IDENTITIES = 10_000
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 5.0
_REPLY_LOST_WAIT_S = 1.0
_DUE_AT_ONCE = 200


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
    """Who sends a request."""

    account: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Reservation:
    """A live hold, with what was pinned when it was made."""

    account: str
    plan: Plan
    model: str
    reserved: Reserved

    @property
    def id(self) -> str:
        """The reservation's id."""
        return self.reserved.reservation_id


@dataclass(frozen=True, slots=True)
class Refused:
    """No decision about credits was possible: the key is not (or no longer) valid."""


class CreditEngine:
    """The use cases. One per process; ``close`` waits for the settlements that are still on their way."""

    def __init__(self, store: Store, plans: Mapping[str, Plan], default_plan: str, metrics: Metrics) -> None:
        self._store = store
        self._plans = plans
        self._default_plan = default_plan
        self._metrics = metrics
        self._identities: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._plan_names: OrderedDict[str, str] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()
        self.open_reservations = 0

    async def close(self, timeout_s: float) -> int:
        """Wait for calls in the background; the number that did not finish (their leases end them)."""
        if self._background:
            await asyncio.wait(self._background, timeout=timeout_s)
        left = len(self._background)
        for task in list(self._background):
            task.cancel()
        return left

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
        account, stored_hex = entry.decode().split("|")
        return Identity(account, digest.id) if digest.matches(stored_hex) else None

    async def reserve(
        self, identity: Identity, request: str, model: str, amount_femto: int, minimum_femto: int, lease_ms: int
    ) -> Reservation | Denied | Refused:
        """Hold up to amount_femto and at least minimum_femto (list prices) for lease_ms.

        request: 24 hex digits, unique per request; the same one again answers the same.
        Raises StoreUnavailable (nothing is held, or not for longer than the lease) and UnknownPlan.
        """
        reservation = reservation_id(identity.account, request)

        async def attempt() -> Reservation | Denied | Refused | NotReserved:
            return await self._reserve_once(identity, reservation, model, amount_femto, minimum_femto, lease_ms)

        try:
            outcome = await repeat_if_lost(self._store, attempt)
        except (asyncio.CancelledError, StoreError):
            # The script may have run, or run yet: nobody will settle this reservation, so it is taken back.
            self._in_background(self._void_until_done(identity.account, reservation))
            raise
        if isinstance(outcome, NotReserved):
            if outcome.outcome == "skewed":
                raise StoreUnavailable("the clocks of store and gateway differ by more than a minute")
            raise StoreUnavailable(f"reservation {reservation} cannot be made again ({outcome.outcome})")
        if isinstance(outcome, Reservation):
            self.open_reservations += 1
            self._metrics.reserved(outcome.reserved.held_nano)
        return outcome

    async def _reserve_once(
        self, identity: Identity, reservation: str, model: str, amount_femto: int, minimum_femto: int, lease_ms: int
    ) -> Reservation | Denied | Refused | NotReserved:
        account = identity.account
        plan = self._plan(self._plan_names.get(account, self._default_plan))
        while True:
            minimum = _within_range(cost_of(minimum_femto, plan.rate_ppm))
            outcome = await scripts.reserve(
                self._store,
                account,
                reservation,
                plan=plan,
                amount=_within_range(cost_of(amount_femto, plan.rate_ppm)),
                minimum_nano=minimum.payg_nano,
                lease_ms=lease_ms,
                key_id=identity.key_id,
                model=model,
            )
            if isinstance(outcome, Reserved):
                return Reservation(account, plan, model, outcome)
            match outcome.outcome:
                case "denied":
                    assert outcome.funds is not None
                    return deny(minimum.payg_nano, outcome.funds, plan)
                case "other_plan":
                    plan = self._plan(outcome.plan)
                    self._remember_plan(account, outcome.plan)
                case "unknown_account" | "unknown_key":
                    self._identities.clear()  # rare: a key was revoked
                    return Refused()
                case _:
                    return outcome

    async def settle(self, reservation: Reservation, cost_femto: int, note: str) -> Settlement:
        """Charge the actual cost (list price, femto-credits) and give back the rest of the hold.

        If the caller is cancelled, or StoreError is raised, the settlement goes on in the background.
        """
        cost = _within_range(cost_of(cost_femto, reservation.plan.rate_ppm))
        self.open_reservations -= 1
        try:
            settlement = await self._settle_once(reservation, cost, note)
        except (asyncio.CancelledError, StoreError):
            self._in_background(self._settle_until_done(reservation, cost, note))
            raise
        return settlement

    async def _settle_once(self, reservation: Reservation, cost: Cost, note: str) -> Settlement:
        settlement = await scripts.settle(
            self._store, reservation.account, reservation.id, plan=reservation.plan, cost=cost, note=note
        )
        self._count_settlement(reservation, settlement)
        return settlement

    def _count_settlement(self, reservation: Reservation, settlement: Settlement) -> None:
        plan, model = reservation.plan.name, reservation.model
        if settlement.from_allowance_nano:
            self._metrics.settled(plan, model, "allowance", settlement.from_allowance_nano)
        if settlement.from_balance_nano:
            self._metrics.settled(plan, model, "payg", settlement.from_balance_nano)
        if settlement.written_off_nano:
            self._metrics.written_off(settlement.written_off_nano)
            log.error("wrote off %d nano-credits of %s", settlement.written_off_nano, reservation.id)
        if left := reservation.reserved.held_nano - settlement.from_allowance_nano - settlement.from_balance_nano:
            self._metrics.released("settled", max(0, left))

    async def void(self, reservation: Reservation) -> None:
        """Give the whole hold back. Never raises StoreError: it goes on in the background."""
        self.open_reservations -= 1
        try:
            await scripts.release(self._store, reservation.account, reservation.id, "void")
        except StoreError as error:
            log.warning("voiding %s is put off: %s", reservation.id, error)
            self._in_background(self._void_until_done(reservation.account, reservation.id))
        except asyncio.CancelledError:
            self._in_background(self._void_until_done(reservation.account, reservation.id))
            raise
        self._metrics.released("voided", reservation.reserved.held_nano)

    # --- repeating ----------------------------------------------------------------------------------------------

    async def _settle_until_done(self, reservation: Reservation, cost: Cost, note: str) -> None:
        await self._until_done(lambda: self._settle_once(reservation, cost, note))

    async def _void_until_done(self, account: str, reservation: str) -> None:
        try:
            await self._until_done(lambda: scripts.release(self._store, account, reservation, "void"))
        except UnknownReservation:
            return  # it was never made

    async def _until_done(self, attempt: Callable[[], Awaitable[object]]) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                await attempt()
            except StoreError as error:
                # Also a store that answers and refuses: full, read-only, busy. It may take the call later.
                log.warning("the store did not take a settlement yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MOST_S)
            else:
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
        except EngineError as error:
            log.error("the lease of %s ran out and cannot be ended: %s", reservation, error)
            return False
        if settlement is None or settlement.repeated:
            return False
        log.warning("the lease of %s (account %s) ran out; its hold was released", reservation, account)
        return True


def _within_range(cost: Cost) -> Cost:
    """No account can hold more than MAX_NANO: a dearer request is denied like any that is too dear."""
    return Cost(min(cost.payg_nano, MAX_NANO), min(cost.plan_nano, MAX_NANO))
