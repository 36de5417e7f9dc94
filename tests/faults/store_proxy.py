"""Stands between a gateway and its store, and spoils single calls: the command or its reply is lost, or waits."""

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import hiredis

from gateway.credits.store import SCRIPTS, load_script

#: Where the call is caught: on its way to the store, or on its way back, when the script has run.
Where = Literal["before", "after"]
_NAMES = {load_script(name).sha: name for name in SCRIPTS}
_WAIT_S = 30


@dataclass(eq=False)
class Trap:
    """Catches one call of a script. cut: end the connection then and there; otherwise it waits for ``let_go``."""

    script: str
    where: Where
    cut: bool
    _caught: asyncio.Event = field(default_factory=asyncio.Event)
    _go: asyncio.Event = field(default_factory=asyncio.Event)

    async def caught(self) -> None:
        """Return once the call is here. Raises TimeoutError after half a minute."""
        async with asyncio.timeout(_WAIT_S):
            await self._caught.wait()

    def let_go(self) -> None:
        """Let the call go on, whether or not who made it still lives."""
        self._go.set()

    async def spring(self) -> None:
        """What happens to the call. Raises ConnectionResetError where it is cut."""
        self._caught.set()
        if self.cut:
            raise ConnectionResetError("cut by a test")
        await self._go.wait()


class StoreProxy:
    """Passes every call on to the server behind a unix socket, one at a time for each connection."""

    def __init__(self, server_url: str) -> None:
        self._socket = Path(server_url.removeprefix("unix://"))
        self._traps: list[Trap] = []
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self.url = ""

    def catch(self, script: str, where: Where, *, cut: bool) -> Trap:
        """Catch the next call of the script."""
        trap = Trap(script, where, cut)
        self._traps.append(trap)
        return trap

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shut()

    async def shut(self) -> None:
        """Take no connections any more, and end those that there are."""
        assert self._server is not None
        self._server.close()
        for task in list(self._handlers):
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = None
        try:
            with contextlib.suppress(ConnectionError):
                from_store, there = await asyncio.open_unix_connection(str(self._socket))
                await self._pass_on(reader, writer, from_store, there)
        finally:
            writer.transport.abort()
            if there is not None:
                there.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_store: asyncio.StreamReader,
        to_store: asyncio.StreamWriter,
    ) -> None:
        commands = hiredis.Reader()
        while data := await reader.read(2**16):
            commands.feed(data)
            while (command := commands.gets()) is not False:
                before, after = self._trap(command, "before"), self._trap(command, "after")
                if before:
                    await before.spring()
                to_store.write(hiredis.pack_command(tuple(command)))
                reply = await _reply(from_store)
                if after:
                    await after.spring()
                writer.write(reply)

    def _trap(self, command: list[bytes], where: Where) -> Trap | None:
        name = _script_of(command)
        trap = next((one for one in self._traps if one.script == name and one.where == where), None)
        if trap:
            self._traps.remove(trap)
        return trap


async def _reply(source: asyncio.StreamReader) -> bytes:
    """The bytes of one reply; there is only one on its way."""
    parser, reply = hiredis.Reader(), b""
    while True:
        data = await source.read(2**16)
        if not data:
            raise ConnectionResetError("the store ended the connection")
        reply += data
        parser.feed(data)
        if parser.gets() is not False:
            return reply


def _script_of(command: list[Any]) -> str | None:
    match command[0].upper():
        case b"EVALSHA":
            return _NAMES.get(command[1].decode())
        case b"EVAL":
            return _NAMES.get(hashlib.sha1(command[1]).hexdigest())
    return None
