"""A running gateway takes over changed configuration files: no request is dropped and nobody's usage is reset."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.acceptance.conftest import BODY, HOLD, MODEL, NOON, STREAM, Answer, HeldUpstream, ask, new_account
from tests.gateway_process import INPUT_PRICE, OUTPUT_PRICE, Gateway, gateway_config, running_gateway
from tests.servers import MovableClock

DAILY = Decimal("0.10")
TOKEN = "a-token-only-for-tests"


class Files:
    """gateway.yaml, plans.yaml and models.yaml in a directory, replaced as most editors do: a new file takes the name.

    main, plans, models: what they hold, to be changed by a test and then saved.
    """

    def __init__(self, directory: Path, upstream: str) -> None:
        self.directory = directory
        config = gateway_config(upstream, [MODEL])
        self.plans: dict[str, Any] = {"plans": config["plans"]}
        self.models: dict[str, Any] = config["models"]
        self.main: dict[str, Any] = {
            "upstreams": config["upstreams"],
            "plans": "plans.yaml",
            "models": "models.yaml",
        }
        self.save()

    @property
    def path(self) -> Path:
        return self.directory / "gateway.yaml"

    def save(self) -> None:
        for name in ("main", "plans", "models"):
            self.write(name, yaml.safe_dump(getattr(self, name)))

    def write(self, name: str, text: str) -> None:
        """Replace one file by any text."""
        file = self.path if name == "main" else self.directory / f"{name}.yaml"
        if file.exists() and file.read_text() == text:
            return
        new = file.with_suffix(".new")
        new.write_text(text)
        new.replace(file)


@dataclass(frozen=True)
class Served:
    """A gateway and its files."""

    gateway: Gateway
    files: Files
    session: aiohttp.ClientSession

    async def ask(self, body: bytes = BODY, key: str | None = None) -> Answer:
        key = key or self.gateway.key
        assert key is not None
        return await ask(self.session, self.gateway, key, body)

    async def prices(self) -> dict[str, Decimal]:
        """The output prices per million tokens of GET /v1/models."""
        headers = {"Authorization": f"Bearer {self.gateway.key}"}
        async with self.session.get(self.gateway.base_url + "/models", headers=headers) as answer:
            listed = json.loads(await answer.read(), parse_float=Decimal)["data"]
        return {model["id"]: model["output_token_price"] * 1_000_000 for model in listed}

    async def reload(self, token: str | None = None) -> tuple[int, Any]:
        """Status and body of the admin endpoint."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self.session.post(self.gateway.admin_url + "/admin/v1/reload", headers=headers) as answer:
            return answer.status, await answer.json()

    async def save(self) -> Any:
        """Save the files and have them read at once; what that changed."""
        self.files.save()
        status, body = await self.reload()
        assert status == 200
        return body

    async def logged(self, text: str, count: int = 1) -> None:
        """Wait until the log has that many lines with text."""
        async with asyncio.timeout(30):
            while sum(text in line for line in self.gateway.stderr.splitlines()) < count:
                await asyncio.sleep(0.05)

    async def metric(self, name: str) -> float:
        async with self.session.get(self.gateway.admin_url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith(f"{name} "))
        return float(value)


def remaining(answer: Answer) -> Decimal:
    return Decimal(answer.headers["x-credits-allowance-remaining"])


def cost(answer: Answer) -> Decimal:
    """What an answer cost, streamed or not."""
    if "x-credits-cost" in answer.headers:
        return answer.cost
    return Decimal(answer.events[-1]["usage"]["credits"]["cost"])


def price_of(upstream: HeldUpstream, output_price: Decimal) -> Decimal:
    """What one of its answers costs at another output price; exact for the counts and prices used here."""
    return (upstream.prompt_tokens * INPUT_PRICE + upstream.completion_tokens * output_price) / 1_000_000


