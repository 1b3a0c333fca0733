"""From a finished training to a model: whatever dies on the way, the next server ends it, once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.job_bench import PROJECT, Bench
from tests.open_files import open_files
from tunewright.errors import Unavailable
from tunewright.jobs import moves, recovery
from tunewright.jobs.records import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    bench = Bench(tmp_path / "home")
    yield bench
    bench.close()


def test_death_at_every_point_of_publishing_makes_one_whole_model(bench: Bench) -> None:
    job = bench.create(steps=3)
    bench.until(lambda: bench.job(job.id).status == RUNNING)
    journal = bench.home.jobs / job.id / "journal-1.jsonl"
    bench.until(lambda: journal.exists() and b'"finished"' in journal.read_bytes(), moving=False)
    bench.until(lambda: not bench.processes_left(job.id), moving=False)
    bench.storage.close()
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.die_while_publishing", str(bench.home.root), job.id],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 20
    whole = ["succeeded", "1", "True", "True"]
    for point, line in enumerate(lines[:-1], 1):
        assert line == [*whole, "9", "0"], f"point {point}\n{done.stderr}"
    assert lines[-1] == [*whole, *whole, "0", "0"]


def test_a_folder_that_a_cancel_left_is_swept_and_nothing_else(bench: Bench) -> None:
    """The proof moved the adapter in at the instant of the cancel: nobody lists it, and the next start removes it."""
    kept, gone = bench.until_over(bench.create(steps=2).id), bench.create(steps=2)
    bench.prover.wait_for = lambda: bench.job(gone.id).status == CANCELLED
    bench.until(lambda: (bench.home.adapters / gone.tuned_model_id).exists())
    bench.jobs.cancel(PROJECT, gone.id)
    bench.until_over(gone.id)
    for model_id in (gone.tuned_model_id, "model-of-another-database"):
        (bench.home.adapters / model_id).mkdir()
    bench.jobs.delete(PROJECT, gone.id)
    (bench.home.jobs / gone.id).mkdir()
    (bench.home.jobs / gone.id / "left").touch()
    bench.models.sweep()
    bench.jobs.sweep()
    adapters = {path.name for path in bench.home.adapters.iterdir()}
    assert adapters == {kept.tuned_model_id, "model-of-another-database"}
    assert [path.name for path in bench.home.jobs.iterdir()] == [kept.id]
    assert bench.models.resolve(PROJECT, kept.tuned_model_name).tuned is not None


def test_r42_a_job_that_found_the_disk_full_goes_on_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "ROOM_DELAY_S", 0.3)
    job = bench.create(fail="insufficient_storage", fails=4)
    bench.until(lambda: "insufficient_storage" in bench.codes(job.id))
    assert bench.job(job.id).status == QUEUED
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.failures) == (SUCCEEDED, 5, 0)
    assert bench.codes(job.id).count("insufficient_storage") == 4


def test_a_training_outlasts_an_engine_that_is_away_for_a_while(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.prover.errors += [Unavailable("engine_not_ready", "The engine is not ready")] * 4
    assert bench.until_over(bench.create(steps=2).id).status == SUCCEEDED
    monkeypatch.setattr(moves, "_PROOF_PATIENCE_S", 0.2)
    bench.prover.errors += [Unavailable("engine_not_ready", "The engine is not ready")] * 9
    done = bench.until_over(bench.create(steps=2).id)
    assert done.status == FAILED and done.error is not None and done.error.code == "engine_not_ready"


@pytest.mark.parametrize("cycles", [12, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_r60_job_after_job_leaves_nothing_behind(bench: Bench, cycles: int) -> None:
    """Made, run, deleted, and a model deleted; some cancelled: no process, folder, descriptor or thread stays."""
    me = psutil.Process()
    counts: list[tuple[int, int]] = []
    bytes_used: list[int] = []
    for n in range(cycles):
        job = bench.create(steps=2, sleep_s=0.0, holds=[1] if n % 4 == 3 else [])
        if n % 4 == 3:
            bench.until(lambda job=job: bench.job(job.id).status == RUNNING)
            bench.jobs.cancel(PROJECT, job.id)
        done = bench.until_over(job.id)
        assert done.status == (CANCELLED if n % 4 == 3 else SUCCEEDED)
        bench.jobs.delete(PROJECT, job.id)
        if done.status == SUCCEEDED:
            bench.models.delete(PROJECT, job.tuned_model_name)
        bench.controller.run_once()
        counts.append((open_files(me.pid)[0].total(), me.num_threads()))
        bytes_used.append(me.memory_info().rss)

    def zombies() -> list[psutil.Process]:
        bench.runners[-1].reap()
        return [child for child in me.children() if child.status() == psutil.STATUS_ZOMBIE]

    bench.until(lambda: not zombies())
    assert list(bench.home.jobs.iterdir()) == list(bench.home.adapters.iterdir()) == []
    # What is about to close counts for a moment; what has leaked counts every time.
    fds, threads = map(max, zip(*counts[: cycles // 3 + 1], strict=True))
    last_fds, last_threads = map(min, zip(*counts[-3:], strict=True))
    assert last_threads <= threads
    assert last_fds <= fds
    if cycles >= 1000:
        assert (bytes_used[-1] - bytes_used[200]) / (cycles - 200) < 10 * 1024


def test_r48_a_clock_that_is_set_back_makes_no_job_end_before_it_began(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back in the middle of a job, then ten years on: it neither loses its lease nor its order."""
    true_time = time.time
    job = bench.create(steps=8, holds=[3])
    bench.until_step(job.id, 3)
    monkeypatch.setattr(time, "time", lambda: true_time() - 3600)
    bench.until(lambda: bench.controller.run_once())
    (bench.home.jobs / job.id / "go").touch()
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (SUCCEEDED, 1)
    assert done.created_at <= (done.running_at or 0) <= (done.finished_at or 0)
    monkeypatch.setattr(time, "time", lambda: true_time() + 10 * 365 * 86400)
    assert bench.until_over(bench.create(steps=2).id).status == SUCCEEDED
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    last = bench.until_over(bench.create(steps=2).id)
    assert last.status == SUCCEEDED and len(bench.jobs.list(PROJECT)[0]) == 3
