"""The JSON Schema of the configuration files, for editors and for checks without the gateway."""

from typing import Any

from pydantic.json_schema import models_json_schema

from gateway.config.raw import MainFile, ModelsFile, PlansFile


def json_schema() -> dict[str, Any]:
    """Draft 2020-12 schema of gateway.yaml; ``$defs/PlansFile`` and ``$defs/ModelsFile`` describe the other two.

    It knows the structure only: references between files, plausible prices and variables need ``check-config``.
    """
    _, generated = models_json_schema([(model, "validation") for model in (MainFile, PlansFile, ModelsFile)])
    definitions = _without_null(generated["$defs"])
    main = definitions.pop("MainFile")
    definitions.pop("Address", None)  # pydantic describes the value that is read; files hold host:port
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **main,
        "title": "Configuration of the quota gateway",
        "$defs": definitions,
    }


def _without_null(schema: Any) -> Any:
    """An absent key is left out of a file, never written as null; pydantic cannot tell the two apart."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _without_null(value) for key, value in schema.items() if not (key == "default" and value is None)}
    choices = kept.get("anyOf")
    if choices and {"type": "null"} in choices:
        kept["anyOf"] = [choice for choice in choices if choice != {"type": "null"}]
    return kept
