"""What the tests of the engine ask of it, in nano-credits, and a look at the books that it keeps."""

from itertools import count

from gateway.credits.keyspace import account_key, shard_keys, shard_of
from gateway.credits.operator import Operator
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Refused, RepeatKey, Reservation, Seen
from gateway.credits.store import Store
from gateway.domain.decision import Denied, Repeated, Settlement
from gateway.domain.price import FEMTO_PER_NANO
from tests.engine_invariants import Fold, check_invariants, pairs, read_account, read_postings, read_record
from tests.servers import MovableClock

HOUR_MS = 3_600_000
CREDIT = 1_000_000_000
ACCOUNT = "acme"
SHARD = shard_of(ACCOUNT)

_requests = count(1)


async def reserve(
    engine: CreditEngine,
    identity: Identity,
    nano: int,
    minimum: int | None = None,
    lease_ms: int = LEASE_MS,
    repeat: RepeatKey | None = None,
    *,
    grows: bool = False,
) -> Reservation | Denied | Refused | Repeated:
    """Ask for nano-credits, all or (with minimum) part of them, under a new request id."""
    least = nano if minimum is None else minimum
    request = f"{next(_requests):024x}"
    return await engine.reserve(
        identity, request, "model", nano * FEMTO_PER_NANO, least * FEMTO_PER_NANO, lease_ms, repeat=repeat, grows=grows
    )


async def hold(
    engine: CreditEngine,
    identity: Identity,
    nano: int,
    minimum: int | None = None,
    lease_ms: int = LEASE_MS,
    repeat: RepeatKey | None = None,
) -> Reservation:
    """A reservation that must be admitted."""
    outcome = await reserve(engine, identity, nano, minimum, lease_ms, repeat)
    assert isinstance(outcome, Reservation), outcome
    return outcome


async def denial(engine: CreditEngine, identity: Identity, nano: int, minimum: int | None = None) -> Denied:
    """A reservation that must be refused for want of credits."""
    outcome = await reserve(engine, identity, nano, minimum)
    assert isinstance(outcome, Denied), outcome
    return outcome


async def extend(engine: CreditEngine, held: Reservation, nano: int, seen: int = 0, note: str = "") -> Reservation:
    """Hold nano-credits in all; seen is what the request has cost so far."""
    return await engine.extend(held, nano * FEMTO_PER_NANO, Seen(seen * FEMTO_PER_NANO, note))


async def settle(engine: CreditEngine, held: Reservation, nano: int, note: str = "") -> Settlement:
    """Charge nano-credits."""
    return await engine.settle(held, nano * FEMTO_PER_NANO, note)


async def spend(engine: CreditEngine, identity: Identity, nano: int) -> Reservation:
    """A whole request that costs nano-credits, to the end."""
    held = await hold(engine, identity, nano)
    await settle(engine, held, nano)
    return held


async def new_identity(operator: Operator, engine: CreditEngine, account: str, plan: str) -> Identity:
    """A new account on a plan, and a key of it."""
    await operator.create_account(account, plan)
    _, secret = await operator.create_key(account, "test")
    identity = await engine.authenticate(secret)
    assert identity is not None
    return identity


async def lose_gateway(engine: CreditEngine, clock: MovableClock, *, reservations: int = 1) -> None:
    """The gateway is gone for as long as a lease lasts; its reservations in SHARD are ended."""
    clock.move(LEASE_MS)
    assert await engine.expire_due(SHARD) == reservations


async def lose_record(store: Store, reservation: str) -> None:
    """A failover to a replica that had not heard of the reservation of ACCOUNT, as far as its record goes."""
    keys = shard_keys(SHARD)
    await store.call("HDEL", keys.records, reservation)
    await store.call("ZREM", keys.due, reservation)


async def ledger(store: Store, account: str = ACCOUNT) -> list[dict[str, str]]:
    """The account's ledger entries."""
    found = await store.call("XRANGE", shard_keys(shard_of(account)).ledger, "-", "+")
    entries = [pairs(fields) for _, fields in found]
    return [entry for entry in entries if entry["account"] == account]


async def last_entry(store: Store, account: str = ACCOUNT) -> tuple[str, str, dict[str, int]]:
    """The account's latest ledger entry: kind, id, postings by book."""
    entry = (await ledger(store, account))[-1]
    return entry["kind"], entry["id"], read_postings(entry["postings"])


async def check_books(store: Store, account: str = ACCOUNT, *, lowered: bool = False) -> None:
    """The ledger and the open reservations must add up to what the account shows. lowered: its plan was, below what
    was used and held."""
    fold = Fold()
    for entry in await ledger(store, account):
        fold.add(entry)
    values = read_account(await store.call("HGETALL", account_key(account)))
    texts = pairs(await store.call("HGETALL", shard_keys(shard_of(account)).records))
    records = [read_record(text) for name, text in texts.items() if name.startswith("rsv_")]
    check_invariants(values, [record for record in records if record["account"] == account], lowered, fold)
