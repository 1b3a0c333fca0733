"""However many adapters there are, the number of series stays bounded."""

from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.contract.rows import job
from tunewright.accounts.usage import UsageLedger
from tunewright.api.server_metrics import ServerMetrics
from tunewright.clock import wall_s
from tunewright.completions.metrics import OTHER, ServingMetrics
from tunewright.deployments.ports import State
from tunewright.settings import Settings
from tunewright.wiring import Platform

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def samples(metrics: ServingMetrics, *states: State) -> list[Any]:
    text = metrics.text(states).decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def metrics_of(most: int) -> ServingMetrics:
    ledger: Any = UsageLedger(None, "s", 1)  # type: ignore[arg-type]
    return ServingMetrics(ledger, most)


def test_ten_thousand_adapters_have_a_hundred_series_and_one() -> None:
    metrics = metrics_of(100)
    for number in range(10_000):
        metrics.of("tiny", f"tiny:1:x:{number}").prompt_tokens.inc()
        metrics.of("tiny", "").prompt_tokens.inc()
    read = {s.labels["adapter"]: s.value for s in samples(metrics) if s.name == "tunewright_prompt_tokens_total"}
    assert len(read) == 102
    assert read[""] == 10_000 and read[OTHER] == 9_900 and read["tiny:1:x:0"] == 1
    assert len(metrics._series) <= 102 + 1, "nor do they stay in memory"


def test_engines_say_their_own_numbers() -> None:
    state = State(
        worker_id="pool-tiny",
        base_code="tiny",
        active=1,
        waiting=2,
        slots=4,
        adapters=["a", "b"],
        adapter_hits=7,
        adapter_loads=3,
        adapter_load_ms=250.0,
        prefix_hits=5,
        prefix_tokens_reused=60,
        prefix_tokens_total=100,
    )
    found = {
        s.name: s.value for s in samples(metrics_of(1), state) if s.labels == {"model": "tiny", "worker": "pool-tiny"}
    }
    assert found == {
        "tunewright_engine_slots": 4,
        "tunewright_engine_active": 1,
        "tunewright_engine_waiting": 2,
        "tunewright_engine_adapters": 2,
        "tunewright_engine_adapter_hits_total": 7,
        "tunewright_engine_adapter_loads_total": 3,
        "tunewright_engine_adapter_load_seconds_total": 0.25,
        "tunewright_engine_prefix_hits_total": 5,
        "tunewright_engine_prefix_tokens_reused_total": 60,
        "tunewright_engine_prefix_tokens_total": 100,
    }


def platform_of(home: Path) -> Platform:
    platform = Platform(Settings(home=home))
    platform.prepare()
    return platform


def test_a_database_that_is_gone_costs_its_own_numbers_only(tmp_path: Path) -> None:
    platform = platform_of(tmp_path / "home")
    metrics = ServerMetrics(platform)
    metrics.answered("GET", "/v1/files", 200, 0.1)
    assert b"tunewright_database_up 1.0" in metrics.text()
    platform.storage.close()
    platform.home.database.rename(tmp_path / "away")
    platform.home.database.mkdir()
    text = metrics.text().decode()
    assert "tunewright_database_up 0.0" in text and "tunewright_home_free_bytes" in text
    assert 'tunewright_http_requests_total{method="GET",route="/v1/files",status="200"} 1.0' in text
    assert "tunewright_jobs" not in text, "no number is better than a wrong one"


def test_queued_jobs_are_counted_and_the_oldest_wait_told(tmp_path: Path) -> None:
    platform = platform_of(tmp_path / "home")
    with platform.storage.write() as tx:
        (mine,) = tx.projects.all()
        for number, status in enumerate(("queued", "queued", "running", "failed")):
            ended = wall_s() if status == "failed" else None
            row = job(mine.id, status=status, created_at=wall_s() - 100 * (number + 1), finished_at=ended)
            tx.jobs.insert(row)
    text = ServerMetrics(platform).text().decode()
    found = {
        s.name + s.labels.get("state", ""): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    assert (found["tunewright_jobsqueued"], found["tunewright_jobsrunning"], found["tunewright_jobspaused"]) == (
        2,
        1,
        0,
    )
    assert found["tunewright_jobs_ended_dayfailed"] == 1
    assert 200 <= found["tunewright_jobs_oldest_wait_seconds"] < 260
    platform.storage.close()


def test_every_metric_is_documented_and_every_documented_one_exists(tmp_path: Path) -> None:
    metrics = metrics_of(1)
    platform = platform_of(tmp_path / "home")
    server = ServerMetrics(platform)
    server.answered("GET", "", 200, 0.1)
    metrics.ended(metrics.of("tiny", ""), "/chat/completions", "ok")
    metrics.refused("x")
    text = (metrics.text([]) + server.text()).decode()
    platform.storage.close()
    families = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
        if not family.name.startswith("process_")  # the library's own
    }
    section = DOCS.read_text("utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `tunewright")]
    documented = {name.strip(" `") for row in rows for name in row.split(",")}
    assert {name.removesuffix("_created") for name in families if not name.endswith("_created")} == documented
