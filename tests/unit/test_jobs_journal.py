"""Reading journals that are whole, growing, damaged; and what events are made of."""

import json
from pathlib import Path

import pytest

from tunewright.jobs import events
from tunewright.jobs.journal_reader import first_record, read_batch
from tunewright.jobs.records import Job
from tunewright.jobs.spec import Failed, Finished, Metrics, Note, Started, Stopped, encode_record

STARTED = Started(
    total_steps=4,
    resumed_step=0,
    rows={"used": 1},
    tokens_per_epoch=1,
    trained_tokens_per_epoch=1,
    choices={},
    renderer_hash="r",
)
JOB = Job(
    id="ftjob-1",
    project_id="p",
    base_code="tiny",
    model="tiny",
    tuned_model_id="m",
    tuned_model_name="tiny:1::x",
    training_file="f",
    created_at=1,
)


def metrics(step: int, loss: float | None = 1.5, **more: float) -> Metrics:
    return Metrics(
        step=step,
        total_steps=4,
        epoch=step / 4,
        loss=loss,
        accuracy=0.25,
        learning_rate=1e-4,
        tokens=step,
        elapsed_s=3725.4,
        remaining_s=None,
        **more,
    )


def line(record: object) -> bytes:
    return encode_record(record) + b"\n"


def test_no_file_is_an_empty_batch(tmp_path: Path) -> None:
    batch = read_batch(tmp_path / "none.jsonl", 0)
    assert (batch.records, batch.offset, batch.terminal, batch.more) == ([], 0, None, False)


def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole, half = line(STARTED), line(metrics(1))
    path.write_bytes(whole + half[:-1])
    batch = read_batch(path, 0)
    assert batch.records == [STARTED] and batch.offset == len(whole) and batch.more
    assert read_batch(path, batch.offset).more is False
    path.write_bytes(whole + half)
    assert read_batch(path, batch.offset).records == [metrics(1)]


@pytest.mark.parametrize(
    "last",
    [
        Finished(trained_tokens=1, final_loss=None, adapter_sha256="a"),
        Failed(code="c", message="m"),
        Stopped(step=3),
    ],
)
def test_the_last_record_is_not_consumed(tmp_path: Path, last: Finished | Failed | Stopped) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(line(STARTED) + line(last) + line(metrics(9)))
    batch = read_batch(path, 0)
    assert batch.records == [STARTED] and batch.terminal == last and batch.offset == len(line(STARTED))
    again = read_batch(path, batch.offset)
    assert again.terminal == last and again.records == [] and again.offset == batch.offset


def test_damaged_lines_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"type":"metrics"}\n\xff\xfe\n{}\n\n' + line(metrics(2)))
    batch = read_batch(path, 0)
    assert batch.damaged == 4 and batch.records == [metrics(2)] and batch.offset == path.stat().st_size


def test_a_file_that_lost_its_end_reads_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(line(STARTED))
    assert read_batch(path, 10_000).records == []


def test_many_records_come_in_pieces_and_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    notes = [Note(level="info", code="n", message="x" * 3000, values={"n": n}) for n in range(1000)]
    path.write_bytes(b"".join(line(note) for note in notes))
    found, offset, reads = [], 0, 0
    while (batch := read_batch(path, offset)).more:
        found += batch.records
        offset = batch.offset
        reads += 1
    assert found == notes and reads > 2


def test_a_line_longer_than_a_read_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    note = Note(level="info", code="n", message="x" * (3 << 20))
    path.write_bytes(line(note))
    assert read_batch(path, 0).records == [note]


def test_first_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert first_record(path) is None
    path.write_bytes(line(STARTED) + line(metrics(1)))
    assert first_record(path) == STARTED


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3725.4, "1:02:05"), (360000, "100:00:00"), (-1, "0:00:00"), (None, None)],
)
def test_clock_text(seconds: float | None, text: str | None) -> None:
    assert events.clock_text(seconds) == text


