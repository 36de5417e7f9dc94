"""Which entry of the configuration a path belongs to."""

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.free import FREE_APIS
from gateway.apis.registry import APIS
from gateway.config.model import GatewayConfig, Passthrough
from gateway.domain.model import Model
from gateway.domain.price import Prices
from gateway.http.passthrough import priced_path

PATTERNS = ("/files", "/files/*", "/files/batch", "/files/batch/*", "/FILES/upper", "/chat/*", "/audio/*", "/images/*")


def config_of(*patterns: str) -> GatewayConfig:
    rules = {name: Passthrough(name, Model(name, "u", Prices(request_femto=1), 0, 0), frozenset()) for name in patterns}
    return cast(GatewayConfig, SimpleNamespace(passthrough=rules))


CONFIG = config_of(*PATTERNS)


def entry(path: str, raw_path: str = "") -> str | None:
    rule = priced_path(CONFIG, path, raw_path or f"/v1{path}")
    return rule.pattern if rule else None


@pytest.mark.parametrize(
    ("path", "pattern"),
    [("/files", "/files"), ("/files/a", "/files/*"), ("/files/a/b", "/files/*"), ("/files/batch", "/files/batch"),
     ("/files/batch/a", "/files/batch/*"), ("/files/batched", "/files/*"), ("/files/upper", "/FILES/upper"),
     ("/FILES/A", "/files/*"), ("/chat/other", "/chat/*"), ("/filesystem", None), ("/", None), ("", None),
     ("/chat", None), ("/files/", None), ("/files/a/", None)],
)  # fmt: skip
def test_the_most_specific_entry_counts(path: str, pattern: str | None) -> None:
    assert entry(path) == pattern


@pytest.mark.parametrize("path", [*APIS, *FREE_APIS, "/models", "/realtime"])
def test_a_metered_path_is_never_one_however_it_is_written(path: str) -> None:
    config = config_of(path, f"/{path.split('/')[1]}/*")
    for written in (path, path.upper(), path.title()):
        assert priced_path(config, written, f"/v1{written}") is None


@given(st.text(alphabet="abcAB./\\;%25eEfF0 ~-_chat", max_size=20))
def test_no_path_that_is_read_in_two_ways_gets_through(rest: str) -> None:
    raw_path = f"/v1/files/{rest}"
    rule = priced_path(CONFIG, f"/files/{rest}", raw_path)
    if rule is not None:
        segments = raw_path.split("/")[1:]
        assert all(segment not in ("", ".", "..") for segment in segments)
        assert not any(sign in raw_path.lower() for sign in ("%2e", "%2f", "%5c", "%25", "\\", ";"))
