"""Numbers about serving for Prometheus. Names and labels are stable; docs/operations.md lists them.

Thousands of adapters must not become thousands of series: the first so many that are called since the start of the server have
labels of their own, all others are `other`. Nothing that a caller chooses freely is ever a label.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tunewright.accounts.usage import UsageLedger
from tunewright.deployments.ports import State

OTHER = "other"
_PLACE = ("model", "adapter")
_WORKER = ("model", "worker")
_FIRST_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Series(NamedTuple):
    """The series of one base or adapter, looked up once for each request."""

    labels: tuple[str, str]
    first: Histogram
    gap: Histogram
    prompt_tokens: Counter
    cached_tokens: Counter
    completion_tokens: Counter
    running: Gauge


class ServingMetrics:
    """All metrics of one server, in a registry of its own. Thread-safe."""

    def __init__(self, ledger: UsageLedger, most_adapters: int) -> None:
        self._most_adapters = most_adapters
        self._series: dict[tuple[str, str], Series] = {}
        self._registry = registry = CollectorRegistry()
        self._first = Histogram(
            "tunewright_time_to_first_token_seconds",
            "From the request to the first piece of its answer",
            _PLACE,
            buckets=_FIRST_S,
            registry=registry,
        )
        self._gap = Histogram(
            "tunewright_inter_token_seconds",
            "Between two tokens of an answer",
            _PLACE,
            buckets=_GAP_S,
            registry=registry,
        )
        self._prompt_tokens = Counter("tunewright_prompt_tokens", "Tokens read", _PLACE, registry=registry)
        self._cached_tokens = Counter(
            "tunewright_cached_prompt_tokens",
            "Tokens of prompts that need not be computed again",
            _PLACE,
            registry=registry,
        )
        self._completion_tokens = Counter("tunewright_completion_tokens", "Tokens written", _PLACE, registry=registry)
        self._running = Gauge("tunewright_requests_running", "Requests being answered", _PLACE, registry=registry)
        self._requests = Counter(
            "tunewright_requests",
            "Requests that were answered, by how they ended",
            (*_PLACE, "endpoint", "outcome"),
            registry=registry,
        )
        self._refused = Counter(
            "tunewright_requests_refused", "Requests that no engine was asked", ("code",), registry=registry
        )
        self._engines = _Engines(ledger)
        registry.register(self._engines)

    def of(self, base_code: str, adapter: str) -> Series:
        """The series of a base (`adapter` empty) or of an adapter of it."""
        labels = (base_code, adapter)
        if labels not in self._series:
            if adapter and sum(bool(other) for _, other in self._series) >= self._most_adapters:
                labels = (base_code, OTHER)
            metrics = (self._first, self._gap, self._prompt_tokens, self._cached_tokens, self._completion_tokens)
            self._series[labels] = Series(
                labels,
                *(metric.labels(*labels) for metric in (*metrics, self._running)),  # type: ignore[arg-type]
            )
        return self._series[labels]

    def ended(self, series: Series, endpoint: str, outcome: str) -> None:
        """A request came to its end."""
        self._requests.labels(*series.labels, endpoint, outcome).inc()

    def refused(self, code: str) -> None:
        """A request was found wrong, or came at a bad time, before an engine was asked."""
        self._refused.labels(code).inc()

    def text(self, engines: Sequence[State]) -> bytes:
        """Everything in Prometheus' text format; `engines` are the workers as they are now."""
        self._engines.states = engines
        return generate_latest(self._registry)


class _Engines(Collector):
    """What workers say of themselves (their counters begin anew when a worker does), and the ledger."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger
        self.states: Sequence[State] = ()

    def collect(self) -> Iterable[Metric]:
        states = self.states
        yield _gauge("slots", "Sequences that an engine can decode together", states, lambda state: state.slots)
        yield _gauge("active", "Slots in use", states, lambda state: state.active)
        yield _gauge("waiting", "Requests in an engine's queue", states, lambda state: state.waiting)
        yield _gauge("adapters", "Adapters in memory", states, lambda state: len(state.adapters))
        yield _counter(
            "adapter_hits", "Requests whose adapter was there or on its way", states, lambda state: state.adapter_hits
        )
        yield _counter("adapter_loads", "Adapters brought into memory", states, lambda state: state.adapter_loads)
        yield _counter(
            "adapter_load_seconds", "Time that it took to load them", states, lambda state: state.adapter_load_ms / 1000
        )
        yield _counter(
            "prefix_hits", "Prompts of which the beginning had been computed", states, lambda state: state.prefix_hits
        )
        yield _counter(
            "prefix_tokens_reused", "Tokens of these beginnings", states, lambda state: state.prefix_tokens_reused
        )
        yield _counter("prefix_tokens", "Tokens of all prompts", states, lambda state: state.prefix_tokens_total)
        yield CounterMetricFamily("tunewright_usage_rows_lost", "Rows of the ledger lost", value=self._ledger.lost)


def _gauge(name: str, text: str, states: Sequence[State], of: Callable[[State], float]) -> Metric:
    return _filled(GaugeMetricFamily(f"tunewright_engine_{name}", text, labels=_WORKER), states, of)


def _counter(name: str, text: str, states: Sequence[State], of: Callable[[State], float]) -> Metric:
    return _filled(CounterMetricFamily(f"tunewright_engine_{name}", text, labels=_WORKER), states, of)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, states: Sequence[State], of: Callable[[State], float]
) -> Metric:
    for state in states:
        family.add_metric((state.base_code, state.worker_id), of(state))
    return family
