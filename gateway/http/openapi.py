"""GET /openapi.json: an OpenAPI 3.1 document of the gateway's own surface.

Which paths there are, which fields a body may have, which endpoints take forms, stream and need credits follows from
the endpoints themselves. What no code can tell, such as the type of each field, stands in openapi.yaml.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import orjson
import yaml

from gateway import __version__
from gateway.apis.api import Api
from gateway.apis.free import FREE_APIS, FreeApi
from gateway.apis.registry import APIS
from gateway.config.model import GatewayConfig, Passthrough
from gateway.domain.model import Model
from gateway.domain.request import Ask, InvalidRequest

#: Where it is, below a prefix and without one.
PATH = "/openapi.json"
#: Where there are more models, their names are not listed.
MOST_NAMES = 100

_ANY_TYPE = "*/*"
_KEYED = ("401", "500", "503")
_FORWARDED = (*_KEYED, "413", "415", "502", "504")
_READ = ("400", "404", "408")
_HELD = ("402", "429")
_REPEATABLE = ("409", "422")
_ID_HEADERS = ("x-request-id", "request-id")
_CREDIT_HEADERS = (
    "x-credits-reserved",
    "x-credits-cost",
    "x-credits-source",
    "x-credits-allowance-remaining",
    "x-credits-allowance-resets-at",
    "x-credits-balance",
    "x-credits-max-tokens",
    "x-credits-model",
)
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A request with the same key is charged once, however often it is sent.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


class Description:
    """The document for a configuration."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config

    @cached_property
    def body(self) -> bytes:
        """The document as JSON, made when it is first asked for."""
        return orjson.dumps(document(self._config))


def document(config: GatewayConfig) -> dict[str, Any]:
    """The document as JSON values."""
    said = _said()
    return {
        "openapi": "3.1.0",
        "info": {**said["info"], "version": __version__},
        "servers": [{"url": "/v1"}, {"url": "/api/v1"}],
        "security": said["security"],
        "tags": [{"name": name} for name in ("metered", "free", "open")],
        "paths": said["paths"]
        | {path: {"post": _metered(api, config)} for path, api in APIS.items()}
        | {path: {"post": _free(api, config)} for path, api in FREE_APIS.items()}
        | {_template(rule.pattern): _unread(rule) for rule in config.passthrough.values()},
        "components": {
            "securitySchemes": said["securitySchemes"],
            "headers": said["headers"],
            "schemas": said["schemas"] | {"ModelName": _name_of(config.models)},
            "responses": {status: _error(error) for status, error in said["errors"].items()}
            | {"upstream": _upstream_error()},
        },
    }


@cache
def _said() -> Mapping[str, Any]:
    """What openapi.yaml says."""
    read: dict[str, Any] = yaml.safe_load((files("gateway.http") / "openapi.yaml").read_text(encoding="utf-8"))
    return read


# --- operations -----------------------------------------------------------------------------------------------------


def _metered(api: Api, config: GatewayConfig) -> dict[str, Any]:
    sold = {name: model for name, model in config.models.items() if _sells(api, model)}
    return {
        "operationId": api.name,
        "summary": _summary(api),
        "tags": ["metered"],
        "parameters": [*_query(api), _IDEMPOTENCY_KEY],
        "requestBody": {"required": True, "content": _form(api, sold) if api.takes_form else _json_body(api, sold)},
        "responses": _responses(
            "200", _content(api), [*_FORWARDED, *_READ, *_HELD, *_REPEATABLE], (*_ID_HEADERS, *_CREDIT_HEADERS)
        ),
    }


def _free(api: FreeApi, config: GatewayConfig) -> dict[str, Any]:
    name = _name_of(config.models)
    body = {
        "type": "object",
        "required": [] if api.default_model else ["model"],
        "properties": {"model": _or_null(name) | {"default": api.default_model} if api.default_model else name},
    }
    content = {"schema": body, "examples": _examples(api.path, config.models)}
    return {
        "operationId": api.path.removeprefix("/").replace("/", "_"),
        "summary": "Passed on as it is. It costs nothing.",
        "tags": ["free"],
        "parameters": _query(api),
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": _responses("200", _json_object(), [*_FORWARDED, *_READ], _ID_HEADERS),
    }


def _unread(rule: Passthrough) -> dict[str, Any]:
    template = _template(rule.pattern)
    below = [{"name": "rest", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    body: dict[str, Any] = {"requestBody": {"content": {_ANY_TYPE: {}}}}
    headers = (*_ID_HEADERS, *_CREDIT_HEADERS)
    return {
        **({"parameters": below} if template != rule.pattern else {}),
        **{
            method.lower(): {
                "summary": "Passed on unread, for a price per request."
                + (" The rest of the path may have slashes." if template != rule.pattern else ""),
                "tags": ["metered"],
                **({} if method in ("GET", "HEAD") else body),
                "responses": _responses("2XX", {_ANY_TYPE: {}}, [*_FORWARDED, *_HELD, "404"], headers),
            }
            for method in sorted(rule.methods)
        },
    }


def _template(pattern: str) -> str:
    """A path of the configuration as OpenAPI writes it."""
    return f"{pattern[:-1]}{{rest}}" if pattern.endswith("/*") else pattern


def _query(api: Api | FreeApi) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "schema": {"type": "string"}} for name in sorted(api.parameters)]


