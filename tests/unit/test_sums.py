"""The metrics of several processes read as those of one."""

from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.metrics import Metrics, expose
from gateway.telemetry.sums import growing, summed


def process(*, requests: int, open_requests: int, plan: str = "standard") -> Metrics:
    metrics = Metrics(["standard", "developer"], ["llama"])
    for _ in range(requests):
        metrics.decided("admitted", "allowance", plan)
        metrics.store_seconds("reserve").observe(0.003)
    metrics.watch_reservations_open(lambda: open_requests)
    return metrics


def values(text: bytes) -> dict[tuple[str, str], float]:
    """By sample name, and the values of its labels in the order of their names."""
    families = text_string_to_metric_families(text.decode())
    return {
        (s.name, ",".join(value for _, value in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def test_counters_histograms_and_gauges_are_added_up_by_their_labels() -> None:
    one = process(requests=2, open_requests=3)
    two = process(requests=5, open_requests=4)
    three = process(requests=1, open_requests=0, plan="developer")
    body, _ = expose(summed([each.families() for each in (one, two, three)]), None)
    found = values(body)
    assert found["quota_gateway_decisions_total", "admitted,standard,allowance"] == 7
    assert found["quota_gateway_decisions_total", "admitted,developer,allowance"] == 1
    assert found["quota_gateway_reservations_open", ""] == 7
    assert found["quota_gateway_store_seconds_count", "reserve"] == 8
    assert found["quota_gateway_store_seconds_bucket", "0.0025,reserve"] == 0
    assert found["quota_gateway_store_seconds_bucket", "0.005,reserve"] == 8


def test_what_is_said_of_the_gateway_as_a_whole_is_not_added_up() -> None:
    one, two = process(requests=0, open_requests=0), process(requests=0, open_requests=0)
    one.config_reloaded(False)
    found = values(expose(summed([one.families(), two.families()]), None)[0])
    alone = values(one.expose(None)[0])
    assert found["quota_gateway_config_last_reload_successful", ""] == 0
    for name in ("quota_gateway_config_last_reload_seconds", "process_start_time_seconds", "process_max_fds"):
        assert found[name, ""] == alone[name, ""]
    assert [value for (name, _), value in found.items() if name == "quota_gateway_build_info"] == [1]


def test_of_an_ended_process_what_it_counted_stays_and_what_it_held_goes() -> None:
    living, ended = process(requests=1, open_requests=1), process(requests=2, open_requests=5)
    found = values(expose(summed([living.families(), growing(ended.families())]), None)[0])
    assert found["quota_gateway_decisions_total", "admitted,standard,allowance"] == 3
    assert found["quota_gateway_reservations_open", ""] == 1


def test_the_sums_of_one_process_are_its_own_metrics() -> None:
    metrics = process(requests=3, open_requests=2)
    families = metrics.families()
    for accept in (None, "application/openmetrics-text"):
        assert expose(summed([families]), accept) == expose(families, accept)
