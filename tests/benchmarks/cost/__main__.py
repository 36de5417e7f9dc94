"""What the gateway costs beside a proxy that does nothing: ``python -m tests.benchmarks.cost [--rounds N] [--write]``.

Runs the gateway, with everything on that a newcomer has, and a bare aiohttp passthrough (``passthrough.py``) in front
of the same model, in turn, and prints the medians and their ratios with the machine that it ran on. The passthrough
runs twice: as aiohttp does by itself, and on uvloop, as the gateway does. Peers join in where they are installed:
``peers.py`` says how. ``--write`` puts the result into ``result.md``, which README.md quotes.

CPU is that of the proxy's own processes, user and system; the store's is among it in a row of its own alone. A gateway
goes on archiving its ledger after the last request, and nothing else is measured meanwhile: all of it counts but in the
first row. Some ten minutes on two cores.
"""

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import uvloop
import yaml

from tests.benchmarks import store
from tests.benchmarks.cost import measures, peers, proxies
from tests.benchmarks.cost.load import Target
from tests.benchmarks.cost.measures import EVENTS, LARGE_PROMPT_BYTES, PAUSE_MS
from tests.benchmarks.cost.proxies import Proxy
from tests.upstreams.process import server_process

RESULT = Path(__file__).with_name("result.md")
_REQUESTS, _LARGE, _STREAMS, _OPEN_STREAMS = 6000, 600, 192, 2000
#: Requests whose reading is nearly all of the work: so many messages, of four bytes each, and compressed, that little
#: is left for the load, the model and the store, which share the cores.
_MANY_MESSAGES, _LABORIOUS = 20_000, 1200
_LATENCY_S = 5.0
#: Long enough that the load is one that can be kept up: what is put off in a burst has to be done, too.
_KEPT_UP = 30_000

Opener = Callable[[], AbstractContextManager[Proxy]]


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
        lines = ["| measure | reach | gateway | passthrough | ratio | on uvloop | ratio |", f"|{'---|' * 7}"]
        lines += [f"| {' | '.join((*row, *([''] * 5))[:7])} |" for row in self.rows]
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
            lambda: proxies.passthrough(upstream, "uvloop"),
        ]
        _compare(table, ours, args.rounds)
        _peers(table, beside)
        _latency(table, upstream, directory, args.rounds)
        _workers(table, upstream, directory, args.rounds)
        _start(table, upstream, directory, args.rounds)
    _open_streams(table)
    _store(table)
    table.add("installed size with dependencies", "≤ 80 MB", f"{measures.installed_bytes() / 1e6:.0f} MB")
    if args.write:
        RESULT.write_text(table.written())


def _compare(table: Table, openers: list[Opener], rounds: int) -> None:
    """The gateway and the passthroughs, A B C A B C."""
    whole, archived, with_store, large, event = [], [], [], [], []
    with ExitStack() as running:
        all_of_them = [running.enter_context(opener()) for opener in openers]
        for _ in range(rounds):
            spent = [uvloop.run(measures.request_us(one, _KEPT_UP)) for one in all_of_them]
            whole.append([each.answered_us for each in spent])
            archived.append([each.archived_us for each in spent])
            with_store.append([each.with_store_us for each in spent])
            event.append([uvloop.run(measures.event_us(one, _STREAMS)) for one in all_of_them])
            spent = [uvloop.run(measures.request_us(one, _LARGE, LARGE_PROMPT_BYTES)) for one in all_of_them]
            large.append([each.archived_us for each in spent])
        gateway = all_of_them[0]
        trips = uvloop.run(measures.trips(gateway, _REQUESTS))
    _ratio(table, "CPU per request, not streamed, µs", "≤ 0.8 ×", whole)
    _ratio(table, "the same, until its ledger entry is archived, µs", "≤ 0.8 ×", archived)
    _ratio(table, "that, with the CPU of the embedded store, µs", "", with_store)
    _ratio(table, "CPU per streamed event, µs", "≤ 1.0 ×", event)
    _ratio(table, "CPU per request with a prompt of 400 kB, µs", "≤ 1.5 ×", large)
    told = f"{trips.scripts:.2f} scripts, in {trips.reads:.2f} reads of the store"
    table.add("round trips to the store per request", "2, shared", told)


