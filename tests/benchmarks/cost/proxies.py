"""The proxies that are compared, each as a process of its own in front of the same model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.credits.embedded import running_url
from tests.benchmarks.cost.load import Target
from tests.gateway_process import gateway_config, running_gateway
from tests.upstreams.process import server_process

#: No request of a run is ever short of credits.
_PLANS = {
    "standard": {"default": True, "allowance": {"per_window": "100000", "refresh": "24h"}, "payg": True},
}


@dataclass(frozen=True)
class Proxy:
    """A running proxy. pids: its own processes, without a store's."""

    name: str
    target: Target
    pids: tuple[int, ...]
    store_pid: int | None = None
    store_url: str = ""
    admin_url: str = ""

    @property
    def cpu_s(self) -> float:
        """CPU that its processes have used so far, user and system, s."""
        return sum(map(cpu_s, self.pids))

    @property
    def store_cpu_s(self) -> float:
        """The same of a gateway's embedded store."""
        return cpu_s(self.store_pid) if self.store_pid else 0.0


def cpu_s(pid: int) -> float:
    """CPU that a process has used so far, user and system, s; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def config_of(upstream: str) -> dict[str, Any]:
    """The gateway's configuration: as a newcomer's, with one model."""
    config = gateway_config(upstream, ["bench"], plans=_PLANS, context_window=400_000)
    config["upstreams"]["test"]["api_key"] = "sk-upstream"
    return config


@contextmanager
def gateway(upstream: str, directory: Path, *options: str) -> Iterator[Proxy]:
    """The gateway with everything on, and its embedded store in directory."""
    with running_gateway(config_of(upstream), data_dir=directory, options=options) as running:
        assert running.key is not None
        children = children_of(running.pid)
        store = next(pid for pid in children if "valkey" in Path(f"/proc/{pid}/comm").read_text())
        url = running_url(directory)
        assert url is not None
        pids = (running.pid, *(pid for pid in children if pid != store))
        yield Proxy("gateway", Target(running.base_url, running.key), pids, store, url, running.admin_url)


@contextmanager
def passthrough(upstream: str, *loop: str) -> Iterator[Proxy]:
    """The yardstick. loop: ``uvloop``, or none for the standard library's."""
    with server_process("tests.benchmarks.cost.passthrough", upstream, *loop) as process:
        yield Proxy("passthrough", Target(process.base_url), (process.pid,))


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
