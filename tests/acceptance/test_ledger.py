"""The ledger through the real gateway and its command line: what credits did, and whether it all agrees."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis

from gateway.credits.embedded import running_url
from gateway.credits.keyspace import account_key, shard_keys, shard_of
from tests.acceptance.conftest import BODY, MODEL, HeldUpstream, ask, new_account
from tests.gateway_process import Gateway, gateway_config, run_cli, running_gateway

REASON = "paid, thank you"


@pytest.fixture
async def gateway(upstream: HeldUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    config = gateway_config(upstream.base_url, [MODEL])
    with running_gateway(config, data_dir=tmp_path / "data") as gateway:
        yield gateway


def run(gateway: Gateway, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb as a process of its own, whatever its exit code."""
    return run_cli(gateway.config, *words, "--data-dir", str(gateway.data_dir), environment=gateway.environment)


def text_of(gateway: Gateway, *words: str) -> str:
    ended = run(gateway, *words)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return ended.stdout


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def store_of(gateway: Gateway) -> "redis.Redis[Any]":
    url = running_url(gateway.data_dir)
    assert url is not None
    return redis.Redis.from_url(url)


def archived(gateway: Gateway, account: str) -> list[int]:
    """The sequence numbers in the archive, read with the database's own tools."""
    file = gateway.data_dir / "ledger.sqlite3"
    if not file.exists():
        return []
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'ledger_entries'").fetchone():
            return []
        rows = connection.execute(
            "SELECT sequence FROM ledger_entries WHERE account = ? ORDER BY sequence", (account,)
        ).fetchall()
    return [sequence for (sequence,) in rows]


