"""The dress rehearsal: which rows it takes, what it measures, and that it fails where the training would."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.recipes.job_folder import ROWS, codes, records, run_trainer, train_here, write_job
from tests.recipes.test_preference import dpo_job
from tests.recipes.test_text import Memory, failed
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.memory_estimate import MICRO_BATCH_TOKENS
from tunewright.jobs.spec import JournalRecord, Rehearsed, TrainingSpec
from tunewright.recipes import flattened, nastiest, packing, rehearsal, text
from tunewright.recipes.evaluation import Progress
from tunewright.rendering.renderer import renderer_of


def rehearsed(found: list[JournalRecord]) -> Rehearsed:
    last = found[-1]
    assert isinstance(last, Rehearsed), last
    return last


def features(**columns: list[float]) -> nastiest.Features:
    n_examples = len(columns["tokens"])
    names = ("tokens", "labels", "turns", "calls", "depth", "rarity", "kind")
    return nastiest.Features(**{name: np.array(columns.get(name, [0] * n_examples)) for name in names})


# --- which rows -----------------------------------------------------------------------------------------------------


def test_each_way_to_be_nasty_is_represented_and_the_longest_rows_fill_up() -> None:
    found = features(
        tokens=[100, 90, 80, 70, 60, 50, 40, 30, 20, 10],
        labels=[1, 1, 1, 1, 9, 1, 1, 1, 1, 1],
        turns=[2, 2, 2, 2, 2, 8, 2, 2, 2, 2],
        calls=[0, 0, 0, 0, 0, 0, 5, 1, 0, 0],
        depth=[0, 0, 0, 0, 0, 0, 1, 7, 0, 0],
        rarity=[0, 0, 0, 0, 0, 0, 0, 0, 3, 0],
        kind=[0, 0, 0, 0, 0, 0, 1, 1, 0, 2],
    )
    assert nastiest.choose(found, 8) == [0, 1, 4, 5, 6, 7, 8, 9]
    assert nastiest.choose(found, 3) == [0, 4, 5]


def test_equal_rows_are_taken_from_the_beginning_and_few_rows_are_all_taken() -> None:
    assert nastiest.choose(features(tokens=[5] * 20), 8) == list(range(8))
    assert nastiest.choose(features(tokens=[5, 7, 6]), 8) == [1, 2, 0]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}, (2, 0, 0, 0)),
        (
            {
                "messages": [{"role": "assistant", "tool_calls": [call('{"a": {"b": [1]}}'), call({"a": 1})]}],
                "tools": [],
            },
            (1, 2, 3, 1),
        ),
        ({"messages": [{"role": "user", "content": "?"}], "tools": [{"type": "function"}]}, (1, 0, 0, 1)),
        (
            {
                "input": {"messages": [{"role": "user", "content": "?"}]},
                "preferred_output": [{"role": "assistant", "content": "!"}],
                "non_preferred_output": [{"role": "assistant", "content": "."}],
            },
            (3, 0, 0, 2),
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [call("no JSON"), "?", {"function": 1}]}]}, (1, 2, 0, 1)),
        (None, (0, 0, 0, 0)),
        ([], (0, 0, 0, 0)),
        ({"messages": "?", "input": 3}, (0, 0, 0, 0)),
    ],
)
def test_the_shape_of_a_row(row: Any, shape: tuple[int, int, int, int]) -> None:
    assert nastiest.shape_of(row) == shape


def test_depth_has_an_end() -> None:
    deep = "[" * 900 + "]" * 900
    assert nastiest.shape_of({"messages": [{"role": "assistant", "tool_calls": [call(deep)]}]})[2] == 64


def test_the_features_of_a_file(tmp_path: Path, base: Path) -> None:
    """Lines keep their numbers when some are left out, and the row with signs that no other row has is known."""
    spec = write_job(
        tmp_path / "job", base, rows=[(f"Is {n} a number?", "yes, it is") for n in range(7)] + [("∮∯", "∰")]
    )
    rows = packing.read_rows(
        Path(spec.training_data),
        renderer_of(base),
        max_length=128,
        max_line_bytes=2**20,
        between_rows=lambda: None,
        param="training_file",
        skip_lines=frozenset({1, 3}),
    )
    assert rows.lines.tolist() == [2, 4, 5, 6, 7, 8]
    found = nastiest.features(rows, Path(spec.training_data), 2**20)
    assert found.turns.tolist() == [2] * 6 and found.kind.tolist() == [0] * 6
    assert int(found.rarity.argmax()) == 5
    few = rows.only([5, 0])
    assert few.lines.tolist() == [8, 2]
    assert few.tokens_of(0).tolist() == rows.tokens_of(5).tolist() and few.n_trained < rows.n_trained


# --- which steps ----------------------------------------------------------------------------------------------------


def test_two_steps_of_four_rows_and_one_of_usual_rows() -> None:
    lengths = np.array([1000, 900, 800, 700, 600, 500, 400, 300, *range(100, 200)])
    plan = rehearsal.plan_of(list(range(8)), lengths, batch_size=4, token_budget=1024)
    assert plan.steps == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert len(plan.usual) == 4 and all(140 < lengths[example] < 160 for example in plan.usual)


def test_short_rows_are_joined_by_others_until_a_micro_batch_is_as_full_as_in_the_training() -> None:
    plan = rehearsal.plan_of(list(range(8)), np.full(100, 60), batch_size=16, token_budget=1024)
    assert (len(plan.steps[0]), len(plan.steps[1])) == (16, 4)
    assert len({example for step in plan.steps for example in step}) == 20
    assert rehearsal.plan_of(list(range(8)), np.full(100, 60), batch_size=4, token_budget=1024).steps[0] == [0, 2, 4, 6]


def test_steps_have_no_more_rows_than_those_of_the_training() -> None:
    lengths = np.arange(20)[::-1]
    plan = rehearsal.plan_of(list(range(8)), lengths, batch_size=1, token_budget=1024)
    assert plan.steps == [[example] for example in range(8)] and len(plan.usual) == 1
    assert rehearsal.plan_of([0], np.array([9]), batch_size=4, token_budget=1024) == rehearsal.Plan(
        [0], [[0], [0]], [0]
    )


# --- the rehearsal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "dpo"])
def test_a_rehearsal_measures_and_leaves_nothing(tmp_path: Path, base: Path, kind: str) -> None:
    if kind == "dpo":
        spec = dpo_job(tmp_path / "job", base, validate=True, rehearsal=True)
    else:
        spec = write_job(tmp_path / "job", base, training_type=kind, rehearsal=True)
    found = rehearsed(train_here(spec))
    assert sorted(found.lines) == [1, 2, 3, 4, 5, 6, 7]
    assert 50 * 2**20 < found.memory_peak_bytes < 2**40 and found.micro_batch_tokens == MICRO_BATCH_TOKENS
    assert 0 < found.least_s < found.most_s and found.seconds_per_step > 0 and found.seconds > 0
    rows = packing.read_rows(
        Path(spec.training_data),
        renderer_of(base),
        max_length=128,
        max_line_bytes=2**20,
        between_rows=lambda: None,
        param="training_file",
        sides=2 if kind == "dpo" else 1,
    )
    assert found.tokens == rows.n_tokens * spec.hyperparameters.n_epochs
    left = {path.name for path in (tmp_path / "job").iterdir()}
    assert left <= {"data", "spec.json", "attempt", "computing.json", f"journal-{spec.attempt}.jsonl"}


def test_the_process_that_the_server_starts(tmp_path: Path, base: Path) -> None:
    """Warnings are errors in it. What an earlier attempt left is no checkpoint of this one."""
    spec = write_job(tmp_path / "job", base, rehearsal=True, rows=[("你好", "你好 " * 200), *ROWS])
    (tmp_path / "job" / "checkpoints" / "step-9").mkdir(parents=True)
    assert run_trainer(spec) == 0
    found = records(spec)
    assert codes(found) == ["rows_cut"] and rehearsed(found).lines[0] == 1
    assert rehearsed(found).memory_peak_bytes > 100 * 2**20


def test_the_answer_is_that_of_the_trained_weights(tmp_path: Path, base: Path) -> None:
    """So high a learning rate that the few steps change every answer."""
    texts = {
        rate: rehearsed(
            train_here(write_job(tmp_path / str(rate), base, rehearsal=True, learning_rate=rate, warmup_ratio=0))
        ).answer
        for rate in (1e-9, 0.5)
    }
    assert texts[1e-9] != texts[0.5]


# --- what fails -----------------------------------------------------------------------------------------------------


def test_memory_that_is_not_enough_fails_with_the_code_of_a_training(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattened, "summed_loss", Memory(2))
    error = failed(train_here(write_job(tmp_path / "job", base, rehearsal=True)))
    assert (error.code, error.values) == ("out_of_memory", {"batch_size": 2, "max_length": 128})


def test_a_base_that_cannot_be_trained_is_told(tmp_path: Path, base: Path) -> None:
    other = tmp_path / "base"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"model_type": "of_tomorrow", "architectures": ["Tomorrow"]})
    )
    error = failed(train_here(write_job(tmp_path / "job", other, rehearsal=True)))
    assert error.code == "base_model_unsupported"


def test_numbers_that_grow_beyond_all_bounds_are_told(tmp_path: Path, base: Path) -> None:
    spec = write_job(tmp_path / "job", base, rehearsal=True, learning_rate=1e38, warmup_ratio=0)
    assert failed(train_here(spec)).code == "loss_not_finite"


def test_a_disk_without_room_is_told(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tunewright.recipes.checkpoints.publish", full)
    assert failed(train_here(write_job(tmp_path / "job", base, rehearsal=True))).code == "insufficient_storage"


def test_a_checkpoint_that_is_not_read_back_as_it_was_is_told(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(trial: rehearsal.Trial) -> Progress:
        progress = text.Training._resume(trial)
        with torch.no_grad():
            next(iter(trial.parameters.values())).view(-1)[0].add_(1e-3)
        return progress

    monkeypatch.setattr(rehearsal.Trial, "load", spoiled)
    spec: TrainingSpec = write_job(tmp_path / "job", base, rehearsal=True)
    assert failed(train_here(spec)).code == "checkpoint_not_restored"
    assert sha256_of(Path(spec.training_data)) == spec.training_sha256
