"""One gateway in front of a real llama.cpp and three mock servers that no one here wrote, requests counted on both
sides of it."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.acceptance.conftest import NOON, Funds, funds_of, new_account
from tests.gateway_process import Gateway, gateway_config, running_gateway
from tests.sdks.counting import Arrived, Counter, counting
from tests.sdks.programs import PROGRAMS, Installed, Program, Saw
from tests.sdks.third_party import AT_LENGTH, Llmock, running_fakellm, running_llmock, running_mock_ai_api
from tests.servers import MovableClock, free_port
from tests.upstreams.llama import running_llama

PROMPT = "Tell me about the sea."
#: What the plan "tight" grants: enough to begin, and for some of an answer of MANY tokens.
TIGHT = Decimal("0.00007")
MANY = 1000
#: What the plan "shared" grants: enough for the beginning of a stream beside another that holds COMPANION tokens.
SHARED = Decimal("0.0021")
COMPANION = 2000

#: Where each server speaks what, by endpoint.
PATHS = {
    "llama": {"chat": "/v1", "responses": "/v1", "messages": "/v1", "completions": "/v1"},
    "llama-embedding": {"embeddings": "/v1"},
    "llmock": {"chat": "/v1", "responses": "/v1", "messages": "/anthropic/v1"},
    "fakellm": {"chat": "/v1", "messages": "/v1"},
    "mockai": {"chat": "/v1", "responses": "/v1", "completions": "/v1", "embeddings": "/v1"},
    "mockai-anthropic": {"messages": "/v1"},
}
#: A server that is not there.
NOBODY = "nobody"
#: A model of fakellm's whose streams hold their maximum from the start.
HELD = "held"
#: What mock-ai-api calls the models that fail.
FAILING = {"500": "any:mock-500", "stream": "any:mock-stream-error"}
_SECONDS = 20


@dataclass(frozen=True)
class Account:
    """An account of a test's own."""

    name: str
    key: str


@dataclass(frozen=True)
class Outcome:
    """What became of one run of a program through the gateway.

    all_saw: of each call. used: what they took of the account's allowance and balance together. upstream: the requests
    that came to the upstream.
    """

    all_saw: list[Saw]
    used: Decimal
    funds: Funds
    upstream: list[Arrived]
    site: "Site"
    first: int

    @property
    def saw(self) -> Saw:
        """What it saw of its only call."""
        (saw,) = self.all_saw
        return saw

    def logged(self, requests: int) -> list[dict[str, Any]]:
        """The gateway's log lines of the run, once there are as many as requests. Raises TimeoutError after 20 s."""
        deadline = time.monotonic() + _SECONDS
        while len(lines := self.site.log[self.first :]) < requests:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{requests} requests were expected, there are {lines}")
            time.sleep(0.02)
        return lines

    def statuses(self, requests: int) -> list[int]:
        """The status of each request that the gateway answered in the run, once there are as many as requests."""
        return [line["status"] for line in self.logged(requests)]


@dataclass(frozen=True)
class Site:
    """The gateway and all that stands around it."""

    gateway: Gateway
    counters: dict[str, Counter]
    llmock: Llmock
    installed: Installed
    numbers: Iterator[int]

    @property
    def log(self) -> list[dict[str, Any]]:
        """A record for each request that the gateway answered so far."""
        lines = [json.loads(line) for line in self.gateway.stderr.splitlines() if line.startswith("{")]
        return [line for line in lines if line["logger"] == "gateway.requests"]

    def account(self, plan: str = "standard") -> Account:
        """A new account on the plan."""
        name = f"account-{next(self.numbers)}"
        return Account(name, new_account(self.gateway, name, plan))

    def run(
        self,
        program: Program,
        upstream: str,
        *calls: str,
        account: Account | None = None,
        key: str | None = None,
        model: str | None = None,
        max_tokens: int = 40,
        held: bool = False,
    ) -> Outcome:
        """Let the program make the calls ("whole", "stream") through the gateway, in a process of their own, to the
        upstream's model or another one.

        key: instead of the account's. held: something else of the account is under way meanwhile.
        """
        account = account or self.account()
        model = program.model_prefix + model if model else model_name(program, upstream)
        before, first, counter = funds_of(self.gateway, account.name), len(self.log), self.counters[upstream]
        counted = len(counter.arrived)
        saw = self.installed.run(
            program, calls, self.gateway.base_url, key or account.key, model, prompt=PROMPT, max_tokens=max_tokens
        )
        after = funds_of(self.gateway, account.name)
        assert held or (after.held, after.balance_held) == (0, 0)
        used = after.used - before.used + before.balance - after.balance
        return Outcome(saw, used, after, counter.arrived[counted:], self, first)

    def run_direct(self, program: Program, upstream: str, *calls: str, max_tokens: int = 40) -> list[Saw]:
        """Let the program make the same calls to the upstream itself."""
        base_url = self.counters[upstream].base_url + PATHS[upstream][program.endpoint]
        model = model_name(program, upstream)
        return self.installed.run(program, calls, base_url, "none", model, prompt=PROMPT, max_tokens=max_tokens)

    def spend(self, account: Account) -> None:
        """Use up an allowance of plan "tight"."""
        with self._asked(account, "llama-chat", PROMPT, MANY) as answer:
            assert json.load(answer)["choices"][0]["finish_reason"] == "length"

    @contextmanager
    def holding(self, account: Account) -> Iterator[None]:
        """Let another stream of the account be under way, which holds what COMPANION tokens cost."""
        with self._asked(account, HELD, f"Tell me {AT_LENGTH}.", COMPANION, stream=True) as answer:
            answer.readline()
            yield

    @contextmanager
    def _asked(self, account: Account, model: str, prompt: str, max_tokens: int, **more: Any) -> Iterator[Any]:
        asked = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}], **more}
        headers = {"Authorization": f"Bearer {account.key}"}
        url = f"{self.gateway.base_url}/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(asked).encode(), headers)) as answer:
            yield answer


