"""What holds for every Lua script, whatever it does: its arguments, its keys, a store in trouble."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import pytest
import redis

from gateway.credits import scripts
from gateway.credits.errors import StoreRefused
from gateway.credits.keyspace import account_key, money_keys, shard_keys
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Identity, RepeatKey
from gateway.credits.store import SCRIPTS, Store
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS, TimedServer
from tests.engine_calls import ACCOUNT, SHARD, check_books, extend, hold, new_identity, settle, spend
from tests.servers import MovableClock
from tests.stores import started_store

TERMS = "1000000|1|charge_seen|,86400000|per_window,100,86400000"
ID = "rsv_00ffffffffffffffffffffffff"
MONEY_KEYS = money_keys(ACCOUNT)
SHARD_KEYS = (shard_keys(SHARD).records, shard_keys(SHARD).due)
NOW_MS = 1_804_000_000_000
#: A call of each script that is as it should be: keys, arguments.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str | int, ...]]] = {
    "create": ((MONEY_KEYS[0], MONEY_KEYS[3]), (ACCOUNT, "standard", TERMS)),
    "reserve": (MONEY_KEYS, (ACCOUNT, ID, "5,5,5,5,0,", 60_000, NOW_MS, "", "model", "", "standard", TERMS)),
    "extend": (MONEY_KEYS, (ACCOUNT, ID, 9, 9, 1, 1, "note", 60_000, NOW_MS, "standard", TERMS)),
    "settle": (MONEY_KEYS, (ACCOUNT, ID, 5, 5, "note", NOW_MS, "", "model", "standard", TERMS)),
    "release": (MONEY_KEYS, (ACCOUNT, ID, "void")),
    "due": (SHARD_KEYS, (10, NOW_MS)),
    "set_plan": (MONEY_KEYS, (ACCOUNT, "op", 0, NOW_MS, "standard", TERMS)),
    "credit": (MONEY_KEYS, (ACCOUNT, "op", "grant", 5, "note")),
    "refund": (MONEY_KEYS, (ACCOUNT, "op", ID, "note")),
    "show": ((MONEY_KEYS[0],), ("standard", TERMS)),
}
#: Arguments that are numbers, or have some in them: which one, in each script, and what it is with another number.
NUMBERS = [
    *[("reserve", at, "{}") for at in (3, 4)],
    *[("reserve", 2, asked) for asked in ("{},5,5,5,0,", "5,{},5,5,0,", "5,5,{},5,0,", "5,5,5,{},0,")],
    *[("extend", at, "{}") for at in (2, 3, 4, 5, 7, 8)],
    *[("settle", at, "{}") for at in (2, 3, 5)],
    *[("set_plan", at, "{}") for at in (2, 3)],
    *[("due", at, "{}") for at in (0, 1)],
    ("credit", 3, "{}"),
    *[
        (name, at, "{}|1|charge_seen|,86400000|per_window,100,86400000")
        for name, at in (("create", 2), ("show", 1), ("set_plan", 5))
    ],
    # The windows of a plan are read where the account's are others.
    ("set_plan", 5, "1000000|1|charge_seen|,3600000|per_window,{},3600000"),
    ("set_plan", 5, "1000000|1|charge_seen|,3600000|per_window,100,{}"),
]


def stored(valkey: TimedServer) -> list[object]:
    """All that the account's shard holds."""
    return [valkey.server.command("DUMP", key) for key in MONEY_KEYS]


def test_every_script_is_tried_here() -> None:
    assert CALLS.keys() == set(SCRIPTS)


async def test_a_call_with_too_few_or_too_many_arguments_or_keys_is_refused(
    store: Store, valkey: TimedServer, acme: Identity
) -> None:
    before = stored(valkey)
    for name, (keys, arguments) in CALLS.items():
        takes = f"{name} takes {len(keys)} key"
        with pytest.raises(StoreRefused, match=takes):
            await store.run(name, (*keys, keys[0]), arguments)
        with pytest.raises(StoreRefused, match=takes):
            await store.run(name, keys, arguments[:-1])
        with pytest.raises(StoreRefused, match=takes):
            await store.run(name, keys, (*arguments, "more"))
    assert stored(valkey) == before


