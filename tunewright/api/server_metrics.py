"""Numbers about the server itself for Prometheus: requests by route, the event loop, database, disk, jobs, the process.

Labels are bounded: a route is its template and never a path, and no label is a name that a caller chose.
"""

import asyncio
import shutil
from collections import Counter as Counts
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tunewright.clock import mono_s, wall_s
from tunewright.errors import TunewrightError
from tunewright.jobs.records import MOVES, QUEUED, TERMINAL
from tunewright.wiring import Platform

OTHER = "other"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_EVERY_S = 0.5
_DAY_S = 24 * 3600
_MOST_ENDED = 1000


class ServerMetrics:
    """In a registry of its own. `text` blocks, for it asks the database; the rest belongs to the event loop."""

    def __init__(self, platform: Platform) -> None:
        self._registry = registry = CollectorRegistry()
        self._answers = Counter("tunewright_http_requests", "Answers", ("method", "route", "status"), registry=registry)
        self._seconds = Histogram(
            "tunewright_http_request_seconds",
            "From the head of a request to the end of its answer",
            ("method", "route"),
            buckets=_REQUEST_S,
            registry=registry,
        )
        self._lag = Histogram(
            "tunewright_event_loop_lag_seconds",
            "How late the event loop came back to a timer",
            buckets=_LAG_S,
            registry=registry,
        )
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        ProcessCollector(registry=registry)
        registry.register(_State(platform))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request came to its end. `route` is the template of its path, empty if it was refused before one was looked for."""
        method = method if method in _METHODS else OTHER
        series = self._series.get((method, route, status))
        if series is None:
            series = self._answers.labels(method, route, status), self._seconds.labels(method, route)
            self._series[method, route, status] = series
        series[0].inc()
        series[1].observe(seconds)

    @asynccontextmanager
    async def watching_loop(self) -> AsyncIterator[None]:
        """Measure the lag of the running event loop meanwhile."""
        task = asyncio.ensure_future(self._watch_loop())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch_loop(self) -> None:
        while True:
            due_s = mono_s() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._lag.observe(max(0.0, mono_s() - due_s))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _State(Collector):
    """What is asked when somebody looks. A database that does not answer costs its own numbers only."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    def collect(self) -> Iterable[Metric]:
        platform = self._platform
        free = shutil.disk_usage(platform.home.root).free
        yield _gauge("home_free_bytes", "Free on the file system of the home", free)
        begun_s = mono_s()
        try:
            platform.storage.probe()
            probe_s = mono_s() - begun_s
            with platform.storage.read() as tx:
                unfinished = tx.jobs.unfinished()
                ended = tx.jobs.ended_since(wall_s() - _DAY_S, _MOST_ENDED)
        except TunewrightError:
            yield _gauge("database_up", "Whether the database took a read and a write just now", 0)
            return
        yield _gauge("database_up", "Whether the database took a read and a write just now", 1)
        yield _gauge("database_probe_seconds", "How long that read and write took", probe_s)
        yield _by_state("jobs", "Jobs that have not ended", (job.status for job in unfinished), MOVES.keys() - TERMINAL)
        yield _by_state("jobs_ended_day", "Jobs that ended in the last day", (job.status for job in ended), TERMINAL)
        waits_s = [wall_s() - job.created_at for job in unfinished if job.status == QUEUED]
        yield _gauge("jobs_oldest_wait_seconds", "Age of the oldest queued job", max(waits_s, default=0))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tunewright_{name}", text, value=value)


def _by_state(name: str, text: str, found: Iterable[str], states: Iterable[str]) -> Metric:
    """A sample for each state, those that nobody is in too."""
    family, counts = GaugeMetricFamily(f"tunewright_{name}", text, labels=("state",)), Counts(found)
    for state in sorted(states):
        family.add_metric((state,), counts[state])
    return family
