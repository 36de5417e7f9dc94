"""``serve --workers 2``: two processes answer, and to clients, operators and the ledger they are one gateway."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.conftest import (
    BODY,
    HOLD,
    MODEL,
    STREAM,
    Answer,
    HeldUpstream,
    ask,
    ask_default,
    hanging_store,
    hold_of,
    store_pid,
)
from tests.gateway_process import OUTPUT_PRICE, Gateway, gateway_config, run_cli, running_gateway
from tests.servers import MovableClock

#: As many connections as leave no doubt that the kernel gives some to each of two workers.
MANY = 32
#: Ten whole requests, and a nano-credit less than the smallest that would be admitted as the eleventh.
TEN = 10 * HOLD + hold_of(BODY, 16) - Decimal("0.000000001")
PATIENCE_SECONDS = 30


def prepaid(upstream: str) -> dict[str, Any]:
    """A configuration without windows: no test meets a midnight."""
    config = gateway_config(upstream, [MODEL], plans={"prepaid": {"default": True}})
    config["store"] = {"timeout": "1500ms"}
    return config


@pytest.fixture
def config(upstream: HeldUpstream) -> dict[str, Any]:
    return prepaid(upstream.base_url)


@contextmanager
def serving(config: dict[str, Any] | Path, data_dir: Path, **options: Any) -> Iterator[Gateway]:
    """A gateway of two workers whose account has TEN credits, unless it ran on this directory before."""
    with running_gateway(config, data_dir=data_dir, options=("--workers", "2"), **options) as gateway:
        if gateway.key is not None:
            gateway.cli("credits", "grant", "default", f"{TEN:f}")
        yield gateway
        assert "Traceback" not in gateway.stderr


@pytest.fixture
async def gateway(config: dict[str, Any], tmp_path: Path) -> AsyncIterator[Gateway]:
    with serving(config, tmp_path / "data") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One for all tests that leave it as it was, in front of the demo model, with plenty of credits."""
    config = prepaid("http://127.0.0.1:1/v1")
    config["upstreams"]["test"]["api_key"] = ""
    with serving(config, tmp_path_factory.mktemp("lasting")) as gateway:
        gateway.cli("credits", "grant", "default", "100")
        yield gateway


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that opens a connection for each request."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


def charged(gateway: Gateway) -> Decimal:
    return TEN - Decimal(gateway.cli("credits", "show", "default")["balance"]) - held(gateway)


def held(gateway: Gateway) -> Decimal:
    return Decimal(gateway.cli("credits", "show", "default")["balance_held"])


def workers_of(gateway: Gateway) -> list[int]:
    """The process ids of its workers that live."""
    children = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"workers/start.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def many(session: aiohttp.ClientSession, gateway: Gateway, key: str | None = None) -> list[Answer]:
    """The answers to MANY requests at once, with the first account's key unless another is given."""
    key = key or gateway.key
    assert key is not None
    return await asyncio.gather(*(ask(session, gateway, key, BODY) for _ in range(MANY)))


def requests_by_worker(gateway: Gateway) -> dict[int, int]:
    """How many answers each worker has logged."""
    counts: dict[int, int] = {}
    for line in map(json.loads, gateway.stderr.splitlines()):
        if line["logger"] == "gateway.requests":
            counts[line["worker"]] = counts.get(line["worker"], 0) + 1
    return counts


async def figures(session: aiohttp.ClientSession, gateway: Gateway) -> dict[str, float]:
    """What a scrape says of counters and gauges: each name's sum over its labels."""
    async with session.get(gateway.admin_url + "/metrics") as answer:
        text = await answer.text()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


async def until_figure(session: aiohttp.ClientSession, gateway: Gateway, name: str, value: float) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await figures(session, gateway))[name] != value:
            await asyncio.sleep(0.05)


