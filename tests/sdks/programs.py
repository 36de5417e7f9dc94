"""The programs in ``clients/``, each on a real SDK, run as a user runs them: URL and key are in the environment."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

_HERE = Path(__file__).parent
_CLIENTS = _HERE / "clients"
_RUN_SECONDS = 60
_INSTALL_SECONDS = 300


#: The class of what each SDK raises, by the status of the answer; None: for an error in the middle of a stream.
_OPENAI = {
    401: "AuthenticationError",
    402: "APIStatusError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "InternalServerError",
    None: "APIError",
}
_OPENAI_NODE = {**_OPENAI, 402: "APIError"}
_ANTHROPIC = {**_OPENAI, 402: "PaymentRequiredError", None: "APIStatusError"}
_ANTHROPIC_NODE = {**_ANTHROPIC, None: "APIError"}
_LANGCHAIN = {
    **_OPENAI,
    401: "OpenAIAuthenticationError",
    404: "OpenAIModelNotFoundError",
    429: "OpenAIRateLimitError",
    500: "OpenAIAPIError",
    502: "OpenAIAPIError",
}
#: What it does not repeat it raises as it is. A stream hands out the server's own error object.
_AI = {**dict.fromkeys((401, 402, 404), "APICallError"), **dict.fromkeys((429, 500, 502), "RetryError"), None: "Object"}

#: What each endpoint's clients call an answer that came to a limit.
_LENGTH = {"chat": "length", "responses": "incomplete", "messages": "max_tokens"}


@dataclass(frozen=True)
class Program:
    """One way to ask for an answer. script: in clients/. api: what it is told to call there.

    endpoint: what that calls of the server: chat, responses, messages, … raises: as above. attempts: how often it asks,
    by its SDK's own default, while it is answered 429 or 5xx. attempts_when_spent: the same where x-should-retry says
    that there is no point. shows_cost: the calls of which it shows a program what they cost. shows_code: whether it
    shows an error's code. model_prefix: without which its SDK does not take a model's name.
    """

    name: str
    script: str
    api: str
    endpoint: str
    raises: Mapping[int | None, str]
    attempts: int = 3
    attempts_when_spent: int = 1
    shows_cost: Collection[str] = ("whole", "stream")
    shows_code: bool = True
    model_prefix: str = ""

    @property
    def length(self) -> str:
        """What it calls an answer that came to a limit."""
        return "length" if self.script == "ai.mjs" else _LENGTH[self.endpoint]


def _ai(api: str, endpoint: str, *, shows_code: bool = True) -> Program:
    return Program(f"ai-{api}", "ai.mjs", api, endpoint, _AI, 3, 3, ("whole",), shows_code)


QUICK = (
    Program("openai", "openai_client.py", "chat", "chat", _OPENAI),
    Program("anthropic", "anthropic_client.py", "messages", "messages", _ANTHROPIC),
)
PROGRAMS = (
    *QUICK,
    Program("openai-responses", "openai_client.py", "responses", "responses", _OPENAI),
    Program("langchain", "langchain_client.py", "chat", "chat", _LANGCHAIN, shows_cost=()),
    Program("langchain-responses", "langchain_client.py", "responses", "responses", _LANGCHAIN, shows_cost=()),
    # Three attempts, each of four of the openai SDK's; only the outer ones overlook x-should-retry.
    Program("llamaindex", "llamaindex_client.py", "chat", "chat", _OPENAI, 12, 3, ("stream",), True, "ft:gpt-4o:"),
    Program("openai-node", "openai.mjs", "chat", "chat", _OPENAI_NODE),
    Program("openai-node-responses", "openai.mjs", "responses", "responses", _OPENAI_NODE),
    Program("anthropic-node", "anthropic.mjs", "messages", "messages", _ANTHROPIC_NODE),
    _ai("chat", "chat"),
    _ai("responses", "responses"),
    _ai("compatible", "chat"),
    _ai("messages", "messages", shows_code=False),
)
COMPLETIONS = Program("openai-completions", "openai_client.py", "completions", "completions", _OPENAI)
EMBEDDINGS = Program("openai-embeddings", "openai_client.py", "embeddings", "embeddings", _OPENAI)
COUNTING = Program("anthropic-counting", "anthropic_client.py", "messages_count_tokens", "messages", _ANTHROPIC)

#: The responses of both lack fields that the AI SDK insists on, whoever hands them on.
_NO_PAIR = {("ai-responses", "mockai"), ("ai-responses", "llama")}


def with_programs(quick: Collection[Program] = QUICK, endpoint: str | None = None) -> pytest.MarkDecorator:
    """Run a test with each program, or each that calls the endpoint. quick: with which it is not long."""
    chosen = [program for program in PROGRAMS if endpoint in (None, program.endpoint)]
    return pytest.mark.parametrize("program", [_case(program, quick=program in quick) for program in chosen])


def with_servers(servers: Mapping[str, Collection[str]], quick: Collection[str]) -> pytest.MarkDecorator:
    """Run a test with each program and each server that has its endpoint. quick: servers with which it is not long."""
    pairs = [(program, server) for program in PROGRAMS for server in servers if program.endpoint in servers[server]]
    cases = [_case(*pair, quick=pair[0] in QUICK and pair[1] in quick) for pair in pairs if takes(*pair)]
    return pytest.mark.parametrize(("program", "server"), cases)


def takes(program: Program, server: str) -> bool:
    """Whether the program can read what the server says."""
    return (program.name, server) not in _NO_PAIR


def _case(program: Program, *more: str, quick: bool) -> ParameterSet:
    # The first of its kind waits for an installation.
    marks = [] if quick else [pytest.mark.long, pytest.mark.timeout(2 * _INSTALL_SECONDS)]
    return pytest.param(program, *more, id="-".join((program.name, *more)), marks=marks)


@dataclass(frozen=True)
class Saw:
    """What a program saw of one answer. usage: input, of it cached, output. naps: the waits that it was spared."""

    text: Any
    finish: str | None
    chunks: int
    usage: Mapping[str, int] | None
    cost: str | None
    error: Mapping[str, Any] | None
    naps: Sequence[float] = ()


class Installed:
    """Where the programs of this session run. directory: where what they need is installed, once for all workers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def run(
        self,
        program: Program,
        calls: Sequence[str],
        base_url: str,
        key: str,
        model: str,
        *,
        prompt: str,
        max_tokens: int,
    ) -> list[Saw]:
        """Let the program make the calls ("whole", "stream"), one after another; what it saw of each. base_url: ends in
        /v1. Raises AssertionError unless it ends well."""
        # Anthropic's own SDK adds the /v1 itself.
        anthropic_url = base_url if program.script == "ai.mjs" else base_url.removesuffix("/v1")
        environment = {
            **os.environ,
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_BASE": base_url,
            "OPENAI_API_KEY": key,
            "ANTHROPIC_BASE_URL": anthropic_url,
            "ANTHROPIC_API_KEY": key,
            "MODEL": model,
            "PROMPT": prompt,
            "MAX_TOKENS": str(max_tokens),
        }
        names = [program.api + {"whole": "", "stream": "_stream"}[call] for call in calls]
        command = [*self._interpreter(program.script), *names]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_RUN_SECONDS, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return [Saw(**json.loads(line)) for line in ended.stdout.splitlines()]

    def _interpreter(self, script: str) -> list[str]:
        if script.endswith(".mjs"):
            return ["node", str(self._once("node", _install_node) / script)]
        if script == "llamaindex_client.py":
            return [str(self._once("llamaindex", _install_llamaindex) / "bin" / "python"), str(_CLIENTS / script)]
        return [sys.executable, str(_CLIENTS / script)]

    def _once(self, name: str, install: Callable[[Path], None]) -> Path:
        directory = self._directory / name
        with _locked(self._directory / f"{name}.lock"):
            if not (directory / "installed").exists():
                directory.mkdir(exist_ok=True)
                install(directory)
                (directory / "installed").touch()
        return directory


def _install_node(directory: Path) -> None:
    if not shutil.which("npm"):
        if os.environ.get("QUOTA_GATEWAY_REQUIRE_NODE"):
            pytest.fail("npm is not installed")
        pytest.skip("npm is not installed")
    for file in (_HERE / "node" / "package.json", *_CLIENTS.glob("*.mjs")):
        shutil.copy(file, directory)
    _quietly("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", directory=directory)


def _install_llamaindex(directory: Path) -> None:
    """It wants another openai than the tests do, so it gets an environment of its own."""
    _quietly(sys.executable, "-m", "venv", str(directory), directory=directory)
    python, requirements = directory / "bin" / "python", _HERE / "llamaindex" / "requirements.txt"
    _quietly(str(python), "-m", "pip", "install", "-r", str(requirements), directory=directory)


def _quietly(*command: str, directory: Path) -> None:
    ended = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as held:
        flock(held, LOCK_EX)
        yield
