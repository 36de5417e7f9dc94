"""The README is true: its commands run, its transcripts are what is printed, its snippets talk to a real gateway."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gateway.config.load import load, shipped_dir
from tests.gateway_process import Gateway, run_cli, running_gateway

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def block(mark: str) -> str:
    """The fenced block under the comment ``<!-- MARK -->``."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w*\n(.*?)\n```", README, re.DOTALL)
    assert found, f"the README has no block {mark!r}"
    return found[1]


def masked(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, word in (
        (r"sk-qg-[\w-]{43}", "KEY"),
        (r"req_[0-9a-f]{24}", "REQUEST"),
        (r"127\.0\.0\.1:\d+", "ADDRESS"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
        (r"in \d+ (h|min|s)( \d+ min)?", "in A WHILE"),
    ):
        text = re.sub(pattern, word, text)
    return text.strip()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The shipped configuration on an empty store, with the demo model."""
    environment = {"IONET_API_KEY": ""}
    data_dir = tmp_path_factory.mktemp("readme") / "data"
    with running_gateway(shipped_dir() / "gateway.yaml", data_dir=data_dir, env=environment) as running:
        yield running


def test_the_transcripts_are_what_is_printed(gateway: Gateway) -> None:
    assert masked(gateway.stdout) == masked(block("transcript: serve"))
    curl = gateway.stdout[gateway.stdout.index("curl -i") :]
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=30, check=True).stdout
    answered = iter(masked(answer).splitlines())
    assert all(line in answered for line in masked(block("transcript: curl")).splitlines())  # in this order
    shown = run_cli(
        gateway.config,
        "credits",
        "show",
        "default",
        "--data-dir",
        str(gateway.data_dir),
        environment=gateway.environment,
    )
    command, *lines = block("transcript: credits show").splitlines()
    assert command.endswith("quota-gateway credits show default")
    assert masked(shown.stdout) == masked("\n".join(lines))


def test_a_lost_key_has_a_successor(tmp_path: Path) -> None:
    """By the command that README gives, which a later start repeats."""
    assert "quota-gateway keys create default` makes another" in README
    config, environment = shipped_dir() / "gateway.yaml", {"IONET_API_KEY": ""}
    for start in range(2):
        with running_gateway(config, data_dir=tmp_path / "data", env=environment) as running:
            assert ("for the first account, default" in running.stdout) == bool(start)
            if start:
                made = run_cli(
                    config, "keys", "create", "default", "--data-dir", str(running.data_dir), environment=environment
                )
                assert "sk-qg-" in made.stdout


def test_what_compose_shows_is_where_the_readme_says() -> None:
    services = yaml.safe_load((REPOSITORY / "config" / "compose.yaml").read_text())["services"]
    for name in ("grafana", "prometheus"):
        (published,) = services[name]["ports"]
        assert f"{name.capitalize()} on http://{published.rpartition(':')[0]}" in README


@pytest.mark.parametrize("mark", ["snippet: openai python", "snippet: langchain", "snippet: curl"])
def test_snippets_get_an_answer(gateway: Gateway, mark: str) -> None:
    interpreter = ["bash", "-c"] if mark.endswith("curl") else [sys.executable, "-W", "ignore", "-c"]
    assert_answers([*interpreter, block(mark)], gateway)


def test_the_media_snippet_gets_priced_answers(tmp_path: Path) -> None:
    config = REPOSITORY / "config" / "openai" / "gateway.yaml"
    assert "--config config/openai/gateway.yaml" in README
    with running_gateway(config, data_dir=tmp_path / "data", env={"OPENAI_UPSTREAM_KEY": ""}) as gateway:
        assert "DEMO MODEL: no upstream has a key (openai)" in gateway.stdout
        assert "IONET" not in gateway.stdout  # the variable of another configuration
        environment = {**os.environ, "OPENAI_BASE_URL": gateway.base_url, "OPENAI_API_KEY": gateway.key or ""}
        command = ["bash", "-euc", block("snippet: media")]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("200 OK") == 3, ended.stdout
        assert "x-credits-cost: 0.011" in ended.stdout.splitlines()
        assert (tmp_path / "hello.wav").read_bytes().startswith(b"RIFF")
        assert "This is the demo model" in ended.stdout
        letters = 12 * 15_000
        recorded = gateway.cli("credits", "show", "default")["allowance"]["used"]
        assert float(recorded) > 0.011 + letters / 10**9


@pytest.mark.long
def test_the_node_snippet_gets_an_answer(gateway: Gateway, tmp_path: Path) -> None:
    if not shutil.which("npm"):
        if os.environ.get("QUOTA_GATEWAY_REQUIRE_NODE"):
            pytest.fail("npm is not installed")
        pytest.skip("npm is not installed")
    subprocess.run(["npm", "install", "--silent", "openai"], cwd=tmp_path, timeout=110, check=True)
    (tmp_path / "snippet.mjs").write_text(block("snippet: openai node"))
    assert_answers(["node", str(tmp_path / "snippet.mjs")], gateway)


def assert_answers(command: list[str], gateway: Gateway) -> None:
    environment = {**os.environ, "OPENAI_BASE_URL": gateway.base_url, "OPENAI_API_KEY": gateway.key or ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "This is the demo model" in ended.stdout
    if "credits" in " ".join(command):
        assert re.search(r"credits: (\d\.\d+|[\d.]+e-\d+)", ended.stdout)


def test_operator_commands_run(gateway: Gateway) -> None:
    for line in block("commands: operator").splitlines():
        command = line.split("#")[0].split()
        assert command[0] == "quota-gateway"
        ended = run_cli(
            gateway.config, *command[1:], "--data-dir", str(gateway.data_dir), environment=gateway.environment
        )
        assert ended.returncode == 0, ended.stderr


def test_configurations_in_the_readme_and_in_config_are_right(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text(block("config: local upstream"))
    assert run_cli(tmp_path / "local.yaml", "check-config").returncode == 0
    assert not load(tmp_path / "local.yaml", {}).demo
    (tmp_path / "shared.yaml").write_text(block("config: shared store"))
    (tmp_path / "plans.yaml").write_text(block("file: config/plans.yaml"))
    (tmp_path / "models.yaml").write_text((REPOSITORY / "config" / "models.yaml").read_text())
    assert load(tmp_path / "shared.yaml", {}).archive.url.startswith("sqlite:////")
    quoted = yaml.safe_load(block("file: config/plans.yaml"))
    assert quoted == yaml.safe_load((REPOSITORY / "config" / "plans.yaml").read_text())
    for name in ("gateway.yaml", "openai/gateway.yaml"):
        assert run_cli(REPOSITORY / "config" / name, "check-config").returncode == 0


def test_each_failure_in_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) >= 8
    for path, test in named:
        assert re.search(rf"def {test}\(", (REPOSITORY / path).read_text()), f"{path}::{test}"


def test_the_figures_of_the_cost_are_those_that_the_benchmark_wrote() -> None:
    figures = re.search(r"<!-- figures: cost -->\n(.*?)\n<!-- end of figures -->", README, re.DOTALL)
    assert figures
    assert figures[1].strip() == (REPOSITORY / "tests/benchmarks/cost/result.md").read_text().strip()


def test_the_gate_runs_the_test_command_of_the_readme() -> None:
    assert "command: install and test" in (REPOSITORY / ".ci" / "run").read_text()
    assert block("command: install and test").endswith(".venv/bin/pytest -n 2")


@pytest.mark.long
def test_the_first_command_serves_from_a_fresh_copy(tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (REPOSITORY / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / name)
    command = block("command: install and serve") + " --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0"
    environment = {**os.environ, "IONET_API_KEY": ""}
    with (tmp_path / "out").open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", f"exec 2>&1; {command}"], cwd=tmp_path, stdout=out, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 110
        while "try it" not in (tmp_path / "out").read_text() and time.monotonic() < deadline and shell.poll() is None:
            time.sleep(0.1)
        printed = (tmp_path / "out").read_text()
        assert masked(block("transcript: serve")) in masked(printed)
        assert "sk-qg-" in printed
    finally:
        os.killpg(shell.pid, signal.SIGTERM)  # the shell and the gateway: a group of our own
        shell.wait(60)
