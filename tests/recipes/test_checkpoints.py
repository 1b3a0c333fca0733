"""Checkpoints on the disk: whatever dies or rots, only whole ones are loaded."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recipes.die_while_saving import fill
from tests.recipes.job_folder import write_job
from tunewright.jobs.spec import TrainingSpec
from tunewright.recipes import checkpoints


@pytest.fixture
def spec(tmp_path: Path, base: Path) -> TrainingSpec:
    """A job with checkpoints of steps 1 and 2."""
    spec = write_job(tmp_path / "job", base)
    for step in (1, 2):
        checkpoints.publish(spec, step, fill, before_rename=lambda: None)
    return spec


def newest(spec: TrainingSpec) -> tuple[str | None, list[int]]:
    """Name of the checkpoint that would be resumed from and the steps told as corrupt."""
    corrupt: list[int] = []
    found = checkpoints.newest_verified(spec, corrupt.append)
    return found and found.name, corrupt


def damage(folder: Path, kind: int) -> None:
    """One of 20 ways to spoil a checkpoint."""
    chance = random.Random(kind)
    files = sorted(folder.iterdir())
    victim = files[kind % len(files)]
    content = bytearray(victim.read_bytes())
    match kind // len(files):
        case 0:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            victim.write_bytes(content)
        case 1:
            victim.write_bytes(content[: chance.randrange(len(content))])
        case 2:
            victim.unlink()
        case 3:
            victim.write_bytes(content + b"\0")
        case _:
            other = files[(kind + 1) % len(files)]
            swapped = other.read_bytes()
            other.write_bytes(content)
            victim.write_bytes(swapped)


@pytest.mark.parametrize("kind", range(20))
def test_damage_is_found_and_the_one_before_is_used(spec: TrainingSpec, kind: int) -> None:
    assert newest(spec) == ("step-2", [])
    damage(checkpoints.checkpoint_path(Path(spec.work_folder), 2), kind)
    assert newest(spec) == ("step-1", [2])
    assert newest(spec) == ("step-1", [])  # told once; the damaged one stays, under another name
    assert (Path(spec.work_folder) / "checkpoints" / "corrupt-step-2-1").is_dir()


def test_swapped_checkpoints_are_found(spec: TrainingSpec) -> None:
    folder = Path(spec.work_folder) / "checkpoints"
    (folder / "step-1").rename(folder / "x")
    (folder / "step-2").rename(folder / "step-1")
    (folder / "x").rename(folder / "step-2")
    assert newest(spec) == (None, [2, 1])


def test_a_checkpoint_of_another_training_is_not_ours(spec: TrainingSpec, tmp_path: Path, base: Path) -> None:
    other = write_job(tmp_path / "other", base, seed=99)
    (tmp_path / "other" / "checkpoints").mkdir()
    source = checkpoints.checkpoint_path(Path(spec.work_folder), 2)
    source.rename(checkpoints.checkpoint_path(tmp_path / "other", 2))
    assert newest(other) == (None, [2])


def test_a_checkpoint_of_a_later_release_is_not_read(spec: TrainingSpec) -> None:
    path = checkpoints.checkpoint_path(Path(spec.work_folder), 2) / checkpoints.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert newest(spec) == ("step-1", [2])


def test_a_refused_checkpoint_leaves_nothing(spec: TrainingSpec) -> None:
    def refuse() -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        checkpoints.publish(spec, 3, fill, refuse)
    assert sorted(path.name for path in (Path(spec.work_folder) / "checkpoints").iterdir()) == ["step-1", "step-2"]


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), torch.rand(()).item()

    torch.randn(1)
    random.gauss(0, 1)
    checkpoints.write_state(tmp_path, {"progress": {"step": 5}})
    drawn = draw()
    assert checkpoints.read_state(tmp_path) == {"progress": {"step": 5}}
    assert draw() == drawn
    json.loads((tmp_path / checkpoints.STATE).read_bytes())


def test_death_at_every_point_of_saving_leaves_whole_checkpoints(tmp_path: Path, base: Path) -> None:
    spec = write_job(tmp_path / "job", base)
    script = [sys.executable, "-m", "tests.recipes.die_while_saving", spec.work_folder]
    lines = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    ends = [line.split() for line in lines]
    assert [code for code, *_ in ends] == ["9"] * (len(ends) - 1) + ["0"]
    assert len(ends) > 20
    loaded = [found for _, found, *_ in ends]
    before = loaded.count("step-3")
    assert loaded == ["step-3"] * before + ["step-4"] * (len(ends) - before)  # never nothing, never half of one
    assert 0 < before < len(ends)
    assert {corrupt for _, _, corrupt, *_ in ends} == {"0"}
    assert ends[-1][3:] == ["step-2", "step-3", "step-4"]