@pytest.fixture
def files(tmp_path: Path, upstream: HeldUpstream) -> Files:
    directory = tmp_path / "config"
    directory.mkdir()
    return Files(directory, upstream.base_url)


@asynccontextmanager
async def serving(
    files: Files, session: aiohttp.ClientSession, data_dir: Path, clock: MovableClock
) -> AsyncIterator[Served]:
    with running_gateway(files.path, data_dir=data_dir, clock=clock) as gateway:
        yield Served(gateway, files, session)
        assert "Traceback" not in gateway.stderr


@pytest.fixture
async def served(
    files: Files, session: aiohttp.ClientSession, tmp_path: Path, clock: MovableClock
) -> AsyncIterator[Served]:
    async with serving(files, session, tmp_path / "data", clock) as served:
        yield served


# --- prices and models ----------------------------------------------------------------------------------------------


async def test_a_changed_price_is_for_the_next_request_not_for_one_in_flight(
    served: Served, upstream: HeldUpstream
) -> None:
    upstream.hold()
    before = [asyncio.create_task(served.ask(body)) for body in (STREAM, BODY)]
    await upstream.wait_for_requests(2)
    new_price = OUTPUT_PRICE * 3
    served.files.models["models"][MODEL]["output_token_price"] = str(new_price)
    served.files.save()
    await served.logged(f"configuration reloaded: models.{MODEL} changed")
    after = [asyncio.create_task(served.ask(body)) for body in (STREAM, BODY)]
    await upstream.wait_for_requests(4)
    upstream.release()
    assert [cost(await answer) for answer in before] == [upstream.cost] * 2
    assert [cost(await answer) for answer in after] == [price_of(upstream, new_price)] * 2
    assert await served.prices() == {MODEL: new_price}


async def test_a_removed_model_is_unknown_but_its_request_in_flight_is_answered_and_paid(
    served: Served, upstream: HeldUpstream
) -> None:
    upstream.hold()
    before = [asyncio.create_task(served.ask(body)) for body in (STREAM, BODY)]
    await upstream.wait_for_requests(2)
    models = served.files.models["models"]
    models["other"] = models.pop(MODEL)
    assert (await served.save())["changed"] == [f"models.{MODEL} removed", "models.other added"]
    refused = await served.ask()
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")
    added = asyncio.create_task(served.ask(BODY.replace(MODEL.encode(), b"other")))
    await upstream.wait_for_requests(3)
    upstream.release()
    for answer in (*before, added):
        assert (await answer).status == 200
        assert cost(await answer) == upstream.cost
    assert list(await served.prices()) == ["other"]


async def test_a_changed_upstream_gets_the_next_request(served: Served, upstream: HeldUpstream) -> None:
    async with HeldUpstream() as other:
        upstream.hold()
        before = asyncio.create_task(served.ask())
        await upstream.wait_for_requests(1)
        served.files.main["upstreams"]["test"]["base_url"] = other.base_url
        assert (await served.save())["changed"] == ["upstreams.test changed"]
        assert (await served.ask()).status == 200
        upstream.release()
        assert (await before).status == 200
        assert (len(upstream.requests), len(other.requests)) == (1, 1)


async def test_no_request_is_dropped_while_the_configuration_changes(served: Served, upstream: HeldUpstream) -> None:
    async def keep_asking() -> list[Answer]:
        return [await served.ask(body) for body in (BODY, STREAM) * 10]

    asking = [asyncio.create_task(keep_asking()) for _ in range(5)]
    prices = [OUTPUT_PRICE * times for times in (2, 1, 3, 1)]
    for price in prices:
        served.files.models["models"][MODEL]["output_token_price"] = str(price)
        assert (await served.save())["changed"] == [f"models.{MODEL} changed"]
    answers = [answer for several in await asyncio.gather(*asking) for answer in several]
    assert {answer.status for answer in answers} == {200}
    assert {cost(answer) for answer in answers} <= {price_of(upstream, price) for price in prices}
    last = await served.ask()
    assert remaining(last) == DAILY - sum(cost(answer) for answer in (*answers, last))