async def test_what_a_customer_paid_and_used_can_be_read_and_exported(
    gateway: Gateway, session: aiohttp.ClientSession, upstream: HeldUpstream, tmp_path: Path
) -> None:
    key = new_account(gateway, "alice", "standard")
    gateway.cli("credits", "grant", "alice", "12.50", "--operation-id", "invoice:7", "--reason", REASON)
    answer = await ask(session, gateway, key, BODY)
    assert answer.status == 200

    opened, refreshed, granted, settled = gateway.cli("ledger", "tail", "alice")["data"]
    assert [one["sequence"] for one in (opened, refreshed, granted, settled)] == [1, 2, 3, 4]
    assert (opened["kind"], opened["plan"], opened["postings"]) == ("open", "standard", {})
    assert (refreshed["kind"], refreshed["postings"]) == (
        "refresh",
        {"granted:86400000": "-0.1", "window:86400000": "0.1"},
    )
    assert (granted["kind"], granted["id"], granted["reason"]) == ("grant", "invoice:7", REASON)
    assert (granted["postings"], granted["balance_after"]) == ({"bought": "-12.5", "balance": "12.5"}, "12.5")
    cost = f"{answer.cost:f}"
    assert (settled["kind"], settled["model"], settled["balance_after"]) == ("settle", MODEL, "12.5")
    assert settled["postings"] == {"window:86400000": f"-{cost}", "used:86400000": cost}
    assert settled["used_after"] == {"86400000": cost}
    assert settled["tokens"] == {"input": upstream.prompt_tokens, "output": upstream.completion_tokens}
    assert settled["source"] == "api" and len(settled["price_version"]) == 8
    assert settled["key"] == gateway.cli("keys", "list", "alice")["data"][0]["id"]
    assert gateway.cli("ledger", "tail", "alice", "-n", "1")["data"] == [settled]

    shown = text_of(gateway, "ledger", "tail", "alice", "-n", "2").splitlines()
    assert shown[0].split()[:4] == ["ENTRY", "TIME", "KIND", "ID"]
    assert "bought -12.5, balance +12.5" in shown[1] and REASON in shown[1]
    assert f"window:24h -{cost}, used:24h +{cost}" in shown[2] and MODEL in shown[2]

    lines = [json.loads(line) for line in text_of(gateway, "ledger", "export", "alice").splitlines()]
    assert lines == [opened, refreshed, granted, settled]
    file = tmp_path / "ledger.csv"
    assert not text_of(gateway, "ledger", "export", "--format", "csv", "--output", str(file))
    with file.open(newline="") as opened_file:
        rows = [row for row in csv.DictReader(opened_file) if row["account"] == "alice"]
    assert [row["sequence"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[2]["reason"] == REASON and json.loads(rows[3]["postings"]) == settled["postings"]
    assert sum(Decimal(nano) for nano in json.loads(rows[3]["postings"]).values()) == 0

    moment = granted["time"]
    since = [json.loads(line) for line in text_of(gateway, "ledger", "export", "--since", moment).splitlines()]
    until = [json.loads(line) for line in text_of(gateway, "ledger", "export", "--until", moment).splitlines()]
    every = [json.loads(line) for line in text_of(gateway, "ledger", "export").splitlines()]
    assert sorted(map(json.dumps, since + until)) == sorted(map(json.dumps, every))
    assert {one["account"] for one in every} == {"alice", "default"}
    assert not text_of(gateway, "ledger", "export", "--since", "2999-01-01")


async def test_verify_agrees_until_something_is_changed_and_names_it_then(
    gateway: Gateway, session: aiohttp.ClientSession, upstream: HeldUpstream
) -> None:
    key = new_account(gateway, "alice", "standard", grant=Decimal(5))
    assert (await ask(session, gateway, key, BODY)).status == 200
    assert gateway.cli("ledger", "verify") == {
        "ok": True,
        "accounts": 2,
        "entries": 6,
        "mismatches": [],
        "unchecked": [],
        "lost": [],
    }
    assert text_of(gateway, "ledger", "verify", "alice") == "ok: 4 entries of 1 accounts agree\n"

    with store_of(gateway) as store:
        store.hset(account_key("alice"), "balance", 5_000_000_001)
    ended = run(gateway, "ledger", "verify")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout == (
        "account alice: balance: expected 5, found 5.000000001\n1 mismatches in 6 entries of 2 accounts\n"
    )
    ended = run(gateway, "ledger", "verify", "alice", "--json")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["mismatches"] == [
        {"account": "alice", "what": "balance", "expected": "5", "found": "5.000000001"}
    ]
    assert run(gateway, "ledger", "verify", "default").returncode == 0


async def test_the_ledger_moves_into_the_archive_and_stays_whole(
    gateway: Gateway, session: aiohttp.ClientSession, upstream: HeldUpstream
) -> None:
    key = new_account(gateway, "alice", "standard", grant=Decimal(5))
    for _ in range(3):
        assert (await ask(session, gateway, key, BODY)).status == 200

    with store_of(gateway) as store:
        eventually(lambda: store.xlen(shard_keys(shard_of("alice")).ledger) == 0)
        assert archived(gateway, "alice") == [1, 2, 3, 4, 5, 6]
        assert [one["sequence"] for one in gateway.cli("ledger", "tail", "alice", "-n", "4")["data"]] == [3, 4, 5, 6]
        assert gateway.cli("ledger", "verify")["ok"]

        with closing(sqlite3.connect(gateway.data_dir / "ledger.sqlite3")) as connection, connection:
            connection.execute("DELETE FROM ledger_entries WHERE account = 'alice' AND sequence = 5")
    ended = run(gateway, "ledger", "verify", "alice")
    assert ended.returncode == 1
    assert "account alice: next entry of the ledger: expected sequence 5, found sequence 6\n" in ended.stdout


def test_following_the_ledger(gateway: Gateway) -> None:
    gateway.cli("accounts", "create", "alice")
    command = [sys.executable, "-m", "gateway", "ledger", "tail", "alice", "-n", "1", "--follow", "--json"]
    with subprocess.Popen(
        [*command, "--config", str(gateway.config), "--data-dir", str(gateway.data_dir)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **gateway.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as following:
        try:
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["kind"] == "refresh"
            for number in (3, 4):
                gateway.cli("credits", "grant", "alice", "1")
                entry = json.loads(following.stdout.readline())
                assert (entry["sequence"], entry["kind"]) == (number, "grant")
            following.send_signal(signal.SIGINT)
            assert following.wait(30) == 130
        finally:
            following.kill()


def test_mistakes_are_told(gateway: Gateway, tmp_path: Path) -> None:
    for words in (("tail", "nobody"), ("export", "nobody"), ("verify", "nobody")):
        ended = run(gateway, "ledger", *words)
        assert (ended.returncode, ended.stderr) == (1, "quota-gateway: there is no account 'nobody'\n")
    ended = run(gateway, "ledger", "export", "--output", str(tmp_path))
    assert (ended.returncode, ended.stderr) == (1, f"quota-gateway: cannot write {tmp_path}: Is a directory\n")
    ended = run(gateway, "ledger", "export", "--since", "yesterday")
    assert ended.returncode == 2
    assert "'yesterday' is not a time such as 2027-03-10 or 2027-03-10T12:30:00Z" in ended.stderr
    ended = run(gateway, "ledger", "tail", "alice", "-n", "10001")
    assert ended.returncode == 2
    assert "'10001' is not a number of entries from 0 to 10000" in ended.stderr
