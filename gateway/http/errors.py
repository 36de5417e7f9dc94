"""The one map from an outcome to what a client sees of it: status, headers, body.

The body satisfies OpenAI and Anthropic clients alike. Statuses and headers are chosen for what the SDKs do with
them: they sleep on Retry-After (some without limit), repeat 429 and 5xx unless ``x-should-retry`` says no, and
send 402 exactly once.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache

import orjson
from aiohttp import web

from gateway.domain.decision import Denied, Funds, Repeated, WindowFunds, affordable_nano
from gateway.domain.model import Model
from gateway.domain.money import format_credits
from gateway.domain.plan import Plan
from gateway.domain.price import FEMTO_PER_NANO
from gateway.domain.request import Bound, InvalidRequest, affordable_output, least_output
from gateway.upstream.client import UpstreamTimeout

_NO_RETRY = {"x-should-retry": "false"}
# Said where a part of the request's body may still be on its way: the connection cannot be used again.
_LAST = {"Connection": "close", **_NO_RETRY}
_BUSY_RETRY_S = 1
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that is an error. resets_at: seconds since 1970. metadata: values fit for JSON."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    resets_at: int | None = None

    def body(self, request_id: str) -> bytes:
        """The JSON body."""
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "metadata": dict(self.metadata),
        }
        if self.resets_at is not None:
            error["resets_at"] = self.resets_at
        return orjson.dumps({"type": "error", "error": error, "request_id": request_id})

    def for_anthropic(self) -> "Failure":
        """The same with the type that Anthropic's API has for such a status, and its clients know."""
        other = "api_error" if self.status >= 500 else "invalid_request_error"
        return replace(self, type=_ANTHROPIC_TYPES.get(self.status, other))

    def response(self, request_id: str, extra: Mapping[str, str] | None = None) -> web.Response:
        """The HTTP answer."""
        return web.Response(
            status=self.status,
            body=self.body(request_id),
            content_type="application/json",
            headers={"x-request-id": request_id, "request-id": request_id, **(extra or {}), **self.headers},
        )


