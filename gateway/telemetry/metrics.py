"""Every metric that the gateway exposes.

Label values come from the configuration and from the code, never from a request: a plan or a model that is not
configured counts under ``other``. Credits are exposed as floats of whole credits; the exact integers are in the
ledger.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gateway import __version__
from gateway.domain.money import NANO_PER_CREDIT
from gateway.domain.request import Operation
from gateway.telemetry.tallies import Count, Counts, Histogram, Histograms, Labels

OTHER = "other"

#: The reason of a denial because the store did not answer. An alert watches it.
STORE_UNAVAILABLE = "quota_store_unavailable"

Decision = Literal["admitted", "denied"]
PaidFrom = Literal["allowance", "payg"]
Cause = Literal["settled", "voided"]
Phase = Literal["authenticate", "quote", "reserve", "forward", "settle"]

#: What takes in the duration, the input and the output of requests with the same labels.
_Usual = tuple[Callable[[float], None], Callable[[float], None], Callable[[float], None]]

# A phase takes well under a millisecond; the wide upper buckets show when it stops doing so.
_FAST_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)

# The boundaries that the OpenTelemetry semantic conventions for generative AI ask for: panels made for model
# servers then work on these series too.
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_GEN_AI_LABELS = ("gen_ai_request_model", "gen_ai_operation_name", "gen_ai_provider_name")

# Chosen once from our own words: given a client's header, choose_encoder parses and repeats what the client wrote.
_OPENMETRICS = "application/openmetrics-text"
_encode_openmetrics, _OPENMETRICS_TYPE = choose_encoder(_OPENMETRICS)
_encode_plain, _PLAIN_TYPE = choose_encoder("text/plain")


class _Names(dict[str, str]):
    """The name that a series has for each configured name: itself, and OTHER for all others."""

    def __missing__(self, name: str) -> str:
        return OTHER

    def add(self, names: Collection[str]) -> None:
        """Know these names too."""
        self.update((name, name) for name in names)


class Metrics:
    """The gateway's own counters in a registry of their own.

    plans, models: the configured names; every other name is counted as ``other``. Names of upstreams, scripts,
    reasons and causes come from the configuration or the code and are taken as they are. No method raises for
    amounts and durations ≥ 0.
    """

    def __init__(self, plans: Collection[str], models: Collection[str]) -> None:
        self._plans, self._models = _Names(), _Names()
        self.use(plans, models)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        Info("quota_gateway_build", "The running version of the gateway; always 1.", registry=self._registry).info(
            {"version": __version__}
        )
        self._make_credit_metrics()
        self._make_gateway_metrics()
        self._make_model_metrics()

    def use(self, plans: Collection[str], models: Collection[str]) -> None:
        """Know these names from now on, and those from before: requests in flight and accounts may still have them."""
        self._plans.add(plans)
        self._models.add(models)

    def _make_credit_metrics(self) -> None:
        self._decisions = self._counters(
            "quota_gateway_decisions",
            "Requests that were admitted or denied, by reason. Unit: requests.",
            ("decision", "reason", "plan"),
        )
        # An increase from "no such series" to 1 is invisible to increase(): the alert needs the 0 before it.
        self._decisions["denied", STORE_UNAVAILABLE, OTHER].add(0)
        self._reserved = self._count(
            "quota_gateway_reserved_credits",
            "Credits held before requests were forwarded. Unit: credits.",
        )
        self._settled = self._counters(
            "quota_gateway_settled_credits",
            "Credits charged, by where they came from: allowance or payg. Unit: credits.",
            ("plan", "model", "source"),
        )
        self._released = self._counters(
            "quota_gateway_released_credits",
            "Credits held and given back, by how the reservation ended: settled or voided. Unit: credits.",
            ("cause",),
        )
        self._written_off = self._counter(
            "quota_gateway_written_off_credits",
            "Credits of cost that neither the allowance nor the balance could pay. Unit: credits.",
        )
        self._leases_expired = self._counter(
            "quota_gateway_leases_expired",
            "Reservations whose gateway did not end them in time, and which this one ended. Unit: reservations.",
        )
        self._journal_pending = self._gauge(
            "quota_gateway_journal_pending",
            "Settlements and voids in the journal that the store has not taken yet. Unit: entries.",
        )
        self._journal_failures = self._counter(
            "quota_gateway_journal_failures",
            "Settlements and voids that could not be written to the journal: they are in memory alone. Unit: entries.",
        )
        self._reservations_open = self._gauge(
            "quota_gateway_reservations_open",
            "Reservations that this gateway made and has not ended yet. Unit: reservations.",
        )

    def _make_gateway_metrics(self) -> None:
        self._overhead = self._histograms(
            "quota_gateway_overhead_seconds",
            "Time that the gateway itself adds to a request, by phase; waiting for the upstream is not in it. "
            "Unit: seconds.",
            ("phase",),
            _FAST_BUCKETS,
        )
        #: Where the gateway's own time in a phase is recorded, forward without the wait for the upstream.
        self.phases: Mapping[Phase, Histogram] = {phase: self._overhead[(phase,)] for phase in get_args(Phase)}
        self._store = self._histograms(
            "quota_gateway_store_seconds",
            "Time from asking for a script to its reply, by script. Unit: seconds.",
            ("script",),
            _FAST_BUCKETS,
        )
        self._upstream_inflight = self._gauges(
            "quota_gateway_upstream_inflight",
            "Requests that an upstream is answering now. Unit: requests.",
            ("upstream",),
        )
        self._overruns = self._counters(
            "quota_gateway_upstream_overruns",
            "Answers for which an upstream reports more usage than it was allowed; customers are not charged for "
            "the excess, the operator may be. Unit: answers.",
            ("upstream",),
        )
        self._truncated = self._counters(
            "quota_gateway_streams_truncated",
            "Streams that were ended because the account's credits had. Unit: streams.",
            ("plan",),
        )
        self._ledger_archived = self._counter(
            "quota_gateway_ledger_archived",
            "Ledger entries that this gateway moved from the store into the archive. Unit: entries.",
        )
        self._ledger_archive_failures = self._counter(
            "quota_gateway_ledger_archive_failures",
            "Attempts to archive the ledger that failed; meanwhile it stays in the store, which grows. Unit: attempts.",
        )
        self._config_reloaded = self._gauge(
            "quota_gateway_config_last_reload_successful",
            "1 when the configuration was last read without mistakes, 0 when the one before it stayed in force.",
        )
        self._config_read = self._gauge(
            "quota_gateway_config_last_reload_seconds",
            "When the configuration in force was read. Unit: seconds since 1970.",
        )
        # Metrics exist only after a configuration was read: a gateway that never reloads is not a failed one.
        self.config_reloaded(True)

    def _make_model_metrics(self) -> None:
        self._usual: dict[Labels, _Usual] = {}
        self._tokens = self._histograms(
            "gen_ai_client_token_usage",
            "Tokens billed per request, by type: input or output. Unit: tokens.",
            (*_GEN_AI_LABELS, "gen_ai_token_type"),
            _TOKEN_BUCKETS,
        )
        self._request_duration = self._histograms(
            "gen_ai_server_request_duration_seconds",
            "Time to the last byte of the answer. Unit: seconds.",
            _GEN_AI_LABELS,
            _DURATION_BUCKETS,
        )
        self._first_token = self._histograms(
            "gen_ai_server_time_to_first_token_seconds",
            "Time to the first token of a streamed answer. Unit: seconds.",
            _GEN_AI_LABELS,
            _FIRST_TOKEN_BUCKETS,
        )
        self._per_token = self._histograms(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per output token after the first of a streamed answer. Unit: seconds per token.",
            _GEN_AI_LABELS,
            _PER_TOKEN_BUCKETS,
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def _count(self, name: str, text: str) -> Count:
        return self._counters(name, text, ())[()]

    def _counters(self, name: str, text: str, labels: Sequence[str]) -> Counts:
        return Counts(CounterMetricFamily, name, text, labels, self._registry)

    def _gauges(self, name: str, text: str, labels: Sequence[str]) -> Counts:
        return Counts(GaugeMetricFamily, name, text, labels, self._registry)

    def _histograms(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histograms:
        return Histograms(name, text, labels, buckets, self._registry)

    def decided(self, decision: Decision, reason: str, plan: str) -> None:
        """Count a request that was admitted or denied.

        reason: the error's code (``insufficient_quota``, ``quota_store_unavailable``, …) or, of an admitted
        request, where its credits come from. plan: ``other`` where it is not known yet.
        """
        self._decisions[decision, reason, self._plans[plan]].total += 1

    def reserved(self, nano: int) -> None:
        """Count credits that a reservation holds, in nano-credits ≥ 0."""
        self._reserved.total += nano / NANO_PER_CREDIT

    def settled(self, plan: str, model: str, source: PaidFrom, nano: int) -> None:
        """Count credits charged from one source, in nano-credits ≥ 0. Once per source that paid something."""
        self._settled[self._plans[plan], self._models[model], source].total += nano / NANO_PER_CREDIT

    def released(self, cause: Cause, nano: int) -> None:
        """Count credits that were held and not charged, in nano-credits ≥ 0, by how the reservation ended."""
        self._released[(cause,)].total += nano / NANO_PER_CREDIT

    def written_off(self, nano: int) -> None:
        """Count cost that no source could pay, in nano-credits ≥ 0."""
        self._written_off.inc(nano / NANO_PER_CREDIT)

    def lease_expired(self) -> None:
        """Count a reservation that this gateway's reaper ended."""
        self._leases_expired.inc()

    def journal_failed(self) -> None:
        """Count a settlement or void that the journal did not take."""
        self._journal_failures.inc()

    def watch_journal_pending(self, count: Callable[[], float]) -> None:
        """Say where the number of the journal's open entries is to be read."""
        self._journal_pending.set_function(count)

    def store_seconds(self, script: str) -> Histogram:
        """Where the time from asking for a script to its reply is recorded."""
        return self._store[(script,)]

    def upstream_inflight(self, upstream: str) -> Count:
        """The requests that upstream answers now: to be counted in, and out again."""
        return self._upstream_inflight[(upstream,)]

    def overrun(self, upstream: str) -> None:
        """Count an answer for which upstream reports more usage than it was allowed."""
        self._overruns[(upstream,)].add()

    def stream_truncated(self, plan: str) -> None:
        """Count a stream that was ended because the account's credits had."""
        self._truncated[(self._plans[plan],)].add()

    def watch_reservations_open(self, count: Callable[[], float]) -> None:
        """Take the number of open reservations from count at every scrape. count must be quick and not raise."""
        self._reservations_open.set_function(count)

    def ledger_archived(self, entries: int) -> None:
        """Count ledger entries that are in the archive now and were not before."""
        self._ledger_archived.inc(entries)

    def ledger_archive_failed(self) -> None:
        """Count an attempt to archive the ledger that failed."""
        self._ledger_archive_failures.inc()

    def config_reloaded(self, ok: bool) -> None:
        """Say whether the configuration was just read without mistakes and taken over."""
        self._config_reloaded.set(1 if ok else 0)
        if ok:
            self._config_read.set_to_current_time()

    def request_finished(
        self,
        operation: Operation,
        model: str,
        upstream: str,
        seconds: float,
        input_tokens: int,
        output_tokens: int,
        first_token_seconds: float | None,
    ) -> None:
        """Record a request that an upstream answered.

        seconds: from the request's arrival to the last byte of its answer. tokens: those billed, ≥ 0; a kind of
        which there were none is not recorded. first_token_seconds: from the request's arrival; None for an answer
        that was not streamed.
        """
        labels = (self._models[model], operation, upstream)
        if input_tokens and output_tokens:  # as of nearly all: three series for one search
            duration, given, made = self._usual.get(labels) or self._usual_of(*labels)
            duration(seconds)
            given(input_tokens)
            made(output_tokens)
        else:
            self._request_duration[labels].observe(seconds)
            for kind, tokens in (("input", input_tokens), ("output", output_tokens)):
                if tokens:
                    self._tokens[*labels, kind].observe(tokens)
        if first_token_seconds is None:
            return
        self._first_token[labels].observe(first_token_seconds)
        if output_tokens > 1:
            self._per_token[labels].observe((seconds - first_token_seconds) / (output_tokens - 1))

    def _usual_of(self, model: str, operation: str, upstream: str) -> _Usual:
        duration = self._request_duration[model, operation, upstream]
        given, made = (self._tokens[model, operation, upstream, kind] for kind in ("input", "output"))
        usual = self._usual[model, operation, upstream] = (duration.observe, given.observe, made.observe)
        return usual

    def watch_workers(self, count: Callable[[], float]) -> None:
        """Say where the number of workers that take requests is to be read. Only a gateway that has workers tells."""
        self._gauge(
            "quota_gateway_workers",
            "Worker processes that take requests. Unit: processes.",
        ).set_function(count)
        self._worker_ends = self._counter(
            "quota_gateway_worker_ends",
            "Worker processes that ended while the gateway went on, and were started again. Unit: processes.",
        )

    def worker_ended(self) -> None:
        """Count a worker that ended while the gateway went on."""
        self._worker_ends.inc()

    def families(self) -> list[Metric]:
        """Every metric with its values as of now."""
        return list(self._registry.collect())

    def expose(self, accept: str | None) -> tuple[bytes, str]:
        """The text of every metric and its content type: OpenMetrics where accept names it, else plain text."""
        return expose(self.families(), accept)


def expose(families: Sequence[Metric], accept: str | None) -> tuple[bytes, str]:
    """The text of metrics and its content type: OpenMetrics where accept names it, else plain text."""
    registry = CollectorRegistry()
    registry.register(_Collected(families))
    if accept and _OPENMETRICS in accept:
        return _encode_openmetrics(registry), _OPENMETRICS_TYPE
    return _encode_plain(registry), _PLAIN_TYPE


class _Collected(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def describe(self) -> Sequence[Metric]:
        return ()

    def collect(self) -> Sequence[Metric]:
        return self._families
