"""A client's own idempotency key: its request runs once, and may run again when the first one was not charged."""

import asyncio

import pytest

from gateway.credits.keyspace import shard_keys
from gateway.credits.operator import Operator
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Refused, RepeatKey, Reservation
from gateway.credits.store import Store
from gateway.domain.decision import Repeated
from gateway.domain.plan import DAY_MS
from tests.engine_calls import (
    ACCOUNT,
    SHARD,
    check_books,
    extend,
    hold,
    ledger,
    new_identity,
    reserve,
    settle,
)
from tests.servers import MovableClock

KEY = RepeatKey("a" * 24, "b" * 24)
OTHER_BODY = RepeatKey("a" * 24, "c" * 24)
OTHER_KEY = RepeatKey("d" * 24, "b" * 24)


async def again(engine: CreditEngine, identity: Identity, repeat: RepeatKey = KEY) -> object:
    """What a request with the key is told now; one that is admitted is voided."""
    outcome = await reserve(engine, identity, 1_000, repeat=repeat)
    if isinstance(outcome, Reservation):
        await engine.void(outcome)
    return outcome


async def test_a_key_that_was_used_says_what_became_of_the_first_request(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 5_000_000, "grant")
    first = await hold(engine, acme, 20_000_000, repeat=KEY)
    assert await again(engine, acme) == Repeated("in_progress", first.id, 0)
    assert await again(engine, acme, OTHER_BODY) == Repeated("other_body")
    assert (await operator.funds(ACCOUNT)).held_nano == 20_000_000
    await settle(engine, first, 120_000_000)  # from all three sources
    assert await again(engine, acme) == Repeated("answered", first.id, 120_000_000)
    assert await again(engine, acme, OTHER_BODY) == Repeated("other_body")
    assert [entry["kind"] for entry in await ledger(store)].count("settle") == 1
    await check_books(store)


async def test_keys_are_each_clients_own(engine: CreditEngine, operator: Operator, acme: Identity) -> None:
    other = await new_identity(operator, engine, "other", "standard")
    first = await hold(engine, acme, 1_000, repeat=KEY)
    for identity, repeat in ((other, KEY), (acme, OTHER_KEY)):
        assert isinstance(await again(engine, identity, repeat), Reservation)
    # Without a key every request is a new one.
    without = [await hold(engine, acme, 1_000) for _ in range(2)]
    for held in (first, *without):
        await engine.void(held)


async def test_of_many_at_once_one_is_admitted(engine: CreditEngine, operator: Operator, acme: Identity) -> None:
    outcomes = await asyncio.gather(*(reserve(engine, acme, 1_000, repeat=KEY) for _ in range(20)))
    admitted = [outcome for outcome in outcomes if isinstance(outcome, Reservation)]
    assert len(admitted) == 1
    assert outcomes.count(Repeated("in_progress", admitted[0].id, 0)) == 19
    await settle(engine, admitted[0], 1_000)


async def test_the_same_request_sent_again_by_the_gateway_is_no_repeat(
    engine: CreditEngine, acme: Identity, operator: Operator
) -> None:
    """A lost reply: the same request id, not only the same key."""
    outcomes = [
        await engine.reserve(acme, "e" * 24, "model", 1_000_000_000, 1_000_000_000, repeat=KEY) for _ in range(2)
    ]
    assert isinstance(outcomes[0], Reservation)
    assert isinstance(outcomes[1], Reservation)
    assert outcomes[0].reserved == outcomes[1].reserved
    await engine.void(outcomes[0])
    await engine.void(outcomes[1])


async def test_a_request_that_was_not_charged_may_be_sent_again(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    voided = await hold(engine, acme, 1_000, repeat=KEY)
    await engine.void(voided)
    assert isinstance(await again(engine, acme, OTHER_BODY), Reservation)  # whatever comes with the key then
    second = await hold(engine, acme, 1_000, repeat=KEY)
    assert await again(engine, acme) == Repeated("in_progress", second.id, 0)
    await settle(engine, second, 900)
    await operator.refund_request(ACCOUNT, second.id)
    assert await again(engine, acme) == Repeated("answered", second.id, 900)  # a refund does not undo the answer
    third = await hold(engine, acme, 1_000, repeat=OTHER_KEY)
    await settle(engine, third, 0)
    assert await again(engine, acme, OTHER_KEY) == Repeated("answered", third.id, 0)  # answered, if for nothing


@pytest.mark.parametrize("seen", [0, 700])
async def test_a_request_of_a_lost_gateway_may_be_sent_again_unless_it_was_charged(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock, seen: int
) -> None:
    first = await hold(engine, acme, 1_000, repeat=KEY)
    await extend(engine, first, 0, seen=seen)
    clock.move(LEASE_MS)
    assert await engine.expire_due(SHARD) == 1
    outcome = await again(engine, acme)
    assert outcome == Repeated("answered", first.id, seen) if seen else isinstance(outcome, Reservation)


async def test_a_key_is_remembered_for_a_day(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    first = await hold(engine, acme, 1_000, repeat=KEY, lease_ms=3 * DAY_MS)
    clock.move(DAY_MS - 1)
    await engine.expire_due(SHARD)
    assert await again(engine, acme) == Repeated("in_progress", first.id, 0)
    clock.move(1)
    await engine.expire_due(SHARD)
    assert isinstance(await again(engine, acme), Reservation)
    await settle(engine, first, 5)


async def test_a_denial_remembers_no_key(engine: CreditEngine, operator: Operator, acme: Identity) -> None:
    await reserve(engine, acme, 200_000_000, repeat=KEY)
    assert isinstance(await again(engine, acme, OTHER_BODY), Reservation)


async def test_a_revoked_key_is_refused_before_anything_is_said_of_a_repeat(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    first = await hold(engine, acme, 1_000, repeat=KEY)
    await operator.revoke_key(acme.key_id)
    assert isinstance(await again(engine, acme), Refused)
    await engine.void(first)


async def test_a_void_forgets_the_key_and_leaves_nothing_to_sweep(
    engine: CreditEngine, store: Store, acme: Identity
) -> None:
    keys = shard_keys(SHARD)
    before = await store.call("HLEN", keys.records), await store.call("ZCARD", keys.due)
    await engine.void(await hold(engine, acme, 1_000, repeat=KEY))
    added = await store.call("HLEN", keys.records), await store.call("ZCARD", keys.due)
    assert added == (before[0] + 1, before[1] + 1)  # the voided reservation's own


async def test_a_late_void_does_not_forget_the_request_that_came_after(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    first = await hold(engine, acme, 1_000, repeat=KEY)
    clock.move(LEASE_MS)
    assert await engine.expire_due(SHARD) == 1
    second = await hold(engine, acme, 1_000, repeat=KEY)
    await engine.void(first)
    assert await again(engine, acme) == Repeated("in_progress", second.id, 0)
    await engine.void(second)
    assert isinstance(await again(engine, acme, OTHER_BODY), Reservation)


async def test_a_key_whose_reservation_the_store_has_lost_is_new(
    engine: CreditEngine, store: Store, acme: Identity
) -> None:
    first = await hold(engine, acme, 1_000, repeat=KEY)
    await settle(engine, first, 0)
    await store.call("HDEL", shard_keys(SHARD).records, first.id)
    assert isinstance(await again(engine, acme), Reservation)