@lru_cache(maxsize=256)
def rfc3339(epoch_ms: int) -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(epoch_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def duration(span_ms: int) -> str:
    """A window's length as the configuration writes it: ``24h``, ``90m``, else in milliseconds."""
    for unit, unit_ms in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if span_ms % unit_ms == 0:
            return f"{span_ms // unit_ms}{unit}"
    return f"{span_ms}ms"


def bad_key() -> Failure:
    """No key, or one that nobody has."""
    return Failure(
        401,
        "invalid_request_error",
        "invalid_api_key",
        "Missing or invalid API key: send it as 'Authorization: Bearer <key>'.",
        headers=_NO_RETRY,
    )


def unknown_path(method: str, path: str) -> Failure:
    """A path that is not metered never reaches an upstream."""
    return Failure(
        404, "invalid_request_error", "unknown_url", f"Unknown request URL: {method} {path[:200]}.", headers=_NO_RETRY
    )


def wrong_method(method: str, allowed: str) -> Failure:
    """A known path, another method."""
    return Failure(
        405,
        "invalid_request_error",
        "method_not_allowed",
        f"Method {method[:20]} is not allowed here; use {allowed}.",
        headers={"Allow": allowed, **_NO_RETRY},
    )


def unknown_model(name: str) -> Failure:
    """A model without a price never reaches an upstream."""
    return Failure(
        404,
        "invalid_request_error",
        "model_not_found",
        f"The model {name[:200]!r} does not exist here; GET /v1/models lists those that do.",
        param="model",
        headers=_NO_RETRY,
    )


def invalid_body(error: InvalidRequest) -> Failure:
    """Not JSON, or a field that cannot be priced."""
    return Failure(
        400, "invalid_request_error", "invalid_body", f"Invalid request body: {error}.", error.param, headers=_NO_RETRY
    )


def broken_body(reason: str) -> Failure:
    """The body cannot be unpacked, or broke off."""
    return Failure(
        400, "invalid_request_error", "invalid_body", f"The body cannot be decoded: {reason}.", headers=_LAST
    )


def unknown_encoding(encoding: str) -> Failure:
    """The body is packed in a way that the gateway does not read, or twice."""
    return Failure(
        415,
        "invalid_request_error",
        "unsupported_encoding",
        f"The body's Content-Encoding {encoding[:50]!r} is not supported here: send it plain, as gzip or as deflate.",
        headers=_LAST,
    )


def not_a_form() -> Failure:
    """A file comes in a form."""
    return Failure(
        400,
        "invalid_request_error",
        "invalid_body",
        "The body must be a form: send Content-Type: multipart/form-data with a boundary.",
        headers=_LAST,
    )


def no_room_for_upload() -> Failure:
    """The gateway's disk takes no more."""
    return Failure(
        503,
        "api_error",
        "upload_not_possible",
        "Uploads cannot be taken at the moment; nothing was charged. Please try again.",
        headers={"Connection": "close", "Retry-After": "10"},
    )


def broken_request(reason: str) -> Failure:
    """Not HTTP, or a body that cannot be unpacked."""
    lines = reason.strip().splitlines() or ["it is not HTTP"]
    return Failure(
        400, "invalid_request_error", "invalid_request", f"The request cannot be read: {lines[0][:200]}", headers=_LAST
    )


def body_too_large(most_bytes: int) -> Failure:
    """The request's body is over the limit."""
    return Failure(
        413,
        "invalid_request_error",
        "request_too_large",
        f"The request body is larger than {most_bytes} bytes.",
        headers=_LAST,
    )


def store_unavailable() -> Failure:
    """No decision about credits is possible; nothing was forwarded."""
    return Failure(
        503,
        "api_error",
        "quota_store_unavailable",
        "Credits cannot be checked at the moment; nothing was charged. Please try again.",
        headers={"Retry-After": "2"},
    )


def plan_not_configured(plan: str) -> Failure:
    """The account's plan is missing from the configuration: the operator's mistake."""
    return Failure(
        503,
        "api_error",
        "plan_not_configured",
        f"The plan {plan!r} of this account is not available.",
        headers=_NO_RETRY,
    )


def upstream_unavailable() -> Failure:
    """No connection to the upstream, or one that broke. Nothing is charged."""
    return Failure(
        502,
        "api_error",
        "upstream_unavailable",
        "The model's server could not be reached, or its answer was of no use; nothing was charged. Please try again.",
        headers={"Retry-After": "1"},
    )


def upstream_failed(error: Exception) -> Failure:
    """Why an upstream's answer did not come, or broke off. Nothing is charged."""
    return upstream_timeout() if isinstance(error, UpstreamTimeout) else upstream_unavailable()


def upstream_timeout() -> Failure:
    """The request was sent and no answer came in time. Nothing is charged."""
    return Failure(
        504,
        "api_error",
        "upstream_timeout",
        "The model's server did not answer in time; nothing was charged.",
        headers=_NO_RETRY,
    )


def deadline_passed(*, charged: bool) -> Failure:
    """The gateway's own limit for an answer. What a client was sent of it by then is charged."""
    return Failure(
        504,
        "api_error",
        "upstream_timeout",
        "The answer took longer than answers may take; "
        + ("what was sent of it was charged." if charged else "nothing was charged."),
        headers=_NO_RETRY,
    )


def upstream_overran(*, charged: bool) -> Failure:
    """The upstream does not heed the limit of the answer. What a client was sent is charged up to that limit."""
    return Failure(
        502,
        "api_error",
        "upstream_overrun",
        "The model's server sends more than it was asked for; "
        + ("what was sent of it was charged, up to the limit." if charged else "nothing was charged."),
        headers=_NO_RETRY,
    )


def store_lost(*, charged: bool) -> Failure:
    """The store went away while a stream ran, and the stream used up what it held by then."""
    return Failure(
        503,
        "api_error",
        "quota_store_unavailable",
        "Credits cannot be checked at the moment, and the answer cannot go on without; "
        + ("what was sent of it was charged." if charged else "nothing was charged."),
        headers={"Retry-After": "2"},
    )


def quota_ended(funds: Funds) -> Mapping[str, object]:
    """What the last chunks of a stream say that was ended because credits had."""
    resets_at = None if funds.resets_at_ms is None else rfc3339(funds.resets_at_ms)
    return {
        "ended_by": "credits",
        "code": "insufficient_quota",
        "message": "The answer ends here because all credits are spent or held by other requests. "
        + (
            f"{_allowance(funds.tightest)} refreshes at {resets_at}."
            if resets_at
            else "Add IO Credits to get longer answers."
        ),
        "resets_at": resets_at,
    }


def invalid_idempotency_key() -> Failure:
    """The header is there and cannot be one."""
    return Failure(
        400,
        "invalid_request_error",
        "invalid_idempotency_key",
        "The Idempotency-Key header must have 1 to 255 visible ASCII characters.",
        "Idempotency-Key",
        headers=_NO_RETRY,
    )


def repeated(repeat: Repeated) -> Failure:
    """A request with an idempotency key that came before: it is never run twice."""
    first = request_id_of(repeat.reservation_id)
    match repeat.state:
        case "in_progress":
            return Failure(
                409,
                "invalid_request_error",
                "idempotency_in_progress",
                "A request with this Idempotency-Key is still being answered; try again when it has ended.",
                headers={"Retry-After": str(_BUSY_RETRY_S)},
                metadata={"request_id": first},
            )
        case "answered":
            return Failure(
                409,
                "invalid_request_error",
                "idempotency_answered",
                "This request was answered and charged once; it is not run again.",
                headers=_NO_RETRY,
                metadata={"request_id": first, "cost": format_credits(repeat.cost_nano)},
            )
        case "other_body":
            return Failure(
                422,
                "invalid_request_error",
                "idempotency_other_body",
                "This Idempotency-Key came before with another request; use a new one for each.",
                headers=_NO_RETRY,
            )


def request_id_of(reservation_id: str) -> str:
    """What x-request-id said for the request that made a reservation."""
    return f"req_{reservation_id[-24:]}"


def body_too_slow() -> Failure:
    """The request's body did not arrive in time."""
    return Failure(
        408,
        "invalid_request_error",
        "request_timeout",
        "The request body did not arrive in time.",
        headers=_LAST,
    )


def upstream_auth() -> Failure:
    """The upstream refuses the gateway's own key."""
    return Failure(
        502,
        "api_error",
        "upstream_auth",
        "The model's server refuses the gateway's credentials; its operator must mend that. Nothing was charged.",
        headers=_NO_RETRY,
    )


def upstream_error(status: int, error: Mapping[str, object]) -> Failure:
    """The upstream refuses or fails: its status and what it says, in the shape of every error. Nothing is charged."""
    message, kind, code, param = (error.get(name) for name in ("message", "type", "code", "param"))
    return Failure(
        status,
        kind if isinstance(kind, str) else "api_error",
        str(code) if isinstance(code, (str, int)) else "upstream_error",
        message if isinstance(message, str) else f"The model's server answered with status {status}.",
        param if isinstance(param, str) else None,
        metadata={"source": "upstream"},
    )


def internal_error() -> Failure:
    """A mistake of the gateway's own."""
    return Failure(500, "api_error", "internal_error", "The gateway made a mistake; nothing was charged.")


def denied(denial: Denied, plan: Plan, bound: Bound, model: Model) -> Failure:
    """Not enough credits: now, until the refresh, or at all."""
    funds = denial.funds
    metadata = _funds_metadata(denial, plan)
    resets_at = None if denial.window is None else -(-denial.window.resets_at_ms // 1000)
    wait_ms = 0 if denial.window is None else max(1, denial.window.resets_at_ms - funds.now_ms)
    match denial.reason:
        case "credits_in_flight":
            return Failure(
                429,
                "rate_limit_error",
                "credits_in_flight",
                "All credits are held by requests in flight, or kept for them; try again when one has ended.",
                headers=_retry_after(_BUSY_RETRY_S * 1000),
                metadata=metadata,
            )
        case "refresh_soon":
            return Failure(
                429,
                "rate_limit_error",
                "rate_limit_exceeded",
                f"{_allowance(denial.window)} of plan {plan.name!r} is spent; it refreshes in {-(-wait_ms // 1000)} s.",
                headers=_retry_after(wait_ms),
                metadata=metadata,
                resets_at=resets_at,
            )
        case "allowance_spent":
            assert denial.window is not None
            return Failure(
                429,
                "usage_limit_reached",
                "insufficient_quota",
                f"{_allowance(denial.window)} of plan {plan.name!r} is spent until "
                f"{rfc3339(denial.window.resets_at_ms)}. "
                + ("Add IO Credits to go on now." if plan.payg else "Access pauses until then."),
                headers={"Retry-After": str(-(-wait_ms // 1000)), **_NO_RETRY},
                metadata=metadata,
                resets_at=resets_at,
            )
        case "exceeds_balance":
            affordable = affordable_output(bound, model, affordable_nano(funds, plan) * FEMTO_PER_NANO)
            return Failure(
                402,
                "insufficient_quota",
                "request_exceeds_balance",
                "This request requires more credits, or fewer max_tokens. You requested up to "
                f"{bound.output_tokens_each} tokens, but can only afford {affordable}"
                + (f" (answers of fewer than {least_output(bound)} are not begun)." if affordable else ".")
                + ("" if plan.payg or denial.window is None else f" {_without_payg(denial.window, plan)}"),
                headers=_NO_RETRY,
                metadata=metadata,
            )
        case "no_credits":
            return Failure(
                402,
                "insufficient_quota",
                "insufficient_quota",
                "There are no credits left and no refresh will bring enough: add IO Credits or change the plan."
                if plan.payg or denial.window is None
                else f"{_allowance(denial.window)} is spent. {_without_payg(denial.window, plan)}",
                headers=_NO_RETRY,
                metadata=metadata,
            )


def _allowance(window: WindowFunds | None) -> str:
    """One window of an allowance, at the beginning of a sentence: the others may well have some left."""
    assert window is not None, "who waits for a refresh, or has no prepaid credits to use, has an allowance"
    return f"The {duration(window.refresh_ms)} allowance"


def _without_payg(window: WindowFunds | None, plan: Plan) -> str:
    """Why neither prepaid credits, which the account may well have, nor waiting helps."""
    assert window is not None, "a plan that does not use prepaid credits has an allowance"
    return (
        f"Plan {plan.name!r} does not use prepaid credits, and also after its {duration(window.refresh_ms)} allowance "
        f"refreshes at {rfc3339(window.resets_at_ms)} it has too little for this request."
    )


def _retry_after(wait_ms: int) -> dict[str, str]:
    return {"Retry-After": str(-(-wait_ms // 1000)), "retry-after-ms": str(wait_ms)}


def _funds_metadata(denial: Denied, plan: Plan) -> dict[str, object]:
    funds = denial.funds
    held = funds.held_nano + (funds.balance_held_nano if plan.payg else 0)
    return {
        "limit": "allowance" if denial.reason in ("refresh_soon", "allowance_spent") else "credits",
        "plan": plan.name,
        "required": format_credits(denial.required_nano),
        "available": format_credits(affordable_nano(funds, plan)),
        "held": format_credits(held),
        "resets_at": None if denial.window is None else rfc3339(denial.window.resets_at_ms),
        "window": None if denial.window is None else duration(denial.window.refresh_ms),
    }


def funds_lines(funds: Funds) -> str:
    """What is left, for every metered answer: lines of its head."""
    _, balance_nano, _, _, _, windows = funds
    _, granted_nano, used_nano, held_nano, resets_at_ms = windows[0] if len(windows) == 1 else funds.tightest
    left_nano = granted_nano - used_nano - held_nano  # as the window's own remaining_nano, which takes 2 k instructions
    resets_at = f"x-credits-allowance-resets-at: {rfc3339(resets_at_ms)}\r\n" if windows else ""
    return (
        f"x-credits-allowance-remaining: {format_credits(left_nano if left_nano > 0 else 0)}\r\n"
        f"x-credits-balance: {format_credits(balance_nano)}\r\n{resets_at}"
    )


def funds_headers(funds: Funds) -> dict[str, str]:
    """The same by name."""
    return headers_of(funds_lines(funds))


def headers_of(lines: str) -> dict[str, str]:
    """The headers in lines of a head, by name."""
    return dict(line.split(": ", 1) for line in lines.split("\r\n") if line)


def upgrade_required() -> Failure:
    """A plain request where only a websocket makes sense."""
    return Failure(
        426,
        "invalid_request_error",
        "upgrade_required",
        "This endpoint is a websocket: ask for it with 'Upgrade: websocket'.",
        headers={"Upgrade": "websocket", "Connection": "Upgrade", **_NO_RETRY},
    )


def invalid_upgrade(error: InvalidRequest) -> Failure:
    """A websocket is asked for in a way that cannot be served."""
    return Failure(
        400, "invalid_request_error", "invalid_request", f"Invalid request: {error}.", error.param, headers=_NO_RETRY
    )


def invalid_event(code: str, message: str, param: str | None = None) -> Failure:
    """An event on a websocket that is not forwarded."""
    return Failure(400, "invalid_request_error", code, f"The event is refused: {message}.", param)


def upstream_refused(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """The upstream's own answer to a handshake, mapped as that to any request."""
    if status in (401, 402, 403):  # about the operator's key or credits, not the customer's
        return upstream_auth()
    if status < 400:
        return upstream_unavailable()
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    retry = headers.get("Retry-After", "")
    retry_headers = {"Retry-After": str(min(int(retry), 60))} if retry.isascii() and retry.isdigit() else {}
    return replace(upstream_error(status, error if isinstance(error, dict) else {}), headers=retry_headers)


def credits_ended(funds: Funds) -> Failure:
    """An answer cannot go on: what it has used up by then is charged."""
    ended = quota_ended(funds)
    resets_at_ms = funds.resets_at_ms
    return Failure(
        429,
        "insufficient_quota",
        "insufficient_quota",
        str(ended["message"]),
        resets_at=None if resets_at_ms is None else -(-resets_at_ms // 1000),
    )


def realtime_event(failure: Failure, client_event_id: object = None) -> dict[str, object]:
    """The same as an event of the realtime websocket. client_event_id: that of the event which it is about."""
    error: dict[str, object] = {
        "type": failure.type,
        "code": failure.code,
        "message": failure.message,
        "param": failure.param,
        "event_id": client_event_id if isinstance(client_event_id, str) else None,
    }
    if failure.resets_at is not None:
        error["resets_at"] = failure.resets_at
    return {"type": "error", "event_id": f"event_{secrets.token_hex(12)}", "error": error}


def session_ended(message: str) -> Failure:
    """A session on a websocket that ends without anybody's fault."""
    return Failure(408, "invalid_request_error", "session_expired", message)
