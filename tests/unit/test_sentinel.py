"""Which node is taken for the primary, of what sentinels answer one after the other."""

from types import SimpleNamespace

import pytest

from gateway.credits import sentinel
from gateway.credits.addresses import Address, StoreUrl, read_url
from gateway.credits.sentinel import SentinelLocator
from gateway.credits.topology import Opener

OLD, NEW = Address("old", 1), Address("new", 1)


class Sentinels:
    """Answer as they are told to, at the time that they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epoch, self.primary, self.now = 7, OLD, 1000.0
        monkeypatch.setattr(sentinel, "_ask_most", self._ask_most)
        monkeypatch.setattr(sentinel, "time", SimpleNamespace(monotonic=lambda: self.now), raising=False)

    async def _ask_most(self, url: StoreUrl, timeout_ms: int) -> sentinel._Answer:
        return sentinel._Answer(self.epoch, self.primary)

    def say(self, epoch: int, primary: Address) -> None:
        self.epoch, self.primary = epoch, primary


async def opened(sentinels: Sentinels) -> SentinelLocator:
    locator = SentinelLocator(read_url("redis+sentinel://a:1/credits"), 1000, Opener(1000, "standalone", []))
    locator._newest = await locator._ask()  # as ``open`` does, which would connect
    return locator


async def test_what_is_older_counts_once_nobody_has_said_what_is_newer_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sentinels that were set up anew count from the beginning, while the node that they replace may still be there."""
    locator = await opened(sentinels := Sentinels(monkeypatch))
    sentinels.say(1, NEW)
    assert not await locator.replaced()
    sentinels.now += 59
    assert not await locator.replaced()
    sentinels.now += 2
    assert await locator.replaced()
    assert not await locator.replaced()
    assert await locator._ask() == (1, NEW)


async def test_as_long_as_one_says_what_is_newer_the_others_are_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    locator = await opened(sentinels := Sentinels(monkeypatch))
    for _ in range(5):
        sentinels.now += 50
        sentinels.say(1, NEW)
        assert not await locator.replaced()
        sentinels.say(7, OLD)
        assert not await locator.replaced()
