"""The demo model on a loopback port, and real clients that ask it."""

from collections.abc import AsyncIterator

import anthropic
import openai
import pytest

from gateway.demo.upstream import DemoUpstream

MODEL = "org/demo-model"
TRANSCRIBER = "gpt-4o-transcribe"


@pytest.fixture
async def upstream() -> AsyncIterator[DemoUpstream]:
    async with DemoUpstream([MODEL, TRANSCRIBER]) as running:
        yield running


@pytest.fixture
async def client(upstream: DemoUpstream) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=upstream.base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(upstream: DemoUpstream) -> AsyncIterator[anthropic.AsyncAnthropic]:
    base_url = upstream.base_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client
