"""A typed call for every Lua script: arguments in, a value of the domain out.

None of these repeats anything; ``service.py`` does, by id. All raise StoreUnavailable or StoreRefused.
"""

import time
from dataclasses import dataclass
from typing import Literal

from gateway.credits.errors import OperationConflict, Rejected, UnknownAccount, UnknownReservation
from gateway.credits.keyspace import account_key, money_keys, shard_keys
from gateway.credits.store import Store
from gateway.domain.decision import Funds, Reserved, Settlement
from gateway.domain.money import format_credits
from gateway.domain.plan import DAY_MS, Plan
from gateway.domain.price import Cost


@dataclass(frozen=True, slots=True)
class NotReserved:
    """Why nothing is held. plan: with other_plan the account's plan. funds: with denied."""

    outcome: Literal["denied", "unknown_account", "unknown_key", "other_plan", "skewed", "conflict", "ended"]
    plan: str = ""
    funds: Funds | None = None


def terms_of(plan: Plan) -> tuple[str, int, int, int, int]:
    """The plan's five values that the scripts take: kind, amount, refresh, rate, payg."""
    allowance = plan.allowance
    if allowance is None:  # windows of a day that grant nothing, so that the scripts know only one kind of plan
        return "per_window", 0, DAY_MS, plan.rate_ppm, int(plan.payg)
    return allowance.kind, allowance.amount_nano, allowance.refresh_ms, plan.rate_ppm, int(plan.payg)


def _gateway_ms() -> int:
    # Only ever compared with the store's clock; nothing is decided by it.
    return time.time_ns() // 1_000_000


def _funds(values: list[bytes], plan: Plan) -> Funds:
    name, granted, used, held, balance, balance_held, window_end, next_granted, now, sequence = values
    return Funds(
        plan=name.decode(),
        granted_nano=int(granted),
        used_nano=int(used),
        held_nano=int(held),
        balance_nano=int(balance),
        balance_held_nano=int(balance_held),
        resets_at_ms=int(window_end) if plan.allowance else None,
        next_granted_nano=int(next_granted),
        now_ms=int(now),
        sequence=int(sequence),
    )


async def reserve(
    store: Store,
    account: str,
    reservation: str,
    *,
    plan: Plan,
    amount: Cost,
    minimum_nano: int,
    lease_ms: int,
    key_id: str,
    model: str,
) -> Reserved | NotReserved:
    """Hold up to amount and at least minimum_nano (list price) for lease_ms."""
    reply = await store.run(
        "reserve",
        money_keys(account),
        (
            *(account, reservation, amount.payg_nano, amount.plan_nano, minimum_nano, lease_ms, _gateway_ms()),
            *(plan.name, *terms_of(plan), key_id, model),
        ),
    )
    match reply[0]:
        case b"reserved":
            _, from_allowance, from_balance, covered, *funds = reply
            return Reserved(reservation, int(covered), int(from_allowance), int(from_balance), _funds(funds, plan))
        case b"denied":
            return NotReserved("denied", plan.name, _funds(reply[1:], plan))
        case b"other_plan":
            return NotReserved("other_plan", reply[1].decode())
        case outcome:
            return NotReserved(outcome.decode())  # type: ignore[arg-type]


async def settle(store: Store, account: str, reservation: str, *, plan: Plan, cost: Cost, note: str) -> Settlement:
    """Charge the cost. plan: the one it was reserved under. Raises UnknownAccount, UnknownReservation."""
    reply = await store.run(
        "settle",
        money_keys(account),
        (account, reservation, cost.payg_nano, cost.plan_nano, note, plan.name, *terms_of(plan)),
    )
    settlement = _settlement(reply, account, reservation)
    return settlement if len(reply) == 6 else _with_funds(settlement, _funds(reply[6:], plan))


async def release(
    store: Store, account: str, reservation: str, verb: Literal["void", "expire", "abandon"]
) -> Settlement | None:
    """Give a hold back. None: expire came before the lease's end. Raises UnknownAccount, UnknownReservation."""
    reply = await store.run("release", money_keys(account), (account, reservation, verb))
    return None if reply[0] == b"open" else _settlement(reply, account, reservation)


def _settlement(reply: list[bytes], account: str, reservation: str) -> Settlement:
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"unknown_reservation":
            raise UnknownReservation(reservation)
    state, _, from_allowance, from_balance, written_off, repeated = reply[:6]
    return Settlement(
        reservation_id=reservation,
        state=state.decode(),  # type: ignore[arg-type]
        from_allowance_nano=int(from_allowance),
        from_balance_nano=int(from_balance),
        written_off_nano=int(written_off),
        repeated=repeated == b"1",
        funds=None,
    )


def _with_funds(settlement: Settlement, funds: Funds) -> Settlement:
    return Settlement(
        settlement.reservation_id,
        settlement.state,
        settlement.from_allowance_nano,
        settlement.from_balance_nano,
        settlement.written_off_nano,
        settlement.repeated,
        funds,
    )


async def due(store: Store, shard: int, limit: int) -> tuple[int, list[tuple[str, str]]]:
    """How many due ids were looked at, and the (reservation, account) pairs whose lease has run out."""
    keys = shard_keys(shard)
    looked_at, *pairs = await store.run("due", (keys.records, keys.due), (limit,))
    texts = [text.decode() for text in pairs]
    return int(looked_at), list(zip(texts[::2], texts[1::2], strict=True))


async def create(store: Store, account: str, plan: Plan) -> Funds:
    """Open an account. Raises Rejected if it exists."""
    keys = money_keys(account)
    reply = await store.run("create", (keys[0], keys[3]), (account, plan.name, *terms_of(plan)))
    if reply[0] == b"exists":
        raise Rejected(f"account {account!r} exists already, on plan {reply[1].decode()!r}")
    return _funds(reply[1:], plan)


async def set_plan(store: Store, account: str, operation: str, version: int, plan: Plan) -> Funds:
    """Move an account to a plan. version 0: whatever comes next. Raises UnknownAccount, OperationConflict,
    Rejected for a version that is not newer, or while the clocks differ."""
    reply = await store.run(
        "set_plan", money_keys(account), (account, operation, version, plan.name, *terms_of(plan), _gateway_ms())
    )
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"conflict":
            raise OperationConflict(operation)
        case b"skewed":
            raise Rejected("the clocks of store and gateway differ by more than a minute; nothing was done")
        case b"stale":
            raise Rejected(
                f"version {version} is not newer than {reply[1].decode()}, which was applied; nothing was done"
            )
    return _funds(reply[2:], plan)


async def credit(
    store: Store, account: str, operation: str, kind: Literal["grant", "refund"], amount_nano: int, reason: str
) -> tuple[int, bool]:
    """Add prepaid credits: the new balance, and whether the operation had been done before.
    Raises UnknownAccount, OperationConflict, Rejected."""
    reply = await store.run("credit", money_keys(account), (account, operation, kind, amount_nano, reason))
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"conflict":
            raise OperationConflict(operation)
        case b"too_large":
            raise Rejected(f"the balance has room for {format_credits(int(reply[1]))} credits more")
        case b"exceeds_spent":
            raise Rejected(
                f"at most {format_credits(int(reply[1]))} credits were charged to the balance and not refunded yet"
            )
    return int(reply[2]), reply[1] == b"1"


async def show(store: Store, account: str, plan: Plan) -> Funds | str:
    """The account's funds, or the name of its plan if that is another one. Raises UnknownAccount."""
    reply = await store.run("show", (account_key(account),), (plan.name, *terms_of(plan)))
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"other_plan":
            return reply[1].decode()
    return _funds(reply[1:], plan)
