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
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """A key of its own for each request: the same is made again and again, and no second request with it gets far. No
    key beside a body that must be refused: with it comes an empty one, which is refused first."""
    key = case.headers.get("Idempotency-Key")
    if _spoils_the_body(case):
        case.headers.pop("Idempotency-Key", None)
    elif isinstance(key, str) and re.fullmatch("[!-~]{1,240}", key):
        case.headers["Idempotency-Key"] = f"{next(_numbers)}-{key}"


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
    if _spoils_the_body(case) and case.media_type == "application/json":
        assert response.status_code >= 400
        assert not _is_the_upstreams(response)


def _spoils_the_body(case: Case) -> bool:
    if case.meta is None or not case.meta.generation.mode.is_negative:
        return False
    return case.meta.phase.data.parameter_location == ParameterLocation.BODY


def _is_the_upstreams(response: Response) -> bool:
    return bool(_error_of(response)["metadata"].get("source") == "upstream")


def _error_of(response: Response) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(response.content)["error"]
    return error
