"""What is measured of a proxy. Each takes it as it runs, with nothing else asked of it meanwhile."""

import asyncio
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import hiredis
from packaging.requirements import Requirement

from gateway.credits.connection import pack
from gateway.credits.keyspace import SHARDS, shard_keys
from tests.benchmarks.cost.load import Target, close, closed_loop, connected, open_loop
from tests.benchmarks.cost.proxies import Proxy, resident_bytes

#: Of the model: events of a stream, and the pause between two of them.
EVENTS, PAUSE_MS = 100, 10
LARGE_PROMPT_BYTES = 400_000
_CONNECTIONS, _STREAMS = 32, 64
_COMPUTE_S = 2.0


async def archived(proxy: Proxy) -> None:
    """Wait until a gateway's ledger is archived, which goes on for a moment after the last request: it belongs to the
    requests that made it, and must not burden whatever is measured next."""
    lengths = [("XLEN", shard_keys(shard).ledger) for shard in range(SHARDS)]
    while proxy.store_url and any(await asyncio.to_thread(_replies, proxy.store_url, lengths)):
        await asyncio.sleep(0.2)


@dataclass(frozen=True)
class Spent:
    """CPU of a proxy's processes for a request whose answer comes whole, µs: until the last is answered, and until the
    ledger entries of all are archived; and that with what its store took."""

    answered_us: float
    archived_us: float
    with_store_us: float


async def request_us(proxy: Proxy, requests: int, prompt_bytes: int = 76) -> Spent:
    """What a request costs."""
    request = proxy.target.request(prompt_bytes=prompt_bytes)
    await closed_loop(proxy.target, request, _CONNECTIONS, requests // 5)
    await archived(proxy)
    before, store_before = proxy.cpu_s, proxy.store_cpu_s
    await closed_loop(proxy.target, request, _CONNECTIONS, requests)
    answered_s = proxy.cpu_s - before
    await archived(proxy)
    archived_s, store_s = proxy.cpu_s - before, proxy.store_cpu_s - store_before
    return Spent(*(seconds / requests * 1e6 for seconds in (answered_s, archived_s, archived_s + store_s)))


async def event_us(proxy: Proxy, streams: int) -> float:
    """CPU of the proxy's processes for each event of streams, their requests' share with it, µs."""
    before = proxy.cpu_s
    await closed_loop(proxy.target, proxy.target.request(stream=True), min(_STREAMS, streams), streams)
    await archived(proxy)
    return (proxy.cpu_s - before) / (streams * EVENTS) * 1e6


async def requests_per_s(
    proxy: Proxy, requests: int, prompt_bytes: int = 76, messages: int = 1, *, compressed: bool = False
) -> float:
    """Answers per second while every connection asks again at once."""
    request = proxy.target.request(prompt_bytes=prompt_bytes, messages=messages, compressed=compressed)
    return requests / await closed_loop(proxy.target, request, _CONNECTIONS, requests)


def two_cores() -> float:
    """What two processes that only compute get done here, of what one does: less than 2 where cores are shared."""
    with multiprocessing.Pool(2) as pool:
        alone = pool.map(_computed, [_COMPUTE_S])[0]
        return sum(pool.map(_computed, [_COMPUTE_S] * 2, chunksize=1)) / alone


def _computed(seconds: float) -> int:
    """Rounds of a loop that were done in that time."""
    until, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        done += sum(range(1000)) > 0
    return done


@dataclass(frozen=True)
class Latency:
    """Milliseconds from request to answer."""

    p50_ms: float
    p99_ms: float


async def latency(target: Target, rate: float, seconds: float) -> Latency:
    """How long answers take at that many requests per second."""
    took = sorted(await open_loop(target, target.request(), rate, seconds))
    return Latency(statistics.median(took) * 1000, took[int(len(took) * 0.99)] * 1000)


@dataclass(frozen=True)
class Trips:
    """Per request: scripts that ran, and how often the store read from a socket to get them."""

    scripts: float
    reads: float


async def trips(proxy: Proxy, requests: int) -> Trips:
    """What the store was asked while many connections ask at once."""
    before = _counted(await asyncio.to_thread(_info, proxy.store_url))
    await closed_loop(proxy.target, proxy.target.request(), _CONNECTIONS, requests)
    after = _counted(await asyncio.to_thread(_info, proxy.store_url))
    return Trips((after[0] - before[0]) / requests, (after[1] - before[1]) / requests)


def _info(url: str) -> dict[str, str]:
    (told,) = _replies(url, [("INFO", "everything")])
    return dict(line.split(":", 1) for line in told.decode().splitlines() if ":" in line)


def _replies(url: str, commands: list[tuple[str, str]]) -> list[Any]:
    replies: list[Any] = []
    with socket.socket(socket.AF_UNIX) as store:
        store.connect(unquote(url.removeprefix("unix://")))
        store.sendall(b"".join(pack(*command) for command in commands))
        reader = hiredis.Reader()
        while len(replies) < len(commands):
            reader.feed(store.recv(2**16))
            while (reply := reader.gets()) is not False:
                replies.append(reply)
    return replies


def _counted(info: dict[str, str]) -> tuple[int, int]:
    scripts = int(info["cmdstat_evalsha"].partition("calls=")[2].partition(",")[0])
    return scripts, int(info["total_reads_processed"])


@dataclass(frozen=True)
class OpenStreams:
    """Of so many streams at once: memory each, and of how many events came meanwhile, the least of any."""

    count: int
    bytes_each: float
    least_events: int


async def open_streams(proxy: Proxy, count: int, seconds: float) -> OpenStreams:
    """Hold so many streams open; proxy: in front of a model whose streams outlast that."""
    clients = await connected(proxy.target, count, lambda _, __: None)
    before = sum(map(resident_bytes, proxy.pids))
    request = proxy.target.request(stream=True)
    for client in clients:
        client.send(request)
        await asyncio.sleep(0.001)
    while not all(client.events for client in clients):
        await asyncio.sleep(0.1)
    seen = [client.events for client in clients]
    await asyncio.sleep(seconds)
    each = (sum(map(resident_bytes, proxy.pids)) - before) / count
    least = min(client.events - then for client, then in zip(clients, seen, strict=True))
    close(clients)
    return OpenStreams(count, each, least)


def ready_s(config: Path) -> float:
    """From the start of ``serve`` on an empty data directory to its welcome, which says that it is ready; seconds."""
    with tempfile.TemporaryDirectory(prefix="qg-ready-") as directory:
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(config), "--data-dir", directory]
        command += ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.readline()
            took = time.perf_counter() - started
            process.terminate()
            process.stdout.read()
        return took


def installed_bytes(name: str = "quota-gateway") -> int:
    """The files of a distribution and of all that it needs, as they are installed here."""
    known = {one.metadata["Name"].lower().replace("_", "-"): one for one in distributions()}
    wanted, seen = [name], set()
    while wanted:
        one = wanted.pop()
        if one in seen or one not in known:
            continue
        seen.add(one)
        wanted += _needs(distribution(one).requires or ())
    own = sum(file.stat().st_size for file in Path("gateway").rglob("*") if file.is_file())
    return own + sum(_size(known[one].files or (), known[one]) for one in seen if one != name)


def _needs(lines: Iterable[str]) -> list[str]:
    asked = (Requirement(line) for line in lines)
    return [
        one.name.lower().replace("_", "-") for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})
    ]


def _size(files: Iterable[object], of: object) -> int:
    paths = (Path(str(of.locate_file(file))) for file in files)  # type: ignore[attr-defined]
    return sum(path.stat().st_size for path in paths if path.is_file())
