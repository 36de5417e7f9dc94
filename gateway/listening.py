"""Opens listeners: one of a process's own, or sockets for several processes on one address."""

import socket
import sys
from contextlib import AsyncExitStack, suppress
from typing import Any

from aiohttp import web

from gateway.config.model import Address

#: Connections that may wait to be accepted, as aiohttp has it.
BACKLOG = 128

#: Whether sockets that share a port get connections by turns.
_OWN_SOCKETS = sys.platform == "linux"


class ListenError(Exception):
    """A listener's address cannot be had; the text names the address, the cause and the setting."""

    def __init__(self, address: Address, setting: str, error: OSError) -> None:
        cause = (error.strerror or str(error)).rpartition(": ")[2]
        option = "--" + setting.replace(".", "-")
        super().__init__(f"cannot listen on {address}: {cause}; choose another address with {option} or as {setting}")


async def listen(stack: AsyncExitStack, runner: web.BaseRunner, address: Address, setting: str) -> Address:
    """Open a listener until the stack ends; the address with the port that it got. Raises ListenError."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, address.host, address.port).start()
    except OSError as error:
        raise ListenError(address, setting, error) from error
    return Address(address.host, runner.addresses[0][1])


def shared_sockets(address: Address, processes: int, setting: str) -> tuple[Address, list[list[socket.socket]]]:
    """The address with the port that it got, and for each process the sockets to listen on, bound but not listening.

    On Linux each process has sockets of its own, and the kernel gives a connection to one of them by a hash of its
    addresses: of 64 connections to two, 32 ± 4 go to either. Of processes that accept from one socket, the first to
    wake would take all that wait. Elsewhere, where such sockets get no even share, it is one socket all the same.
    Raises ListenError.
    """
    seats: list[list[socket.socket]] = [[] for _ in range(processes)]
    port = address.port
    try:
        found = socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, where in found:
            row = _one_each(family, (where[0], port, *where[2:]), processes)
            port = row[0].getsockname()[1]
            for seat, sock in zip(seats, row, strict=True):
                seat.append(sock)
    except OSError as error:
        raise ListenError(address, setting, error) from error
    return Address(address.host, port), seats


def _one_each(family: int, where: tuple[Any, ...], processes: int) -> list[socket.socket]:
    if not _OWN_SOCKETS:
        return [_bound(family, where, shared=False)] * processes
    if where[1]:
        # Sockets that share a port would also share it with another gateway of the same user, unnoticed.
        _bound(family, where, shared=False).close()
    first = _bound(family, where, shared=True)
    return [first, *(_bound(family, first.getsockname(), shared=True) for _ in range(processes - 1))]


def _bound(family: int, where: tuple[Any, ...], *, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
    except BaseException:
        sock.close()
        raise
    return sock


def stop_listening(sock: socket.socket) -> None:
    """Have the kernel give connections to the sockets of the other processes, until a process listens on this one
    again."""
    if _OWN_SOCKETS:
        with suppress(OSError):  # it does not listen
            sock.shutdown(socket.SHUT_RD)
