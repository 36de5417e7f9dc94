"""The description at /openapi.json says what the endpoints are, and says it of every one."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any, ClassVar

import pytest
from openapi_spec_validator import validate

from gateway.apis.api import Api
from gateway.apis.embeddings import Embeddings
from gateway.apis.form import File
from gateway.apis.free import FREE_APIS
from gateway.apis.registry import APIS
from gateway.config.load import load
from gateway.config.model import GatewayConfig, Passthrough
from gateway.domain.request import InvalidRequest
from gateway.http import errors, openapi
from gateway.http.openapi import MOST_NAMES, document


@pytest.fixture(scope="module")
def config() -> GatewayConfig:
    """The one that ships, with two more paths."""
    shipped = load(None)
    model = next(iter(shipped.models.values()))
    rules = (
        Passthrough("/files", model, frozenset({"GET", "POST"})),
        Passthrough("/files/*", model, frozenset({"GET", "DELETE"})),
    )
    return replace(shipped, passthrough={rule.pattern: rule for rule in rules})


@pytest.fixture(scope="module")
def described(config: GatewayConfig) -> dict[str, Any]:
    return document(config)


def body_of(described: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of a body, whichever media type it has."""
    (content,) = described["paths"][path]["post"]["requestBody"]["content"].values()
    schema: dict[str, Any] = content["schema"]
    return schema


def test_it_is_an_openapi_document(described: dict[str, Any]) -> None:
    validate(described)
    assert [server["url"] for server in described["servers"]] == ["/v1", "/api/v1"]
    names = [operation["operationId"] for path in described["paths"].values() for operation in path.values()
             if isinstance(operation, dict) and "operationId" in operation]  # fmt: skip
    assert len(names) == len(set(names))


def test_every_endpoint_is_in_it(described: dict[str, Any]) -> None:
    by_hand = {"/", "/openapi.json", "/models", "/models/{model}", "/realtime"}
    assert set(described["paths"]) == {*by_hand, *APIS, *FREE_APIS, "/files", "/files/{rest}"}
    assert set(described["paths"]["/files"]) == {"get", "post"}
    assert set(described["paths"]["/files/{rest}"]) == {"parameters", "get", "delete"}


def test_the_bodies_of_every_endpoint_are_described_by_hand() -> None:
    """Its name alone says little of a field: whoever adds an endpoint writes down what it demands."""
    assert set(openapi._said()["bodies"]) == {*APIS, *FREE_APIS}


@pytest.mark.parametrize("path", sorted(APIS))
def test_every_field_that_is_let_through_is_in_it(described: dict[str, Any], path: str) -> None:
    schema = body_of(described, path)
    assert set(schema["properties"]) == APIS[path].fields
    assert set(schema["required"]) <= APIS[path].fields


class Watched(dict[str, Any]):
    """A body that notes which of its fields are looked at."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.seen: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        return super().__getitem__(name)


def a_body(api: Api) -> dict[str, Any]:
    """A body that the endpoint takes."""
    file = File("file", "a.wav", "audio/wav", 4, b"RIFF", BytesIO(b"RIFF"))
    in_forms = {"/images/edits": {"prompt": "x", "image": [file]}, "/images/variations": {"image": [file]}}
    example = openapi._said()["bodies"][api.path].get("example") or in_forms.get(api.path) or {"file": [file]}
    return {"model": "m", **example}


@pytest.mark.parametrize("path", sorted(APIS))
def test_every_field_that_is_read_is_described(path: str) -> None:
    body = Watched(a_body(APIS[path]))
    APIS[path].read(body)
    assert "model" in body.seen
    missing = (body.seen & APIS[path].fields) - {"model"} - set(openapi._said()["bodies"][path]["fields"])
    assert not missing


@pytest.mark.parametrize("path", sorted(APIS))
def test_what_is_required_is_demanded(path: str) -> None:
    body = a_body(APIS[path])
    for name in openapi._said()["bodies"][path]["required"]:
        with pytest.raises(InvalidRequest):
            APIS[path].read({field: value for field, value in body.items() if field != name})


class Louder(Embeddings):
    """Embeddings, and loudly."""

    path = "/louder"
    name = "louder"
    fields: ClassVar[frozenset[str]] = Embeddings.fields | {"volume"}


def test_an_endpoint_that_is_added_is_in_it(config: GatewayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openapi, "APIS", {**APIS, "/louder": Louder()})
    described = document(config)
    validate(described)
    assert "volume" in body_of(described, "/louder")["properties"]
    assert described["paths"]["/louder"]["post"]["summary"] == "Embeddings, and loudly."


def failures() -> Iterator[tuple[int, str]]:
    """Status and code of every error that the gateway makes, as its source has them."""
    for node in ast.walk(ast.parse(inspect.getsource(errors))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Failure":
            status, _, code = (argument.value if isinstance(argument, ast.Constant) else None
                               for argument in node.args[:3])  # fmt: skip
            if isinstance(status, int) and isinstance(code, str):
                yield status, code


def test_every_error_is_in_it(described: dict[str, Any]) -> None:
    found = set(failures())
    assert (402, "request_exceeds_balance") in found
    said = openapi._said()["errors"]
    nowhere = {(status, code) for status, code in found if code not in said.get(str(status), {}).get("codes", ())}
    # Of no operation: the text at the top tells of the one, an event of a realtime session of the other.
    assert nowhere == {(405, "method_not_allowed"), (408, "session_expired")}
    assert "method_not_allowed" in described["info"]["description"]
    of_chat = described["paths"]["/chat/completions"]["post"]["responses"]
    assert set("200 400 401 402 404 408 409 413 415 422 429 500 502 503 504 default".split()) == set(of_chat)


def test_a_model_is_named_where_it_is_sold(config: GatewayConfig) -> None:
    name, model = next(iter(config.models.items()))
    by_request = replace(model, name="by-request", prices=replace(model.prices, tokens=None, request_femto=1))
    two = document(replace(config, models={name: model, "by-request": by_request}))
    assert body_of(two, "/chat/completions")["properties"]["model"]["enum"] == [name]
    assert body_of(two, "/rerank")["properties"]["model"]["enum"] == ["by-request", name]
    assert two["components"]["schemas"]["ModelName"]["enum"] == ["by-request", name]

    many = {f"{name}-{number}": replace(model, name=f"{name}-{number}") for number in range(MOST_NAMES + 1)}
    assert "enum" not in body_of(document(replace(config, models=many)), "/chat/completions")["properties"]["model"]


def test_a_form_is_described_as_one(described: dict[str, Any]) -> None:
    for path, api in APIS.items():
        (media_type,) = described["paths"][path]["post"]["requestBody"]["content"]
        assert media_type == ("multipart/form-data" if api.takes_form else "application/json")


def test_streams_and_sound_are_told(described: dict[str, Any]) -> None:
    answers = {path: set(described["paths"][path]["post"]["responses"]["200"]["content"]) for path in APIS}
    assert answers["/embeddings"] == {"application/json"}
    assert answers["/messages"] == {"application/json", "text/event-stream"}
    assert answers["/audio/speech"] == {"application/json", "text/event-stream", "*/*"}
    assert answers["/audio/transcriptions"] == {"application/json", "text/event-stream", "text/*"}
