"""The pipelined connection, against real Valkey servers and against servers that misbehave."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from gateway.credits import connection as connection_module
from gateway.credits.connection import Connection, connect
from gateway.credits.errors import ReplyLost, StoreRefused, StoreUnavailable
from tests.conftest import TimedServer
from tests.servers import ValkeyServer, free_port, valkey_server

PASSWORD = "correct horse"
TIMEOUT_MS = 20_000


@pytest.fixture
async def connection(valkey: TimedServer) -> AsyncIterator[Connection]:
    connection = await connect(valkey.url, TIMEOUT_MS)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def locked_server() -> Iterator[tuple[ValkeyServer, int]]:
    """A server on a TCP port that wants a password."""
    port = free_port()
    with valkey_server(port=port, password=PASSWORD) as server:
        yield server, port


React = Callable[[asyncio.Transport, bytes], None]


class _Scripted(asyncio.Protocol):
    def __init__(self, react: React, opened: list[asyncio.Transport]) -> None:
        self._react = react
        self._opened = opened

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._opened.append(transport)

    def data_received(self, data: bytes) -> None:
        self._react(self._transport, data)


@asynccontextmanager
async def scripted_server(react: React) -> AsyncIterator[str]:
    """A server that does as react says with what it receives; its redis:// URL."""
    opened: list[asyncio.Transport] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Scripted(react, opened), "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for transport in opened:
            transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)


def _silent(_transport: asyncio.Transport, _data: bytes) -> None:
    """Take everything and answer nothing."""


# --- a real server --------------------------------------------------------------------------------------------------


async def test_concurrent_commands_get_their_own_replies(connection: Connection) -> None:
    async def echo(i: int) -> bytes:
        await asyncio.sleep(0.001 * (i % 7))
        reply: bytes = await connection.send("ECHO", f"text {i}")
        return reply

    assert await asyncio.gather(*(echo(i) for i in range(5000))) == [f"text {i}".encode() for i in range(5000)]


async def test_commands_of_the_same_moment_are_written_together() -> None:
    """The event loop writes each piece that it is given at once: 20 µs of the system's for every command."""
    reads: list[bytes] = []

    def react(transport: asyncio.Transport, data: bytes) -> None:
        reads.append(data)
        transport.write(b"+PONG\r\n" * data.count(b"PING"))

    async with scripted_server(react) as url:
        connection = await connect(url, TIMEOUT_MS)
        assert await asyncio.gather(*(connection.send("PING") for _ in range(50))) == [b"PONG"] * 50
        connection.close()
    assert [data.count(b"PING") for data in reads] == [50]


async def test_every_kind_of_reply(connection: Connection) -> None:
    assert await connection.send("SET", b"\x00\xff key", "v\r\n$-1\r\n") == b"OK"
    assert await connection.send("GET", b"\x00\xff key") == b"v\r\n$-1\r\n"
    assert await connection.send("GET", "nothing here") is None
    assert await connection.send("INCRBY", "number", 2**62) == 2**62
    assert await connection.send("EVAL", "return {1, 'two', {3, {}}, false}", 0) == [1, b"two", [3, []], None]


async def test_values_of_many_megabytes(connection: Connection) -> None:
    value = bytes(range(256)) * 65_536
    small = connection.send("ECHO", "before")
    await connection.send("SET", "big", value)
    assert await small == b"before"
    big, after = await asyncio.gather(connection.send("GET", "big"), connection.send("ECHO", "after"))
    assert big == value
    assert after == b"after"


async def test_an_error_reply_fails_its_own_command_only(connection: Connection) -> None:
    await connection.send("SET", "text", "x")
    before, error, after = await asyncio.gather(
        connection.send("ECHO", "before"),
        connection.send("INCR", "text"),
        connection.send("ECHO", "after"),
        return_exceptions=True,
    )
    assert (before, after) == (b"before", b"after")
    assert isinstance(error, StoreRefused)
    assert str(error).startswith("ERR value is not an integer")


