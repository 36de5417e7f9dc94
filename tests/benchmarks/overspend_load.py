"""What the overspend benchmark asks for, and how a customer's streams spend an account to its end.

Everything about a request follows from its seed, so that each policy gets the same answers, and the upstream and the
client agree on how long they are.
"""

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from itertools import count
from typing import Any

import aiohttp

from tests.gateway_process import cost_of

#: What every request names as its limit. About one answer in 4,500 would be longer.
MAX_TOKENS = 2000
#: Log-normal answer lengths, tokens.
MEDIAN_TOKENS, SIGMA = 120, 0.8
MEAN_TOKENS = round(MEDIAN_TOKENS * math.exp(SIGMA**2 / 2))
#: Prompt lengths, tokens of five bytes each.
_LEAST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS = 10, 60
_PROMPT_WORD = "word "
#: One token of an answer, and how it stands in an event.
WORD = " w"
_SAID = re.compile(rb'"content": ?" w"')
_CHARGED = re.compile(rb'"credits": ?\{"cost": ?"([0-9.]+)"')

#: A client would wait for the Retry-After of a second; shortened so that a run takes seconds.
RETRY_S = 0.2
_NANO = Decimal("0.000000001")
_SETTLE_S = 30


@dataclass(frozen=True)
class Request:
    """One request of an account. natural_tokens: how long its answer is if nothing ends it sooner."""

    account: str
    seed: str
    prompt_tokens: int
    natural_tokens: int

    def body(self, model: str) -> bytes:
        """The streamed chat request; its ``user`` tells the upstream account and seed."""
        return json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": _PROMPT_WORD * self.prompt_tokens}],
                "user": f"{self.account} {self.seed}",
                "max_tokens": MAX_TOKENS,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()


def request_of(account: str, seed: str) -> Request:
    """The request with this seed."""
    pick = random.Random(seed)
    prompt_tokens = pick.randint(_LEAST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS)
    natural_tokens = min(MAX_TOKENS, max(1, round(pick.lognormvariate(math.log(MEDIAN_TOKENS), SIGMA))))
    return Request(account, seed, prompt_tokens, natural_tokens)


def budget_of(requests: int) -> Decimal:
    """Credits for so many average requests."""
    prompt_tokens = (_LEAST_PROMPT_TOKENS + _MOST_PROMPT_TOKENS) // 2
    return (requests * cost_of(prompt_tokens, MEAN_TOKENS)).quantize(_NANO, ROUND_FLOOR)


@dataclass(frozen=True)
class Account:
    """Whom the streams spend for. seed: the same for the accounts that are compared."""

    name: str
    key: str
    seed: str


@dataclass
class Spent:
    """What an account's streams saw until nothing was left.

    delivered: the true cost of what they were handed. charged: the sum of the costs that the gateway told them. cut:
    streams that ended before their natural length although the upstream would have gone on; limited: those that the
    upstream ended at a limit below the client's own. peak: the most streams at once.
    """

    delivered: Decimal = Decimal(0)
    charged: Decimal = Decimal(0)
    requests: int = 0
    refused: int = 0
    cut: int = 0
    limited: int = 0
    flying: int = 0
    peak: int = 0
    seconds: float = 0
    numbers: "count[int]" = field(default_factory=count)

    @property
    def truncated(self) -> int:
        """Streams that did not come to their natural end."""
        return self.cut + self.limited


async def spend(
    session: aiohttp.ClientSession, account: Account, base_urls: Sequence[str], model: str, streams: int
) -> Spent:
    """Stream with so many clients at once, spread over the gateways, until each is told that nothing is left."""
    spent = Spent()
    started = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for number in range(streams):
            clients.create_task(_client(session, account, base_urls[number % len(base_urls)], model, spent))
    spent.seconds = time.perf_counter() - started
    return spent


async def _client(session: aiohttp.ClientSession, account: Account, base_url: str, model: str, spent: Spent) -> None:
    pick = random.Random(f"{account.name} {base_url}")
    headers = {"Authorization": f"Bearer {account.key}", "Content-Type": "application/json"}
    while True:
        request = request_of(account.name, f"{account.seed}/{next(spent.numbers)}")
        body = request.body(model)
        while True:
            async with session.post(f"{base_url}/chat/completions", data=body, headers=headers) as answer:
                if answer.status == 200:
                    await _listen(answer, request, spent)
                    break
                spent.refused += 1
                if _nothing_left(answer.status, await answer.json()):
                    return
            await asyncio.sleep(RETRY_S * pick.uniform(0.5, 1.5))


async def _listen(answer: aiohttp.ClientResponse, request: Request, spent: Spent) -> None:
    spent.flying += 1
    spent.peak = max(spent.peak, spent.flying)
    body = await answer.read()
    spent.flying -= 1
    spent.requests += 1
    said = len(_SAID.findall(body))
    spent.delivered += cost_of(request.prompt_tokens, said)
    if charged := _CHARGED.search(body):
        spent.charged += Decimal(charged[1].decode())
    if b'"error"' in body or not body.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"{request}: the stream broke: {body[-400:]!r}")
    if said < request.natural_tokens:
        # The gateway says so where it ended the stream itself.
        if b'"quota"' in body:
            spent.cut += 1
        else:
            spent.limited += 1


def _nothing_left(status: int, document: Any) -> bool:
    """Whether a refusal is final. Raises RuntimeError for one that has another reason than credits."""
    code = document["error"]["code"]
    if status == 429 and code == "credits_in_flight":
        return False
    if status == 402 or (status, code) == (429, "insufficient_quota"):
        return True
    raise RuntimeError(f"refused with {status}: {document}")


async def truth_of(session: aiohttp.ClientSession, upstream_url: str, account: str) -> Decimal:
    """The true cost of all that the upstream has read and written for an account, once it writes no more."""
    async with asyncio.timeout(_SETTLE_S):
        while True:
            async with session.get(f"{upstream_url}/truth/{account}") as answer:
                truth = await answer.json()
            if not truth["open"]:
                return cost_of(truth["prompt_tokens"], truth["written_tokens"])
            await asyncio.sleep(0.02)
