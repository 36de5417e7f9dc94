"""Mock model servers that no one here wrote, each a process of its own on a free port of loopback.

- llmock speaks OpenAI (chat, responses) below ``/v1`` and Anthropic below ``/anthropic/v1``. Its usage is exact (a
  token per four characters), ``max_tokens`` means nothing to it, and it can be told to fail, to break off, to cut a
  stream.
- fakellm speaks both below ``/v1``; its chat streams never say a usage. It says ``FAKELLM_SAYS``, a word every 10 ms,
  and goes on for a minute where a message has the words ``AT_LENGTH``. ``max_tokens`` means nothing to it either.
- mock-ai-api is a server for each. Its chat streams have the usage on the chunk with the finish reason, asked or not.
  Its model names say what happens, ``any:mock-500`` a failure.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FAKELLM_SAYS = "No one here wrote what says this, and it never says what it used."
AT_LENGTH = "at length"

_FAKELLM_RULES = [
    {"name": AT_LENGTH, "when": {"messages_contain": AT_LENGTH}, "respond": {"content": "word " * 6000}},
    {"name": "any", "respond": {"content": FAKELLM_SAYS}},
]
_START_SECONDS = 60
_READY = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True)
class Llmock:
    """A running llmock. url: without a path."""

    url: str

    def will(self, behaviour: str, **members: Any) -> None:
        """Let every request from now on meet this behaviour, until ``reset``."""
        self._post("scenario", {"behaviors": [{"type": behaviour, "times": None, **members}]})

    def reset(self) -> None:
        """Forget behaviours and requests."""
        self._post("reset", {})

    def verdict(self) -> list[str]:
        """What it finds wrong with its client since the last reset: the codes of errors."""
        with urllib.request.urlopen(f"{self.url}/_llmock/verdict") as answer:
            said = json.load(answer)
        return [finding["code"] for finding in said["findings"] if finding["severity"] == "error"]

    def _post(self, verb: str, document: dict[str, Any]) -> None:
        request = urllib.request.Request(
            f"{self.url}/_llmock/{verb}", json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request):
            pass


@contextmanager
def running_llmock() -> Iterator[Llmock]:
    """Run llmock until the block ends."""
    program = "from llmock.cli import app; app()"
    with _uvicorn(["-c", program, "serve", "--port", "0"]) as url:
        yield Llmock(url)


@contextmanager
def running_fakellm() -> Iterator[str]:
    """Run fakellm until the block ends; its URL without a path."""
    with tempfile.TemporaryDirectory(prefix="fakellm-") as directory:
        config = Path(directory, "fakellm.yaml")
        config.write_text(yaml.safe_dump({"rules": _FAKELLM_RULES}))
        program = "from fakellm.cli import main; main()"
        with _uvicorn(["-c", program, "serve", "--port", "0", "--config", str(config)]) as url:
            yield url


@contextmanager
def running_mock_ai_api(dialect: str) -> Iterator[str]:
    """Run mock-ai-api's server for "openai" or "anthropic" until the block ends; its URL without a path."""
    with _uvicorn(["-m", "uvicorn", f"app.{dialect}_app:app", "--port", "0"]) as url:
        yield url


@contextmanager
def _uvicorn(arguments: Sequence[str]) -> Iterator[str]:
    # A file, not a pipe: nobody reads along, and a full pipe would stop the server.
    with tempfile.TemporaryDirectory(prefix="third-party-") as directory:
        path = Path(directory, "log")
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield _wait_until_ready(process, path)
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := _READY.search(log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not get ready:\n{log.read_text(errors='replace')}")
