"""The metrics as Prometheus reads them."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from gateway.telemetry.metrics import Metrics

LABELS = {"gen_ai_request_model": "llama", "gen_ai_operation_name": "chat", "gen_ai_provider_name": "ionet"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(plans=["standard", "developer"], models=["llama"])


def samples(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    families = parse_plain(metrics.expose(None)[0].decode())
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics, name).get(tuple(sorted(labels.items())))


def bounds(metrics: Metrics, name: str) -> list[float]:
    return sorted({float(dict(labels)["le"]) for labels in samples(metrics, f"{name}_bucket")})[:-1]


def test_the_names_and_labels_that_users_rely_on(metrics: Metrics) -> None:
    drive(metrics)
    found = {
        family.name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for family in parse_plain(metrics.expose(None)[0].decode())
        if not family.name.startswith("process_") and not family.name.endswith("_created")
    }
    gen_ai = set(LABELS)
    assert found == {
        "quota_gateway_decisions": {"decision", "reason", "plan"},
        "quota_gateway_reserved_credits": set(),
        "quota_gateway_settled_credits": {"plan", "model", "source"},
        "quota_gateway_released_credits": {"cause"},
        "quota_gateway_written_off_credits": set(),
        "quota_gateway_reservations_open": set(),
        "quota_gateway_leases_expired": set(),
        "quota_gateway_journal_pending": set(),
        "quota_gateway_journal_failures": set(),
        "quota_gateway_ledger_archived": set(),
        "quota_gateway_ledger_archive_failures": set(),
        "quota_gateway_streams_truncated": {"plan"},
        "quota_gateway_overhead_seconds": {"phase"},
        "quota_gateway_store_seconds": {"script"},
        "quota_gateway_upstream_overruns": {"upstream"},
        "quota_gateway_upstream_inflight": {"upstream"},
        "quota_gateway_config_last_reload_successful": set(),
        "quota_gateway_config_last_reload_seconds": set(),
        "quota_gateway_build_info": {"version"},
        "gen_ai_client_token_usage": gen_ai | {"gen_ai_token_type"},
        "gen_ai_server_request_duration_seconds": gen_ai,
        "gen_ai_server_time_to_first_token_seconds": gen_ai,
        "gen_ai_server_time_per_output_token_seconds": gen_ai,
    }


def drive(metrics: Metrics) -> None:
    metrics.decided("admitted", "allowance", "standard")
    metrics.reserved(2)
    metrics.settled("standard", "llama", "allowance", 1)
    metrics.released("settled", 1)
    metrics.written_off(1)
    metrics.stream_truncated("standard")
    metrics.phases["reserve"].observe(0.001)
    metrics.store_seconds("reserve").observe(0.001)
    metrics.upstream_inflight("ionet").add()
    metrics.overrun("ionet")
    metrics.request_finished("chat", "llama", "ionet", 1.0, 10, 10, 0.5)


def test_credits_are_whole_credits(metrics: Metrics) -> None:
    metrics.settled("developer", "llama", "payg", 1_500_000_000)
    metrics.settled("developer", "llama", "payg", 250_000_000)
    metrics.settled("developer", "llama", "allowance", 638)
    metrics.reserved(3_000_000_000)
    metrics.released("voided", 3_000_000_000)
    metrics.written_off(1)
    settled = "quota_gateway_settled_credits_total"
    assert value(metrics, settled, plan="developer", model="llama", source="payg") == 1.75
    assert value(metrics, settled, plan="developer", model="llama", source="allowance") == 638e-9
    assert value(metrics, "quota_gateway_reserved_credits_total") == 3
    assert value(metrics, "quota_gateway_released_credits_total", cause="voided") == 3
    assert value(metrics, "quota_gateway_written_off_credits_total") == 1e-9


def test_names_that_are_not_configured_share_one_series(metrics: Metrics) -> None:
    for number in range(50):
        metrics.settled(f"plan-{number}", f"model-{number}", "payg", 1_000_000_000)
        metrics.decided("denied", "insufficient_quota", f"plan-{number}")
        metrics.request_finished("chat", f"model-{number}", "ionet", 1.0, 1, 1, None)
    assert samples(metrics, "quota_gateway_settled_credits_total") == {
        (("model", "other"), ("plan", "other"), ("source", "payg")): 50
    }
    assert value(metrics, "quota_gateway_decisions_total", decision="denied", reason="insufficient_quota", plan="other")
    assert b"model-" not in metrics.expose(None)[0]
    assert b"plan-" not in metrics.expose(None)[0]


def test_store_denials_start_at_zero_so_that_the_first_one_is_an_increase(metrics: Metrics) -> None:
    labels = {"decision": "denied", "reason": "quota_store_unavailable", "plan": "other"}
    assert value(metrics, "quota_gateway_decisions_total", **labels) == 0
    metrics.decided("denied", "quota_store_unavailable", "other")
    assert value(metrics, "quota_gateway_decisions_total", **labels) == 1


def test_gauges_follow_what_they_count(metrics: Metrics) -> None:
    metrics.upstream_inflight("ionet").add()
    metrics.upstream_inflight("ionet").add()
    metrics.upstream_inflight("ionet").add(-1)
    assert value(metrics, "quota_gateway_upstream_inflight", upstream="ionet") == 1
    is_open = [1, 2]
    metrics.watch_reservations_open(lambda: len(is_open))
    assert value(metrics, "quota_gateway_reservations_open") == 2
    is_open.pop()
    assert value(metrics, "quota_gateway_reservations_open") == 1


def test_a_configuration_is_in_force_until_a_reload_fails(metrics: Metrics) -> None:
    name = "quota_gateway_config_last_reload_successful"
    assert value(metrics, name) == 1
    metrics.config_reloaded(False)
    assert value(metrics, name) == 0
    metrics.config_reloaded(True)
    assert value(metrics, name) == 1


def test_the_time_of_a_reload_is_that_of_the_configuration_in_force(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "quota_gateway_config_last_reload_seconds"
    monkeypatch.setattr("time.time", lambda: 1000.5)
    metrics.config_reloaded(True)
    monkeypatch.setattr("time.time", lambda: 2000.5)
    metrics.config_reloaded(False)
    assert value(metrics, name) == 1000.5
    metrics.config_reloaded(True)
    assert value(metrics, name) == 2000.5


def test_names_of_a_new_configuration_are_known_beside_those_of_the_old(metrics: Metrics) -> None:
    name = "quota_gateway_decisions_total"
    metrics.decided("admitted", "allowance", "pro")
    metrics.use(["pro"], ["mistral"])
    for plan in ("pro", "standard"):
        metrics.decided("admitted", "allowance", plan)
    found = {dict(labels)["plan"]: count for labels, count in samples(metrics, name).items() if count}
    assert found == {"other": 1, "pro": 1, "standard": 1}


def test_a_streamed_answer_is_timed_by_token(metrics: Metrics) -> None:
    metrics.request_finished("chat", "llama", "ionet", 3.0, 100, 11, 1.0)
    assert value(metrics, "gen_ai_server_request_duration_seconds_sum", **LABELS) == 3.0
    assert value(metrics, "gen_ai_server_time_to_first_token_seconds_sum", **LABELS) == 1.0
    assert value(metrics, "gen_ai_server_time_per_output_token_seconds_sum", **LABELS) == 0.2
    assert value(metrics, "gen_ai_client_token_usage_sum", **LABELS, gen_ai_token_type="input") == 100
    assert value(metrics, "gen_ai_client_token_usage_sum", **LABELS, gen_ai_token_type="output") == 11


def test_one_token_has_no_time_per_token(metrics: Metrics) -> None:
    metrics.request_finished("chat", "llama", "ionet", 3.0, 100, 1, 1.0)
    assert value(metrics, "gen_ai_server_time_to_first_token_seconds_count", **LABELS) == 1
    assert not samples(metrics, "gen_ai_server_time_per_output_token_seconds_count")


def test_an_embedding_has_neither_output_nor_a_first_token(metrics: Metrics) -> None:
    metrics.request_finished("embeddings", "llama", "ionet", 3.0, 100, 0, None)
    (labels,) = samples(metrics, "gen_ai_client_token_usage_count")
    assert ("gen_ai_token_type", "input") in labels
    assert not samples(metrics, "gen_ai_server_time_to_first_token_seconds_count")


def test_buckets_are_those_of_the_semantic_conventions(metrics: Metrics) -> None:
    drive(metrics)
    assert bounds(metrics, "gen_ai_client_token_usage") == [4**power for power in range(14)]
    doubling = pytest.approx([0.01 * 2**power for power in range(14)])
    assert bounds(metrics, "gen_ai_server_request_duration_seconds") == doubling
    first = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
    assert bounds(metrics, "gen_ai_server_time_to_first_token_seconds") == first
    per_token = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
    assert bounds(metrics, "gen_ai_server_time_per_output_token_seconds") == per_token


def test_openmetrics_when_it_is_asked_for(metrics: Metrics) -> None:
    drive(metrics)
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    body, content_type = metrics.expose(accept)
    assert content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert body.endswith(b"# EOF\n")
    assert "quota_gateway_build" in {family.name for family in parse_openmetrics(body.decode())}


@pytest.mark.parametrize("accept", [None, "", "*/*", "text/html", "text/plain;version=abc"])
def test_plain_text_for_everyone_else(metrics: Metrics, accept: str | None) -> None:
    assert metrics.expose(accept)[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_what_a_client_writes_into_accept_is_not_repeated(metrics: Metrics) -> None:
    accept = "application/openmetrics-text; version=abc; escaping=sneaky"
    assert metrics.expose(accept)[1] == "application/openmetrics-text; version=1.0.0; charset=utf-8"


def test_two_gateways_in_one_process_do_not_share_numbers(metrics: Metrics) -> None:
    metrics.reserved(1_000_000_000)
    assert value(Metrics([], []), "quota_gateway_reserved_credits_total") == 0


def test_a_histogram_counts_every_amount_once_however_many_come_between_two_scrapes(metrics: Metrics) -> None:
    # Amounts are counted many at a time: on a bound, between two, above the last.
    name = "quota_gateway_overhead_seconds"
    amounts = [0.00005, 0.00007, 0.5, 7.0] * 150
    for count, amount in enumerate(amounts, 1):
        metrics.phases["quote"].observe(amount)
        if count in (1, 130, 599, 600):
            assert value(metrics, f"{name}_count", phase="quote") == count
            assert value(metrics, f"{name}_sum", phase="quote") == pytest.approx(sum(amounts[:count]))
    buckets = {le: value(metrics, f"{name}_bucket", phase="quote", le=le) for le in ("5e-05", "0.0001", "1.0", "+Inf")}
    assert buckets == {"5e-05": 150, "0.0001": 300, "1.0": 450, "+Inf": 600}
