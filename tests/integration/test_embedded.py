"""The embedded store against what can happen to it: kills on either side, a second gateway, a torn file."""

import asyncio
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import redis

from gateway.credits import embedded, scripts
from gateway.credits.embedded import EmbeddedStore, EmbeddedStoreError, running_url
from gateway.credits.keyspace import account_key, reservation_id
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import Cost
from gateway.telemetry.metrics import Metrics
from tests.stores import started_store

#: A gateway reduced to its store: starts it, writes 100 settled amounts, says so, waits to be killed.
GATEWAY = """
import asyncio, sys, threading
from pathlib import Path
import redis, uvloop
from gateway.credits.embedded import EmbeddedStore

async def serve():
    store = EmbeddedStore(Path(sys.argv[1]), "everysec")
    await store.start()
    with redis.Redis.from_url(store.url) as client:
        for number in range(100):
            client.set(f"settled:{number}", number)
    print(store.pid, flush=True)
    await asyncio.sleep(3600)

run = uvloop.run if sys.argv[2] == "uvloop" else asyncio.run
if sys.argv[3] == "main":
    run(serve())
else:
    threading.Thread(target=lambda: run(serve())).start()
"""

LOOPS = ["asyncio", "uvloop"]


@contextmanager
def connected(url: str | None) -> Iterator[redis.Redis]:
    assert url is not None
    with redis.Redis.from_url(url, decode_responses=True) as client:
        yield client


@asynccontextmanager
async def running(store: EmbeddedStore) -> AsyncIterator[EmbeddedStore]:
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


@contextmanager
def gateway_process(data_dir: Path, loop: str, thread: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The gateway's process and its server's pid; the gateway is dead afterwards."""
    command = [sys.executable, "-c", GATEWAY, str(data_dir), loop, thread]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def runs(pid: int) -> bool:
    """Whether the process lives; one that ended but that nobody has waited for does not."""
    if Path("/proc/self").exists():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    """Returns once the process has ended; the test's own time limit is the bound."""
    while runs(pid):
        time.sleep(0.01)


async def wait_until_replaced(store: EmbeddedStore, old_pid: int) -> None:
    while not store.alive or store.pid == old_pid:
        await asyncio.sleep(0.01)


async def test_starts_answers_and_stops(tmp_path: Path) -> None:
    data_dir = tmp_path / "deep" / "data"
    store = EmbeddedStore(data_dir)
    with pytest.raises(EmbeddedStoreError, match="not started"):
        _ = store.url
    assert (store.alive, store.pid) == (False, None)
    async with running(store):
        assert store.alive
        assert store.url == f"unix://{data_dir}/valkey.sock"
        with connected(store.url) as client:
            assert client.ping()
            assert client.info("server")["process_id"] == store.pid
            assert client.info("server")["valkey_version"].startswith("9.")
        pid = store.pid
        with pytest.raises(EmbeddedStoreError, match="already started"):
            await store.start()
        assert store.pid == pid
    assert pid is not None
    assert not runs(pid)
    assert (store.alive, store.pid) == (False, None)
    assert not (data_dir / "valkey.sock").exists()
    await store.stop()


async def test_only_the_owner_may_look_inside(tmp_path: Path) -> None:
    async with running(EmbeddedStore(tmp_path / "data")) as store:
        with connected(store.url) as client:
            client.set("a", 1)
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "data" / "valkey.sock").stat().st_mode) == 0o700
        for file in (tmp_path / "data").rglob("*"):
            assert not file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), file


