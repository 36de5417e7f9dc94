"""Start the real gateway (``python -m gateway serve``) for a test, and end it by its pid."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import patch

import yaml

from gateway.cli import main
from gateway.credits import scripts
from tests.servers import MovableClock

#: Prices in USD per million tokens that no binary fraction and no whole number of nano-credits can hold.
INPUT_PRICE, OUTPUT_PRICE, CACHE_READ_PRICE = Decimal("0.0305"), Decimal("0.7777"), Decimal("0.01")

_START_SECONDS = 60
_CLI_SECONDS = 60
#: A little more than the gateway's own limits for draining and settling together.
_STOP_SECONDS = 35
_REPOSITORY = Path(__file__).parents[1]
_NANO = Decimal("0.000000001")
#: Characters of a gateway's log.
_LOG_SHOWN = 20_000


@dataclass(frozen=True)
class Gateway:
    """A running gateway.

    base_url: ends in /v1. admin_url: ends in the port. key: the secret that the start printed, None where it printed
    none because the data directory was not empty. directory: where its config.yaml, stdout and stderr are.
    """

    base_url: str
    admin_url: str
    key: str | None
    process: subprocess.Popen[bytes]
    directory: Path
    config: Path
    data_dir: Path
    environment: Mapping[str, str]
    clock: MovableClock | None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        """What it printed so far."""
        return (self.directory / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it logged so far."""
        return (self.directory / "stderr").read_text(errors="replace")

    def cli(self, *arguments: str) -> Any:
        """The parsed output of the verb with ``--json`` on the same configuration and store; also when the gateway has
        ended. Raises RuntimeError with its stderr unless it exits with 0."""
        command = [*arguments, "--data-dir", str(self.data_dir), "--json"]
        # Here is much quicker than in a process of its own. But on an ended gateway's directory a verb starts a store,
        # which must follow the clock.
        if self.process.poll() is None:
            now_ms = self.clock.now_ms if self.clock else scripts.gateway_ms
            with patch.object(scripts, "gateway_ms", now_ms):
                ended = _run_here(self.config, *command, environment=self.environment)
        else:
            ended = run_cli(self.config, *command, environment=self.environment)
        if ended.returncode:
            raise RuntimeError(f"{arguments} exited with {ended.returncode}: {ended.stdout}{ended.stderr}")
        return json.loads(ended.stdout)

    def kill(self) -> None:
        """End it as a crash would, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended. Raises TimeoutExpired after a little more than its own limits."""
        return self.process.wait(_STOP_SECONDS)


def gateway_config(
    upstream: str, models: Iterable[str], *, plans: Mapping[str, Any] | None = None, **model_settings: Any
) -> dict[str, Any]:
    """A configuration with one upstream at the base URL, its models at the prices above, and the three usual plans
    unless others are given. model_settings: added to each model, or replacing what it has."""
    model: dict[str, Any] = {
        "upstream": "test",
        "input_token_price": str(INPUT_PRICE),
        "output_token_price": str(OUTPUT_PRICE),
        "cache_read_token_price": str(CACHE_READ_PRICE),
        "context_window": 4096,
        "max_output_tokens": 2048,
        **model_settings,
    }
    usual = {
        "standard": {"default": True, "allowance": {"per_window": "0.10", "refresh": "24h"}},
        "professional": {"allowance": {"monthly": 15, "refresh": "24h"}},
        "developer": {"allowance": {"monthly": 150, "refresh": "8h"}, "rate": "0.9"},
    }
    return {
        "upstreams": {"test": {"base_url": upstream}},
        "plans": dict(plans) if plans is not None else usual,
        "models": {"price_unit": "usd_per_million_tokens", "models": {name: dict(model) for name in models}},
    }


def cost_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, rate: Decimal | str = "1") -> Decimal:
    """Credits for a use at the prices above, computed apart from the gateway: exact, then rounded up once."""
    exact = (
        (prompt_tokens - cached_tokens) * INPUT_PRICE
        + cached_tokens * CACHE_READ_PRICE
        + completion_tokens * OUTPUT_PRICE
    )
    return (exact * Decimal(rate) / 1_000_000).quantize(_NANO, ROUND_CEILING)


