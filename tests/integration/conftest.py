"""Fixtures of the engine's tests."""

from collections.abc import Iterator

import pytest

from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Identity
from tests.engine_calls import ACCOUNT, new_identity
from tests.servers import ValkeyServer, valkey_server


@pytest.fixture
async def acme(operator: Operator, engine: CreditEngine) -> Identity:
    """On the standard plan: 0.1 credits a day, then prepaid ones."""
    return await new_identity(operator, engine, ACCOUNT, "standard")


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that the test may kill and pause, with every reply's write on disk."""
    with valkey_server("--appendfsync", "always") as server:
        yield server
