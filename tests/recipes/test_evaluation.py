"""When validation rows are measured, what then stays, and when a training ends early."""

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.job_folder import (
    codes,
    losses,
    metrics,
    next_attempt,
    train_here,
    write_job,
    write_rows,
)
from tests.recipes.test_text import finished
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Checkpoint, EarlyStopping, JournalRecord, Started, Stopped, TrainingSpec
from tunewright.recipes import adapters, checkpoints, evaluation
from tunewright.recipes.checkpoints import Standing
from tunewright.recipes.evaluation import Progress

OTHER = [("What is the capital of Spain?", "ten"), ("你好吗", "yes"), ("Name a sea.", "one two")]
"""Validation rows that get worse the better the training rows are known."""


def job(folder: Path, base: Path, **changes: Any) -> TrainingSpec:
    rows = folder.with_name(folder.name + "-valid.jsonl")
    write_rows(rows, OTHER)
    settings = {"n_epochs": 12, "learning_rate": 2e-2} | changes
    return write_job(folder, base, validation_data=str(rows), validation_sha256=sha256_of(rows), **settings)


def measured(found: list[JournalRecord]) -> dict[int, float]:
    return {record.step: record.eval_loss for record in metrics(found) if record.eval_loss is not None}


def told(found: list[JournalRecord]) -> list[Checkpoint]:
    return [record for record in found if isinstance(record, Checkpoint)]


def test_the_best_and_the_last_are_never_dropped(tmp_path: Path, base: Path) -> None:
    """A prune simulation and a real run: of seven epochs the second was best."""
    found = train_here(job(tmp_path / "job", base))
    losses_seen = measured(found)
    best = min(losses_seen, key=lambda step: losses_seen[step])
    total = max(losses(found))
    assert best < total - 12, "the rows are meant to be unlearned early"
    there = checkpoints.steps(tmp_path / "job")
    assert there == sorted({best, total - 8, total - 4, total})
    assert told(found)[-1].kept == there
    folder = checkpoints.checkpoint_path(tmp_path / "job", best)
    assert told(found)[losses_seen_index(found, best)].adapter_sha256 == sha256_of(folder / adapters.WEIGHTS)

    standings: dict[int, Standing] = {}
    for step in range(1, 200):
        loss = abs(step - 70) / 10 if step % 10 == 0 else None
        standings[step] = Standing(validation_loss=loss, ends_epoch=step % 25 == 0)
        stay = checkpoints.kept(standings, "lora")
        standings = {step: standing for step, standing in standings.items() if step in stay}
        assert step in standings and len(standings) <= 7
        assert step < 70 or 70 in standings
    assert sorted(standings) == [70, 125, 150, 175, 197, 198, 199]
    assert checkpoints.kept(standings, "full") == {70, 197, 198, 199}


def losses_seen_index(found: list[JournalRecord], step: int) -> int:
    return [record.step for record in told(found)].index(step)


def test_a_checkpoint_shows_a_validation_loss_only_where_it_was_measured(tmp_path: Path, base: Path) -> None:
    found = train_here(job(tmp_path / "job", base, n_epochs=2, checkpoint_every_s=1e-6))
    shown = {record.step: record.metrics.get("full_valid_loss") for record in told(found)}
    assert list(shown) == list(range(1, 9))
    assert {step for step, loss in shown.items() if loss is not None} == {4, 8}
    assert told(found)[3].metrics["valid_loss"] == shown[4] == measured(found)[4]


def test_long_epochs_are_measured_within(tmp_path: Path, base: Path) -> None:
    found = train_here(job(tmp_path / "job", base, n_epochs=2, eval_steps=3))
    assert list(measured(found)) == [3, 4, 6, 8]
    assert {3, 4, 6, 8} >= {record.step for record in told(found)} >= {4, 8}


@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_early_stopping_publishes_the_best_weights(tmp_path: Path, base: Path, training_type: str) -> None:
    stopping = EarlyStopping(patience=2)
    changes: dict[str, Any] = {"training_type": training_type, "early_stopping": stopping}
    found = train_here(job(tmp_path / "job", base, **changes))
    seen = measured(found)
    best, last = min(seen, key=lambda step: seen[step]), max(seen)
    assert last == best + 8 < 48
    assert codes(found)[-2:] == ["early_stopped", "best_step_published"]
    end = finished(found)
    assert end.step == best
    assert end.trained_tokens == metrics(found)[-1].tokens
    if training_type == "lora":
        kept = checkpoints.checkpoint_path(tmp_path / "job", best) / adapters.WEIGHTS
        assert end.adapter_sha256 == sha256_of(kept) == sha256_of(tmp_path / "job" / "result" / adapters.WEIGHTS)


def test_resuming_near_an_early_stop_changes_no_bit(tmp_path: Path, base: Path) -> None:
    """The lowest loss and the count of evaluations without gain are part of the state."""
    changes: dict[str, Any] = {"early_stopping": EarlyStopping(patience=2, min_delta=0.001), "eval_steps": 3}
    whole = train_here(job(tmp_path / "whole", base, **changes))
    last = max(losses(whole))
    assert last < 48
    for stop_at in (last - 4, last - 1, last):
        spec = job(tmp_path / f"stopped-{stop_at}", base, **changes)
        first = train_here(spec, stop_at=stop_at)
        if stop_at < last:
            assert first[-1] == Stopped(step=stop_at)
        second = train_here(next_attempt(spec))
        assert isinstance(second[0], Started) and second[0].resumed_step == stop_at
        assert losses(first) | losses(second) == losses(whole)
        assert finished(second) == finished(whole)


def test_without_an_early_end_the_best_weights_are_published_too(tmp_path: Path, base: Path) -> None:
    found = train_here(job(tmp_path / "job", base, early_stopping=EarlyStopping(patience=100)))
    seen = measured(found)
    assert max(losses(found)) == 48
    assert finished(found).step == min(seen, key=lambda step: seen[step]) < 48
    assert "early_stopped" not in codes(found)


def test_a_best_checkpoint_that_rotted_is_told(tmp_path: Path, base: Path) -> None:
    spec = job(tmp_path / "job", base, early_stopping=EarlyStopping(patience=100))
    whole = train_here(spec)
    best = finished(whole).step or 0
    (checkpoints.checkpoint_path(tmp_path / "job", best) / adapters.WEIGHTS).write_bytes(b"?")
    again = train_here(next_attempt(spec))
    assert finished(again).step == 48
    assert codes(again) == ["best_checkpoint_lost"]


def test_gain_is_counted_from_the_last_loss_that_was_one() -> None:
    """Many falls below `min_delta` add up to one; a loss that is no number is no gain."""
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    progress = Progress()
    seen = []
    for step, loss in enumerate([2.0, 1.95, 1.85, None, 1.84, 1.8], 1):
        progress = evaluation.judged(evaluation.replace(progress, step=step, eval_loss=loss), stopping)
        seen.append((progress.stale, progress.best_step, evaluation.is_enough(progress, stopping)))
    assert seen == [(0, 1, False), (1, 2, False), (0, 3, False), (1, 3, False), (2, 5, True), (3, 6, True)]
