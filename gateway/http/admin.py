"""The admin listener: metrics for Prometheus, health for whatever restarts or routes around a gateway, and the admin
API, so far the reload of the configuration."""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from gateway.config.changes import Changes
from gateway.config.model import Secret
from gateway.config.problem import ConfigError

_log = logging.getLogger(__name__)

#: Probes of orchestrators give up after one second by default: an answer must be there before.
CHECK_TIMEOUT_SECONDS = 1.0

OK = "ok"

#: Answers None when the component works, else what is wrong with it, in words that may be shown to anyone.
Check = Callable[[], Awaitable[str | None]]


#: The token as it is now; None where none is set.
Token = Callable[[], Secret | None]

#: The metrics' text and its content type, for what a client says that it accepts.
Scrape = Callable[[str | None], Awaitable[tuple[bytes, str]]]

#: Reads the configuration files again; raises ConfigError.
Reload = Callable[[], Awaitable[Changes]]


@dataclass(frozen=True, slots=True)
class Health:
    """The components that a gateway needs to admit requests, each with its check."""

    components: Mapping[str, Check]

    async def report(self) -> dict[str, str]:
        """``ok`` or what is wrong, by component. All checks run at once, each for at most CHECK_TIMEOUT_SECONDS."""
        states = await asyncio.gather(*(_state(name, check) for name, check in self.components.items()))
        return dict(zip(self.components, states, strict=True))


async def _state(name: str, check: Check) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS) as limit:
            return await check() or OK
    except Exception as error:
        if limit.expired():
            return f"no answer within {CHECK_TIMEOUT_SECONDS:g} s"
        # Anyone may read this answer, and an exception's text can name hosts and users: the log has the rest.
        _log.warning("the health check of %s failed", name, exc_info=error)
        return f"the check failed: {type(error).__name__}"


def admin_app(health: Health, scrape: Scrape, token: Token, reload: Reload) -> web.Application:
    """The admin listener's application: GET and HEAD of /metrics, /livez and /readyz, POST of /admin/v1/reload.

    token: what all but health asks for as a bearer token; None leaves it open. Health is always open, because probes
    cannot keep secrets.
    """
    admin = _Admin(health, scrape, token, reload)
    app = web.Application(middlewares=[_json_errors])
    app.router.add_get("/livez", admin.livez)
    app.router.add_get("/readyz", admin.readyz)
    app.router.add_get("/metrics", admin.metrics)
    app.router.add_post("/admin/v1/reload", admin.reload)
    return app


class _Admin:
    def __init__(self, health: Health, scrape: Scrape, token: Token, reload: Reload) -> None:
        self._health = health
        self._scrape = scrape
        self._token = token
        self._reload = reload

    async def livez(self, _request: web.Request) -> web.Response:
        return _json(200, {"status": "alive"})

    async def readyz(self, _request: web.Request) -> web.Response:
        components = await self._health.report()
        ready = all(state == OK for state in components.values())
        return _json(200 if ready else 503, {"status": "ready" if ready else "not_ready", "components": components})

    async def metrics(self, request: web.Request) -> web.Response:
        if not self._is_admin(request):
            return _unauthorized()
        body, content_type = await self._scrape(request.headers.get(hdrs.ACCEPT))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def reload(self, request: web.Request) -> web.Response:
        if not self._is_admin(request):
            return _unauthorized()
        try:
            found = await self._reload()
        except ConfigError as error:
            count = len(error.problems)
            message = f"The configuration has {count} mistake{'s' if count > 1 else ''}; the one before stays in force."
            problems = [str(problem) for problem in error.problems]
            return _error(422, "invalid_configuration", message, {}, {"problems": problems})
        return _json(
            200,
            {
                "status": "reloaded",
                "changed": found.applied,
                "needs_restart": found.needs_restart,
                "removed_plans": found.removed_plans,
            },
        )

    def _is_admin(self, request: web.Request) -> bool:
        token = self._token()
        if token is None:
            return True
        authorization = request.headers.get(hdrs.AUTHORIZATION, "")
        scheme, _, offered = authorization.partition(" ")
        # surrogateescape: aiohttp decodes headers so, and bytes that are not UTF-8 are a wrong token, not a crash.
        return scheme.lower() == "bearer" and hmac.compare_digest(
            offered.strip().encode(errors="surrogateescape"), token.reveal().encode()
        )


@web.middleware
async def _json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = error.headers[hdrs.ALLOW]
        message = f"{request.path} answers {allowed}, not {request.method}."
        return _error(405, "method_not_allowed", message, {hdrs.ALLOW: allowed})
    except web.HTTPNotFound:
        return _error(404, "not_found", "The admin listener serves /metrics, /livez, /readyz and /admin/v1/reload.", {})


def _unauthorized() -> web.Response:
    message = "Send the admin token as 'Authorization: Bearer <token>'."
    return _error(401, "invalid_admin_token", message, {hdrs.WWW_AUTHENTICATE: "Bearer"})


def _error(
    status: int, code: str, message: str, headers: Mapping[str, str], metadata: Mapping[str, object] | None = None
) -> web.Response:
    error: dict[str, object] = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    if metadata is not None:
        error["metadata"] = metadata
    return _json(status, {"type": "error", "error": error}, headers)


def _json(status: int, body: object, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(body),
        content_type="application/json",
        headers={hdrs.CACHE_CONTROL: "no-store", **(headers or {})},
    )
