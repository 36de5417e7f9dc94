"""GET /v1/models: the upstream's list, cut down to what is sold, with the prices that will be charged."""

import json
import re
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI, NotFoundError

from tests.acceptance.conftest import Answer, HeldUpstream, funds_of
from tests.gateway_process import (
    CACHE_READ_PRICE,
    INPUT_PRICE,
    OUTPUT_PRICE,
    Gateway,
    gateway_config,
    running_gateway,
)
from tests.servers import MovableClock, free_port

SOLD = "meta-llama/Llama-3.3-70B-Instruct"
UNLISTED = "mistralai/unlisted"
#: What the upstream says: a sold model at prices of its own, and one that has no price here.
LISTED: list[dict[str, Any]] = [
    {
        "id": SOLD,
        "object": "model",
        "created": 1736000000,
        "owned_by": "io-intelligence",
        "supports_images_input": False,
        "input_token_price": 1.0,
        "context_window": 1,
    },
    {"id": "unpriced", "object": "model"},
]


@pytest.fixture
async def gateway(upstream: HeldUpstream, tmp_path: Path, clock: MovableClock) -> AsyncIterator[Gateway]:
    upstream.models = LISTED
    config = gateway_config(upstream.base_url, [SOLD, UNLISTED])
    del config["models"]["models"][UNLISTED]["cache_read_token_price"]
    with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
        yield gateway


async def get(session: aiohttp.ClientSession, gateway: Gateway, path: str, key: str | None = None) -> Answer:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with session.get(gateway.base_url + path, headers=headers) as response:
        return Answer(response.status, response.headers.copy(), await response.read())


async def test_lists_what_is_sold_at_our_prices(session: aiohttp.ClientSession, gateway: Gateway) -> None:
    answer = await get(session, gateway, "/models", gateway.key)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    # Numbers, not strings, and without an exponent: Decimal takes them exactly as they are written.
    assert not re.search(rb":-?[0-9.]+[eE]", answer.body)
    document = json.loads(answer.body, parse_float=Decimal)
    assert document["object"] == "list"
    assert [model["id"] for model in document["data"]] == [SOLD, UNLISTED]
    sold, unlisted = document["data"]
    assert (sold["input_token_price"], sold["output_token_price"]) == (INPUT_PRICE / 10**6, OUTPUT_PRICE / 10**6)
    assert sold["cache_read_token_price"] == CACHE_READ_PRICE / 10**6
    assert (sold["context_window"], sold["max_tokens"]) == (4096, 2048)
    assert (sold["object"], sold["created"], sold["owned_by"]) == ("model", 1736000000, "io-intelligence")
    assert sold["supports_images_input"] is False
    assert unlisted["input_token_price"] == INPUT_PRICE / 10**6
    assert (unlisted["object"], unlisted["owned_by"]) == ("model", "test")


async def test_a_renamed_model_is_looked_up_by_the_name_that_its_upstream_has_for_it(
    session: aiohttp.ClientSession, upstream: HeldUpstream, tmp_path: Path, clock: MovableClock
) -> None:
    upstream.models = [*LISTED, {"id": "alias", "object": "model", "owned_by": "somebody else"}]
    config = gateway_config(upstream.base_url, ["alias"])
    config["models"]["models"]["alias"]["upstream_model"] = SOLD
    with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
        (listed,) = (await get(session, gateway, "/models", gateway.key)).document["data"]
        assert (listed["id"], listed["owned_by"], listed["created"]) == ("alias", "io-intelligence", 1736000000)
        assert (await get(session, gateway, "/models/alias", gateway.key)).document == listed


async def test_the_sdk_lists_and_retrieves(gateway: Gateway) -> None:
    for base_url in (gateway.base_url, gateway.base_url.replace("/v1", "/api/v1")):
        async with AsyncOpenAI(base_url=base_url, api_key=gateway.key, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == [SOLD, UNLISTED]
            model = await client.models.retrieve(SOLD)  # its slash is sent as %2F
            assert (model.id, model.owned_by, model.created) == (SOLD, "io-intelligence", 1736000000)
            with pytest.raises(NotFoundError) as missing:
                await client.models.retrieve("unpriced")
            assert missing.value.code == "model_not_found"


async def test_a_plain_slash_in_the_path_is_the_same(session: aiohttp.ClientSession, gateway: Gateway) -> None:
    answer = await get(session, gateway, f"/models/{SOLD}", gateway.key)
    assert (answer.status, answer.document["id"]) == (200, SOLD)


async def test_needs_a_key_and_costs_nothing(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    for key in (None, "sk-qg-nobody"):
        for path in ("/models", f"/models/{SOLD}"):
            refused = await get(session, gateway, path, key)
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
            assert refused.headers["x-should-retry"] == "false"
    assert (await get(session, gateway, "/models", gateway.key)).status == 200
    assert funds_of(gateway).used == 0
    assert upstream.requests == []


@pytest.mark.parametrize("failure", ["down", "error", "nonsense"])
async def test_without_the_upstreams_list_the_sold_ones_are_listed(
    session: aiohttp.ClientSession, upstream: HeldUpstream, tmp_path: Path, clock: MovableClock, failure: str
) -> None:
    base_url = f"http://127.0.0.1:{free_port()}/v1" if failure == "down" else upstream.base_url
    upstream.models, upstream.models_status = (LISTED, 500) if failure == "error" else (["?", {"id": 5}], 200)
    config = gateway_config(base_url, [SOLD])
    with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
        answer = await get(session, gateway, "/models", gateway.key)
        assert (answer.status, [model["id"] for model in answer.document["data"]]) == (200, [SOLD])
        assert answer.document["data"][0]["owned_by"] == "test"
        assert (await get(session, gateway, f"/models/{SOLD}", gateway.key)).status == 200
