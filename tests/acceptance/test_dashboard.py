"""What config/ ships for operators, asked of a real Prometheus and of a gateway's own metrics."""

import asyncio
import json
import math
import os
import re
import shlex
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp.test_utils import TestServer
from prometheus_client.parser import text_string_to_metric_families

from gateway.front import Front
from gateway.http.admin import Health, admin_app
from gateway.telemetry.metrics import STORE_UNAVAILABLE, Metrics

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
DASHBOARD = json.loads((CONFIG / "grafana/dashboards/quota-gateway.json").read_text())
ALERTS = yaml.safe_load((CONFIG / "prometheus/alerts.yml").read_text())
SCRAPE = yaml.safe_load((CONFIG / "prometheus/prometheus.yml").read_text())
COMPOSE = yaml.safe_load((CONFIG / "compose.yaml").read_text())

#: What Grafana puts in place of its variables, for series that are seconds old.
GRAFANA = {"$__rate_interval": "10s", "$__range": "1m"}

#: Prometheus starts, scrapes a few times and answers; a machine that needs longer than this is stuck.
PATIENCE_SECONDS = 30


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries() -> dict[str, str]:
    """Every expression of the dashboard, as Grafana would send it, by panel and target."""
    queries = {}
    for panel in panels():
        for target in panel["targets"]:
            expr = target["expr"]
            for variable, text in GRAFANA.items():
                expr = expr.replace(variable, text)
            queries[f"{panel['id']} {panel['title']} {target['refId']}"] = expr
    return queries


def alert_queries() -> dict[str, str]:
    return {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}


def make_metrics() -> Metrics:
    metrics = Metrics(plans=["standard", "developer"], models=["llama"])
    metrics.watch_reservations_open(lambda: 3)
    metrics.upstream_inflight("ionet").add()
    metrics.overrun("ionet")
    return metrics


def drive(metrics: Metrics) -> None:
    """A little of everything that happens on a good day."""
    metrics.decided("admitted", "allowance", "standard")
    metrics.decided("denied", "insufficient_quota", "standard")
    metrics.reserved(3_000_000)
    metrics.settled("standard", "llama", "allowance", 1_000_000)
    metrics.settled("developer", "llama", "payg", 1_000_000)
    metrics.released("settled", 1_000_000)
    for phase in ("authenticate", "quote", "reserve", "forward", "settle"):
        metrics.phases[phase].observe(0.0004)
    metrics.store_seconds("reserve").observe(0.0002)
    metrics.stream_truncated("standard")
    metrics.ledger_archived(3)
    metrics.request_finished("chat", "llama", "ionet", 1.5, 200, 20, 0.3)


def trouble(metrics: Metrics) -> None:
    """Everything that an alert watches."""
    drive(metrics)
    metrics.decided("denied", STORE_UNAVAILABLE, "other")
    metrics.written_off(1_000_000)
    metrics.phases["reserve"].observe(0.9)
    metrics.lease_expired()
    metrics.journal_failed()
    metrics.watch_journal_pending(lambda: 2)
    metrics.ledger_archive_failed()
    metrics.config_reloaded(False)


# --- what can be checked without Prometheus ---------------------------------------------------------------------


def exposed() -> tuple[set[str], set[str]]:
    """Names of the gateway's own samples and of their labels."""
    metrics = make_metrics()
    trouble(metrics)
    families = text_string_to_metric_families(metrics.expose(None)[0].decode())
    samples = [sample for family in families for sample in family.samples]
    own = [sample for sample in samples if sample.name.startswith(("quota_gateway_", "gen_ai_"))]
    return {sample.name for sample in own}, {label for sample in own for label in sample.labels}


def named(queries: dict[str, str]) -> set[str]:
    """The gateway's metrics that the queries name. Some labels begin like metrics: they are left out."""
    words = {word for query in queries.values() for word in re.findall(r"\b(?:quota_gateway|gen_ai)_\w+", query)}
    return words - exposed()[1]


def test_every_metric_asked_for_exists() -> None:
    assert named(dashboard_queries())
    assert named(dashboard_queries()) <= exposed()[0]
    assert named(alert_queries()) <= exposed()[0]


def test_every_metric_is_shown() -> None:
    unseen = {name for name in exposed()[0] if not name.endswith(("_created", "_sum", "_count", "_bucket"))}
    assert unseen <= named(dashboard_queries())
    histograms = {name.removesuffix("_bucket") for name in exposed()[0] if name.endswith("_bucket")}
    shown = " ".join(dashboard_queries().values())
    assert [name for name in histograms if name not in shown] == []


def test_every_panel_can_be_told_apart_and_asks_the_chosen_prometheus() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
    for panel in panels():
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["datasource"]["uid"] for target in panel["targets"]] == ["${datasource}"] * len(panel["targets"])
    assert "$" not in " ".join(dashboard_queries().values())


