"""What a store holds does not grow with what it has done, but with what it did in the last 24 hours."""

import pytest

from tests.benchmarks.growth import measure

REQUESTS, ACCOUNTS, CONNECTIONS = 50_000, 1000, 4
#: Of the store's memory, with 30 % to spare: for each request of the last 24 h, and for each account that stays.
MOST_RECORD_BYTES, MOST_ACCOUNT_BYTES = 256, 1200


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_store_keeps_little_of_a_request_and_nothing_after_a_day() -> None:
    said: list[str] = []
    sizes = await measure(REQUESTS, ACCOUNTS, CONNECTIONS, said.append)
    print("\n".join(said))
    assert (sizes.archived - sizes.accounts) / REQUESTS <= MOST_RECORD_BYTES
    assert (sizes.forgotten - sizes.empty) / ACCOUNTS <= MOST_ACCOUNT_BYTES