def model_name(program: Program, upstream: str) -> str:
    """What the program calls the upstream's model."""
    return f"{program.model_prefix}{upstream}-{program.endpoint}"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All of it, for the whole session: a test has accounts of its own, and leaves llmock as it was."""
    directory = tmp_path_factory.mktemp("sdks")
    clock = MovableClock(directory / "clock")
    clock.set_to(NOON)  # no test meets a real midnight
    with ExitStack() as stack:
        llmock = stack.enter_context(running_llmock())
        targets = {
            "llama": stack.enter_context(running_llama()).removesuffix("/v1"),
            "llama-embedding": stack.enter_context(running_llama(embedding=True)).removesuffix("/v1"),
            "llmock": llmock.url,
            "fakellm": stack.enter_context(running_fakellm()),
            "mockai": stack.enter_context(running_mock_ai_api("openai")),
            "mockai-anthropic": stack.enter_context(running_mock_ai_api("anthropic")),
            NOBODY: f"http://127.0.0.1:{free_port()}",
        }
        counters = stack.enter_context(counting(targets))
        gateway = stack.enter_context(running_gateway(_config(counters), data_dir=directory / "data", clock=clock))
        # Workers share what they install; one process takes it away again, which is hundreds of megabytes.
        if "PYTEST_XDIST_WORKER" in os.environ:
            installed = Installed(tmp_path_factory.getbasetemp().parent)
        else:
            installed = Installed(Path(stack.enter_context(TemporaryDirectory(prefix="sdks-"))))
        yield Site(gateway, counters, llmock, installed, count(1))


@pytest.fixture
def llmock(site: Site) -> Iterator[Llmock]:
    """The session's llmock, which forgets what the test told it."""
    yield site.llmock
    site.llmock.reset()


def _config(counters: Mapping[str, Counter]) -> dict[str, Any]:
    """Each server's endpoints are upstreams of their own, each with a model per name that a program needs."""
    config = gateway_config("", [])
    for plan, granted in (("tight", TIGHT), ("shared", SHARED)):
        config["plans"][plan] = {"allowance": {"per_window": str(granted), "refresh": "24h"}}
    config["plans"]["empty"] = {}
    config["upstreams"] = {}
    model = gateway_config("", ["any"])["models"]["models"]["any"]
    paths = {**PATHS, NOBODY: dict.fromkeys(("chat", "responses", "messages"), "/v1")}
    for server, endpoints in paths.items():
        for endpoint, path in endpoints.items():
            name = f"{server}-{endpoint}"
            # The counters are no part of what is tested: a server that is not there has none.
            address = counters[server].target if server == NOBODY else counters[server].base_url
            config["upstreams"][name] = {"base_url": address + path}
            for prefix in {program.model_prefix for program in PROGRAMS}:
                config["models"]["models"][f"{prefix}{name}"] = {**model, "upstream": name}
                for how, there in FAILING.items():
                    config["models"]["models"][f"{prefix}{name}-{how}"] = {
                        **model,
                        "upstream": name,
                        "upstream_model": there,
                    }
    config["upstreams"][HELD] = {"base_url": f"{counters['fakellm'].base_url}/v1", "count_output": "maximum"}
    config["models"]["models"][HELD] = {**model, "upstream": HELD}
    return config
