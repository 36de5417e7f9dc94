"""What the tests of images, audio, priced paths and fallbacks share: a gateway before an upstream that answers as the
test says (no server that could be had here draws or speaks), and a client of each kind."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import openai

from tests.acceptance.conftest import Answer, Funds, ask, funds_of
from tests.gateway_process import Gateway, running_gateway
from tests.upstreams.scripted import Asked, Script, ScriptedUpstream, says

PLANS = {
    "standard": {"default": True, "allowance": {"per_window": 1000, "refresh": "24h"}},
    "small": {"allowance": {"per_window": "0.1", "refresh": "24h"}},
}
UPSTREAM_KEY = "upstream-key"

#: A file of a form: its field, name, content type and content.
FormFile = tuple[str, str, str, bytes]


@dataclass
class Bench:
    gateway: Gateway
    upstream: ScriptedUpstream
    session: aiohttp.ClientSession
    client: openai.AsyncOpenAI

    @property
    def key(self) -> str:
        return str(self.gateway.key)

    @property
    def asked(self) -> Asked:
        """The last request that the upstream got."""
        return self.upstream.asked[-1]

    @property
    def funds(self) -> Funds:
        return funds_of(self.gateway)

    async def ask(self, path: str, body: dict[str, Any], script: Script | None = None, key: str = "") -> Answer:
        """A request in JSON. script: how the upstream answers it."""
        self.upstream.script = script or says({})
        return await ask(self.session, self.gateway, key or self.key, json.dumps(body).encode(), path)

    async def ask_form(
        self,
        path: str,
        fields: Iterable[tuple[str, str]],
        files: Iterable[FormFile],
        script: Script | None = None,
        *,
        files_first: bool = False,
        key: str = "",
    ) -> Answer:
        """The same in a form."""
        self.upstream.script = script or says({})
        body, content_type = form(fields, files, files_first=files_first)
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": content_type}
        url = self.gateway.base_url + path
        async with self.session.post(url, data=io.BytesIO(body), headers=headers) as answer:
            return Answer(answer.status, answer.headers.copy(), await answer.read())

    async def settled(self) -> Funds:
        """The account's credits once none are held any more."""
        async with asyncio.timeout(20):
            while True:
                funds = await asyncio.to_thread(lambda: self.funds)
                if not funds.held:
                    return funds
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def charging(self, cost: Decimal | str) -> AsyncIterator[None]:
        """What happens in the block costs exactly so many credits, and leaves nothing held."""
        before = self.funds
        yield
        after = await self.settled()
        assert after.used - before.used == Decimal(cost)
        assert (after.balance, after.balance_held) == (before.balance, before.balance_held)


@asynccontextmanager
async def media_bench(
    data_dir: Path, models: dict[str, dict[str, Any]], *, price_unit: str = "usd_per_million_tokens", **settings: Any
) -> AsyncIterator[Bench]:
    """models: each without its upstream. settings: of the configuration besides."""
    async with ScriptedUpstream() as upstream, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        config = {
            "upstreams": {"test": {"base_url": upstream.base_url, "api_key": UPSTREAM_KEY}},
            "plans": PLANS,
            "models": {
                "price_unit": price_unit,
                "models": {name: {"upstream": "test", **model} for name, model in models.items()},
            },
            **settings,
        }
        with running_gateway(config, data_dir=data_dir) as gateway:
            key, url = str(gateway.key), gateway.base_url
            async with openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=60) as client:
                yield Bench(gateway, upstream, session, client)


BOUNDARY = "a-boundary-of-the-test"


def form(
    fields: Iterable[tuple[str, str]], files: Iterable[FormFile], *, files_first: bool = False
) -> tuple[bytes, str]:
    """A form's bytes, and its content type."""
    texts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields
    ]
    others = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        f"Content-Type: {content_type}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, filename, content_type, content in files
    ]
    parts = others + texts if files_first else texts + others
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"
