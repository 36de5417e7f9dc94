"""``prices diff`` and ``prices import`` as an operator runs them, on a local upstream and on a price file."""

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from aiohttp import web

from gateway.config.load import load
from tests.gateway_process import run_cli
from tests.upstreams.local import LocalUpstream

ROOT = Path(__file__).parents[2]
PRICE_FILE = ROOT / "tests/price_file.json"
KEY = "sk-the-operators-own"
MODELS = """\
price_unit: usd_per_million_tokens
models:
  # The workhorse.
  meta-llama/Llama-3.3-70B-Instruct:
    upstream: ionet
    input_token_price: 0.10      # promised to acme
    output_token_price: 0.768
    context_window: 128000
    max_output_tokens: 8192
  gpt-4o: {upstream: files, input_token_price: 5, output_token_price: 10, context_window: 128000,
           max_output_tokens: 16384}
"""
#: The same model in both of io.net's shapes.
PER_TOKEN = {
    "id": "meta-llama/Llama-3.3-70B-Instruct",
    "object": "model",
    "input_token_price": 6.38e-07,
    "output_token_price": 7.68e-07,
    "cache_read_token_price": 3e-07,
    "context_window": 128000,
    "max_tokens": 8192,
}
PER_MILLION = {
    "id": "meta-llama/Llama-3.3-70B-Instruct",
    "object": "model",
    "metadata": {
        "input_token_price": "0.638",
        "output_token_price": "0.768",
        "cache_read_token_price": "0.30",
        "context_window": 128000,
        "max_tokens": 8192,
    },
}
IMPORTED = MODELS.replace("0.10      #", "0.638      #").replace("0.768\n", "0.768\n    cache_read_token_price: 0.3\n")


def configure(directory: Path, base_url: str = "http://127.0.0.1:9/v1") -> Path:
    (directory / "models.yaml").write_text(MODELS)
    config = directory / "gateway.yaml"
    config.write_text(
        f'upstreams:\n  ionet: {{base_url: "{base_url}", api_key: "{KEY}"}}\n  files: {{base_url: "{base_url}"}}\n'
        "plans: {standard: {default: true}}\nmodels: models.yaml\n"
    )
    return config


def models(config: Path) -> str:
    return (config.parent / "models.yaml").read_text()


def upstream(*entries: dict[str, Any], status: int = 200, **fields: Any) -> LocalUpstream:
    """An upstream that gives this list to whoever has its key."""

    async def answer(request: web.Request) -> web.Response:
        known = request.headers.get("Authorization") == f"Bearer {KEY}"
        return web.json_response({"object": "list", "data": entries, **fields}, status=status if known else 401)

    return LocalUpstream(web.get("/v1/models", answer))


async def prices(config: Path, *arguments: str) -> CompletedProcess[str]:
    ended = await asyncio.to_thread(run_cli, config, "prices", *arguments)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


@pytest.mark.parametrize("entry", [PER_TOKEN, PER_MILLION], ids=["per token", "per million"])
async def test_both_of_ionets_shapes_are_imported_to_the_same_file(tmp_path: Path, entry: dict[str, Any]) -> None:
    async with upstream(entry, {**entry, "id": "another"}) as server:
        config = configure(tmp_path, server.base_url)
        shown = await prices(config, "diff", "--from-upstream", "ionet")
        assert (shown.returncode, shown.stderr, models(config)) == (0, "", MODELS)
        assert shown.stdout == (
            f"source  upstream ionet, GET {server.base_url}/models\n"
            f"file    {tmp_path}/models.yaml, prices of tokens and characters in USD per million tokens\n"
            "\n"
            "meta-llama/Llama-3.3-70B-Instruct\n"
            "  input_token_price       0.10 -> 0.638\n"
            "  cache_read_token_price     - -> 0.3\n"
            "\n"
            "in the source only: 1 (--add takes them over)\n"
        )
        written = await prices(config, "import", "--from-upstream", "ionet", "--yes")
        assert (written.returncode, written.stderr) == (0, "")
        assert written.stdout == shown.stdout + f"written: {tmp_path}/models.yaml\n"
        assert models(config) == IMPORTED
        again = await prices(config, "import", "--from-upstream", "ionet")
        assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "nothing to change")
        added = await prices(config, "import", "--from-upstream", "ionet", "--add", "--yes", "--json")
        assert [model["added_to"] for model in json.loads(added.stdout)["changed"]] == ["ionet"]
        sold = load(config, {}).models
        assert sold["another"].prices == sold["meta-llama/Llama-3.3-70B-Instruct"].prices


async def test_the_document_says_what_the_text_says(tmp_path: Path) -> None:
    config = configure(tmp_path)
    ended = await prices(config, "diff", "--from-file", str(PRICE_FILE), "--json")
    document = json.loads(ended.stdout)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert document == {
        "source": f"price file {PRICE_FILE}",
        "file": f"{tmp_path}/models.yaml",
        "price_unit": "usd_per_million_tokens",
        "written": False,
        "changed": [
            {
                "model": "gpt-4o",
                "added_to": None,
                "changes": [
                    {"field": "input_token_price", "old": "5", "new": "2.5"},
                    {"field": "cache_read_token_price", "old": None, "new": "1.25"},
                ],
                "kept": [],
                "not_imported": [],
            }
        ],
        "unchanged": [],
        "not_in_source": ["meta-llama/Llama-3.3-70B-Instruct"],
        "refused": [],
        "others_in_source": document["others_in_source"],
    }


