"""A typed call for every Lua script: arguments in, a value of the domain out.

None of these repeats anything; ``service.py`` does, by id. All raise StoreUnavailable or StoreRefused.
"""

import time
from typing import Any, Literal

from gateway.credits.errors import OperationConflict, Rejected, UnknownAccount, UnknownReservation
from gateway.credits.keyspace import account_key, money_keys, shard_keys
from gateway.credits.store import Store
from gateway.domain.decision import Extended, Funds, Repeated, Reserved, Settlement, WindowFunds
from gateway.domain.money import format_credits
from gateway.domain.plan import Plan
from gateway.domain.price import Cost
from gateway.domain.value import value

CreditKind = Literal["grant", "refund", "deduct"]


@value(frozen=True, slots=True)
class NotReserved:
    """Why nothing is held. plan: with other_plan the account's plan. funds: with denied."""

    outcome: Literal["denied", "unknown_account", "unknown_key", "other_plan", "skewed", "conflict", "ended"]
    plan: str = ""
    funds: Funds | None = None


@value(frozen=True, slots=True)
class RepeatKey:
    """A client's idempotency key and the body that came with it, as hashes of 24 hex digits each."""

    key_hash: str
    body_hash: str


NO_REPEAT = RepeatKey("", "")
_ENDED_VALUES, _FUNDS_VALUES, _WINDOW_VALUES = 6, 5, 5
_RESERVED_AT = 7
#: Makes a named tuple of values that are in its order, for a third of what its own constructor takes.
_tuple = tuple.__new__


class _Held(Reserved):
    """Reserved, whose funds are read off the script's reply when somebody asks for them: an answer that is not streamed
    tells those of its settlement. To read them takes 7,000 instructions."""

    __slots__ = ()

    @property
    def funds(self) -> Funds:
        return _funds(self[4], 4)  # type: ignore[arg-type]


def asked(listed: int, rated: int, minimum: int, alone: int, grows: bool, key_hash: str) -> str:
    """What a request asks for as ``reserve`` takes it and its record keeps it, in nano-credits: most requests ask for
    all or nothing, at the list price, and a number that is the same again is left out."""
    at_rate = "" if rated == listed else rated
    at_least = "" if minimum == rated else minimum
    if_alone = "" if alone == minimum else alone
    return f"{listed},{at_rate},{at_least},{if_alone},{'1' if grows else '0'},{key_hash}"


def gateway_ms() -> int:
    """This machine's clock, ms since 1970. Only ever compared with the store's clock; nothing is decided by it."""
    return time.time_ns() // 1_000_000


def _funds(reply: list[Any], at: int) -> Funds:
    """What a reply says of the account from one of its values on."""
    if len(reply) == at + _FUNDS_VALUES + _WINDOW_VALUES:  # of nearly all plans: named, not cut out, in three quarters
        plan, balance, balance_held, now, sequence, refresh, granted, used, held, resets = reply[at:]
        windows: tuple[WindowFunds, ...] = (_tuple(WindowFunds, (refresh, granted, used, held, resets)),)
    else:
        first = at + _FUNDS_VALUES
        plan, balance, balance_held, now, sequence = reply[at:first]
        starts = range(first, len(reply), _WINDOW_VALUES)
        windows = tuple([_tuple(WindowFunds, reply[start : start + _WINDOW_VALUES]) for start in starts])
    return _tuple(Funds, (plan.decode(), balance, balance_held, now, sequence, windows))


