"""A stream's hold: extended ahead of need, again while it is refused, and never less than what was handed out."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from gateway.apis.chat import Chat
from gateway.apis.chat_stream import ChatStream
from gateway.config.model import GatewayConfig
from gateway.credits.errors import StoreUnavailable
from gateway.credits.service import CreditEngine, Identity, Reservation, Seen
from gateway.domain.decision import Funds, Reserved, WindowFunds
from gateway.domain.metered import Images, Metered
from gateway.domain.model import Model
from gateway.domain.plan import Plan
from gateway.domain.price import FEMTO_PER_NANO, Prices, TokenPrices
from gateway.domain.request import Ask, Bound, worst_parts
from gateway.http import holding
from gateway.http.exchange import Exchange
from gateway.http.holding import CreditsEnded, StreamHold, note_of, payable_nano
from gateway.http.quote import Quote
from gateway.upstream.sse import UNLIMITED

#: A nano-credit per token, so that credits and tokens are the same number.
MODEL = Model("m", "up", Prices(TokenPrices(FEMTO_PER_NANO, FEMTO_PER_NANO)), 10_000, 1000, price_version="0a1b2c3d")
INPUT, SLICE, MOST = 50, 100, 1000
WORD = b'data: {"choices": [{"index": 0, "delta": {"content": "w"}}]}\n\n'


@dataclass
class FakeEngine:
    """Grants up to credits in all. broken: it raises as if the store were away. targets: what it was asked for."""

    credits: int
    broken: bool = False
    targets: list[int] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    async def extend(self, reservation: Reservation, target_femto: int, seen: Seen) -> Reservation:
        await asyncio.sleep(0)
        self.targets.append(target_femto // FEMTO_PER_NANO)
        self.seen.append(seen)
        if self.broken:
            raise StoreUnavailable("away")
        held = max(reservation.reserved.payg_nano, min(target_femto // FEMTO_PER_NANO, self.credits))
        reservation.reserved = reservation.reserved._replace(payg_nano=held)
        return reservation


@dataclass
class Stream:
    engine: FakeEngine
    hold: StreamHold
    events: ChatStream

    def say(self, words: int) -> None:
        self.events.feed(WORD * words, self.hold.covered)
        self.hold.follow()

    async def settle_down(self) -> None:
        """Let the extension's task run as far as it goes without waiting."""
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def stream() -> AsyncIterator[Callable[..., Stream]]:
    made: list[Stream] = []

    def make(credits: int, **engine: Any) -> Stream:
        fake = FakeEngine(credits, **engine)
        exchange = Exchange(cast(GatewayConfig, None))
        exchange.identity = Identity("a", "k", "chat")
        exchange.slices = {MODEL.name: SLICE}
        funds = Funds("p", credits, INPUT + SLICE, now_ms=0, sequence=1)
        reserved = Reserved("rsv", INPUT + SLICE, 0, INPUT + SLICE, funds)
        exchange.reservation = Reservation("a", Plan("p"), "m", "k", 0, reserved)
        ask, bound = Ask("chat", "m", 40, stream=True), Bound(INPUT, 1, MOST)
        events = ChatStream(ask, bound)
        quote = Quote(Chat(), ask, MODEL, bound, worst_parts(bound, MODEL), {}, b"")
        hold = StreamHold(cast(CreditEngine, fake), exchange, quote, events)
        made.append(Stream(fake, hold, events))
        return made[-1]

    yield make
    for one in made:
        one.hold.close()
    await asyncio.sleep(0)