@pytest.mark.parametrize("appendfsync", ["everysec", "always"])
async def test_runs_with_the_promised_settings(tmp_path: Path, appendfsync: str) -> None:
    async with running(EmbeddedStore(tmp_path, appendfsync)) as store:  # type: ignore[arg-type]
        with connected(store.url) as client:
            settings = client.config_get("*")
    promised = {
        "port": "0",
        "unixsocketperm": "700",
        "dir": str(tmp_path),
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "save": "",
        "maxmemory": "0",
        "maxmemory-policy": "noeviction",
        "aof-load-truncated": "yes",
        "auto-aof-rewrite-percentage": "100",
        "auto-aof-rewrite-min-size": "134217728",
        "enable-debug-command": "no",
        "daemonize": "no",
        "loglevel": "notice",
    }
    assert {name: settings[name] for name in promised} == promised


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, "glibc.malloc.tcache_count=65535"),
        ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=65535"),
        ("glibc.malloc.tcache_count=7", "glibc.malloc.tcache_count=7"),
    ],
)
async def test_the_allocator_is_set_beside_what_the_operator_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, expected: str
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    server = tmp_path / "server"  # instead of Valkey, which writes its title over its environment
    server.write_text('#!/bin/sh\nprintf %s "$GLIBC_TUNABLES" > "$0.saw"\nexit 1\n')
    server.chmod(0o700)
    monkeypatch.setattr(embedded, "_server_binary", lambda: server)
    with pytest.raises(EmbeddedStoreError):
        await EmbeddedStore(tmp_path / "data").start()
    assert (tmp_path / "server.saw").read_text() == expected


async def test_an_account_with_large_figures_stays_compact(tmp_path: Path) -> None:
    plan = Plan("large", (Allowance("per_window", 10**15, DAY_MS),))
    amount = Cost(10**12, 10**12)
    async with running(EmbeddedStore(tmp_path)) as server, started_store(server.url, Metrics({}, [])) as store:
        await scripts.create(store, "acme", plan)
        for number in range(2):
            reservation = reservation_id("acme", f"{number:024x}")
            await scripts.reserve(
                store,
                "acme",
                reservation,
                plan=plan,
                amount=amount,
                minimum_nano=0,
                alone_nano=0,
                lease_ms=60_000,
                key_id="",
                model="model",
            )
            if number == 0:
                await scripts.settle(store, "acme", reservation, plan=plan, cost=amount, note="")
        assert len(await store.call("HGET", account_key("acme"), "w1")) > 64
        assert await store.call("OBJECT", "ENCODING", account_key("acme")) == b"listpack"


