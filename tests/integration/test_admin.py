"""The admin listener over HTTP."""

import asyncio
from typing import Any

import pytest
from pytest_aiohttp.plugin import AiohttpClient

from gateway.config.changes import Changes
from gateway.config.model import Secret
from gateway.config.problem import ConfigError, Problem
from gateway.front import Front
from gateway.http.admin import Health, admin_app
from gateway.telemetry.metrics import Metrics

TOKEN = "a-token-only-for-tests"


async def fine() -> None:
    """Nothing is wrong."""


async def broken() -> str:
    return "the server does not answer"


async def raises() -> str | None:
    raise ConnectionError("redis://user:hunter2@store:6379 refused")


async def hangs() -> None:
    await asyncio.Event().wait()


async def gives_up_itself() -> None:
    raise TimeoutError


class Admin:
    """Builds the application with the checks of one test. token: changes while it runs. found: what a reload finds."""

    def __init__(self, aiohttp_client: AiohttpClient) -> None:
        self._client = aiohttp_client
        self.token: str | None = None
        self.found: Changes | ConfigError = Changes((), (), ())
        self.reloads = 0

    async def __call__(self, token: str | None = None, **components: Any) -> Any:
        self.token = token
        metrics = Metrics(["standard"], ["llama"])
        return await self._client(admin_app(Health(components), Front(metrics).scrape, self._token, self._reload))

    def _token(self) -> Secret | None:
        return Secret(self.token) if self.token else None

    async def _reload(self) -> Changes:
        self.reloads += 1
        if isinstance(self.found, ConfigError):
            raise self.found
        return self.found


@pytest.fixture
def admin(aiohttp_client: AiohttpClient) -> Admin:
    return Admin(aiohttp_client)


async def test_ready_when_every_component_is(admin: Admin) -> None:
    answer = await (await admin(store=fine, upstreams=fine)).get("/readyz")
    assert answer.status == 200
    assert await answer.json() == {"status": "ready", "components": {"store": "ok", "upstreams": "ok"}}


async def test_not_ready_names_the_component_and_what_is_wrong(admin: Admin) -> None:
    answer = await (await admin(store=broken, upstreams=fine)).get("/readyz")
    assert answer.status == 503
    components = {"store": "the server does not answer", "upstreams": "ok"}
    assert await answer.json() == {"status": "not_ready", "components": components}


async def test_a_check_that_fails_is_that_component_s_failure(admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
    answer = await (await admin(store=raises, upstreams=fine)).get("/readyz")
    assert answer.status == 503
    body = await answer.text()
    assert '"store":"the check failed: ConnectionError"' in body
    assert "hunter2" not in body
    assert "the health check of store failed" in caplog.text


async def test_a_check_that_hangs_is_given_up(admin: Admin) -> None:
    answer = await (await admin(store=hangs, other=hangs, upstreams=fine)).get("/readyz")
    assert answer.status == 503
    components = {"store": "no answer within 1 s", "other": "no answer within 1 s", "upstreams": "ok"}
    assert (await answer.json())["components"] == components


async def test_a_timeout_of_the_check_s_own_is_not_ours(admin: Admin) -> None:
    answer = await (await admin(store=gives_up_itself)).get("/readyz")
    assert (await answer.json())["components"] == {"store": "the check failed: TimeoutError"}


async def test_alive_whatever_the_components_do(admin: Admin) -> None:
    answer = await (await admin(store=broken, other=hangs)).get("/livez")
    assert answer.status == 200
    assert await answer.json() == {"status": "alive"}
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 503), ("/metrics", 200)])
async def test_head_answers_as_get_without_a_body(admin: Admin, path: str, status: int) -> None:
    answer = await (await admin(store=broken)).head(path)
    assert answer.status == status
    assert await answer.read() == b""


async def test_metrics_in_the_format_that_is_asked_for(admin: Admin) -> None:
    client = await admin()
    plain = await client.get("/metrics")
    assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "quota_gateway_build_info{" in await plain.text()
    openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert (await openmetrics.text()).endswith("# EOF\n")


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer  {TOKEN} "])
async def test_the_token_opens_the_metrics(admin: Admin, authorization: str) -> None:
    answer = await (await admin(TOKEN)).get("/metrics", headers={"Authorization": authorization})
    assert answer.status == 200


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer t\udcffken"]
)
async def test_no_metrics_without_the_token(admin: Admin, authorization: str) -> None:
    answer = await (await admin(TOKEN)).get("/metrics", headers={"Authorization": authorization})
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert (await answer.json())["error"]["code"] == "invalid_admin_token"
    assert TOKEN not in await answer.text()


async def test_health_needs_no_token(admin: Admin) -> None:
    client = await admin(TOKEN, store=fine)
    assert (await client.get("/livez")).status == 200
    assert (await client.get("/readyz")).status == 200


async def test_an_unknown_path_is_told_in_json(admin: Admin) -> None:
    answer = await (await admin()).get("/nowhere")
    assert answer.status == 404
    assert answer.content_type == "application/json"
    assert (await answer.json())["error"]["code"] == "not_found"


async def test_a_wrong_method_is_told_in_json(admin: Admin) -> None:
    answer = await (await admin()).post("/readyz")
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET,HEAD"
    assert (await answer.json())["error"] == {
        "message": "/readyz answers GET,HEAD, not POST.",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }


async def test_a_reload_says_what_it_changed(admin: Admin) -> None:
    admin.found = Changes(("plans.pro added", "limits changed"), ("listen",), ("old",))
    answer = await (await admin()).post("/admin/v1/reload")
    assert answer.status == 200
    assert await answer.json() == {
        "status": "reloaded",
        "changed": ["plans.pro added", "limits changed"],
        "needs_restart": ["listen"],
        "removed_plans": ["old"],
    }


async def test_a_reload_of_a_bad_configuration_names_every_mistake(admin: Admin) -> None:
    admin.found = ConfigError([Problem("b.yaml", 2, 1, "plans is empty"), Problem("a.yaml", 1, 9, "listen is empty")])
    answer = await (await admin()).post("/admin/v1/reload")
    assert answer.status == 422
    error = (await answer.json())["error"]
    assert error["code"] == "invalid_configuration"
    assert error["message"] == "The configuration has 2 mistakes; the one before stays in force."
    assert error["metadata"] == {"problems": ["a.yaml:1:9: listen is empty", "b.yaml:2:1: plans is empty"]}


async def test_only_the_token_of_now_may_reload(admin: Admin) -> None:
    client = await admin(TOKEN)
    assert (await client.post("/admin/v1/reload")).status == 401
    assert admin.reloads == 0
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert (await client.post("/admin/v1/reload", headers=bearer)).status == 200
    admin.token = "another-token"
    assert (await client.post("/admin/v1/reload", headers=bearer)).status == 401
    assert admin.reloads == 1


async def test_a_reload_is_asked_for_with_post(admin: Admin) -> None:
    answer = await (await admin()).get("/admin/v1/reload")
    assert answer.status == 405
    assert admin.reloads == 0