async def test_nothing_is_asked_for_while_half_a_slice_is_left(stream: Callable[..., Stream]) -> None:
    one = stream(10_000)
    one.say(SLICE // 2)
    await one.settle_down()
    assert (one.hold.covered, one.engine.targets) == (SLICE, [])


async def test_more_is_asked_for_before_it_is_needed(stream: Callable[..., Stream]) -> None:
    one = stream(10_000)
    one.say(SLICE // 2 + 1)
    await one.settle_down()
    assert one.engine.targets == [INPUT + SLICE // 2 + 1 + SLICE]
    assert one.hold.covered == SLICE // 2 + 1 + SLICE


async def test_what_was_seen_goes_along(stream: Callable[..., Stream]) -> None:
    one = stream(10_000)
    one.say(60)
    await one.settle_down()
    # Input that nobody reported: a quarter of its bytes.
    note = '{"price":"0a1b2c3d","tokens":{"input":10,"output":60},"source":"chat"}'
    assert one.engine.seen == [Seen((10 + 60) * FEMTO_PER_NANO, note)]


async def test_no_more_is_held_than_the_upstream_may_say(stream: Callable[..., Stream]) -> None:
    one = stream(10_000)
    for _ in range(20):
        one.say(50)
        await one.settle_down()
    assert max(one.engine.targets) == INPUT + MOST
    assert one.hold.covered == UNLIMITED


async def test_who_waits_gets_what_is_granted(stream: Callable[..., Stream]) -> None:
    one = stream(10_000)
    one.say(SLICE + 10)
    assert one.events.waiting
    await one.hold.more()
    assert len(one.events.release(one.hold.covered)) == 10 * len(WORD)


async def test_who_waits_in_vain_has_come_to_the_end_of_its_credits(stream: Callable[..., Stream]) -> None:
    one = stream(INPUT + SLICE)
    one.say(SLICE + 1)
    with pytest.raises(CreditsEnded):
        await one.hold.more()
    assert one.events.counted == SLICE


async def test_the_last_credits_are_handed_out_too(stream: Callable[..., Stream]) -> None:
    one = stream(INPUT + SLICE + 7)
    one.say(SLICE + 10)
    await one.hold.more()
    assert len(one.events.release(one.hold.covered)) == 7 * len(WORD)
    with pytest.raises(CreditsEnded):
        await one.hold.more()


async def test_what_others_free_is_taken_without_being_waited_for(
    stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "_PAUSE_FIRST_S", 0)
    monkeypatch.setattr(holding, "_PAUSE_MOST_S", 0)
    one = stream(INPUT + SLICE)
    one.say(SLICE - 1)
    await one.settle_down()
    assert one.hold.covered == SLICE
    one.engine.credits = 10_000
    async with asyncio.timeout(10):
        while one.hold.covered == SLICE:
            await asyncio.sleep(0)


async def test_a_store_that_comes_back_in_time_is_waited_for(
    stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "_PAUSE_FIRST_S", 0.01)
    one = stream(10_000, broken=True)
    one.say(SLICE + 1)
    waiting = asyncio.create_task(one.hold.more())
    await one.settle_down()
    assert not waiting.done()
    one.engine.broken = False
    await waiting
    assert one.hold.covered > SLICE


async def test_a_store_that_stays_away_is_said_so(
    stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "STORE_WAIT_S", 0.3)
    one = stream(10_000, broken=True)
    one.say(SLICE + 1)
    with pytest.raises(StoreUnavailable, match="away"):
        await one.hold.more()
    assert len(one.engine.targets) < 10  # it is not asked all the time


def test_all_credits_of_an_account_count_also_those_that_are_held() -> None:
    windows = (WindowFunds(1, 900, 100, 500, 0), WindowFunds(2, 600, 150, 0, 0))
    funds = Funds("p", balance_nano=30, balance_held_nano=20, now_ms=0, sequence=1, windows=windows)
    assert payable_nano(funds, Plan("p", rate_ppm=900_000)) == 450 * 10 // 9 + 30
    assert payable_nano(funds, Plan("p", payg=False)) == 450
    assert payable_nano(funds._replace(windows=()), Plan("p")) == 30


@pytest.mark.parametrize("asked", ["m", "other"])
@pytest.mark.parametrize(
    "metered",
    [
        Metered(31, 14, requests=1),
        Metered(0, 14, requests=1),
        Metered(31, 0),
        Metered(),
        Metered(31, 14, cache_read=3),
        Metered(31, 14, characters=5),
        Metered(31, 14, images=(Images("1x1", "low", 2),)),
    ],
)
@pytest.mark.parametrize("version", ["0a1b2c3d", '0}"\\{%é'])
def test_a_note_is_the_same_however_it_is_written(asked: str, metered: Metered, version: str) -> None:
    exchange = Exchange(cast(GatewayConfig, None), identity=Identity("a", "k", "chat"), ask=Ask("chat", asked, 0))
    expected: dict[str, Any] = {"price": version, "tokens": metered.figures(), "source": "chat"}
    if asked != "m":
        expected["answered_by"] = "m"
    note = note_of(exchange, replace(MODEL, price_version=version), metered)
    assert note == json.dumps(expected, separators=(",", ":"), ensure_ascii=False)