async def test_data_survives_a_restart(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    async with running(store):
        with connected(store.url) as client:
            client.hset("account", mapping={"balance": 7})
    async with running(store):
        with connected(store.url) as client:
            assert client.hgetall("account") == {"balance": "7"}


async def test_a_second_gateway_is_refused_by_name(tmp_path: Path) -> None:
    with gateway_process(tmp_path, "asyncio", "main") as (process, server_pid):
        second = EmbeddedStore(tmp_path)
        with pytest.raises(EmbeddedStoreError) as refused:
            await second.start()
        assert str(refused.value) == f"the data directory {tmp_path} is in use by another gateway (pid {process.pid})"
        await second.stop()
        with connected(running_url(tmp_path)) as client:
            assert client.info("server")["process_id"] == server_pid
    wait_until_gone(server_pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_server_ends_with_a_killed_gateway(tmp_path: Path, loop: str) -> None:
    with gateway_process(tmp_path, loop, "main") as (process, server_pid):
        process.kill()
        process.wait()
        wait_until_gone(server_pid)
    assert running_url(tmp_path) is None


@pytest.mark.parametrize("loop", LOOPS)
async def test_nothing_is_lost_when_the_gateway_is_killed(tmp_path: Path, loop: str) -> None:
    with gateway_process(tmp_path, loop, "main") as (process, server_pid):
        process.kill()
        process.wait()
        async with running(EmbeddedStore(tmp_path)) as store:
            assert not runs(server_pid)
            with connected(store.url) as client:
                assert [client.get(f"settled:{n}") for n in range(100)] == [str(n) for n in range(100)]


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_leftover_server_is_stopped_first(tmp_path: Path, loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """Started off the main thread, the server outlives its gateway, as it always does on macOS."""
    with gateway_process(tmp_path, loop, "other") as (process, server_pid):
        process.kill()
        process.wait()
        try:
            with connected(running_url(tmp_path)) as client:
                assert client.info("server")["process_id"] == server_pid
                client.set("late", "kept")
            async with running(EmbeddedStore(tmp_path)) as store:
                assert not runs(server_pid)
                assert store.pid != server_pid
                with connected(store.url) as client:
                    assert client.get("late") == "kept"
                    assert client.get("settled:99") == "99"
        finally:
            if runs(server_pid):
                os.kill(server_pid, signal.SIGKILL)
    assert f"(pid {server_pid}) left over" in caplog.text


async def test_a_server_of_another_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket stands where ours would, and something holds our server lock: still no reason to stop it."""
    monkeypatch.setattr(embedded, "_LEFTOVER_S", 0.2)
    ours = tmp_path / "ours"
    ours.mkdir()
    async with running(EmbeddedStore(tmp_path / "theirs")) as theirs:
        (ours / "socket.path").write_text(str(tmp_path / "theirs" / "valkey.sock"))
        holder = os.open(ours / "server.lock", os.O_RDWR | os.O_CREAT)
        try:
            assert embedded._try_lock(holder, embedded.fcntl.LOCK_EX)
            with pytest.raises(EmbeddedStoreError, match="left over from an earlier gateway"):
                await EmbeddedStore(ours).start()
        finally:
            os.close(holder)
        assert theirs.alive
        with connected(theirs.url) as client:
            assert client.ping()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_killed_server_is_started_again_with_its_data(tmp_path: Path, loop: str) -> None:
    with gateway_process(tmp_path, loop, "main") as (_, server_pid):
        url = running_url(tmp_path)
        os.kill(server_pid, signal.SIGKILL)
        while True:
            try:
                with connected(url) as client:
                    assert client.info("server")["process_id"] != server_pid
                    assert client.get("settled:99") == "99"
                    new_pid = client.info("server")["process_id"]
                    break
            except redis.ConnectionError:
                time.sleep(0.01)
    wait_until_gone(new_pid)


async def test_each_death_is_logged_and_followed_by_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with running(EmbeddedStore(tmp_path)) as store:
        url = store.url
        for deaths in (1, 2):
            pid = store.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await wait_until_replaced(store, pid)
            assert caplog.text.count("the store server died: signal 9 (Killed)") == deaths
        assert store.url == url
        with connected(url) as client:
            assert client.ping()
    assert "Ready to accept connections" in caplog.text


async def test_keeps_trying_while_the_server_cannot_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(EmbeddedStore(tmp_path)) as store:
        pid = store.pid
        assert pid is not None
        with monkeypatch.context() as broken:
            broken.setattr(embedded, "_server_binary", lambda: Path("/bin/false"))
            os.kill(pid, signal.SIGKILL)
            while caplog.text.count("could not be started again") < 2:
                await asyncio.sleep(0.01)
            assert not store.alive
        assert "ended while starting: exit code 1" in caplog.text
        await wait_until_replaced(store, pid)
        with connected(store.url) as client:
            assert client.ping()


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    async with running(EmbeddedStore(tmp_path)) as store:
        assert store.pid is not None
        assert os.getsid(store.pid) == os.getpgid(store.pid) == store.pid != os.getsid(0)


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_a_directory_with_a_path_too_long_for_a_socket(tmp_path: Path, kill: bool) -> None:
    data_dir = tmp_path / ("d" * 120)
    with gateway_process(data_dir, "asyncio", "main") as (process, server_pid):
        first = embedded._recorded_socket(data_dir)
        with connected(running_url(data_dir)) as client:
            assert client.info("server")["process_id"] == server_pid
        process.kill()
        process.wait()
        wait_until_gone(server_pid)
    store = EmbeddedStore(data_dir)
    await store.start()
    path = embedded._recorded_socket(data_dir)
    try:
        assert not first.parent.exists(), "what the killed gateway left is cleaned up"
        assert path.parent != data_dir
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert running_url(data_dir) == store.url
        with connected(store.url) as client:
            assert client.get("settled:99") == "99"
        if kill:
            pid = store.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await wait_until_replaced(store, pid)
            assert running_url(data_dir) == store.url
    finally:
        await store.stop()
    assert not path.parent.exists()
    assert running_url(data_dir) is None


async def test_a_directory_with_an_awkward_name(tmp_path: Path) -> None:
    data_dir = tmp_path / """a b?c#d%41 "e' é"""
    async with running(EmbeddedStore(data_dir)) as store:
        assert running_url(data_dir) == store.url
        with connected(store.url) as client:
            client.set("a", 1)
            assert client.config_get("dir") == {"dir": str(data_dir)}
    async with running(EmbeddedStore(data_dir)) as store:
        with connected(store.url) as client:
            assert client.get("a") == "1"


async def test_running_url_tells_whether_a_server_runs(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert running_url(data_dir) is None
    async with running(EmbeddedStore(data_dir)) as store:
        assert running_url(data_dir) == store.url
        copy = tmp_path / "copy"
        shutil.copytree(data_dir, copy, ignore=shutil.ignore_patterns("*.sock"))
        (copy / "socket.path").write_text(str(data_dir / "valkey.sock"))
        assert running_url(copy) is None, "a copied directory is not the one that the server runs for"
        assert running_url(data_dir) == store.url
    assert running_url(data_dir) is None


def incremental_file(data_dir: Path) -> Path:
    (path,) = (data_dir / "appendonlydir").glob("*.incr.aof")
    return path


async def test_a_torn_tail_is_cut_off(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    async with running(store):
        with connected(store.url) as client:
            client.set("whole", "kept")
    with incremental_file(tmp_path).open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\ntorn\r\n$9\r\nhal")
    for _ in range(2):  # the second start reads what the first one cut and appended to
        async with running(store):
            with connected(store.url) as client:
                assert client.get("whole") == "kept"
                assert client.get("torn") is None
                client.incr("starts")
    async with running(store):
        with connected(store.url) as client:
            assert client.get("starts") == "2"


async def test_a_file_damaged_in_the_middle_is_a_clear_error(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    async with running(store):
        with connected(store.url) as client:
            for number in range(100):
                client.set(f"key:{number}", number)
    path = incremental_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"x" * 40
    path.write_bytes(content)
    with pytest.raises(EmbeddedStoreError, match=r"(?s)ended while starting: exit code 1.*Bad file format"):
        await store.start()
    assert store.pid is None
    assert running_url(tmp_path) is None
    assert path.read_bytes() == content, "the evidence is left as it was"


async def test_waits_while_a_large_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddedStore(tmp_path)
    async with running(store):
        with connected(store.url) as client:
            client.set("first", 1)
    command = b"*3\r\n$3\r\nSET\r\n$8\r\nkey:%04d\r\n$1000\r\n" + b"v" * 1000 + b"\r\n"
    with incremental_file(tmp_path).open("ab") as file:
        for number in range(100_000):
            file.write(command % (number % 10_000))
    seen = []
    progress = embedded._progress

    async def watched(path: Path) -> str:
        seen.append(await progress(path))
        return seen[-1]

    monkeypatch.setattr(embedded, "_progress", watched)
    async with running(store):
        with connected(store.url) as client:
            assert client.dbsize() == 10_001
    assert seen[-1] == "ready"
    assert any(state.isdigit() for state in seen), "the server was seen loading"


async def test_a_start_that_makes_no_progress_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "hangs"
    script.write_text("#!/bin/sh\nexec sleep 3600\n")
    script.chmod(0o700)
    monkeypatch.setattr(embedded, "_server_binary", lambda: script)
    monkeypatch.setattr(embedded, "_STALL_S", 0.2)
    store = EmbeddedStore(tmp_path / "data")
    with pytest.raises(EmbeddedStoreError, match="no progress"):
        await store.start()
    assert store.pid is None


async def test_a_server_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "_STOP_S", 0.2)
    store = EmbeddedStore(tmp_path)
    await store.start()
    pid = store.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await store.stop()
    assert not runs(pid)
    assert "did not end within" in caplog.text


async def test_the_log_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "valkey.log").write_bytes(b"old\n" * (embedded.MAX_LOG_BYTES // 4 + 1))
    for _ in range(2):
        async with running(EmbeddedStore(tmp_path)):
            pass
    assert b"old" not in (tmp_path / "valkey.log").read_bytes()
    assert (tmp_path / "valkey.log.1").stat().st_size > embedded.MAX_LOG_BYTES
    assert sorted(path.name for path in tmp_path.glob("valkey.log*")) == ["valkey.log", "valkey.log.1"]


async def test_an_unusable_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedStoreError, match=r"the data directory .*/file/data cannot be used: Not a directory"):
        await EmbeddedStore(tmp_path / "file" / "data").start()


async def test_a_missing_server_binary_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    store = EmbeddedStore(tmp_path)
    with pytest.raises(EmbeddedStoreError, match="no embedded store for this system"):
        await store.start()
    monkeypatch.undo()
    async with running(store):
        assert store.alive
