"""The forecast of a training's time, on synthetic machines and on a run that was recorded."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recipes.job_folder import ROWS, metrics, train_here, write_job
from tests.recipes.test_packing import rows_of_lengths
from tunewright.jobs.spec import TrainingSpec
from tunewright.recipes import packing
from tunewright.recipes.forecast import Forecast, Remaining, RowCost, Sample, Workload, row_cost, sample

CONFIG = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}


def long_tailed(n_rows: int, seed: int) -> packing.Rows:
    chance = np.random.default_rng(seed)
    return rows_of_lengths([int(length) for length in np.clip(np.exp(chance.normal(5.0, 0.9, n_rows)), 8, 1024)])


def spec_of(base: Path, folder: Path, **changes: Any) -> TrainingSpec:
    return write_job(folder, base, **changes)


def test_units_are_tokens_squares_and_labels() -> None:
    cost = row_cost(CONFIG)
    assert 0.00025 < cost.square < 0.0004 and 0.2 < cost.label < 0.35
    rows = rows_of_lengths([1, 100, 1000])
    assert RowCost(0.001, 0.5).of(rows) == pytest.approx([1.001, 100 + 10 + 49.5, 1000 + 1000 + 499.5])
    assert row_cost({}) == RowCost() and RowCost().of(rows).tolist() == [1, 100, 1000]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_size", [1, 8])
def test_after_a_tenth_of_the_steps_the_rest_is_known(base: Path, tmp_path: Path, seed: int, batch_size: int) -> None:
    """A machine with other costs than the model's shape says, a slow first step, and a tenth of noise."""
    rows, validation = long_tailed(400, seed), long_tailed(40, seed + 100)
    spec = spec_of(base, tmp_path / "job", n_epochs=2, batch_size=batch_size, checkpoint_every_s=60.0)
    work = Workload(spec, rows, validation, row_cost(CONFIG))
    chance = np.random.default_rng(seed)
    forecast, took, told = Forecast(), 0.0, {}
    for step in range(work.total_steps):
        epoch, place = divmod(step, work.steps_per_epoch)
        order = packing.epoch_order(len(rows), spec.seed, epoch)
        chosen = order[place * batch_size : (place + 1) * batch_size]
        groups = list(packing.micro_batches(rows, chosen, 1024))
        lengths = rows.lengths[chosen]
        seconds = 0.15 * len(groups) + 0.003 * lengths.sum() + 2e-6 * (lengths**2).sum()
        seconds = seconds * chance.normal(1.0, 0.1) + (3.0 if step == 0 else 0.0)
        forecast.step(work.units(chosen), len(groups), seconds)
        took += seconds
        if (step + 1) % work.steps_per_epoch == 0:
            forecast.evaluation(20.0)
            forecast.save(1.0)
            took += 21.0
        told[step + 1] = took, forecast.remaining_s(work.left(step + 1, forecast.pieces_per_step))
    for step in range(max(5, work.total_steps // 10), work.total_steps * 9 // 10):
        passed, remaining = told[step]
        assert remaining == pytest.approx(took - passed, rel=0.2, abs=3.0), step


def test_tokens_alone_would_not_do() -> None:
    """Long rows come first: what they take for each token is not what short ones take."""
    forecast, cost = Forecast(), row_cost(CONFIG)
    long, short = rows_of_lengths([1024] * 10), rows_of_lengths([64] * 1000)

    def seconds(rows: packing.Rows) -> np.ndarray:
        return 0.003 * cost.of(rows)

    for units, one in zip(cost.of(long), seconds(long), strict=True):
        forecast.step(float(units), 1, float(one))
    known = forecast.seconds(float(cost.of(short).sum()), 1000 * 64 / 1024)
    assert known == pytest.approx(seconds(short).sum(), rel=0.01)
    by_tokens = seconds(long).sum() / long.n_tokens * short.n_tokens
    assert by_tokens > 1.15 * seconds(short).sum()


def test_what_comes_besides_steps_counts() -> None:
    forecast = Forecast()
    left = Remaining(units=100.0, pieces=10.0, evaluations=2, evaluation_units=20.0, saves=3, save_every_s=10.0)
    assert forecast.remaining_s(left) is None
    for _ in range(3):
        forecast.step(10.0, 1, 1.0)
    assert forecast.remaining_s(left) == pytest.approx(10.0 + 2 * 0.5 * 2.0)
    forecast.evaluation(4.0)
    forecast.save(0.5)
    assert forecast.remaining_s(left) == pytest.approx(18.0 + (3 + 1.8 + 1) * 0.5)
    looking = replace(left, look_units=40.0)
    assert forecast.remaining_s(looking) == pytest.approx(18.0 + 0.5 * 4.0 + (3 + 1.8 + 1) * 0.5)


def test_the_first_step_counts_only_until_there_is_a_second() -> None:
    forecast = Forecast()
    forecast.step(10.0, 1, 9.0)
    assert forecast.seconds(10.0, 1) == pytest.approx(9.0)
    forecast.step(10.0, 1, 1.0)
    assert forecast.seconds(10.0, 1) == pytest.approx(1.0)


def test_a_machine_that_slows_down_is_believed() -> None:
    forecast = Forecast()
    for seconds in [1.0] * 200 + [3.0] * 100:
        forecast.step(10.0, 1, seconds)
    assert 2.6 < (forecast.seconds(10.0, 1) or 0) <= 3.0


def test_what_is_left_is_exact_wherever_a_training_goes_on(base: Path, tmp_path: Path) -> None:
    rows = long_tailed(10, 1)
    spec = spec_of(base, tmp_path / "job", n_epochs=2, batch_size=4, eval_steps=2, receipts="auto")
    work = Workload(spec, rows, rows, RowCost())
    left = work.left(4, 1.5)
    order = packing.epoch_order(10, spec.seed, 1)
    assert left.units == rows.lengths[order[4:]].sum()
    assert (left.pieces, left.evaluations, left.saves) == (3.0, 1, 1)  # due after steps 2, 3, 4 and 6
    assert work.left(0, 1.0).units == 2 * rows.n_tokens
    assert work.left(6, 1.0).units == 0
    assert work.left(0, 1.0).look_units == 2 * rows.n_tokens  # receipts of all rows, before and after
    assert work.left(6, 1.0).look_units == rows.n_tokens
    assert sample(rows, 1, 7, 1024, share=False) == Sample(pieces=1.0, computed=1.0)
    assert sample(rows.only([0, 0, 0]), 3, 7, 10**6, share=True) == Sample(pieces=1.0, computed=1 / 3)


def test_a_training_tells_what_is_left(tmp_path: Path, base: Path) -> None:
    found = metrics(train_here(write_job(tmp_path / "job", base, ROWS * 3, n_epochs=2)))
    assert all(record.remaining_s is not None and math.isfinite(record.remaining_s) for record in found)
    assert 0 <= (found[-1].remaining_s or 0) < 5
