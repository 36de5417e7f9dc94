"""One store for a module, whose clock the tests move, and a gateway on it that ends what killed ones leave behind."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import NOON
from tests.faults.bench import MODEL, Books, Client, Place, a_client, books_of, place
from tests.faults.upstream import CountingUpstream
from tests.gateway_process import Gateway, gateway_config, running_gateway
from tests.servers import MovableClock, valkey_server


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    """The module's store."""
    with tempfile.TemporaryDirectory(prefix="qg-faults-") as directory:
        clock = MovableClock(Path(directory) / "clock")
        clock.set_to(NOON)
        with valkey_server(clock=clock) as server:
            yield place(server.url, Path(directory), clock)


@pytest.fixture(scope="module")
def survivor(shared: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway on the module's store that nobody asks; like every other it ends reservations whose lease is over."""
    config = gateway_config("http://127.0.0.1:1/v1", [MODEL], plans={"prepaid": {"default": True}})
    config |= {"store": {"url": shared.url}, "archive": {"url": shared.archive}}
    with running_gateway(config, data_dir=tmp_path_factory.mktemp("survivor"), clock=shared.clock) as gateway:
        yield gateway


@pytest.fixture
async def upstream() -> AsyncIterator[CountingUpstream]:
    async with CountingUpstream() as upstream:
        yield upstream


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with a_client() as client:
        yield client


@pytest.fixture
async def books(shared: Place) -> AsyncIterator[Books]:
    async with books_of(shared) as books:
        yield books