def test_numbers_that_json_lacks_become_null() -> None:
    event = events.metrics(JOB, metrics(1, loss=float("nan"), eval_loss=float("inf")))
    assert event.data is not None and event.data["loss"] is None and event.data["valid_loss"] is None
    assert event.message == "Step {step}/{total_steps}"
    json.dumps(event.data, allow_nan=False)


def test_validation_names_are_there_only_when_measured() -> None:
    plain = events.metrics(JOB, metrics(1)).data or {}
    assert "eval_loss" not in plain and plain["elapsed_time"] == "1:02:05" and plain["remaining_time"] is None
    assert (events.metrics(JOB, metrics(1, eval_loss=2.5)).data or {})["valid_loss"] == 2.5


def test_steps_of_preference_training_have_names_of_their_own() -> None:
    event = events.metrics(
        JOB, metrics(1, eval_loss=0.5, eval_accuracy=0.75, reward_margin=0.2, eval_reward_margin=0.1)
    )
    data = event.data or {}
    assert (data["train_reward_accuracy"], data["reward_margin"], data["acc"]) == (0.25, 0.2, 0.25)
    assert (data["valid_reward_accuracy"], data["eval_reward_margin"], data["eval_acc"]) == (0.75, 0.1, 0.75)
    assert "train_mean_token_accuracy" not in data and "valid_mean_token_accuracy" not in data
    assert event.message.format(**event.values) == "Step 1/4: loss=1.5000, margin=0.2000"
    assert "reward_margin" not in (events.metrics(JOB, metrics(1)).data or {})


def test_the_result_table_has_empty_cells_and_one_row_a_step() -> None:
    made = [events.metrics(JOB, record) for record in (metrics(2, eval_loss=0.5), metrics(1))]
    made.append(events.message(JOB, "note", "x"))
    assert events.result_table(made).decode() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.5,0.25,,\n2,1.5,0.25,0.5,\n"
    )


def test_levels_are_those_of_the_api() -> None:
    levels = [events.message(JOB, "c", "t", level=level).level for level in ("info", "warning", "warn", "error", "x")]
    assert levels == ["info", "warn", "warn", "error", "info"]


def test_the_names_of_both_dialects_are_there() -> None:
    """Those of zhipuai's `Metric`, and those of an OpenAI checkpoint with `step`."""
    zhipu = {"epoch", "current_steps", "total_steps", "elapsed_time", "remaining_time", "trained_tokens", "loss"}
    zhipu |= {"eval_loss", "acc", "eval_acc", "learning_rate"}
    openai = {"step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"}
    openai |= {"full_valid_loss", "full_valid_mean_token_accuracy"}
    data = events.metrics(JOB, metrics(1, eval_loss=2.0, eval_accuracy=0.5)).data
    assert data is not None and set(data) == zhipu | openai
    assert data["eval_loss"] == data["valid_loss"] == data["full_valid_loss"] == 2.0
    assert data["eval_acc"] == data["valid_mean_token_accuracy"] == data["full_valid_mean_token_accuracy"] == 0.5
    without = events.metrics(JOB, metrics(1)).data
    assert without is not None and not [name for name in without if "valid" in name or "eval" in name]


def test_the_result_table_of_pairs_has_columns_of_its_own() -> None:
    made = [
        events.metrics(JOB, metrics(1, reward_margin=0.125)),
        events.metrics(JOB, metrics(2, reward_margin=0.5, eval_loss=0.75, eval_accuracy=1.0, eval_reward_margin=2.0)),
    ]
    assert events.result_table(made).decode().splitlines() == [
        "step,train_loss,train_reward_accuracy,train_reward_margin,valid_loss,valid_reward_accuracy,valid_reward_margin",
        "1,1.5,0.25,0.125,,,",
        "2,1.5,0.25,0.5,0.75,1.0,2.0",
    ]
