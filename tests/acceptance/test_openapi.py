"""The description at /openapi.json is served to everybody, and the gateway does what it says: schemathesis asks every
operation of a running gateway, in front of the demo model, for what is described and for what is not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openapi_spec_validator import validate

from tests.gateway_process import Gateway, running_gateway

#: Paths that are passed through, which the demo model does not have, and says so.
NOT_IN_DEMO = {"GET /files", "POST /files", "GET /files/{rest}", "DELETE /files/{rest}"}

_TOKENS = {"input_token_price": "0.1", "output_token_price": "0.4", "context_window": 32768, "max_output_tokens": 4096}
_MODELS: dict[str, dict[str, Any]] = {
    "words": _TOKENS,
    "maker/more-words": {**_TOKENS, "fallbacks": ["words"]},
    "pictures": {"image_prices": {"*": "0.04"}},
    "voice": {"character_price": 15},
    "ears": {"second_price": "0.0001"},
    "ranks": {"request_price": "0.001"},
    "omni-moderation-latest": {"request_price": 0},
}
_CONFIG: dict[str, Any] = {
    "upstreams": {"demo": {"base_url": "http://127.0.0.1:9/v1", "api_key": ""}},
    "plans": {"rich": {"default": True, "allowance": {"per_window": 1000000, "refresh": "24h"}}},
    "models": {
        "price_unit": "usd_per_million_tokens",
        "models": {name: {"upstream": "demo", **model} for name, model in _MODELS.items()},
    },
    "passthrough": {
        "/files": {"upstream": "demo", "request_price": "0.001", "methods": ["GET", "POST"]},
        "/files/*": {"upstream": "demo", "request_price": "0.001", "methods": ["GET", "DELETE"]},
    },
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(_CONFIG, data_dir=tmp_path_factory.mktemp("openapi") / "data") as gateway:
        yield gateway


# --- served ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/v1", "/api/v1"])
async def test_everybody_may_read_it(gateway: Gateway, prefix: str) -> None:
    url = f"{gateway.base_url.removesuffix('/v1')}{prefix}/openapi.json"
    async with aiohttp.ClientSession() as session:
        async with session.get(url, headers={"Origin": "https://app.example.com"}) as answer:
            assert (answer.status, answer.content_type) == (200, "application/json")
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            described = await answer.json()
        async with session.head(url) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
        async with session.post(url) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    validate(described)
    assert described["paths"]["/audio/speech"]
    assert described["components"]["schemas"]["ModelName"]["enum"] == sorted(_MODELS)


async def test_it_follows_the_configuration(tmp_path: Path) -> None:
    with running_gateway(_CONFIG, data_dir=tmp_path / "data") as gateway:
        url = f"{gateway.base_url}/openapi.json"
        async with aiohttp.ClientSession() as session:
            async with session.get(url) as answer:
                assert "/files" in (await answer.json())["paths"]
            text = gateway.config.read_text()
            gateway.config.write_text(text.replace("/files", "/batches").replace("pictures", "paintings"))
            async with session.post(f"{gateway.admin_url}/admin/v1/reload") as answer:
                assert answer.status == 200, await answer.text()
            async with session.get(url) as answer:
                described = await answer.json()
    assert {"/batches", "/batches/{rest}"} <= set(described["paths"])
    assert "/files" not in described["paths"]
    assert "paintings" in described["components"]["schemas"]["ModelName"]["enum"]


# --- true -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_the_gateway_does_what_it_says(gateway: Gateway, tmp_path: Path) -> None:
    answers = ask_everything(gateway, tmp_path, "--mode=positive", "--phases=examples,fuzzing", "--max-examples=30")
    good = {operation for operation, status, _ in answers if status < 300}
    assert {operation for operation, _, _ in answers} - good == {*NOT_IN_DEMO, "GET /realtime"}  # which is a websocket
    assert {operation for operation, _, who in answers if who == "upstream"} >= NOT_IN_DEMO


@pytest.mark.timeout(300)
def test_the_gateway_refuses_what_it_says_it_does(gateway: Gateway, tmp_path: Path) -> None:
    answers = ask_everything(gateway, tmp_path, "--mode=negative", "--phases=coverage")
    with_body = {operation for operation, _, _ in answers if operation.startswith("POST") and "files" not in operation}
    assert with_body == {operation for operation, status, who in answers if (status, who) == (400, "gateway")}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "amount",
    [
        ["--mode=all", "--phases=coverage"],
        ["--mode=positive", "--phases=fuzzing", "--max-examples=150"],
        # Little can be wrong without a body, and what is written into a form is a text, whatever it was before.
        [
            *("--mode=negative", "--phases=fuzzing", "--max-examples=300", "--include-method=POST"),
            r"--exclude-path-regex=^/(files|images/(edits|variations)|audio/trans)",
        ],
    ],
    ids=["edges", "taken", "refused"],
)
def test_the_gateway_does_what_it_says_whatever_is_asked(gateway: Gateway, tmp_path: Path, amount: list[str]) -> None:
    assert len({operation for operation, _, _ in ask_everything(gateway, tmp_path, *amount)}) > 10


def ask_everything(gateway: Gateway, directory: Path, *arguments: str) -> set[tuple[str, int, str]]:
    """Let schemathesis ask; fails with what it found. The answers: operation, status, and who gave it.

    What it asks is the same each time. One worker: CPython 3.11 fails now and then where several threads compile.
    """
    answers, settings = directory / "answers", directory / "schemathesis.toml"
    settings.write_text(_SETTINGS)
    command = [sys.executable, "-m", "schemathesis.cli", f"--config-file={settings}", "run", *arguments]
    command += [f"{gateway.base_url}/openapi.json", f"--header=Authorization: Bearer {gateway.key}"]
    ended = subprocess.run(
        [*command, "--seed=1", "--workers=1", "--no-color", "--warnings=off", "--output-truncate=false"],
        cwd=directory,  # it leaves files behind
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "SCHEMATHESIS_HOOKS": "tests.acceptance.openapi_checks",
            "QG_ANSWERS": str(answers),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = (line.split("\t") for line in answers.read_text().splitlines())
    return {(operation, int(status), who) for operation, status, who in told}


#: What the gateway takes its upstream may refuse: openapi_checks.py tells the two apart. Whatever comes to "/" besides
#: a GET is told that it is no endpoint, and what comes to the websocket that it is one.
_SETTINGS = """
continue-on-failure = true
[generation]
database = "none"
no-shrink = true
[checks]
positive_data_acceptance.enabled = false
[[operations]]
include-path = "/"
checks.unsupported_method.enabled = false
[[operations]]
include-path = "/realtime"
checks.negative_data_rejection.expected-statuses = [426]
"""