def _ratio(table: Table, measure: str, reach: str, rounds: list[list[float]]) -> None:
    ours, *theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [statistics.median(row[0] / row[other] for row in rounds) for other in range(1, len(rounds[0]))]
    beside = [text for one, ratio in zip(theirs, ratios, strict=True) for text in (f"{one:.1f}", f"{ratio:.2f}")]
    table.add(measure, reach, f"{ours:.1f}", *beside)


def _peers(table: Table, openers: list[Opener]) -> None:
    for opener in openers:
        with opener() as peer:
            few = peer.name == "LiteLLM"
            whole = uvloop.run(measures.request_us(peer, _REQUESTS // (20 if few else 1))).answered_us
            event = uvloop.run(measures.event_us(peer, _STREAMS // (6 if few else 1)))
        table.add(f"{peer.name}: CPU per request, per event, µs", "", f"{whole:.0f}, {event:.1f}")


def _latency(table: Table, upstream: str, directory: Path, rounds: int) -> None:
    """Direct, gateway, passthroughs, in turn."""
    with (
        proxies.gateway(upstream, directory / "latency") as gateway,
        proxies.passthrough(upstream) as plain,
        proxies.passthrough(upstream, "uvloop") as on_uvloop,
    ):
        rate = uvloop.run(measures.requests_per_s(gateway, _KEPT_UP)) / 2

        def seen_of(target: Target) -> measures.Latency:
            uvloop.run(measures.archived(gateway))
            return uvloop.run(measures.latency(target, rate, _LATENCY_S))

        targets = (Target(upstream), gateway.target, plain.target, on_uvloop.target)
        seen = [[seen_of(target) for target in targets] for _ in range(rounds)]
    for name, reach, of in (("p50", "1 ms", lambda one: one.p50_ms), ("p99", "3 ms", lambda one: one.p99_ms)):
        added = [[of(one) - of(direct) for one in proxied] for direct, *proxied in seen]
        ours, theirs, others = (f"{statistics.median(column):.2f}" for column in zip(*added, strict=True))
        beyond = statistics.median(row[0] - row[1] for row in added)
        measure = f"added latency at {rate:.0f} requests/s, {name}, ms"
        table.add(measure, f"≤ {reach} more", f"{ours}: {beyond:.2f} more", theirs, "", others)


def _workers(table: Table, upstream: str, directory: Path, rounds: int) -> None:
    """By requests that are nearly all the gateway's work, and by small ones, mostly of load, model and store; one
    worker and two, in turn, none beside the other: two take all of both cores. Whatever else the machine does then
    shows, so there are twice as many rounds."""
    hard, easy, cores = [], [], []
    for number in range(2 * rounds):
        seen = []
        for workers in ("1", "2"):
            with proxies.gateway(upstream, directory / f"{number}-{workers}", "--workers", workers) as gateway:
                seen.append((_laborious_per_s(gateway), _small_per_s(gateway)))
        one, two = seen
        hard.append(two[0] / one[0])
        easy.append(two[1] / one[1])
        cores.append(measures.two_cores())
    told = f"{statistics.median(hard):.2f} ×, of {statistics.median(cores):.2f} × that two cores are here"
    table.add(f"two workers, requests of {_MANY_MESSAGES:,} messages as gzip", "≥ 1.8 × one", told)
    table.add("two workers, small requests, load and store beside", "", f"{statistics.median(easy):.2f} ×")


def _laborious_per_s(proxy: Proxy) -> float:
    messages = _MANY_MESSAGES
    return uvloop.run(measures.requests_per_s(proxy, _LABORIOUS, 4 * messages, messages, compressed=True))


def _small_per_s(proxy: Proxy) -> float:
    seen = uvloop.run(measures.requests_per_s(proxy, _REQUESTS))
    uvloop.run(measures.archived(proxy))
    return seen


def _start(table: Table, upstream: str, directory: Path, rounds: int) -> None:
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(proxies.config_of(upstream)))
    took = statistics.median(measures.ready_s(config) for _ in range(rounds))
    table.add("from serve to ready, with an empty embedded store, s", "≤ 1.0", f"{took:.2f}")


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