async def test_models_of_a_price_file_are_added_to_the_upstream_that_is_named(tmp_path: Path) -> None:
    config = configure(tmp_path)
    source = ("--from-file", str(PRICE_FILE), "--upstream", "files", "--add", "--only", "*dall-e*", "claude-*")
    ended = await prices(config, "import", *source, "--yes")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "not imported: cache_creation_input_token_cost_above_1hr 0.000006" in ended.stdout
    assert models(config) == MODELS + (
        "  claude-sonnet-4-5: {upstream: files, input_token_price: 3, output_token_price: 15, "
        "cache_read_token_price: 0.3, cache_write_token_price: 3.75, tiers: [{above_input_tokens: 200000, "
        "input_token_price: 6, output_token_price: 22.5, cache_read_token_price: 0.6, cache_write_token_price: 7.5}], "
        "context_window: 1000000, max_output_tokens: 64000}\n"
        "  dall-e-3: {upstream: files, image_prices: {1024x1024: 0.0399999238144, 1024x1792/hd: 0.12}}\n"
    )


async def test_an_implausible_price_is_named_and_not_written(tmp_path: Path) -> None:
    wrong = {**PER_TOKEN, "input_token_price": 0.638}
    async with upstream(wrong) as server:
        config = configure(tmp_path, server.base_url)
        ended = await prices(config, "import", "--from-upstream", "ionet", "--yes")
    assert (ended.returncode, models(config)) == (1, MODELS)
    assert (
        "REFUSED, left as it is: meta-llama/Llama-3.3-70B-Instruct: input_token_price is 0.638 USD per token, which is "
        "638000 per million"
    ) in ended.stdout


async def test_without_a_terminal_or_a_yes_nothing_is_written(tmp_path: Path) -> None:
    config = configure(tmp_path)
    ended = await prices(config, "import", "--from-file", str(PRICE_FILE))
    assert (ended.returncode, models(config)) == (1, MODELS)
    assert "  input_token_price       5 -> 2.5\n" in ended.stdout
    assert ended.stderr == ("quota-gateway: nothing was written: standard input is no terminal to ask; add --yes\n")


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 1), ("n\n", 1), ("\x04", 1)])
def test_on_a_terminal_it_asks(tmp_path: Path, answer: str, code: int) -> None:
    config = configure(tmp_path)
    terminal, its_input = pty.openpty()
    command = ["prices", "import", "--from-file", str(PRICE_FILE), "--config", str(config)]
    try:
        os.write(terminal, answer.encode())
        ended = subprocess.run(
            [sys.executable, "-m", "gateway", *command],
            cwd=ROOT,
            stdin=its_input,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(terminal)
        os.close(its_input)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.index("input_token_price       5 -> 2.5") < ended.stdout.index("write? [y/N]")
    assert (models(config) != MODELS) == (code == 0) == ("written: " in ended.stdout)
    assert ended.stdout.endswith("nothing was written\n") == (code == 1)


@pytest.mark.parametrize(
    ("status", "entries", "problem"),
    [
        (503, (), "answers 503"),
        (403, (), "answers 403: check its api_key"),
        (200, ({"id": "m"},), "has 1 models and no price in a known place"),
    ],
)
async def test_an_upstream_without_prices_is_an_error(
    tmp_path: Path, status: int, entries: tuple[dict[str, Any], ...], problem: str
) -> None:
    async with upstream(*entries, status=status) as server:
        ended = await prices(configure(tmp_path, server.base_url), "diff", "--from-upstream", "ionet")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"quota-gateway: upstream ionet, GET {server.base_url}/models: {problem}")
    assert KEY not in ended.stderr


async def test_a_list_beyond_the_limit_and_an_upstream_that_is_away_are_errors(tmp_path: Path) -> None:
    async with upstream(PER_TOKEN, filling="x" * (8 * 2**20)) as server:
        config = configure(tmp_path, server.base_url)
        ended = await prices(config, "diff", "--from-upstream", "ionet")
        assert (ended.returncode, ended.stderr.endswith("the answer has more than 8388608 bytes\n")) == (1, True)
    ended = await prices(config, "diff", "--from-upstream", "ionet")
    assert ended.returncode == 1 and "Connect call failed" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("diff", "--from-upstream", "ione"), "'ione' is no upstream of the configuration: did you mean ionet?"),
        (("diff", "--from-file", "none.json"), "price file none.json: cannot be read: No such file or directory"),
        (("diff", "--from-file", str(PRICE_FILE), "--add"), "--add needs --upstream NAME beside --from-file: the"),
        (("diff", "--from-upstream", "ionet", "--upstream", "files"), "--upstream files is for a file: the list is"),
        (("import", "--from-file", str(PRICE_FILE), "--json"), "--json asks nothing: add --yes, or look with"),
    ],
)
async def test_what_was_asked_wrongly_is_said_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    config = configure(tmp_path)
    ended = await prices(config, *arguments)
    assert (ended.returncode, ended.stdout, models(config)) == (1, "", MODELS)
    assert ended.stderr.startswith(f"quota-gateway: {problem}") and ended.stderr.count("\n") == 1


def test_the_configuration_that_ships_is_not_written_to() -> None:
    command = [sys.executable, "-m", "gateway", "prices", "import", "--from-file", str(PRICE_FILE), "--yes"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("quota-gateway: says no --config: the configuration that ships is not for changing")


async def test_a_configuration_with_mistakes_is_said_to_have_them(tmp_path: Path) -> None:
    config = configure(tmp_path)
    (tmp_path / "models.yaml").write_text(MODELS.replace("0.768", "dear"))
    ended = await prices(config, "import", "--from-file", str(PRICE_FILE), "--yes")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert (
        "models.yaml:7:25: models.meta-llama/Llama-3.3-70B-Instruct.output_token_price must be a price" in ended.stderr
    )