async def reserve(
    store: Store,
    account: str,
    reservation: str,
    *,
    plan: Plan,
    amount: Cost,
    minimum_nano: int,
    alone_nano: int,
    lease_ms: int,
    key_id: str,
    model: str,
    repeat: RepeatKey | None = None,
    grows: bool = False,
) -> Reserved | NotReserved | Repeated:
    """Hold up to amount for lease_ms, and at least minimum_nano (list price), or alone_nano if no other request of the
    account holds credits. One that grows must leave an eighth of what others hold free for them to grow, too."""
    repeat = repeat or NO_REPEAT
    wording = store.wording(account, key_id, model, plan.name, plan.terms)
    wanted = asked(amount.payg_nano, amount.plan_nano, minimum_nano, alone_nano, grows, repeat.key_hash)
    command = wording.reserve(reservation, wanted, lease_ms, gateway_ms(), repeat.body_hash)
    reply = await store.run_packed("reserve", wording.key, command)
    if held := read_held(reply, reservation):
        reserved, _ = held
        return Reserved(*reserved[:4], reserved.funds)
    return read_not_held(reply)


def read_held(reply: list[Any], reservation: str) -> tuple[Reserved, int] | None:
    """What ``reserve`` answers where credits are held, and when that was, on the store's clock; None of any other
    answer."""
    if reply[0] != b"reserved":
        return None
    return _tuple(_Held, (reservation, reply[3], reply[1], reply[2], reply)), reply[_RESERVED_AT]


def read_not_held(reply: list[Any]) -> NotReserved | Repeated:
    """What it answers otherwise."""
    outcome = reply[0]
    match outcome:
        case b"denied":
            funds = _funds(reply, 1)
            return NotReserved("denied", funds.plan, funds)
        case b"other_plan":
            return NotReserved("other_plan", reply[1].decode())
        case b"other_body":
            return Repeated("other_body")
        case b"in_progress" | b"answered":
            return Repeated(outcome.decode(), reply[1].decode(), reply[2])
    return NotReserved(outcome.decode())


async def extend(
    store: Store,
    account: str,
    reservation: str,
    *,
    plan: Plan,
    wanted: Cost,
    seen: Cost,
    seen_note: str,
    lease_ms: int,
) -> Extended:
    """Hold wanted in all, as far as there are credits, for lease_ms from now; seen is what the request costs so far.
    plan: the one it was reserved under. Raises UnknownAccount, UnknownReservation."""
    reply = await store.run(
        "extend",
        money_keys(account),
        (
            *(account, reservation, wanted.payg_nano, wanted.plan_nano, seen.payg_nano, seen.plan_nano, seen_note),
            *(lease_ms, gateway_ms(), plan.name, plan.terms),
        ),
    )
    _check_known(reply[0], account, reservation)
    if reply[0] == b"ended":
        return Extended(0, 0, 0, open=False, funds=_funds(reply, 2))
    return Extended(reply[3], reply[1], reply[2], open=True, funds=_funds(reply, 4))


async def settle(
    store: Store,
    account: str,
    reservation: str,
    *,
    plan: Plan,
    cost: Cost,
    note: str,
    created_ms: int = 0,
    key_id: str = "",
    model: str = "",
) -> Settlement:
    """Charge the cost. plan: the one it was reserved under. created_ms: when, on the store's clock; less than 1 h ago
    the cost is charged even if the store has lost the reservation. Raises UnknownAccount, UnknownReservation."""
    wording = store.wording(account, key_id, model, plan.name, plan.terms)
    command = wording.settle(reservation, cost.payg_nano, cost.plan_nano, note, created_ms)
    return read_settlement(await store.run_packed("settle", wording.key, command), account, reservation)


async def release(
    store: Store, account: str, reservation: str, verb: Literal["void", "expire", "abandon"]
) -> Settlement | None:
    """Give a hold back. None: expire came before the lease's end. Raises UnknownAccount, UnknownReservation."""
    reply = await store.run("release", money_keys(account), (account, reservation, verb))
    return None if reply[0] == b"open" else read_settlement(reply, account, reservation)


async def refund(store: Store, account: str, operation: str, reservation: str, note: str) -> Settlement:
    """Give back what a request was charged; what that was. Raises UnknownAccount, UnknownReservation,
    OperationConflict, Rejected."""
    reply = await store.run("refund", money_keys(account), (account, operation, reservation, note))
    match reply[0]:
        case b"conflict":
            raise OperationConflict(operation)
        case b"exceeds_spent":
            raise Rejected(
                f"at most {format_credits(reply[1])} credits were charged to the balance and not refunded yet"
            )
        case b"not_settled":
            raise Rejected(f"{reservation} is {reply[1].decode()}: only what was charged can be refunded")
    return read_settlement(reply, account, reservation)


