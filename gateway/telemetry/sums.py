"""Adds up the metrics of several processes, so that they read as those of one.

prometheus-client's own way for many processes keeps a file for each that ever ran, and knows neither the process's own
figures nor gauges that are read when asked. Here each process is asked, and the sums are exact.
"""

from collections.abc import Sequence

from prometheus_client import Metric
from prometheus_client.samples import Sample

_GROWING = ("counter", "histogram")

#: What is said of the gateway as a whole, by the process that runs it, and has no sum.
_OF_THE_GATEWAY = frozenset(
    {
        "quota_gateway_build",
        "quota_gateway_config_last_reload_successful",
        "quota_gateway_config_last_reload_seconds",
        "process_start_time_seconds",
        "process_max_fds",
    }
)


def growing(metrics: Sequence[Metric]) -> list[Metric]:
    """Those that only grow: of a process that has ended they still count."""
    return [metric for metric in metrics if metric.type in _GROWING]


def summed(processes: Sequence[Sequence[Metric]]) -> list[Metric]:
    """The metrics of several processes as those of one. Of what has no sum the first process's value counts; a series
    began when the first did."""
    families: dict[str, Metric] = {}
    series: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for metric in (metric for metrics in processes for metric in metrics):
        if metric.name not in families:
            families[metric.name] = Metric(metric.name, metric.documentation, metric.type)
            series[metric.name] = {}
        elif metric.name in _OF_THE_GATEWAY:
            continue
        _add(series[metric.name], metric.samples)
    for name, values in series.items():
        families[name].samples = [Sample(sample, dict(labels), value) for (sample, labels), value in values.items()]
    return list(families.values())


def _add(values: dict[tuple[str, tuple[tuple[str, str], ...]], float], samples: Sequence[Sample]) -> None:
    for sample in samples:
        key = sample.name, tuple(sample.labels.items())
        if key not in values:
            values[key] = sample.value
        elif sample.name.endswith("_created"):
            values[key] = min(values[key], sample.value)
        else:
            values[key] += sample.value
