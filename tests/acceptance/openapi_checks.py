"""What schemathesis is told besides the description: loaded by its own process (SCHEMATHESIS_HOOKS).

QG_ANSWERS names a file, to which a line is added for every answer: operation, status, and who gave it.
"""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response
from schemathesis.core.parameters import ParameterLocation

_ANSWERS = Path(os.environ["QG_ANSWERS"])
_numbers = itertools.count(1)


@schemathesis.hook
def map_body(context: HookContext, body: Any) -> Any:
    """Whole numbers are written without a fraction: to JSON Schema 1.0 is one too."""
    return _without_fractions(body)


def _without_fractions(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_fractions(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_fractions(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@schemathesis.hook
def map_headers(context: HookContext, headers: Any) -> Any:
    """A key for each request: what is generated is often the same, and no second request with it gets far."""
    key = (headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch("[!-~]{1,240}", key):
        headers["Idempotency-Key"] = f"{next(_numbers)}-{key}"
    return headers


@schemathesis.hook
def after_call(context: HookContext, case: Case, response: Response) -> None:
    who = "gateway" if response.status_code >= 400 and not _is_the_upstreams(response) else "upstream"
    with _ANSWERS.open("a") as answers:
        answers.write(f"{case.operation.label}\t{response.status_code}\t{who}\n")


@schemathesis.check
def what_is_described_is_taken(context: CheckContext, response: Response, case: Case) -> None:
    """The upstream may want more of a body than the gateway, but the gateway wants no more than it says."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    assert _is_the_upstreams(response) or _error_of(response)["code"] != "invalid_body", _error_of(response)["message"]


@schemathesis.check
def what_is_described_is_served(context: CheckContext, response: Response, case: Case) -> None:
    """No operation is unknown to the gateway, but for a path that a pattern lets through and that is none."""
    if response.status_code != 404 or case.method.lower() != case.operation.method.lower() or "{rest}" in case.path:
        return
    assert _error_of(response)["code"] != "unknown_url"


@schemathesis.check
def what_is_ruled_out_is_refused_here(context: CheckContext, response: Response, case: Case) -> None:
    """No upstream sees what the description of a JSON body rules out."""
    data = case.meta.phase.data if case.meta is not None and case.meta.generation.mode.is_negative else None
    if data is None or data.parameter_location != ParameterLocation.BODY or case.media_type != "application/json":
        return
    assert response.status_code >= 400 and not _is_the_upstreams(response), data.description


def _is_the_upstreams(response: Response) -> bool:
    return bool(_error_of(response)["metadata"].get("source") == "upstream")


def _error_of(response: Response) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(response.content)["error"]
    return error
