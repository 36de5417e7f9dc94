"""What the gateway costs beside a proxy that does nothing: ``python -m tests.benchmarks.cost [--rounds N] [--write]``.

Runs the gateway, with everything on that a newcomer has, and a bare aiohttp passthrough (``passthrough.py``) in front
of the same model, in turn, and prints the medians and their ratios with the machine that it ran on. Peers join in where
they are installed: ``peers.py`` says how. ``--write`` puts the result into ``result.md``, which README.md quotes.

CPU is that of the proxy's own processes, user and system; the store's is shown apart. Some ten minutes on two cores.
"""

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import uvloop
import yaml

from tests.benchmarks import store
from tests.benchmarks.cost import measures, peers, proxies
from tests.benchmarks.cost.measures import EVENTS, LARGE_PROMPT_BYTES, PAUSE_MS
from tests.benchmarks.cost.proxies import Proxy
from tests.upstreams.process import server_process

RESULT = Path(__file__).with_name("result.md")
_REQUESTS, _LARGE, _STREAMS, _OPEN_STREAMS = 6000, 600, 192, 2000
_LATENCY_S = 5.0

Opener = Callable[[], AbstractContextManager[Proxy]]
T = TypeVar("T")


class Table:
    """The rows so far, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, measure: str, reach: str, *figures: str) -> None:
        """One row: what, what was to be reached, what the gateway has, and what the others have."""
        self.rows.append((measure, reach, *figures))
        print(f"{measure:<52} {reach:<18} {'   '.join(figures)}", flush=True)

    def written(self) -> str:
        """The rows in Markdown, with the machine."""
        lines = ["| measure | reach | gateway | passthrough | ratio |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join((*row, '', '', '')[:5])} |" for row in self.rows]
        return "\n".join([f"{_machine()}", "", *lines, ""])


def main() -> None:
    """Measure, print, and write down what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    table = Table()
    print(_machine())
    with _model() as upstream, tempfile.TemporaryDirectory(prefix="qg-cost-") as name:
        directory = Path(name)
        beside = [lambda proxy=proxy: proxy(upstream) for proxy in peers.installed()]
        ours: list[Opener] = [
            lambda: proxies.gateway(upstream, directory / "data"),
            lambda: proxies.passthrough(upstream),
        ]
        _compare(table, ours, args.rounds)
        _peers(table, beside)
        _latency(table, upstream, directory)
        _workers(table, upstream, directory, args.rounds)
        _start(table, upstream, directory, args.rounds)
    _open_streams(table)
    _store(table)
    table.add("installed size with dependencies", "≤ 80 MB", f"{measures.installed_bytes() / 1e6:.0f} MB")
    if args.write:
        RESULT.write_text(table.written())


def _compare(table: Table, openers: list[Opener], rounds: int) -> None:
    """The gateway and the passthrough, A B A B."""
    whole, large, event = [], [], []
    with openers[0]() as gateway, openers[1]() as passthrough:
        for _ in range(rounds):
            both = gateway, passthrough
            whole.append([uvloop.run(measures.request_us(one, _REQUESTS)) for one in both])
            event.append([uvloop.run(measures.event_us(one, _STREAMS)) for one in both])
            large.append([uvloop.run(measures.request_us(one, _LARGE, LARGE_PROMPT_BYTES)) for one in both])
        trips = uvloop.run(measures.trips(gateway, _REQUESTS))
    _ratio(table, "CPU per request, not streamed, µs", "≤ 0.8 ×", whole)
    _ratio(table, "CPU per streamed event, µs", "≤ 1.0 ×", event)
    _ratio(table, "CPU per request with a prompt of 400 kB, µs", "≤ 1.5 ×", large)
    told = f"{trips.scripts:.2f} scripts, in {trips.reads:.2f} reads of the store"
    table.add("round trips to the store per request", "2, shared", told)


def _ratio(table: Table, measure: str, reach: str, rounds: list[list[float]]) -> None:
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    table.add(measure, reach, f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.2f}")


