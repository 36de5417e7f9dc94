"""The published JSON Schema is a correct schema and accepts what the loader accepts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from gateway.config.load import shipped_dir
from gateway.config.schema import json_schema


def definition(name: str) -> dict[str, Any]:
    """One of the schema's definitions as a schema of its own."""
    return {"$ref": f"#/$defs/{name}", "$defs": json_schema()["$defs"]}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_schema_is_one() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        ("gateway.yaml", json_schema()),
        ("plans.yaml", definition("PlansFile")),
        ("models.yaml", definition("ModelsFile")),
    ],
)
def test_the_shipped_files_are_accepted(file: str, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema).validate(read(shipped_dir() / file))


def test_plans_and_models_may_stand_inside() -> None:
    document = read(shipped_dir() / "gateway.yaml")
    document["plans"] = read(shipped_dir() / "plans.yaml")["plans"]
    document["models"] = read(shipped_dir() / "models.yaml")
    Draft202012Validator(json_schema()).validate(document)
    document["plans"] = {"plans": document["plans"]}
    assert not Draft202012Validator(json_schema()).is_valid(document)


@pytest.mark.parametrize("price", [3.05e-8, "3.05e-8", 0, "${PRICE}"])
def test_prices_may_be_written_in_every_way_the_loader_reads(price: object) -> None:
    document = read(shipped_dir() / "models.yaml")
    for model in document["models"].values():
        model["input_token_price"] = price
    Draft202012Validator(definition("ModelsFile")).validate(document)


def test_an_allowance_may_be_one_window_or_several() -> None:
    hourly, daily = {"per_window": 1, "refresh": "1h"}, {"monthly": 15, "refresh": "24h"}
    schema = Draft202012Validator(definition("PlansFile"))
    for allowance in (daily, [daily], [hourly, daily]):
        schema.validate({"plans": {"a": {"default": True, "allowance": allowance}}})


def test_a_value_may_be_absent_but_not_null() -> None:
    document = {"plans": {"a": {"default": True, "allowance": None}}}
    assert not Draft202012Validator(definition("PlansFile")).is_valid(document)
    del document["plans"]["a"]["allowance"]
    Draft202012Validator(definition("PlansFile")).validate(document)


def test_every_field_is_described() -> None:
    schema = json_schema()
    for name, part in {"main": schema, **schema["$defs"]}.items():
        for key, field in part["properties"].items():
            assert "description" in field or "$ref" in field, f"{name}.{key}"
