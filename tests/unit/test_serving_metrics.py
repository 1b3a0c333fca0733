"""However many adapters there are, the number of series stays bounded."""

from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tunewright.accounts.usage import UsageLedger
from tunewright.completions.metrics import OTHER, ServingMetrics
from tunewright.deployments.ports import State

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


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    metrics = metrics_of(1)
    metrics.ended(metrics.of("tiny", ""), "/chat/completions", "ok")
    metrics.refused("x")
    text = metrics.text([]).decode()
    families = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)
    }
    section = DOCS.read_text("utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `tunewright")]
    documented = {name.strip(" `") for row in rows for name in row.split(",")}
    assert {name.removesuffix("_created") for name in families if not name.endswith("_created")} == documented