async def test_an_account_that_is_not_there_is_never_made_by_the_way(store: Store, valkey: TimedServer) -> None:
    before = stored(valkey)
    for name in sorted(set(SCRIPTS) - {"create", "due"}):
        keys, arguments = CALLS[name]
        assert await store.run(name, keys, arguments) == [b"unknown_account"], name
    assert stored(valkey) == before


async def test_what_is_not_a_whole_number_is_refused(store: Store, valkey: TimedServer, acme: Identity) -> None:
    before = stored(valkey)
    for name, at, text in NUMBERS:
        keys, arguments = CALLS[name]
        for wrong, complaint in (("-1", "is not a whole number: -1"), (MAX_NANO + 1, "is too large: ")):
            with pytest.raises(StoreRefused, match=complaint):
                await store.run(name, keys, (*arguments[:at], text.format(wrong), *arguments[at + 1 :]))
    assert stored(valkey) == before


@pytest.mark.parametrize("refresh_ms", [0, 7, DAY_MS - 1, 2 * DAY_MS])
async def test_a_window_that_does_not_divide_a_day_is_refused(
    store: Store, operator: Operator, refresh_ms: int
) -> None:
    plan = Plan("odd", (Allowance("per_window", 1, refresh_ms),))
    with pytest.raises(StoreRefused, match=f"refresh does not divide a day: {refresh_ms}"):
        await scripts.create(store, ACCOUNT, plan)
    assert await operator.accounts() == []


async def test_a_full_store_refuses_a_script_before_it_has_done_anything(
    store: Store, valkey: TimedServer, acme: Identity
) -> None:
    before = stored(valkey)
    valkey.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        for name in sorted(set(SCRIPTS) - {"show"}):
            keys, arguments = CALLS[name]
            with pytest.raises(StoreRefused, match=r"^OOM .* 'maxmemory'\.$"):  # no line of the script is named
                await store.run(name, keys, arguments)
    finally:
        valkey.server.command("CONFIG", "SET", "maxmemory", 0)
    assert stored(valkey) == before


async def test_credits_are_shown_while_the_store_is_full_or_hands_over(
    valkey: TimedServer, metrics: Metrics, operator: Operator, acme: Identity
) -> None:
    """A primary that hands over to its replica holds back everything that may write."""
    async with started_store(valkey.url, metrics, 500) as impatient:
        try:
            valkey.server.command("CONFIG", "SET", "maxmemory", 1)
            shown = Operator(impatient, PLANS, "standard")
            assert (await shown.funds(ACCOUNT)).granted_nano == 100_000_000
            valkey.server.command("CLIENT", "PAUSE", 60_000, "WRITE")
            assert (await shown.funds(ACCOUNT)).granted_nano == 100_000_000
        finally:
            valkey.server.command("CLIENT", "UNPAUSE")
            valkey.server.command("CONFIG", "SET", "maxmemory", 0)