def _check_known(outcome: bytes, account: str, reservation: str) -> None:
    if outcome == b"unknown_account":
        raise UnknownAccount(account)
    if outcome == b"unknown_reservation":
        raise UnknownReservation(reservation)


def read_settlement(reply: list[Any], account: str, reservation: str) -> Settlement:
    """How a reservation ended, as ``settle``, ``release`` and ``refund`` answer; only the first tells the account's
    funds. Raises UnknownAccount, UnknownReservation."""
    state = reply[0]
    if state == b"settled":
        state = "settled"
    else:
        _check_known(state, account, reservation)
        state = state.decode()
    funds = _funds(reply, _ENDED_VALUES) if len(reply) > _ENDED_VALUES else None
    return _tuple(Settlement, (reservation, state, reply[2], reply[3], reply[4], reply[5] == 1, funds))


async def due(store: Store, shard: int, limit: int) -> tuple[int, list[tuple[str, str]]]:
    """How many due ids were looked at, and the (reservation, account) pairs whose lease has run out."""
    keys = shard_keys(shard)
    looked_at, *pairs = await store.run("due", (keys.records, keys.due), (limit, gateway_ms()))
    texts = [text.decode() for text in pairs]
    return looked_at, list(zip(texts[::2], texts[1::2], strict=True))


async def create(store: Store, account: str, plan: Plan) -> Funds:
    """Open an account. Raises Rejected if it exists."""
    keys = money_keys(account)
    reply = await store.run("create", (keys[0], keys[3]), (account, plan.name, plan.terms))
    if reply[0] == b"exists":
        raise Rejected(f"account {account!r} exists already, on plan {reply[1].decode()!r}")
    return _funds(reply, 1)


async def set_plan(store: Store, account: str, operation: str, version: int, plan: Plan) -> Funds:
    """Move an account to a plan. version 0: whatever comes next. Raises UnknownAccount, OperationConflict,
    Rejected for a version that is not newer, or while the clocks differ."""
    reply = await store.run(
        "set_plan", money_keys(account), (account, operation, version, gateway_ms(), plan.name, plan.terms)
    )
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"conflict":
            raise OperationConflict(operation)
        case b"skewed":
            raise Rejected("the clocks of store and gateway differ by more than a minute; nothing was done")
        case b"stale":
            raise Rejected(f"version {version} is not newer than {reply[1]}, which was applied; nothing was done")
    return _funds(reply, 2)


async def credit(
    store: Store, account: str, operation: str, kind: CreditKind, amount_nano: int, note: str
) -> tuple[int, bool]:
    """Add or deduct prepaid credits: the new balance, and whether the operation had been done before.
    Raises UnknownAccount, OperationConflict, Rejected."""
    reply = await store.run("credit", money_keys(account), (account, operation, kind, amount_nano, note))
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"conflict":
            raise OperationConflict(operation)
        case b"too_large":
            raise Rejected(f"the balance has room for {format_credits(reply[1])} credits more")
        case b"exceeds_free":
            raise Rejected(f"at most {format_credits(reply[1])} credits are neither spent nor held by requests")
        case b"exceeds_spent":
            raise Rejected(
                f"at most {format_credits(reply[1])} credits were charged to the balance and not refunded yet"
            )
    return reply[2], reply[1] == 1


async def show(store: Store, account: str, plan: Plan) -> Funds | str:
    """The account's funds, or the name of its plan if that is another one. Raises UnknownAccount."""
    reply = await store.run("show", (account_key(account),), (plan.name, plan.terms))
    match reply[0]:
        case b"unknown_account":
            raise UnknownAccount(account)
        case b"other_plan":
            name: str = reply[1].decode()
            return name
    return _funds(reply, 1)
