"""What a trainer takes of the machine, and what that is known from."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract.rows import job as a_job
from tunewright.jobs.hyperparameters import resolve
from tunewright.jobs.memory_estimate import estimate
from tunewright.jobs.needs import MARGIN, needs
from tunewright.jobs.records import Job
from tunewright.models.records import Base, Source

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
PLENTY = 2**50


@pytest.fixture
def base(tmp_path: Path) -> Base:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    return Base(code="b", name="b", source=Source(kind="folder"), licence="", context_tokens=8192, path=tmp_path)


def job(method: str = "supervised", training_type: str = "lora", **changes: Any) -> Job:
    asked = changes.pop("asked", {})
    run = resolve(asked, rows=100, training_type=training_type, method=method, context_tokens=8192)
    numbers = msgspec.to_builtins(run)
    fields = {"method": method, "training_type": training_type, "hyperparameters": numbers, "rehearsal": {}} | changes
    return a_job("proj-1", **fields)


def test_the_estimate_is_that_of_the_fastest_way_that_fits(base: Base) -> None:
    common: dict[str, Any] = {
        "training_type": "lora",
        "lora_rank": 16,
        "precision": "auto",
        "longest_row": 1024,
    }
    fast = estimate(CONFIG, **common, micro_batch_tokens=1024, activation_checkpointing=False).total
    found = needs(job(), base, 7, PLENTY, 0)
    assert found == {
        "memory_bytes": round(fast * MARGIN),
        "source": "estimate",
        "limit_bytes": round(fast * MARGIN),
        "gpus": 0,
        "rows": 7,
    }
    lean = needs(job(), base, 7, round(fast * MARGIN) - 10, 0)
    assert lean["memory_bytes"] < found["memory_bytes"]
    too_small = needs(job(), base, 7, 10, 0)
    assert too_small["memory_bytes"] > 10, "which fails the job"


def test_pairs_and_all_weights_take_more(base: Base) -> None:
    plain = needs(job(), base, 7, PLENTY, 0)["memory_bytes"]
    assert needs(job(method="dpo"), base, 7, PLENTY, 0)["memory_bytes"] > plain
    assert needs(job(training_type="full"), base, 7, PLENTY, 0)["memory_bytes"] > plain
    assert needs(job(asked={"activation_checkpointing": "on"}), base, 7, PLENTY, 0)["memory_bytes"] < plain


def test_what_was_measured_goes_before_what_was_estimated(base: Base) -> None:
    estimated = needs(job(), base, 7, PLENTY, 0)["memory_bytes"]
    for peak in (10**9, 10**11):
        found = needs(job(rehearsal={"memory_peak_bytes": peak}), base, 7, PLENTY, 0)
        assert (found["memory_bytes"], found["source"]) == (round(peak * MARGIN), "rehearsal")
        assert found["limit_bytes"] == max(estimated, found["memory_bytes"]), (
            "a small peak is no reason to compute leaner"
        )


@pytest.mark.parametrize("config", [None, "{", "{}", '{"hidden_size": "x"}'])
def test_a_base_that_says_nothing_counts_by_its_weights(base: Base, config: str | None) -> None:
    path = base.path
    assert path is not None
    (path / "config.json").unlink()
    if config is not None:
        (path / "config.json").write_text(config)
    lora, full = (needs(job(training_type=kind), base, 7, PLENTY, 2) for kind in ("lora", "full"))
    assert lora["source"] == "weights" and lora["gpus"] == 1
    assert full["memory_bytes"] - lora["memory_bytes"] == pytest.approx(6000 * MARGIN, abs=2)