async def test_the_demo_model_knows_new_and_renamed_models(
    files: Files, session: aiohttp.ClientSession, tmp_path: Path, clock: MovableClock
) -> None:
    files.main["upstreams"]["test"]["api_key"] = ""
    files.save()
    async with serving(files, session, tmp_path / "data", clock) as served:
        assert (await served.ask()).status == 200
        files.models["models"]["new"] = files.models["models"][MODEL]
        files.models["models"]["renamed"] = files.models["models"][MODEL] | {"upstream_model": "theirs"}
        await served.save()
        for model in (MODEL, "new", "renamed"):
            answer = await served.ask(BODY.replace(MODEL.encode(), model.encode()))
            assert (answer.status, answer.document["system_fingerprint"]) == (200, "quota-gateway-demo")


# --- plans ----------------------------------------------------------------------------------------------------------


async def test_a_raised_amount_is_granted_from_the_next_refresh(
    served: Served, upstream: HeldUpstream, clock: MovableClock
) -> None:
    assert remaining(await served.ask()) == DAILY - upstream.cost
    served.files.plans["plans"]["standard"]["allowance"]["per_window"] = "0.25"
    served.files.save()
    await served.logged("configuration reloaded: plans.standard changed")
    assert remaining(await served.ask()) == DAILY - 2 * upstream.cost
    clock.set_to(NOON + timedelta(days=1))
    assert remaining(await served.ask()) == Decimal("0.25") - upstream.cost


async def test_a_window_is_added_and_removed_without_resetting_what_was_used(
    served: Served, upstream: HeldUpstream, clock: MovableClock
) -> None:
    await served.ask()
    plan = served.files.plans["plans"]["standard"]
    daily, hourly = plan["allowance"], {"per_window": str(2 * HOLD), "refresh": "1h"}
    plan["allowance"] = [daily, hourly]
    assert (await served.save())["changed"] == ["plans.standard changed"]
    # The hour counts what was used before it was a window; the tightest one is told.
    assert remaining(await served.ask()) == 2 * HOLD - 2 * upstream.cost
    clock.set_to(NOON + timedelta(hours=1, minutes=1))
    assert remaining(await served.ask()) == 2 * HOLD - upstream.cost
    plan["allowance"] = daily
    await served.save()
    assert remaining(await served.ask()) == DAILY - 4 * upstream.cost


async def test_accounts_on_a_removed_plan_are_refused_and_keep_what_they_used(
    served: Served, upstream: HeldUpstream
) -> None:
    key = new_account(served.gateway, "acme", "professional")
    first = await served.ask(key=key)
    plans = served.files.plans["plans"]
    removed = plans.pop("professional")
    body = await served.save()
    assert (body["changed"], body["removed_plans"]) == (["plans.professional removed"], ["professional"])
    await served.logged("plans removed: professional; accounts on them are refused until set-plan moves them")
    refused = await served.ask(key=key)
    assert (refused.status, refused.error["code"]) == (503, "plan_not_configured")
    assert (await served.ask()).status == 200
    plans["professional"] = removed
    await served.save()
    assert remaining(await served.ask(key=key)) == remaining(first) - upstream.cost


# --- mistakes -------------------------------------------------------------------------------------------------------


