"""Fixtures that several parts of the suite share: a real store whose clock the test moves, and the engine on it."""

import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings

from gateway.credits import scripts
from gateway.credits.journal import Journal
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine
from gateway.credits.store import Store
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.telemetry.metrics import Metrics
from tests.servers import MovableClock, ValkeyServer, valkey_server
from tests.stores import started_store

#: Where the store's clock stands when a test begins: in the middle of a day, of a month and of an 8-hour window.
START_MS = round(datetime(2027, 3, 10, 12, 30, tzinfo=UTC).timestamp() * 1000)

PLANS = {
    plan.name: plan
    for plan in (
        Plan("standard", (Allowance("per_window", 100_000_000, DAY_MS),)),
        Plan("professional", (Allowance("monthly", 15_000_000_000, DAY_MS),)),
        Plan("developer", (Allowance("monthly", 150_000_000_000, DAY_MS // 3),), rate_ppm=900_000),
        Plan("payg"),
    )
}

# How long an example takes says nothing about it on a busy machine; and no failure may depend on earlier runs.
settings.register_profile("suite", deadline=None, database=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long ones out unless ``-m`` was given."""
    if config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m long"))


@dataclass(frozen=True)
class TimedServer:
    """A Valkey server and the clock that it follows."""

    server: ValkeyServer
    clock: MovableClock

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="session")
def session_valkey() -> Iterator[TimedServer]:
    with tempfile.TemporaryDirectory(prefix="qg-clock-") as directory:
        clock = MovableClock(Path(directory) / "clock")
        with valkey_server(clock=clock) as server:
            yield TimedServer(server, clock)


@pytest.fixture
def valkey(session_valkey: TimedServer, monkeypatch: pytest.MonkeyPatch) -> TimedServer:
    """The session's server, empty, its clock standing at START_MS and the engine's own clock showing the same."""
    session_valkey.clock.freeze_at(START_MS)
    session_valkey.server.command("FLUSHALL")
    monkeypatch.setattr(scripts, "gateway_ms", session_valkey.clock.now_ms)
    return session_valkey


@pytest.fixture
def clock(valkey: TimedServer) -> MovableClock:
    return valkey.clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(PLANS, ["model"])


@pytest.fixture
async def store(valkey: TimedServer, metrics: Metrics) -> AsyncIterator[Store]:
    async with started_store(valkey.url, metrics) as store:
        yield store


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(tmp_path / "journal")
    await journal.open()
    yield journal
    await journal.close()


@pytest.fixture
def plans() -> Mapping[str, Plan]:
    """The engine's plans, the default one first. A module with plans of its own has a fixture of this name."""
    return PLANS


@pytest.fixture
async def engine(
    store: Store, plans: Mapping[str, Plan], metrics: Metrics, journal: Journal
) -> AsyncIterator[CreditEngine]:
    engine = CreditEngine(store, plans, next(iter(plans)), metrics, journal)
    yield engine
    assert await engine.close(5) == 0


@pytest.fixture
def operator(store: Store, plans: Mapping[str, Plan]) -> Operator:
    return Operator(store, plans, next(iter(plans)))
