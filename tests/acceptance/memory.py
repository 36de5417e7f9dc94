"""The memory that a running gateway has, as the kernel counts it."""

from pathlib import Path

from tests.gateway_process import Gateway


def peak_bytes(gateway: Gateway) -> int:
    """The most that the process has had since the last ``forget_peak``."""
    return _memory_of(gateway, "VmHWM")


def forget_peak(gateway: Gateway) -> int:
    """Begin to watch for the most; what the process has now."""
    Path(f"/proc/{gateway.pid}/clear_refs").write_text("5")
    return _memory_of(gateway, "VmRSS")


def _memory_of(gateway: Gateway, name: str) -> int:
    lines = Path(f"/proc/{gateway.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
