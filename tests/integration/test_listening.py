"""Sockets on which several processes listen at one address."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gateway.config.model import Address
from gateway.listening import ListenError, shared_sockets, stop_listening


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def seats_of(stack: ExitStack, address: Address, processes: int) -> tuple[Address, list[list[socket.socket]]]:
    got, seats = shared_sockets(address, processes, "listen")
    for sock in (sock for seat in seats for sock in seat):
        stack.enter_context(sock)
    return got, seats


def accepted(seat: list[socket.socket]) -> int:
    """How many connections wait at a process's sockets, which are taken."""
    count = 0
    for sock in seat:
        sock.setblocking(False)
        while True:
            try:
                sock.accept()[0].close()
            except OSError:
                break
            count += 1
    return count


def listen(seat: list[socket.socket]) -> None:
    for sock in seat:
        sock.listen(128)


def connect(stack: ExitStack, address: Address, count: int) -> None:
    for _ in range(count):
        stack.enter_context(socket.create_connection((address.host, address.port)))


def test_each_process_gets_its_share_and_none_while_it_does_not_listen(stack: ExitStack) -> None:
    address, seats = seats_of(stack, Address("127.0.0.1", 0), 2)
    for seat in seats:
        listen(seat)
    connect(stack, address, 64)
    shares = [accepted(seat) for seat in seats]
    assert sum(shares) == 64
    assert min(shares) > 8  # 32 ± 4

    stop_listening(seats[1][0])
    connect(stack, address, 64)
    assert [accepted(seat) for seat in seats] == [64, 0]

    listen(seats[1])
    connect(stack, address, 64)
    assert min(accepted(seat) for seat in seats) > 8


def test_a_name_of_several_addresses_has_one_port_on_all_of_them(stack: ExitStack) -> None:
    hosts = {entry[4][0] for entry in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    address, seats = seats_of(stack, Address("localhost", 0), 3)
    for seat in seats:
        assert {sock.getsockname()[0] for sock in seat} == hosts
        assert {sock.getsockname()[1] for sock in seat} == {address.port}


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_another_gateway_has_is_refused(stack: ExitStack, shared: bool) -> None:
    if shared:
        address, seats = seats_of(stack, Address("127.0.0.1", 0), 2)
        listen(seats[0])
    else:
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = Address("127.0.0.1", other.getsockname()[1])
    with pytest.raises(ListenError, match=rf"cannot listen on {address}: .* --listen or as listen"):
        shared_sockets(address, 2, "listen")