@contextmanager
def running_gateway(
    config: dict[str, Any] | Path,
    *,
    data_dir: Path,
    env: Mapping[str, str] | None = None,
    clock: MovableClock | None = None,
    options: Sequence[str] = (),
) -> Iterator[Gateway]:
    """Run the gateway with an embedded store in data_dir until the block ends; a plain ``with``, also in async tests.

    config: a file, or what to write into one; listeners and data directory are given on the command line, and
    what else options say. clock: what the gateway, its store and ``cli`` take for the time. Raises RuntimeError with
    its stderr if it does not get ready, does not end on SIGTERM or ends with a code other than 0; a block that kills it
    or waits for its end decides about that itself. The end of its log is printed where something failed, and always in
    tests, where pytest shows it if they do.
    """
    with tempfile.TemporaryDirectory(prefix="qg-serve-") as name:
        directory = Path(name)
        environment = {**os.environ, **(clock.environment if clock else {}), **(env or {})}
        path = config if isinstance(config, Path) else directory / "config.yaml"
        if not isinstance(config, Path):
            path.write_text(yaml.safe_dump(config))
        process = _spawn(path, directory, data_dir, environment, options)
        gateway: Gateway | None = None
        try:
            base_url, admin_url, key = _wait_until_ready(process, directory)
            gateway = Gateway(base_url, admin_url, key, process, directory, path, data_dir, environment, clock)
            yield gateway
            _end(process, gateway)
        finally:
            process.kill()
            process.wait()
            if sys.exc_info()[0] or "PYTEST_CURRENT_TEST" in os.environ:
                print((directory / "stderr").read_text(errors="replace")[-_LOG_SHOWN:], file=sys.stderr)


def run_cli(config: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """``python -m gateway ARGUMENTS --config CONFIG``, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments, "--config", str(config)],
        cwd=_REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_CLI_SECONDS,
        check=False,
    )


def _run_here(config: Path, *arguments: str, environment: Mapping[str, str]) -> CompletedProcess[str]:
    words = [*arguments, "--config", str(config)]
    with (
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as stderr,
        patch.dict(os.environ, environment, clear=True),
        ThreadPoolExecutor(1) as thread,  # the test's own thread may have a running loop
    ):
        try:
            code = thread.submit(main, words).result(_CLI_SECONDS)
        except SystemExit as exit_:  # argparse
            code = exit_.code if isinstance(exit_.code, int) else 1
        return CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())


def _spawn(
    config: Path, directory: Path, data_dir: Path, environment: Mapping[str, str], options: Sequence[str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(config), "--data-dir", str(data_dir)]
    command += ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", *options]
    # Files, not pipes: nobody reads along, and a full pipe would stop the gateway.
    with (directory / "stdout").open("wb") as stdout, (directory / "stderr").open("wb") as stderr:
        return subprocess.Popen(
            command, cwd=_REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )


def _wait_until_ready(process: subprocess.Popen[bytes], directory: Path) -> tuple[str, str, str | None]:
    """Base URL, the admin listener's URL and the key of the welcome, whose last line of these is the key's."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        lines = [line for line in (directory / "stdout").read_text().splitlines(keepends=True) if line.endswith("\n")]
        said = {line[:10].strip(): line[10:].split() for line in lines}
        if "key" in said:
            key = said["key"][0]
            admin_url = said["metrics"][0].removesuffix("/metrics")
            return said["base URL"][0], admin_url, None if key == "make" else key
        time.sleep(0.02)
    raise RuntimeError(f"the gateway did not get ready (exit code {process.poll()})")


def _end(process: subprocess.Popen[bytes], gateway: Gateway) -> None:
    """Ask it to end, unless the block ended it already."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the gateway did not end within {_STOP_SECONDS} s of SIGTERM") from None
    if code:
        raise RuntimeError(f"the gateway ended with {code} on SIGTERM: {gateway.stderr}")