async def until(true: Callable[[], bool]) -> None:
    """Raises TimeoutError after half a minute, which is half a lease."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.05)


async def test_both_answer_and_exactly_what_fits_is_admitted(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    upstream.hold()
    tasks = [asyncio.create_task(ask_default(session, gateway)) for _ in range(100)]
    await until(lambda: sum(task.done() for task in tasks) == 90)  # no more can be refused, and none be admitted
    assert held(gateway) == 10 * HOLD
    assert (await figures(session, gateway))["quota_gateway_reservations_open"] == 10
    upstream.release()
    answers = await asyncio.gather(*tasks)
    assert sorted(answer.status for answer in answers) == [200] * 10 + [429] * 90
    assert (charged(gateway), held(gateway)) == (10 * upstream.cost, 0)
    assert requests_by_worker(gateway).keys() == {1, 2}
    assert gateway.cli("ledger", "verify")["ok"]


async def test_a_scrape_shows_the_sums_and_never_less_than_before(
    session: aiohttp.ClientSession, lasting: Gateway
) -> None:
    """Also after a worker was killed, which is replaced."""
    start = await figures(session, lasting)
    await many(session, lasting)
    before = await figures(session, lasting)
    assert before["quota_gateway_decisions_total"] == start["quota_gateway_decisions_total"] + MANY
    assert before["quota_gateway_build_info"] == 1
    assert before["quota_gateway_workers"] == 2

    killed, kept = workers_of(lasting)
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (now := await figures(session, lasting))["quota_gateway_worker_ends_total"] == 0:
            assert now["quota_gateway_decisions_total"] == before["quota_gateway_decisions_total"]
            assert now["process_cpu_seconds_total"] >= before["process_cpu_seconds_total"]
    await until_figure(session, lasting, "quota_gateway_workers", 2)
    now_there = workers_of(lasting)
    assert len(now_there) == 2 and kept in now_there and killed not in now_there

    answered = requests_by_worker(lasting)
    assert [answer.status for answer in await many(session, lasting)] == [200] * MANY
    after = await figures(session, lasting)
    assert after["quota_gateway_decisions_total"] == before["quota_gateway_decisions_total"] + MANY
    assert after["process_cpu_seconds_total"] >= before["process_cpu_seconds_total"]
    assert all(requests_by_worker(lasting)[number] > answered[number] for number in (1, 2))


async def test_it_is_ready_while_a_worker_answers(session: aiohttp.ClientSession, lasting: Gateway) -> None:
    with ExitStack() as standing_still:
        for pid in workers_of(lasting):
            assert await readiness(session, lasting) == (200, "ok")
            os.kill(pid, signal.SIGSTOP)
            standing_still.callback(os.kill, pid, signal.SIGCONT)
        assert await readiness(session, lasting) == (503, "none answers")
    assert await readiness(session, lasting) == (200, "ok")


async def readiness(session: aiohttp.ClientSession, gateway: Gateway) -> tuple[int, str]:
    async with session.get(gateway.admin_url + "/readyz") as answer:
        return answer.status, (await answer.json())["components"]["workers"]


async def test_connections_that_waited_for_a_killed_worker_are_taken_by_its_successor(lasting: Gateway) -> None:
    killed = workers_of(lasting)[0]
    os.kill(killed, signal.SIGSTOP)
    connections = [await connect(lasting) for _ in range(MANY)]
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_SECONDS):
        for reader, writer in connections:
            writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: gateway\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.close()


async def connect(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A new connection."""
    host, _, port = gateway.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
    return await asyncio.open_connection(host, int(port))


async def test_a_revoked_key_is_refused_by_all(session: aiohttp.ClientSession, lasting: Gateway) -> None:
    made = lasting.cli("keys", "create", "default")
    assert {answer.status for answer in await many(session, lasting, made["secret"])} == {200}
    lasting.cli("keys", "revoke", made["id"])
    assert {answer.status for answer in await many(session, lasting, made["secret"])} == {401}


async def test_two_gateways_do_not_share_a_port(lasting: Gateway, tmp_path: Path) -> None:
    """Though the sockets of workers do."""
    address = lasting.base_url.removeprefix("http://").removesuffix("/v1")
    listeners = ("--listen", address, "--admin-listen", "127.0.0.1:0")
    arguments = ("serve", *listeners, "--data-dir", str(tmp_path / "other"), "--workers", "2")
    second = await asyncio.to_thread(run_cli, lasting.config, *arguments)
    assert (second.returncode, second.stdout) == (1, "")
    assert f"cannot listen on {address}: address already in use" in second.stderr.lower()


async def test_what_a_killed_worker_held_ends_with_its_leases_and_the_others_are_not_touched(
    session: aiohttp.ClientSession, config: dict[str, Any], upstream: HeldUpstream, tmp_path: Path, clock: MovableClock
) -> None:
    with serving(config, tmp_path / "data", clock=clock) as gateway:
        gateway.cli("credits", "grant", "default", f"{MANY * HOLD:f}")
        granted = TEN + MANY * HOLD
        upstream.hold()
        tasks = [asyncio.create_task(ask_default(session, gateway)) for _ in range(MANY)]
        await upstream.wait_for_requests(MANY)
        os.kill(workers_of(gateway)[0], signal.SIGKILL)
        await until_figure(session, gateway, "quota_gateway_worker_ends_total", 1)
        await until_figure(session, gateway, "quota_gateway_workers", 2)
        assert held(gateway) == MANY * HOLD
        upstream.release()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        answered = [one.status for one in outcomes if isinstance(one, Answer)]
        assert answered == [200] * len(answered)
        assert 0 < len(answered) < MANY
        assert held(gateway) == (MANY - len(answered)) * HOLD

        clock.move(61_000)
        await until(lambda: held(gateway) == 0)
        assert Decimal(gateway.cli("credits", "show", "default")["balance"]) == granted - len(answered) * upstream.cost
        assert gateway.cli("ledger", "verify")["ok"]


