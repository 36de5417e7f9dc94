"""Crashes of the real gateway process and of its embedded store: what was settled stays, and holds end."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.acceptance.conftest import (
    BODY,
    HOLD,
    MAX_TOKENS,
    MODEL,
    STREAM,
    Answer,
    HeldUpstream,
    ask,
    ask_default,
    funds_of,
    hanging_store,
    hold_of,
    store_pid,
)
from tests.gateway_process import Gateway, gateway_config, run_cli, running_gateway
from tests.servers import MovableClock

#: Times are shown to the second.
LEASE = timedelta(seconds=59)


@pytest.fixture
def config(upstream: HeldUpstream) -> dict[str, Any]:
    config = gateway_config(upstream.base_url, [MODEL])
    config["store"] = {"timeout": "1500ms"}
    return config


@pytest.fixture
async def gateway(config: dict[str, Any], tmp_path: Path, clock: MovableClock) -> AsyncIterator[Gateway]:
    with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
        yield gateway


async def wait_for_another_store(gateway: Gateway, old_pid: int) -> None:
    """Raises TimeoutError if none comes up."""
    async with asyncio.timeout(20):
        while store_pid(gateway) in (None, old_pid):
            await asyncio.sleep(0.05)


async def wait_until_nothing_is_held(gateway: Gateway) -> None:
    """Raises TimeoutError if something stays held."""
    async with asyncio.timeout(20):
        while gateway.cli("reservations", "list")["data"]:
            await asyncio.sleep(0.1)


def assert_unavailable(answer: Answer) -> None:
    assert (answer.status, answer.error["code"]) == (503, "quota_store_unavailable")
    assert answer.error["type"] == "api_error"
    assert answer.headers["Retry-After"] == "2"


async def test_a_killed_gateway_loses_nothing_that_was_settled(
    session: aiohttp.ClientSession,
    config: dict[str, Any],
    upstream: HeldUpstream,
    tmp_path: Path,
    clock: MovableClock,
) -> None:
    data_dir = tmp_path / "data"
    with running_gateway(config, data_dir=data_dir, clock=clock) as gateway:
        key = gateway.key
        assert key is not None
        settled = [(await ask_default(session, gateway)).cost for _ in range(5)]
        upstream.hold()
        in_flight = [asyncio.create_task(ask(session, gateway, key, body)) for body in (BODY, STREAM, BODY)]
        await upstream.wait_for_requests(8)
        gateway.kill()
        for task in in_flight:
            with pytest.raises(aiohttp.ClientError):
                await task

        # What it left behind, before another gateway has touched it.
        held = 2 * HOLD + hold_of(STREAM, MAX_TOKENS)
        funds = funds_of(gateway)
        assert (funds.used, funds.held) == (sum(settled), held)
        listed = gateway.cli("reservations", "list")["data"]
        assert sum(Decimal(one["held"]) for one in listed) == held
        for one in listed:
            assert (one["account"], one["model"]) == ("default", MODEL)
            created, expires = (datetime.fromisoformat(one[name]) for name in ("created_at", "lease_expires_at"))
            assert expires - created >= LEASE

    upstream.release()
    with running_gateway(config, data_dir=data_dir, clock=clock) as gateway:
        assert gateway.key is None  # there is an account already
        assert (await ask(session, gateway, key, BODY)).cost == upstream.cost
        # Nobody else can settle what the killed one held: it is given back without waiting for the leases.
        await wait_until_nothing_is_held(gateway)
        funds = funds_of(gateway)
        assert (funds.used, funds.held) == (sum(settled) + upstream.cost, 0)


async def test_a_second_gateway_on_the_same_directory_is_an_error(
    session: aiohttp.ClientSession, gateway: Gateway
) -> None:
    listeners = ("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    directory = ("--data-dir", str(gateway.data_dir))
    second = run_cli(gateway.config, "serve", *listeners, *directory, environment=gateway.environment)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == (
        f"quota-gateway: the data directory {gateway.data_dir} is in use by another gateway (pid {gateway.pid})\n"
    )
    assert (await ask_default(session, gateway)).status == 200


async def test_a_killed_store_is_started_again(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    """Whatever is asked meanwhile gets its answer and is paid for, or is refused and costs nothing."""
    upstream.hold()
    in_flight = asyncio.create_task(ask_default(session, gateway))
    await upstream.wait_for_requests(1)
    pid = store_pid(gateway)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    upstream.release()
    meanwhile = await asyncio.gather(*(ask_default(session, gateway) for _ in range(20)))
    await wait_for_another_store(gateway, pid)
    async with asyncio.timeout(20):
        while (answer := await ask_default(session, gateway)).status != 200:
            assert_unavailable(answer)
            await asyncio.sleep(0.05)

    for refused in meanwhile:
        if refused.status != 200:
            assert_unavailable(refused)
    # Its settlement may have had to wait for the store: then its answer went out without a cost.
    assert (await in_flight).status == 200
    await wait_until_nothing_is_held(gateway)
    paid = 2 + sum(one.status == 200 for one in meanwhile)
    assert len(upstream.requests) == paid
    funds = funds_of(gateway)
    assert (funds.used, funds.held) == (paid * upstream.cost, 0)


async def test_a_store_that_hangs_is_unavailable_and_no_request_reaches_the_upstream(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    before = await ask_default(session, gateway)
    pid = store_pid(gateway)
    with hanging_store(gateway):
        for refused in await asyncio.gather(*(ask_default(session, gateway) for _ in range(5))):
            assert_unavailable(refused)
        async with session.get(gateway.admin_url + "/readyz") as ready:
            assert ready.status == 503
        async with session.get(gateway.admin_url + "/livez") as live:
            assert live.status == 200
    assert len(upstream.requests) == 1
    async with asyncio.timeout(20):
        while (after := await ask_default(session, gateway)).status != 200:
            assert_unavailable(after)
            await asyncio.sleep(0.05)
    # The scripts that ran once the store went on held credits for requests that nobody waits for: taken back.
    await wait_until_nothing_is_held(gateway)
    assert store_pid(gateway) == pid
    funds = funds_of(gateway)
    assert (funds.used, funds.held) == (before.cost + after.cost, 0)


async def test_a_gateway_that_stood_still_reads_what_came_meanwhile_before_it_gives_the_store_up(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    """As after a pause of the machine: the store has answered, but its time was up before the gateway could look."""
    upstream.hold()
    in_flight = asyncio.create_task(ask_default(session, gateway))
    await upstream.wait_for_requests(1)
    with hanging_store(gateway):
        upstream.release()
        await asyncio.sleep(0.3)  # the settlement is on its way to the store
        gateway.process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(2)
    finally:
        gateway.process.send_signal(signal.SIGCONT)
    answer = await in_flight
    assert (answer.status, answer.cost) == (200, upstream.cost)


async def test_sigterm_lets_a_stream_end_and_settles_it(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    upstream.hold()
    assert gateway.key is not None
    headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}
    async with session.post(gateway.base_url + "/chat/completions", data=STREAM, headers=headers) as response:
        first = await response.content.readline()
        assert b"held" in first
        gateway.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            while await accepts(gateway):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # a gateway that does not wait for its requests would be gone by then
        assert gateway.process.poll() is None
        upstream.release()
        answer = Answer(response.status, response.headers.copy(), first + await response.read())
    usage = answer.events[-1]["usage"]
    assert Decimal(usage["credits"]["cost"]) == upstream.cost
    assert await asyncio.to_thread(gateway.wait) == 0
    funds = funds_of(gateway)
    assert (funds.used, funds.held) == (upstream.cost, 0)
    assert gateway.cli("reservations", "list") == {"data": []}
    assert "Traceback" not in gateway.stderr


async def test_sigterm_lets_a_body_arrive_and_answers_it(gateway: Gateway, upstream: HeldUpstream) -> None:
    host, _, port = gateway.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {gateway.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\nExpect: 100-continue\r\n\r\n"
    )
    writer.write(head.encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"  # it waits for the body
    gateway.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        while await accepts(gateway):
            await asyncio.sleep(0.01)
    writer.write(BODY)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in answer.lower()
    assert await asyncio.to_thread(gateway.wait) == 0
    assert funds_of(gateway).used == upstream.cost


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
async def test_a_second_signal_cuts_a_stream_and_charges_what_was_sent(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, first: signal.Signals
) -> None:
    upstream.hold()
    headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}
    async with session.post(gateway.base_url + "/chat/completions", data=STREAM, headers=headers) as response:
        assert b"held" in await response.content.readline()
        gateway.process.send_signal(first)
        async with asyncio.timeout(20):
            while await accepts(gateway):
                await asyncio.sleep(0.01)
        async with session.get(gateway.admin_url + "/readyz") as ready:
            assert ready.status == 503
            assert (await ready.json())["components"] == {"store": "ok", "gateway": "stopping"}
        gateway.process.send_signal(signal.SIGINT)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert await asyncio.to_thread(gateway.wait) == 0
    funds = funds_of(gateway)
    assert funds.used > 0
    assert funds.held == 0
    (line,) = [line for line in map(json.loads, gateway.stderr.splitlines()) if line["logger"] == "gateway.requests"]
    assert Decimal(line["cost"]) == funds.used


async def accepts(gateway: Gateway) -> bool:
    """Whether a new connection is taken."""
    host, _, port = gateway.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionError:  # refused, or reset because it was not accepted before the listener closed
        return False
    writer.close()
    return True
