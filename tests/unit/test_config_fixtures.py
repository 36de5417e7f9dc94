"""One bad configuration per mistake, each with the exact lines that the loader answers."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from gateway.config.load import ConfigError, load
from gateway.config.schema import json_schema

FIXTURES = Path(__file__).parents[1] / "config_fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.txt"))
ENVIRON = {"GIVEN": "sk-very-secret", "EMPTY": ""}

#: What is wrong with these is the structure or the notation of one file, so the published schema must see it too.
SCHEMA_SEES = [
    "allowance_both_kinds",
    "allowance_empty_list",
    "allowance_in_list",
    "allowance_no_kind",
    "allowance_not_a_mapping",
    "allowance_too_many",
    "allowance_without_refresh",
    "archive_unknown_key",
    "archive_url_postgres",
    "archive_url_relative",
    "archive_url_unknown",
    "base_url_password",
    "base_url_query",
    "base_url_scheme",
    "context_window",
    "count_output",
    "credits_negative",
    "credits_too_large",
    "hidden_reasoning",
    "idle_timeout_without_unit",
    "image_price_notation",
    "image_prices_empty",
    "image_prices_key",
    "image_prices_one_price",
    "list_instead_of_value",
    "listen_host",
    "listen_ipv6",
    "missing_base_url",
    "missing_context_window",
    "missing_input_token_price",
    "missing_output_token_price",
    "missing_price_unit",
    "missing_upstreams",
    "model_without_price",
    "no_models",
    "no_upstreams",
    "nothing_can_pay",
    "null_value",
    "on_lost",
    "plan_unknown_key",
    "price_negative",
    "price_unit",
    "rate_percent",
    "rate_zero",
    "refresh_unit",
    "size_unit",
    "store_url_cluster",
    "store_url_sentinel",
    "store_url_unknown",
    "template_tokens",
    "tier_threshold",
    "tier_unknown_key",
    "tier_without_price",
    "tier_without_threshold",
    "tiers_empty",
    "tiers_not_a_list",
    "tiers_of_no_tokens",
    "tiers_too_many",
    "unknown_key",
    "unknown_key_far_from_any",
    "unknown_key_nested",
    "value_instead_of_mapping",
]


def fixture_file(name: str) -> Path:
    """The main file of a fixture, relative to the fixtures' directory."""
    return Path(name, "gateway.yaml") if (FIXTURES / name).is_dir() else Path(f"{name}.yaml")


@pytest.fixture
def in_fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)


@pytest.mark.usefixtures("in_fixtures")
@pytest.mark.parametrize("name", NAMES)
def test_each_mistake_gets_its_exact_message(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(fixture_file(name), ENVIRON)
    assert str(caught.value) == (FIXTURES / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.usefixtures("in_fixtures")
@pytest.mark.parametrize("name", NAMES)
def test_no_message_shows_a_secret_or_the_machinery(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(fixture_file(name), ENVIRON)
    for trace in (str(caught.value), repr(caught.value), repr(caught.value.problems)):
        assert "very-secret" not in trace
        assert "very secret" not in trace
        assert "pydantic" not in trace
        assert "input_value" not in trace
    assert caught.value.__context__ is None


def test_every_fixture_has_its_expected_lines() -> None:
    written = {path.stem for path in FIXTURES.glob("*.yaml")} | {
        path.name for path in FIXTURES.iterdir() if path.is_dir()
    }
    assert written == set(NAMES)


def test_problems_are_sorted_by_file_and_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load(FIXTURES / "many_mistakes" / "gateway.yaml", ENVIRON)
    places = [(problem.file, problem.line, problem.column) for problem in caught.value.problems]
    assert places == sorted(places)
    assert len({problem.file for problem in caught.value.problems}) == 3


@pytest.mark.parametrize("name", SCHEMA_SEES)
def test_the_schema_refuses_structural_mistakes(name: str) -> None:
    document: Any = yaml.safe_load((FIXTURES / fixture_file(name)).read_text(encoding="utf-8"))
    assert not Draft202012Validator(json_schema()).is_valid(document)


@pytest.mark.parametrize("name", ["upstream_unknown", "price_looks_per_million", "one_key_missing", "no_default_plan"])
def test_the_schema_leaves_the_rest_to_the_loader(name: str) -> None:
    document: Any = yaml.safe_load((FIXTURES / fixture_file(name)).read_text(encoding="utf-8"))
    Draft202012Validator(json_schema()).validate(document)