async def test_the_journal_of_killed_workers_is_taken_over(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    upstream.hold()
    tasks = [asyncio.create_task(ask_default(session, gateway)) for _ in range(4)]
    await upstream.wait_for_requests(4)
    with hanging_store(gateway):
        upstream.release()
        assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 4
        for pid in workers_of(gateway):
            os.kill(pid, signal.SIGKILL)
    await until(lambda: held(gateway) == 0)
    assert charged(gateway) == 4 * upstream.cost
    await until_figure(session, gateway, "quota_gateway_workers", 2)
    assert (await ask_default(session, gateway)).status == 200


async def test_workers_and_store_end_with_a_killed_parent_and_what_was_sent_is_charged(
    session: aiohttp.ClientSession, config: dict[str, Any], upstream: HeldUpstream, tmp_path: Path
) -> None:
    with serving(config, tmp_path / "data") as gateway:
        workers, store = workers_of(gateway), store_pid(gateway)
        assert store is not None
        upstream.hold()
        headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}
        async with session.post(gateway.base_url + "/chat/completions", data=STREAM, headers=headers) as response:
            assert b"held" in await response.content.readline()
            gateway.kill()
            await until(lambda: not any(map(lives, [*workers, store])))
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
    with serving(config, tmp_path / "data") as gateway:
        await until(lambda: held(gateway) == 0 and charged(gateway) > 0)
        assert charged(gateway) < upstream.cost
        assert gateway.cli("ledger", "verify")["ok"]


async def test_a_stream_ends_well_after_sigterm_to_every_process(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    """As service managers send it: one that reaches the workers too is not the second one."""
    upstream.hold()
    stream = asyncio.create_task(ask_default(session, gateway, STREAM))
    await upstream.wait_for_requests(1)
    for pid in (gateway.pid, *workers_of(gateway)):
        os.kill(pid, signal.SIGTERM)
    await until_refused(gateway)
    upstream.release()
    assert (await stream).events[-1]["usage"]["completion_tokens"] == upstream.completion_tokens
    assert await asyncio.to_thread(gateway.wait) == 0
    assert (charged(gateway), held(gateway)) == (upstream.cost, 0)


async def test_a_second_signal_cuts_the_streams_of_all_workers(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    upstream.hold()
    streams = [asyncio.create_task(ask_default(session, gateway, STREAM)) for _ in range(8)]
    await upstream.wait_for_requests(8)
    gateway.process.send_signal(signal.SIGTERM)
    await until_refused(gateway)
    async with session.get(gateway.admin_url + "/readyz") as ready:
        assert ready.status == 503
        assert (await ready.json())["components"]["gateway"] == "stopping"
    gateway.process.send_signal(signal.SIGINT)
    for outcome in await asyncio.gather(*streams, return_exceptions=True):
        assert isinstance(outcome, aiohttp.ClientPayloadError)
    assert await asyncio.to_thread(gateway.wait) == 0
    assert charged(gateway) > 0
    assert held(gateway) == 0


async def until_refused(gateway: Gateway) -> None:
    """Until no worker takes a connection. One that just stops may reset what it has not accepted."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                _, writer = await connect(gateway)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                continue
            writer.close()
            await asyncio.sleep(0.01)


async def test_a_reload_is_in_force_in_all_workers_or_in_none(
    session: aiohttp.ClientSession, config: dict[str, Any], upstream: HeldUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "gateway.yaml"

    async def reload(text: str) -> int:
        path.write_text(text)
        async with session.post(gateway.admin_url + "/admin/v1/reload") as answer:
            return answer.status

    async def costs() -> set[Decimal]:
        return {answer.cost for answer in await many(session, gateway)}

    path.write_text(yaml.safe_dump(config))
    with serving(path, tmp_path / "data") as gateway:
        gateway.cli("credits", "grant", "default", "1")
        assert await costs() == {upstream.cost}
        config["models"]["models"][MODEL]["output_token_price"] = str(2 * OUTPUT_PRICE)
        dearer = {upstream.cost + upstream.completion_tokens * OUTPUT_PRICE / 1_000_000}
        assert await reload(yaml.safe_dump(config)) == 200
        assert await costs() == dearer
        assert await reload("plans: [") == 422
        assert await costs() == dearer
        # One that is started from now on knows it too.
        os.kill(workers_of(gateway)[1], signal.SIGKILL)
        await until_figure(session, gateway, "quota_gateway_worker_ends_total", 1)
        await until_figure(session, gateway, "quota_gateway_workers", 2)
        assert await costs() == dearer