async def test_a_bad_file_changes_nothing_until_it_is_mended(served: Served, upstream: HeldUpstream) -> None:
    read_at = await served.metric("quota_gateway_config_last_reload_seconds")
    served.files.models["models"][MODEL]["output_token_price"] = str(OUTPUT_PRICE * 2)
    broken = yaml.safe_dump(served.files.models).replace("upstream: test", "upstream: tset")
    served.files.write("models", broken.replace("context_window: 4096", "context_window: many"))
    await served.logged("configuration not reloaded", 2)
    assert await served.metric("quota_gateway_config_last_reload_successful") == 0
    assert await served.metric("quota_gateway_config_last_reload_seconds") == read_at
    assert (await served.ask()).cost == upstream.cost

    status, body = await served.reload()
    assert (status, body["error"]["code"]) == (422, "invalid_configuration")
    file = served.files.directory / "models.yaml"
    problems = body["error"]["metadata"]["problems"]
    assert [problem.rpartition(f"models.{MODEL}.")[2] for problem in problems] == [
        "context_window must be a whole number from 1 to 10000000, not 'many'",
        "upstream names no upstream, it is 'tset': did you mean test?",
    ]
    assert all(problem.startswith(f"{file}:") for problem in problems)
    logged = [json.loads(line)["message"] for line in served.gateway.stderr.splitlines()]
    assert all(f"configuration not reloaded: {problem}" in logged for problem in problems)

    served.files.save()
    await served.logged(f"configuration reloaded: models.{MODEL} changed")
    assert await served.metric("quota_gateway_config_last_reload_successful") == 1
    assert await served.metric("quota_gateway_config_last_reload_seconds") >= read_at
    assert (await served.ask()).cost == price_of(upstream, OUTPUT_PRICE * 2)


async def test_what_needs_a_restart_is_named_and_the_rest_is_taken_over(served: Served, upstream: HeldUpstream) -> None:
    served.files.main |= {"store": {"timeout": "3s"}, "archive": {"url": "sqlite:///elsewhere.sqlite3"}}
    served.files.models["models"][MODEL]["output_token_price"] = str(OUTPUT_PRICE * 2)
    body = await served.save()
    assert body["changed"] == [f"models.{MODEL} changed"]
    assert body["needs_restart"] == ["store.timeout", "archive.url"]
    await served.logged("changed but not applied before a restart: store.timeout, archive.url")
    assert (await served.ask()).cost == price_of(upstream, OUTPUT_PRICE * 2)


async def test_the_listeners_of_the_command_line_are_no_change(served: Served) -> None:
    assert await served.reload() == (
        200,
        {"status": "reloaded", "changed": [], "needs_restart": [], "removed_plans": []},
    )


async def test_the_admin_token_can_be_set_and_changed(served: Served) -> None:
    served.files.main["admin"] = {"token": TOKEN}
    assert (await served.save())["changed"] == ["admin.token changed"]
    status, body = await served.reload()
    assert (status, body["error"]["code"]) == (401, "invalid_admin_token")
    served.files.main["admin"] = {"token": "another-token"}
    served.files.save()
    assert (await served.reload(TOKEN))[0] == 200
    assert (await served.reload(TOKEN))[0] == 401
    assert (await served.reload("another-token"))[0] == 200
    assert TOKEN not in served.gateway.stderr


# --- how files change -----------------------------------------------------------------------------------------------


async def test_a_swapped_link_is_followed(
    files: Files, session: aiohttp.ClientSession, tmp_path: Path, clock: MovableClock, upstream: HeldUpstream
) -> None:
    """As Kubernetes updates a ConfigMap: gateway.yaml → ..data/gateway.yaml, and ..data → the version."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    names = [file.name for file in files.directory.iterdir()]
    first = mounted / "..first"
    files.directory.rename(first)
    files.directory = mounted
    (mounted / "..data").symlink_to(first.name)
    for name in names:
        (mounted / name).symlink_to(f"..data/{name}")
    async with serving(files, session, tmp_path / "data", clock) as served:
        assert (await served.ask()).cost == upstream.cost
        second = mounted / "..second"
        second.mkdir()
        for name in names:
            text = (first / name).read_text().replace(str(OUTPUT_PRICE), str(OUTPUT_PRICE * 2))
            (second / name).write_text(text)
        (mounted / "..new").symlink_to(second.name)
        (mounted / "..new").replace(mounted / "..data")
        await served.logged(f"configuration reloaded: models.{MODEL} changed")
        assert (await served.ask()).cost == price_of(upstream, OUTPUT_PRICE * 2)