def test_every_alert_says_what_to_look_at() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert "$labels.instance" in rule["annotations"]["summary"]
            assert rule["annotations"]["description"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where a service finds what, without the access mode: target → source."""
    return {target: source for source, target, *_ in (volume.split(":") for volume in service.get("volumes", []))}


def test_compose_mounts_only_what_exists() -> None:
    for service in COMPOSE["services"].values():
        for source in mounts(service).values():
            assert (CONFIG / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"]
    build = COMPOSE["services"]["gateway"]["build"]
    assert (CONFIG / build["context"] / build["dockerfile"]).is_file()


def test_compose_pins_images_and_publishes_to_this_machine_only() -> None:
    for name, service in COMPOSE["services"].items():
        assert "build" in service or re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert service["ports"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_compose_runs_the_gateway_as_its_image_does() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    gateway = COMPOSE["services"]["gateway"]
    command = json.loads(re.findall(r"^CMD (\[.*\])$", dockerfile, re.M)[-1])
    health = json.loads(re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile, re.M)[-1])
    assert gateway["command"] == command
    assert gateway["healthcheck"]["test"] == ["CMD", *health]
    assert "USER 10001:10001" in dockerfile
    (data_dir,) = mounts(gateway)
    assert f"VOLUME {data_dir}" in dockerfile
    assert command[-2:] == ["--data-dir", data_dir]


def test_what_the_image_is_built_from_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert {"gateway", "config", "pyproject.toml"} <= kept
    for name in re.findall(r"README\.md|LICENSE", pyproject):
        assert name in kept


def test_grafana_is_provisioned_with_what_compose_mounts() -> None:
    provisioning = CONFIG / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == SCRAPE["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/quota-gateway.yaml").read_text())["providers"]
    grafana = COMPOSE["services"]["grafana"]
    assert mounts(grafana)[provider["options"]["path"]] == "./grafana/dashboards"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert (CONFIG / "grafana/dashboards" / home.name).is_file()


# --- with a real Prometheus -------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """The path of one of Prometheus's programs; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed (Debian: apt install prometheus)"
        if os.environ.get("QUOTA_GATEWAY_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


@contextmanager
def bound_port() -> Iterator[int]:
    """A loopback port on which nobody listens while the context lasts."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@asynccontextmanager
async def driven_gateway(act: Callable[[Metrics], None]) -> AsyncIterator[str]:
    """An admin listener whose metrics act moves several times a second. Yields its host:port."""

    async def keep_moving() -> None:
        while True:
            act(metrics)
            await asyncio.sleep(0.1)

    async def no_reload() -> list[str]:
        raise AssertionError("nobody asks for one here")

    metrics = make_metrics()
    moving = asyncio.create_task(keep_moving())
    server = TestServer(admin_app(Health({}), Front(metrics).scrape, lambda: None, no_reload))
    await server.start_server()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await server.close()


class Prometheus:
    """The query API of a Prometheus that runs for one test."""

    def __init__(self, session: aiohttp.ClientSession, instances: dict[str, str]) -> None:
        self._session = session
        self.instances = instances

    async def get(self, path: str, **params: str) -> Any:
        async with self._session.get(path, params=params) as answer:
            body = await answer.json()
            assert body["status"] == "success", body
            return body["data"]

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The series that expr yields now, without those whose value is no number."""
        result = (await self.get("/api/v1/query", query=expr))["result"]
        return [series for series in result if math.isfinite(float(series["value"][1]))]


@asynccontextmanager
async def running_prometheus(tmp_path: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus with the shipped configuration, over a gateway in good health, one in trouble and one that is down.

    Only the targets and the intervals differ from what ships.
    """
    program = tool("prometheus")
    with bound_port() as port:
        pass  # Free again for Prometheus, which does not tell which port it got when asked to take any.
    with bound_port() as down:
        async with driven_gateway(drive) as healthy, driven_gateway(trouble) as troubled:
            instances = {"healthy": healthy, "troubled": troubled, "down": f"127.0.0.1:{down}"}
            config = tmp_path / "prometheus.yml"
            config.write_text(yaml.safe_dump(config_for(instances)))
            log = tmp_path / "prometheus.log"
            with log.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    program,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    stdout=output,
                    stderr=output,
                )
            try:
                async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                    await until_ready(process, session, log)
                    yield Prometheus(session, instances)
            finally:
                if process.returncode is None:
                    process.terminate()
                await process.wait()


def config_for(instances: dict[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(SCRAPE))
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG / "prometheus" / name) for name in SCRAPE["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": list(instances.values())}]
    return config


async def until_ready(process: asyncio.subprocess.Process, session: aiohttp.ClientSession, log: Path) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            assert process.returncode is None, log.read_text()
            try:
                async with session.get("/-/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)


async def wait_for_all(missing: Callable[[], Awaitable[list[str]]]) -> None:
    """Ask missing() until it returns nothing; fails with what is still missing when patience is at its end."""
    still = await missing()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while still:
                await asyncio.sleep(0.5)
                still = await missing()
    except TimeoutError:
        pytest.fail(f"Prometheus has nothing for {still}")


async def test_every_query_of_the_dashboard_returns_data(tmp_path: Path) -> None:
    queries = dashboard_queries()
    async with running_prometheus(tmp_path) as prometheus:

        async def without_data() -> list[str]:
            return [name for name, expr in queries.items() if not await prometheus.query(expr)]

        await wait_for_all(without_data)
        stored = set(await prometheus.get("/api/v1/label/__name__/values"))
    assert named(queries) <= stored


async def test_every_alert_fires_in_trouble_and_only_there(tmp_path: Path) -> None:
    alerts = alert_queries()
    async with running_prometheus(tmp_path) as prometheus:
        healthy = prometheus.instances["healthy"]

        async def instances(expr: str) -> set[str]:
            return {series["metric"]["instance"] for series in await prometheus.query(expr)}

        async def silent() -> list[str]:
            return [name for name, expr in alerts.items() if not await instances(expr) - {healthy}]

        async def unevaluated() -> list[str]:
            groups = (await prometheus.get("/api/v1/rules"))["groups"]
            states = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
            return [name for name in alerts if states.get(name) != "ok"]

        await wait_for_all(silent)
        await wait_for_all(unevaluated)
        assert [name for name, expr in alerts.items() if healthy in await instances(expr)] == []


@pytest.mark.parametrize("command", ["check config prometheus.yml", "check rules alerts.yml"])
async def test_promtool_accepts_the_configuration(command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        tool("promtool"),
        *shlex.split(command),
        cwd=CONFIG / "prometheus",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert f"{len(alert_queries())} rules found" in output.decode()