class Watched:
    """What scripts did while a store was watched. declared: each call's keys. commands: theirs, each with the number of
    its call."""

    def __init__(self) -> None:
        self.declared: list[tuple[str, ...]] = []
        self.commands: list[tuple[int, list[str]]] = []

    def touched(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Every command on a key, beside the keys that its script had declared."""
        for call, command in self.commands:
            if command[0] != "TIME":
                yield self.declared[call], command

    def fields_set(self, key: str) -> list[set[str]]:
        """What each HSET of a key wrote."""
        return [set(command[2::2]) for _, command in self.touched() if command[:2] == ["HSET", key]]


@contextmanager
def watching(valkey: TimedServer) -> Iterator[Watched]:
    """Listen to what the server executes, until the block ends."""
    watched = Watched()
    with (
        redis.Redis(unix_socket_path=valkey.url.removeprefix("unix://")) as client,
        client.monitor() as monitor,
    ):
        yield watched
        valkey.server.command("ECHO", "the end")
        for said in monitor.listen():
            words = said["command"].split(" ")
            if words[:1] == ["ECHO"]:
                break
            if words[0] in {"EVALSHA", "EVAL"}:
                count = int(words[2])
                watched.declared.append(tuple(words[3 : 3 + count]))
            elif said["client_type"] == "lua":
                watched.commands.append((len(watched.declared) - 1, words))


async def test_scripts_touch_no_key_that_they_have_not_declared(
    engine: CreditEngine, operator: Operator, valkey: TimedServer, clock: MovableClock
) -> None:
    """A cluster finds a script's node by its declared keys, and refuses it where one of them is on the move."""
    with watching(valkey) as watched:
        identity = await new_identity(operator, engine, ACCOUNT, "standard")
        await operator.credit(ACCOUNT, 1_000, "grant", "op")
        held = await hold(engine, identity, 10, repeat=RepeatKey("a" * 24, "b" * 24))
        await extend(engine, held, 20, seen=5)
        await hold(engine, identity, 10)  # and nobody settles it
        await settle(engine, held, 15)
        await operator.refund_request(ACCOUNT, held.id)
        await operator.set_plan(ACCOUNT, "developer")
        await operator.set_plan(ACCOUNT, "payg")
        clock.move(2 * DAY_MS)
        await engine.expire_due(SHARD)
        await engine.expire_due(SHARD)
        await operator.funds(ACCOUNT)
    assert len({command[0] for _, command in watched.touched()}) >= 7
    for declared, command in watched.touched():
        assert command[1] in declared, command


async def test_only_what_changed_of_an_account_is_written(
    engine: CreditEngine, operator: Operator, valkey: TimedServer, acme: Identity, clock: MovableClock
) -> None:
    """The append-only file and the replicas get every write."""
    with watching(valkey) as watched:
        held = await hold(engine, acme, 10)
        clock.move(1)
        await settle(engine, held, 10)
        await operator.credit(ACCOUNT, 5, "grant")
        await operator.set_plan(ACCOUNT, "payg")
    assert watched.fields_set(account_key(ACCOUNT)) == [
        {"w1"},
        {"w1", "day_used", "seen", "sequence"},
        {"balance", "sequence"},
        {"plan", "plan_version", "sequence"},
    ]


async def test_what_earlier_versions_stored_is_read(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    """They stored an account's zeros, the day, and of every open reservation its rate and what was seen of it."""
    await operator.credit(ACCOUNT, 100, "grant")
    held, lost = await hold(engine, acme, 10), await hold(engine, acme, 20)
    numbers = {"plan_version": 0, "balance_held": 0, "day_used": 0, "day": 1_804_000_000_000}
    await store.call("HSET", account_key(ACCOUNT), *chain.from_iterable(numbers.items()))
    for one in (held, lost):
        record = await store.call("HGET", SHARD_KEYS[0], one.id)
        fields = record.split(b"|")
        assert fields[5] == b""
        fields[5] = b"1000000"
        await store.call("HSET", SHARD_KEYS[0], one.id, b"|".join([*fields, b"0", b"0", b"0", b""]))
    assert (await settle(engine, held, 7)).from_allowance_nano == 7
    assert (await extend(engine, lost, 30, seen=5)).reserved.held_nano == 30
    settlement = await operator.void_reservation(lost.id)
    assert (settlement.state, settlement.cost_nano) == ("voided", 0)
    await check_books(store)


async def test_a_plan_change_leaves_no_window_behind(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await spend(engine, acme, 10)
    await operator.set_plan(ACCOUNT, "payg")
    assert await store.call("HEXISTS", account_key(ACCOUNT), "w1") == 0