async def test_cancelled_callers_do_not_shift_the_replies_of_others(connection: Connection) -> None:
    async def call(i: int) -> bytes:
        reply: bytes = await connection.send("ECHO", str(i))
        return reply

    tasks = [asyncio.create_task(call(i)) for i in range(900)]
    await asyncio.sleep(0)  # they have sent, or are about to
    for task in tasks[::3]:
        task.cancel()
    tasks += [asyncio.create_task(call(i)) for i in range(900, 1000)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = {i: result for i, result in enumerate(results) if not isinstance(result, BaseException)}
    assert len(kept) == 700
    assert kept == {i: str(i).encode() for i in kept}


async def test_cancelling_a_caller_does_not_recall_its_command(connection: Connection) -> None:
    future = connection.send("INCR", "counter")
    future.cancel()
    assert await connection.send("GET", "counter") == b"1"


async def test_a_server_that_is_killed_fails_what_waits_for_it() -> None:
    with valkey_server() as server:
        connection = await connect(server.url, TIMEOUT_MS)
        server.pause()
        waiting = [connection.send("PING") for _ in range(3)]
        await asyncio.sleep(0.01)
        server.kill()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [ReplyLost] * 3
        await connection.lost.wait()
        with pytest.raises(StoreUnavailable):
            connection.send("PING")


# --- logging in -----------------------------------------------------------------------------------------------------


async def test_a_password_in_a_tcp_url(locked_server: tuple[ValkeyServer, int]) -> None:
    _, port = locked_server
    connection = await connect(f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}", TIMEOUT_MS)
    assert await connection.send("PING") == b"PONG"
    connection.close()


async def test_a_password_in_a_unix_url(locked_server: tuple[ValkeyServer, int]) -> None:
    server, _ = locked_server
    connection = await connect(f"{server.url}?password={PASSWORD.replace(' ', '+')}", TIMEOUT_MS)
    assert await connection.send("PING") == b"PONG"
    connection.close()


async def test_a_user_and_a_password(locked_server: tuple[ValkeyServer, int]) -> None:
    server, port = locked_server
    server.command("ACL", "SETUSER", "gateway", "on", ">s3cret", "~*", "+@all", password=PASSWORD)
    connection = await connect(f"redis://gateway:s3cret@127.0.0.1:{port}", TIMEOUT_MS)
    assert await connection.send("ACL", "WHOAMI") == b"gateway"
    connection.close()


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:s3cret@"])
async def test_without_the_right_password_nothing_works(locked_server: tuple[ValkeyServer, int], login: str) -> None:
    _, port = locked_server
    with pytest.raises(StoreRefused, match=r"NOAUTH|WRONGPASS"):
        connection = await connect(f"redis://{login}127.0.0.1:{port}", TIMEOUT_MS)
        try:
            await connection.send("PING")
        finally:
            connection.close()


async def test_the_database_of_the_url_is_selected(valkey: TimedServer) -> None:
    third = await connect(f"{valkey.url}?db=3", TIMEOUT_MS)
    first = await connect(valkey.url, TIMEOUT_MS)
    await third.send("SET", "here", "1")
    assert await first.send("GET", "here") is None
    await first.send("SELECT", 3)
    assert await first.send("GET", "here") == b"1"
    third.close()
    first.close()


async def test_a_database_that_is_not_there_is_refused(valkey: TimedServer) -> None:
    with pytest.raises(StoreRefused, match="DB index is out of range"):
        await connect(f"{valkey.url}?db=99", TIMEOUT_MS)


# --- servers that misbehave -----------------------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    with pytest.raises(StoreUnavailable, match="cannot reach the store"):
        await connect(f"redis://127.0.0.1:{free_port()}", TIMEOUT_MS)
    with pytest.raises(StoreUnavailable, match="cannot reach the store"):
        await connect("unix:///nowhere/socket", TIMEOUT_MS)


async def test_replies_that_arrive_byte_by_byte() -> None:
    def react(transport: asyncio.Transport, _data: bytes) -> None:
        loop = asyncio.get_running_loop()
        for i, byte in enumerate(b"*2\r\n$5\r\nhello\r\n:7\r\n+OK\r\n"):
            loop.call_later(0.001 * i, transport.write, bytes([byte]))

    async with scripted_server(react) as url:
        connection = await connect(url, TIMEOUT_MS)
        first, second = await asyncio.gather(connection.send("A"), connection.send("B"))
        assert (first, second) == ([b"hello", 7], b"OK")
        connection.close()


async def test_a_server_that_closes_after_the_first_reply() -> None:
    def react(transport: asyncio.Transport, _data: bytes) -> None:
        transport.write(b"+first\r\n$100\r\nonly a part of the second")
        transport.close()

    async with scripted_server(react) as url:
        connection = await connect(url, TIMEOUT_MS)
        first, second, third = await asyncio.gather(
            *(connection.send("GET", str(i)) for i in range(3)), return_exceptions=True
        )
        assert first == b"first"
        assert isinstance(second, ReplyLost)
        assert isinstance(third, ReplyLost)
        assert connection.lost.is_set()


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x01\x02\x00", b"*-7\r\n", b"$x\r\n"]
)
async def test_garbage_ends_the_connection(garbage: bytes) -> None:
    async with scripted_server(lambda transport, _: transport.write(garbage)) as url:
        connection = await connect(url, TIMEOUT_MS)
        with pytest.raises(ReplyLost):
            await connection.send("GET", "x")
        assert connection.lost.is_set()


