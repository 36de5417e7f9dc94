"""Fixtures of the engine's tests."""

from collections.abc import AsyncIterator, Iterator, Mapping

import pytest

from gateway.credits.journal import Journal
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Identity
from gateway.credits.store import Store
from gateway.domain.plan import Plan
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS
from tests.engine_calls import ACCOUNT, new_identity
from tests.servers import ValkeyServer, valkey_server
from tests.stores import started_store


@pytest.fixture
async def acme(operator: Operator, engine: CreditEngine, plans: Mapping[str, Plan]) -> Identity:
    """On the default plan: 0.1 credits a day, then prepaid ones, unless the module has plans of its own."""
    return await new_identity(operator, engine, ACCOUNT, next(iter(plans)))


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that the test may kill and pause, with every reply's write on disk."""
    with valkey_server("--appendfsync", "always") as server:
        yield server


@pytest.fixture
async def own_store(own_server: ValkeyServer, metrics: Metrics) -> AsyncIterator[Store]:
    """Soon tired of waiting."""
    async with started_store(own_server.url, metrics, 500) as store:
        yield store


@pytest.fixture
async def own_engine(own_store: Store, metrics: Metrics, journal: Journal) -> AsyncIterator[CreditEngine]:
    engine = CreditEngine(own_store, PLANS, "standard", metrics, journal)
    yield engine
    assert await engine.close(30) == 0


@pytest.fixture
def own_operator(own_store: Store) -> Operator:
    return Operator(own_store, PLANS, "standard")


@pytest.fixture
async def own_acme(own_operator: Operator, own_engine: CreditEngine) -> Identity:
    """Like ``acme``, in the store that the test may kill."""
    return await new_identity(own_operator, own_engine, ACCOUNT, "standard")
