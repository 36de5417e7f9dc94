"""What a good configuration becomes: values, defaults, the environment, demo mode, secrets."""

import dataclasses
from hashlib import sha256
from pathlib import Path

import pytest

from gateway.config.fields import MOST_TOKENS
from gateway.config.load import ConfigError, load, shipped_dir
from gateway.config.model import (
    Address,
    AdminConfig,
    ArchiveConfig,
    GatewayConfig,
    Limits,
    Secret,
    StoreConfig,
    Upstream,
)
from gateway.config.prices import MOST_PRICE
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import Allowance, Plan
from gateway.domain.price import Prices, TokenPrices, femto_per_unit

UPSTREAMS = "upstreams:\n  local: {base_url: http://127.0.0.1:8000/v1}\n"
PLANS = "plans:\n  standard: {default: true, allowance: {per_window: 0.10, refresh: 24h}}\n"
MODELS = """
price_unit: usd_per_million_tokens
models:
  tiny: {upstream: local, input_token_price: 1, output_token_price: 2, context_window: 4096, max_output_tokens: 512}
"""
INLINE_MODELS = "models:\n" + "".join(f"  {line}\n" for line in MODELS.strip().splitlines())


def loaded(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> GatewayConfig:
    """The configuration that text, as the main file, becomes."""
    file = tmp_path / "gateway.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file, environ or {})


def refused(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    """The messages that text, as the main file, gets."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, environ)
    return [problem.message for problem in caught.value.problems]


def with_price(unit: str, price: str) -> str:
    """A main file whose model has the one price in the unit."""
    models = INLINE_MODELS.replace("usd_per_million_tokens", unit).replace("_price: 1,", f"_price: {price},")
    return UPSTREAMS + PLANS + models.replace("output_token_price: 2", "output_token_price: 0")


def test_the_smallest_configuration_has_the_defaults_of_the_model(tmp_path: Path) -> None:
    config = loaded(tmp_path, UPSTREAMS + PLANS + INLINE_MODELS)
    assert config == GatewayConfig(
        listen=Address("127.0.0.1", 8080),
        admin=AdminConfig(Address("127.0.0.1", 9090), None),
        store=StoreConfig("embedded", Path("data")),
        upstreams={"local": Upstream("local", "http://127.0.0.1:8000/v1", None)},
        plans={"standard": Plan("standard", (Allowance("per_window", 100_000_000, 86_400_000),))},
        default_plan="standard",
        models={
            "tiny": Model(
                "tiny", "local", Prices(TokenPrices(1_000_000_000, 2_000_000_000)), 4096, 512, price_version="a9b0337f"
            )
        },
        limits=Limits(),
        archive=ArchiveConfig("sqlite"),
    )


def test_every_value_can_be_set(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        """
listen: "[::1]:0"
admin: {listen: "admin.internal:9999", token: hunter2}
store: {url: "rediss://user:hunter2@db:6380/1", data_dir: /srv/data, timeout: 500ms, allow_unsafe: true}
upstreams:
  far:
    base_url: https://far.example/v1/
    api_key: hunter2
    connect_timeout: 1s
    idle_timeout: 2m
    total_timeout: 1h
    stream_usage: false
    limit_field: max_completion_tokens
    allow_fields: [n_probs]
    count_output: bytes
limits: {body: 1KiB, response: 4096}
archive: {url: "postgresql://user:hunter2@db:5432/ledger?sslmode=require"}
plans:
  prepaid: {default: true}
  fast: {allowance: {monthly: 150, refresh: 8h}, rate: 0.9, payg: false, on_lost: charge_hold}
models:
  price_unit: usd_per_token
  models:
    m/x:
      upstream: far
      input_token_price: 3.05e-8
      output_token_price: 0
      cache_read_token_price: 0.00000001
      cache_write_token_price: 2E-8
      context_window: 10
      max_output_tokens: 10
      template_tokens: 0
      hidden_reasoning: true
""",
    )
    assert config == GatewayConfig(
        listen=Address("::1", 0),
        admin=AdminConfig(Address("admin.internal", 9999), Secret("hunter2")),
        store=StoreConfig("rediss://user:hunter2@db:6380/1", Path("/srv/data"), 500, True),
        upstreams={
            "far": Upstream(
                "far",
                "https://far.example/v1",
                Secret("hunter2"),
                1000,
                120_000,
                3_600_000,
                False,
                "max_completion_tokens",
                frozenset({"n_probs"}),
                "bytes",
            )
        },
        plans={
            "prepaid": Plan("prepaid"),
            "fast": Plan("fast", (Allowance("monthly", 150_000_000_000, 28_800_000),), 900_000, False, "charge_hold"),
        },
        default_plan="prepaid",
        models={
            "m/x": Model(
                "m/x", "far", Prices(TokenPrices(30_500_000, 0, 10_000_000, 20_000_000)), 10, 10, 0, True, "96035883"
            )
        },
        limits=Limits(1024, 4096),
        archive=ArchiveConfig("postgresql://user:hunter2@db:5432/ledger?sslmode=require"),
    )
    assert str(config.listen) == "[::1]:0"
    assert config.store.shown_url == "rediss://db:6380/1"
    assert config.archive.shown_url == "postgresql://db:5432/ledger"


@pytest.mark.parametrize("written", ["{per_window: 2, refresh: 24h}", "[{per_window: 2, refresh: 24h}]"])
def test_one_window_may_be_written_as_a_list(tmp_path: Path, written: str) -> None:
    config = loaded(tmp_path, UPSTREAMS + f"plans:\n  a: {{default: true, allowance: {written}}}\n" + INLINE_MODELS)
    assert config.plans["a"].allowances == (Allowance("per_window", 2_000_000_000, 86_400_000),)


def test_a_plan_has_up_to_four_windows_in_the_order_of_the_file(tmp_path: Path) -> None:
    """A longer window may grant less than a shorter one: that is how a plan is closed for a while."""
    windows = (
        "[{monthly: 150, refresh: 24h}, {per_window: 2, refresh: 1h}, {per_window: 9, refresh: 30m}, "
        "{per_window: 0.5, refresh: 12h}]"
    )
    config = loaded(tmp_path, UPSTREAMS + f"plans:\n  a: {{default: true, allowance: {windows}}}\n" + INLINE_MODELS)
    assert [(one.kind, one.amount_nano, one.refresh_ms) for one in config.plans["a"].allowances] == [
        ("monthly", 150_000_000_000, 86_400_000),
        ("per_window", 2_000_000_000, 3_600_000),
        ("per_window", 9_000_000_000, 1_800_000),
        ("per_window", 500_000_000, 43_200_000),
    ]


def test_a_price_version_stands_for_what_is_charged(tmp_path: Path) -> None:
    def version(**prices: str) -> str:
        lines = "".join(f", {name}_token_price: {price}" for name, price in prices.items())
        models = INLINE_MODELS.replace(", output_token_price: 2", f", output_token_price: 2{lines}")
        return loaded(tmp_path, UPSTREAMS + PLANS + models).models["tiny"].price_version

    assert version() == version(cache_read="1.000") == version(cache_read="1", cache_write="1")
    assert len({version(), version(cache_read="0.5"), version(cache_write="0.5")}) == 3


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite", "sqlite"),
        ("sqlite:///var/lib/ledger.sqlite3", "sqlite:///var/lib/ledger.sqlite3"),
        ("postgresql://u:${SECRET}@db/ledger", "postgresql://db/ledger"),
        ("postgresql:///ledger?host=/run/postgresql&password=${SECRET}", "postgresql:///ledger"),
    ],
)
def test_the_archive_s_url_is_shown_without_its_secrets(tmp_path: Path, url: str, shown: str) -> None:
    text = f"archive: {{url: '{url}'}}\n" + UPSTREAMS + PLANS + INLINE_MODELS
    config = loaded(tmp_path, text, {"SECRET": "hunter2"})
    assert config.archive.url == url.replace("${SECRET}", "hunter2")
    assert config.archive.shown_url == shown
    assert "hunter2" not in repr(config) + str(config.archive)


def test_the_files_that_were_read_are_named_with_their_digests(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PLANS, encoding="utf-8")
    (tmp_path / "m.yaml").write_text(MODELS, encoding="utf-8")
    config = loaded(tmp_path, UPSTREAMS + "plans: p.yaml\nmodels: m.yaml\n")
    assert list(config.files) == [tmp_path / name for name in ("gateway.yaml", "p.yaml", "m.yaml")]
    assert all(digest == sha256(file.read_bytes()).hexdigest() for file, digest in config.files.items())


def test_a_bad_configuration_names_its_files_too(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(MODELS + "oops", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, UPSTREAMS + "plans: p.yaml\nmodels: m.yaml\n")
    assert list(caught.value.files) == [tmp_path / name for name in ("gateway.yaml", "p.yaml", "m.yaml")]
    assert [bool(digest) for digest in caught.value.files.values()] == [True, False, True]


def test_plans_and_models_may_be_files_beside_the_main_one(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PLANS, encoding="utf-8")
    (tmp_path / "m.yaml").write_text(MODELS, encoding="utf-8")
    inline = loaded(tmp_path, UPSTREAMS + PLANS + INLINE_MODELS)
    assert loaded(tmp_path, UPSTREAMS + "plans: p.yaml\nmodels: ${WHICH:-m}.yaml\n") == inline


def test_the_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IONET_API_KEY", raising=False)
    config = load()
    assert config.demo
    assert config.admin.token is None or config.admin.token
    assert config.default_plan == "standard"
    assert config.plans == {
        "standard": Plan("standard", (Allowance("per_window", 100_000_000, 86_400_000),)),
        "professional": Plan("professional", (Allowance("monthly", 15_000_000_000, 86_400_000),)),
        "developer": Plan("developer", (Allowance("monthly", 150_000_000_000, 28_800_000),), 900_000),
    }
    llama = config.models["meta-llama/Llama-3.3-70B-Instruct"]
    assert llama.prices == Prices(TokenPrices(638_000_000, 768_000_000, 319_000_000))
    assert any(model.prices.tokens.output_femto == 0 for model in config.models.values()), "an embedding model"


def test_the_shipped_configuration_with_a_key_is_no_demo() -> None:
    config = load(shipped_dir() / "gateway.yaml", {"IONET_API_KEY": "k", "QUOTA_GATEWAY_ADMIN_TOKEN": "t"})
    assert not config.demo
    assert config.upstreams["ionet"].api_key == Secret("k")
    assert config.admin.token == Secret("t")


def test_a_packaged_copy_goes_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gateway" / "config"
    package.mkdir(parents=True)
    monkeypatch.setattr("gateway.config.load.__file__", str(package / "load.py"))
    assert shipped_dir() == tmp_path / "config"
    (package / "shipped").mkdir()
    assert shipped_dir() == package / "shipped"


@pytest.mark.parametrize(
    ("unit", "price", "femto"),
    [
        ("usd_per_million_tokens", "0.0305", 30_500_000),
        ("usd_per_million_tokens", "'0.0305'", 30_500_000),
        ("usd_per_million_tokens", "0.638", 638_000_000),
        ("usd_per_million_tokens", "1.000000001", 1_000_000_001),
        ("usd_per_million_tokens", "0.1", 100_000_000),
        ("usd_per_million_tokens", "2000", 2_000_000_000_000),
        ("usd_per_million_tokens", "0.001", 1_000_000),
        ("usd_per_million_tokens", "0", 0),
        ("usd_per_token", "3.05e-8", 30_500_000),
        ("usd_per_token", "0.0000000305", 30_500_000),
    ],
)
def test_prices_are_exact(tmp_path: Path, unit: str, price: str, femto: int) -> None:
    assert loaded(tmp_path, with_price(unit, price)).models["tiny"].prices.tokens.input_femto == femto


@pytest.mark.parametrize("price", ["2000.000001", "0.000999999", "1_000", "0x10", ".5", ".inf", "1e400", "NaN"])
def test_prices_outside_the_plausible_or_in_other_notations_are_refused(tmp_path: Path, price: str) -> None:
    (message,) = refused(tmp_path, with_price("usd_per_million_tokens", price))
    assert message.startswith("models.models.tiny.input_token_price ")


def test_the_dearest_request_is_within_what_the_engine_can_hold() -> None:
    dearest = femto_per_unit(MOST_PRICE.scaleb(-6))
    cost = Prices(TokenPrices(dearest, dearest)).cost(Metered(MOST_TOKENS, MOST_TOKENS), rate_ppm=10_000_000)
    assert max(cost.payg_nano, cost.plan_nano) < MAX_NANO


@pytest.mark.parametrize(
    ("written", "environ", "text"),
    [
        ("${A}", {"A": "x:1"}, "x:1"),
        ("${A:-y:2}", {}, "y:2"),
        ("${A:-y:2}", {"A": ""}, "y:2"),
        ("${A:-y:2}", {"A": "x:1"}, "x:1"),
        ("${A}:${B}", {"A": "x", "B": "1"}, "x:1"),
        ("x${A:-}:1", {}, "x:1"),
    ],
)
def test_variables_are_replaced(tmp_path: Path, written: str, environ: dict[str, str], text: str) -> None:
    config = loaded(tmp_path, f'listen: "{written}"\n' + UPSTREAMS + PLANS + INLINE_MODELS, environ)
    assert str(config.listen) == text


def test_a_doubled_dollar_is_a_literal_one(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'store: {data_dir: "$${A}"}\n' + UPSTREAMS + PLANS + INLINE_MODELS, {"A": "x"})
    assert config.store.data_dir == Path("${A}")


def test_a_variable_cannot_change_the_structure(tmp_path: Path) -> None:
    environ = {"A": "data\nlisten: 0.0.0.0:80"}
    config = loaded(tmp_path, "store: {data_dir: '${A}'}\n" + UPSTREAMS + PLANS + INLINE_MODELS, environ)
    assert config.listen == Address("127.0.0.1", 8080)


def test_a_refused_variable_is_named_but_its_value_is_not_shown(tmp_path: Path) -> None:
    environ = {"A": "hunter2"}
    text = "listen: '${A}'\nstore: {timeout: '${A}'}\n" + UPSTREAMS + PLANS + INLINE_MODELS
    messages = refused(tmp_path, text, environ)
    assert len(messages) == 2
    assert all("'${A}'" in message and "hunter2" not in message for message in messages)


def upstream_lines(*lines: str) -> str:
    """A main file with upstreams a, b, … that have these extra lines; models use the first."""
    entries = "".join(
        f"  {name}:\n    base_url: http://127.0.0.1:1/v1\n{line and f'    {line}'}\n"
        for name, line in zip("abc", lines, strict=False)
    )
    return f"upstreams:\n{entries}" + PLANS + INLINE_MODELS.replace("local", "a")


@pytest.mark.parametrize(
    ("lines", "demo"),
    [
        (["api_key: ${K:-}"], True),
        (["api_key:"], True),
        (["api_key: '  '"], True),
        (["api_key: ''", "api_key: ~"], True),
        (["api_key: k"], False),
        ([""], False),
        (["api_key: k", ""], False),
    ],
)
def test_demo_is_when_no_upstream_is_set_up(tmp_path: Path, lines: list[str], demo: bool) -> None:
    assert loaded(tmp_path, upstream_lines(*lines)).demo is demo


@pytest.mark.parametrize("token", ["", "  ", "${T:-}"])
def test_an_empty_admin_token_is_none(tmp_path: Path, token: str) -> None:
    config = loaded(tmp_path, f"admin: {{token: '{token}'}}\n" + UPSTREAMS + PLANS + INLINE_MODELS)
    assert config.admin.token is None


def test_secrets_are_shown_by_no_representation(tmp_path: Path) -> None:
    environ = {"SECRET": "hunter2"}
    text = "admin: {token: '${SECRET}'}\nstore: {url: 'redis://u:${SECRET}@db/0?password=${SECRET}'}\n"
    config = loaded(tmp_path, text + upstream_lines("api_key: ${SECRET}"), environ)
    key = config.upstreams["a"].api_key
    assert key is not None
    assert key.reveal() == "hunter2"
    shown = [repr(config), str(config), f"{key} {key!r} {key!s:>9}", config.store.shown_url, repr(config.store)]
    assert not any("hunter2" in text for text in shown)
    assert config.store.shown_url == "redis://db/0"


def test_secrets_compare_by_their_text() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
    assert not Secret("")


def test_white_space_around_a_key_is_dropped(tmp_path: Path) -> None:
    config = loaded(tmp_path, upstream_lines("api_key: ${K}"), {"K": "hunter2\n"})
    assert config.upstreams["a"].api_key == Secret("hunter2")


def test_a_key_that_no_header_can_carry_is_refused_unseen(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, upstream_lines("api_key: ${K}"), {"K": "hunter2\nX: y"})
    assert message.startswith("upstreams.a.api_key holds spaces or characters")
    assert "hunter2" not in message


def test_values_are_frozen(tmp_path: Path) -> None:
    config = loaded(tmp_path, UPSTREAMS + PLANS + INLINE_MODELS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.default_plan = "other"  # type: ignore[misc]


def test_a_missing_main_file_is_a_problem_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "nowhere.yaml", {})
    assert str(caught.value) == f"{tmp_path / 'nowhere.yaml'}:1:1: cannot be read: No such file or directory"


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, "#" * (2**20 + 1))
    assert message.startswith("is larger than 1 MiB")


@pytest.mark.parametrize("text", ["a: " + "[" * 5000, "a: " + "[" * 50 + "]" * 50])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text) == ["is nested more than 20 levels deep"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\\0b"])
def test_impossible_file_names_are_refused(tmp_path: Path, name: str) -> None:
    (message,) = refused(tmp_path, UPSTREAMS + f'plans: "{name}"\n' + INLINE_MODELS)
    assert message.startswith("plans names the file '")
    assert len(message) < 200


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + (UPSTREAMS + PLANS + INLINE_MODELS).replace("\n", "\r\n").encode())
    assert load(file, {}).default_plan == "standard"


def test_an_alias_may_be_used(tmp_path: Path) -> None:
    plans = (
        "plans:\n  a: {default: true, allowance: &daily {per_window: 1, refresh: 24h}}\n"
        "  b: {allowance: *daily, rate: 0.5}\n"
    )
    config = loaded(tmp_path, UPSTREAMS + plans + INLINE_MODELS)
    assert config.plans["a"].allowances == config.plans["b"].allowances != ()