def _summary(api: Api) -> str:
    return " ".join((inspect.getdoc(api) or api.name).split())


# --- bodies ---------------------------------------------------------------------------------------------------------


def _json_body(api: Api, sold: Mapping[str, Model]) -> dict[str, Any]:
    required = _described(api.path).get("required", ["model"])
    fields = {name: schema if name in required else _or_null(schema) for name, schema in _fields(api, sold).items()}
    # What is null means nothing, also where nobody knows what it would mean.
    schema = _object(api, fields) | {"additionalProperties": {"type": "null"}}
    return {"application/json": {"schema": schema, "examples": _examples(api.path, sold)}}


def _form(api: Api, sold: Mapping[str, Model]) -> dict[str, Any]:
    fields = {name: schema or {"type": "string"} for name, schema in _fields(api, sold).items()}
    schema = _object(api, fields) | {
        "additionalProperties": False,
        "description": "A list's field may be repeated, or its name end in []; any other may come once.",
    }
    return {"multipart/form-data": {"schema": schema}}


def _object(api: Api, fields: Mapping[str, Any]) -> dict[str, Any]:
    described = _described(api.path)
    required = described.get("required", ["model"])
    return {"type": "object", "required": required, "properties": fields, **described.get("rules", {})}


def _fields(api: Api, sold: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """All fields that the endpoint lets through, and what it demands of each."""
    described = _described(api.path).get("fields", {})
    return {name: described.get(name, {}) for name in sorted(api.fields)} | {"model": _name_of(sold)}


def _examples(path: str, models: Mapping[str, Model]) -> dict[str, Any]:
    described = _described(path)
    if "example" not in described:
        return {}
    whole = {"model": next(iter(models), "the-model"), **described["example"]}
    if "stream" not in described.get("fields", {}):
        return {"whole": {"value": whole}}
    return {"whole": {"value": whole}, "streamed": {"value": whole | {"stream": True}}}


def _described(path: str) -> Mapping[str, Any]:
    """What openapi.yaml says of the bodies at a path."""
    described: Mapping[str, Any] = _said()["bodies"].get(path, {})
    return described


def _sells(api: Api, model: Model) -> bool:
    try:
        api.check_sold(Ask(api.operation, model.name, 0), model)
    except InvalidRequest:
        return False
    return True


def _name_of(models: Mapping[str, Model]) -> dict[str, Any]:
    if 0 < len(models) <= MOST_NAMES:
        return {"type": "string", "enum": sorted(models)}
    return {"type": "string", "minLength": 1}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema:
        return schema
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


# --- answers --------------------------------------------------------------------------------------------------------


def _responses(success: str, content: dict[str, Any], errors: Iterable[str], headers: Iterable[str]) -> dict[str, Any]:
    return {
        success: {"description": "The upstream's answer.", "headers": _headers(headers), "content": content},
        **{status: {"$ref": f"#/components/responses/{status}"} for status in sorted(errors)},
        "default": {"$ref": "#/components/responses/upstream"},
    }


def _content(api: Api) -> dict[str, Any]:
    """What a good answer may be: a JSON object, events, or whatever the upstream makes of it."""
    content = _json_object()
    if type(api).stream is not Api.stream:
        content |= {"text/event-stream": {}}
    if api.passes_bytes:
        content |= {_ANY_TYPE: {}}
    if type(api).answer_to is not Api.answer_to:
        content |= {"text/*": {}}
    return content


def _json_object() -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}}


def _error(error: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"properties": {"error": {"properties": {"code": {"enum": error["codes"]}}}}}
    schema = {
        "anyOf": [
            {"allOf": [{"$ref": "#/components/schemas/Error"}, ours]},
            {"$ref": "#/components/schemas/UpstreamError"},
        ]
    }
    return {
        "description": error["for"],
        "headers": _error_headers(error["headers"]),
        "content": {"application/json": {"schema": schema}},
    }


def _upstream_error() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/UpstreamError"}
    return {
        "description": "The upstream refuses or fails: its own status, but for those about the gateway's key.",
        "headers": _error_headers(["Retry-After"]),
        "content": {"application/json": {"schema": schema}},
    }


def _headers(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_headers(names: Iterable[str]) -> dict[str, Any]:
    """What is always there on good answers is not on every error of a status."""
    said = _said()["headers"]
    return _headers(_ID_HEADERS) | {name: said[name] | {"required": False} for name in names}
