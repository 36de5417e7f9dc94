"""Events that need only be counted go to the client as they arrive, past the answer's reader; nothing else does."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.apis.chat_stream import ChatStream
from gateway.domain.request import Ask, Bound
from gateway.http import relay
from gateway.http.holding import StreamHold
from gateway.http.relay import _Stream
from gateway.http.writing import KEEPS_UP_BYTES
from gateway.upstream.answer import UpstreamAnswer
from gateway.upstream.errors import UpstreamUnavailable


class Line:
    def resume(self) -> None:
        pass

    def drop(self) -> None:
        pass


@pytest.fixture
async def answer() -> UpstreamAnswer:
    loop = asyncio.get_running_loop()
    one = UpstreamAnswer(loop, Line(), 10.0, loop.time() + 10.0)
    one.begin(200, {})
    return one


async def test_the_reader_is_not_woken_for_what_is_taken(answer: UpstreamAnswer) -> None:
    taken: list[bytes] = []

    def taker(block: bytes) -> bool:
        if block != b"c":
            taken.append(block)
        return block != b"c"

    reading = asyncio.ensure_future(answer.read(taker))
    await asyncio.sleep(0)
    assert answer.take(b"a")
    assert answer.take(b"b")
    await asyncio.sleep(0)
    assert not reading.done()
    assert answer.take(b"c")
    assert answer.take(b"d")  # behind what waits to be read: not for the taker
    assert await reading == b"cd"
    assert taken == [b"a", b"b"]


async def test_nothing_is_taken_while_nobody_reads(answer: UpstreamAnswer) -> None:
    taken: list[bytes] = []
    reading = asyncio.ensure_future(answer.read(lambda block: not taken.append(block)))
    await asyncio.sleep(0)
    answer.take(b"a")
    reading.cancel()
    answer.take(b"b")
    await asyncio.gather(reading, return_exceptions=True)
    answer.take(b"c")
    assert taken == [b"a"]
    assert await answer.read() == b"bc"


async def test_an_answer_that_ends_wakes_its_reader(answer: UpstreamAnswer) -> None:
    reading = asyncio.ensure_future(answer.read(lambda block: True))
    await asyncio.sleep(0)
    answer.take(b"a")
    answer.end(UpstreamUnavailable("it broke"))
    with pytest.raises(UpstreamUnavailable, match="it broke"):
        await reading


class Client:
    """A client's transport that notes what is written to it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unsent = 0
        self.closing = False

    def write(self, block: bytes) -> None:
        self.written.append(block)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing


WORD = b'data: {"choices": [{"index": 0, "delta": {"content": "word"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(WORD), WORD)
#: Covered are ten tokens, and more is asked for once six are counted.
COVERED, ENOUGH = 10, 6


def stream_to(client: Client) -> tuple[ChatStream, Any]:
    events = ChatStream(Ask("chat", "m", 40, stream=True), Bound(10, 1, 100))
    events.feed(WORD)
    request = SimpleNamespace(transport=client, writer=SimpleNamespace(chunked=True))
    stream = SimpleNamespace(events=events, request=request, response=SimpleNamespace(prepared=True))
    hold = SimpleNamespace(covered=COVERED, enough_until=ENOUGH)
    return events, relay._at_once(cast(_Stream, stream), cast(StreamHold, hold))


def test_events_go_out_until_more_must_be_held() -> None:
    client = Client()
    events, take = stream_to(client)
    assert [take(WORD) for _ in range(7)] == [True] * (ENOUGH - 1) + [False] * 2
    assert client.written == [CHUNK] * (ENOUGH - 1)
    assert events.counted == ENOUGH


def test_many_go_out_as_one_chunk() -> None:
    client = Client()
    events, take = stream_to(client)
    assert take(WORD * 5)
    assert client.written == [b"%x\r\n%b\r\n" % (5 * len(WORD), 5 * WORD)]
    assert events.counted == ENOUGH


@pytest.mark.parametrize("state", [{"closing": True}, {"unsent": KEEPS_UP_BYTES - len(WORD) + 1}])
def test_a_client_that_does_not_keep_up_or_is_gone_is_waited_for(state: dict[str, Any]) -> None:
    client = Client()
    events, take = stream_to(client)
    vars(client).update(state)
    assert not take(WORD)
    assert (client.written, events.counted) == ([], 1)


@pytest.mark.parametrize(("prepared", "chunked"), [(False, True), (True, False)])
def test_an_answer_that_has_not_begun_or_has_no_chunks_is_written_otherwise(prepared: bool, chunked: bool) -> None:
    events = ChatStream(Ask("chat", "m", 40, stream=True), Bound(10, 1, 100))
    request = SimpleNamespace(transport=Client(), writer=SimpleNamespace(chunked=chunked))
    stream = SimpleNamespace(events=events, request=request, response=SimpleNamespace(prepared=prepared))
    hold = SimpleNamespace(covered=COVERED, enough_until=ENOUGH)
    assert relay._at_once(cast(_Stream, stream), cast(StreamHold, hold)) is None