def _peers(table: Table, openers: list[Opener]) -> None:
    for opener in openers:
        with opener() as peer:
            few = peer.name == "LiteLLM"
            whole = uvloop.run(measures.request_us(peer, _REQUESTS // (20 if few else 1)))
            event = uvloop.run(measures.event_us(peer, _STREAMS // (6 if few else 1)))
        table.add(f"{peer.name}: CPU per request, per event, µs", "", f"{whole:.0f}, {event:.1f}")


def _latency(table: Table, upstream: str, directory: Path) -> None:
    with proxies.gateway(upstream, directory / "latency") as gateway, proxies.passthrough(upstream) as passthrough:
        rate = uvloop.run(measures.requests_per_s(gateway, _REQUESTS)) / 2
        targets = (proxies.Target(upstream), passthrough.target, gateway.target)
        direct, plain, ours = (uvloop.run(measures.latency(target, rate, _LATENCY_S)) for target in targets)
    for name, of in (("p50", lambda one: one.p50_ms), ("p99", lambda one: one.p99_ms)):
        reach = "1 ms" if name == "p50" else "3 ms"
        added, others = of(ours) - of(direct), of(plain) - of(direct)
        measure = f"added latency at {rate:.0f} requests/s, {name}, ms"
        table.add(measure, f"≤ {reach} more", f"{added:.2f}", f"{others:.2f}")


def _workers(table: Table, upstream: str, directory: Path, rounds: int) -> None:
    """By CPU-bound load: large prompts, so that load, model and store take as little as can be of the two cores."""
    shown = []
    for number in range(max(1, rounds // 2)):
        at = []
        for workers in ("1", "2"):
            with proxies.gateway(upstream, directory / f"workers-{number}-{workers}", "--workers", workers) as gateway:
                uvloop.run(measures.requests_per_s(gateway, _LARGE // 4, LARGE_PROMPT_BYTES))
                per_s = uvloop.run(measures.requests_per_s(gateway, _LARGE, LARGE_PROMPT_BYTES))
                us = uvloop.run(measures.request_us(gateway, _LARGE, LARGE_PROMPT_BYTES))
            at.append((per_s, us))
        shown.append((at[1][0] / at[0][0], at[0][1] / at[1][1] * 2))
    per_s, of_cores = (statistics.median(column) for column in zip(*shown, strict=True))
    table.add("requests/s of two workers, all on two cores", "≥ 1.8 × one", f"{per_s:.2f} ×")
    table.add("the same by what a core of the gateway's does", "≥ 1.8 × one", f"{of_cores:.2f} ×")


def _start(table: Table, upstream: str, directory: Path, rounds: int) -> None:
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(proxies.config_of(upstream)))
    took = statistics.median(measures.ready_s(config) for _ in range(rounds))
    table.add("from serve to ready, with the embedded store, s", "≤ 1.0", f"{took:.2f}")


def _open_streams(table: Table) -> None:
    with (
        _model(events=10_000, pause_ms=1000) as upstream,
        tempfile.TemporaryDirectory(prefix="qg-cost-") as directory,
        proxies.gateway(upstream, Path(directory) / "data") as gateway,
    ):
        seen = uvloop.run(measures.open_streams(gateway, _OPEN_STREAMS, 10.0))
    told = f"{seen.bytes_each / 1000:.1f} kB each, {seen.least_events} events in 10 s at least"
    table.add(f"{seen.count} open streams, an event a second each", "≤ 60 kB each", told)


def _store(table: Table) -> None:
    seen = store.measure()
    table.add("reserve + settle pairs/s of a core of the store", "≥ 12,000", f"{seen['pairs_per_second']:,.0f}")
    table.add("store bytes per idle account", "≤ 300", f"{seen['account_bytes']:.0f}")
    table.add("store bytes per open reservation", "≤ 350", f"{seen['reservation_bytes']:.0f}")


@contextmanager
def _model(events: int = EVENTS, pause_ms: int = PAUSE_MS) -> Iterator[str]:
    with server_process("tests.benchmarks.cost.upstream", str(events), str(pause_ms)) as process:
        yield process.base_url


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    system = f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores of {model}, {system}"


if __name__ == "__main__":
    main()
