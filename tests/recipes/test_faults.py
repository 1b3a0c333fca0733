"""What may happen to a trainer while it works, with the real recipe: in the end it is as if nothing had happened.

The short forms run always, the long ones (`soak`) with the figures of a nightly run.
"""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.recipes.job_folder import codes, losses, next_attempt, records, run_trainer, train_here, write_job
from tests.recipes.test_checkpoints import damage
from tunewright.jobs.spec import Checkpoint, Finished, Started, Stopped
from tunewright.recipes import checkpoints

SOAK = pytest.mark.soak


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=SOAK) for seed in range(5, 30))])
def test_r10_a_trainer_killed_at_any_step_ends_with_the_same_bits(tmp_path: Path, base: Path, seed: int) -> None:
    chance = random.Random(seed)
    wanted = {"seed": seed, "checkpoint_every_s": chance.choice([1e-6, 0.02, 1000.0])}
    whole = train_here(write_job(tmp_path / "whole", base, **wanted))
    total = len(losses(whole))
    spec = write_job(tmp_path / "job", base, **wanted)
    found: dict[int, float | None] = {}
    saved: list[int] = []
    for step in sorted(chance.sample(range(1, total), 2)):
        assert run_trainer(spec, ("after_step", step)) == -signal.SIGKILL
        part = records(spec)
        saved = [record.step for record in part if isinstance(record, Checkpoint)]
        assert found.items() | losses(part).items() <= losses(whole).items(), "repeated steps have the same loss"
        found |= losses(part)
        assert sorted(found) == list(range(1, step + 1)), "no step is missing"
        spec = next_attempt(spec)
        assert checkpoints.newest_step(tmp_path / "job") == max(saved, default=0)
    assert run_trainer(spec) == 0
    last = records(spec)
    assert isinstance(last[0], Started) and last[0].resumed_step == max(saved, default=0)
    assert found | losses(last) == losses(whole)
    assert isinstance(last[-1], Finished) and last[-1] == whole[-1], "the hash of the adapter too"


@SOAK
def test_r11_death_at_every_point_of_a_real_save(tmp_path: Path, base: Path) -> None:
    """Until a run comes through without dying."""
    wanted = {"n_epochs": 3, "checkpoint_every_s": 1e-6}
    whole = train_here(write_job(tmp_path / "whole", base, **wanted))
    code, point = -1, 0
    while code != 0:
        point += 1
        spec = write_job(tmp_path / "job", base, **wanted)
        code = run_trainer(spec, ("while_saving", point))
        assert code in (0, -signal.SIGKILL)
        if code != 0:
            spec = next_attempt(spec)
            assert run_trainer(spec) == 0
        last = records(spec)
        assert isinstance(last[0], Started) and last[0].resumed_step in ((0,) if code == 0 else (1, 2))
        assert codes(last) == [] and last[-1] == whole[-1]
        shutil.rmtree(tmp_path / "job")
    assert point > 20


@SOAK
@pytest.mark.parametrize("kind", range(20))
def test_r12_a_damaged_checkpoint_costs_one_interval(tmp_path: Path, base: Path, kind: int) -> None:
    whole = train_here(write_job(tmp_path / "whole", base))
    spec = write_job(tmp_path / "job", base, checkpoint_every_s=1e-6)
    train_here(spec, stop_at=6)
    damage(checkpoints.checkpoint_path(tmp_path / "job", 6), kind)
    second = train_here(next_attempt(spec))
    assert codes(second) == ["checkpoint_corrupt"]
    assert min(losses(second)) == 6 and second[-1] == whole[-1]
    assert (tmp_path / "job" / "checkpoints" / "corrupt-step-6-2").is_dir()


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=SOAK)])
def test_r18_pausing_and_resuming_changes_no_bit(tmp_path: Path, base: Path, times: int) -> None:
    whole = train_here(write_job(tmp_path / "whole", base, n_epochs=6))
    total = len(losses(whole))
    spec = write_job(tmp_path / "job", base, n_epochs=6)
    found: dict[int, float | None] = {}
    for step in sorted(random.Random(times).sample(range(1, total), times)):
        part = train_here(spec, stop_at=step)
        assert part[-1] == Stopped(step=step)
        found |= losses(part)
        spec = next_attempt(spec)
    last = train_here(spec)
    assert found | losses(last) == losses(whole) and last[-1] == whole[-1]