async def test_a_reply_that_nobody_asked_for_ends_the_connection() -> None:
    """Whose the next reply were could not be known."""
    async with scripted_server(lambda transport, _: transport.write(b"+one\r\n+two\r\n")) as url:
        connection = await connect(url, TIMEOUT_MS)
        assert await connection.send("GET", "x") == b"one"
        await connection.lost.wait()
        with pytest.raises(StoreUnavailable):
            connection.send("GET", "y")


async def test_a_silent_server_is_given_up_on() -> None:
    async with scripted_server(_silent) as url:
        connection = await connect(url, 50)
        errors = await asyncio.gather(*(connection.send("PING") for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [ReplyLost] * 3
        with pytest.raises(StoreUnavailable):
            connection.send("PING")


async def test_a_server_that_answers_the_first_and_not_the_second_is_given_up_on() -> None:
    replies = iter([b"+one\r\n"])
    async with scripted_server(lambda transport, _: transport.write(next(replies, b""))) as url:
        connection = await connect(url, 100)
        assert await connection.send("GET", "x") == b"one"
        with pytest.raises(ReplyLost):
            await connection.send("GET", "y")


async def test_a_server_that_answers_everything_too_late_is_given_up_on() -> None:
    """That each of its replies is only a little later than the one before does not help it."""
    loop = asyncio.get_running_loop()

    def react(transport: asyncio.Transport, data: bytes) -> None:
        for number in range(data.count(b"PING")):
            loop.call_later(0.01 * number, transport.write, b"+PONG\r\n")

    async with scripted_server(react) as url:
        connection = await connect(url, 200)
        replies = await asyncio.gather(*(connection.send("PING") for _ in range(1000)), return_exceptions=True)
    assert replies[0] == b"PONG"
    assert isinstance(replies[-1], ReplyLost)


async def test_a_server_that_never_answers_the_login() -> None:
    async with scripted_server(_silent) as url:
        with pytest.raises(StoreUnavailable):
            await connect(f"{url.replace('//', '//:secret@')}", 50)
        await asyncio.sleep(0.1)  # the half-made connection gives up as well


async def test_closing_fails_what_waits() -> None:
    async with scripted_server(_silent) as url:
        connection = await connect(url, TIMEOUT_MS)
        waiting = connection.send("PING")
        connection.close()
        with pytest.raises(ReplyLost, match="was closed"):
            await waiting
        connection.close()


async def test_no_more_than_so_many_wait_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_PENDING", 3)
    async with scripted_server(_silent) as url:
        connection = await connect(url, TIMEOUT_MS)
        waiting = [connection.send("PING") for _ in range(3)]
        with pytest.raises(StoreUnavailable, match="does not answer"):
            connection.send("PING")
        connection.close()
        assert {type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)} == {ReplyLost}
