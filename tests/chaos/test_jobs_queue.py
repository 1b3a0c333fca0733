"""The queue with real processes: turns, priorities, memory. The trainer is fake, everything else is real."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.job_bench import PROJECT, Bench
from tunewright.accounts.records import Project
from tunewright.clock import wall_s
from tunewright.jobs.line import Line
from tunewright.jobs.records import FAILED, QUEUED, RUNNING, SUCCEEDED, Job
from tunewright.jobs.scheduling import MOST_PASSES
from tunewright.jobs.service import CreateJob

REPOSITORY = Path(__file__).parents[2]
OTHER = "proj-2"
GB = 10**9


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home", max_running_jobs=3, reserved_memory_bytes=0)
    bench.machine.bytes = 10 * GB
    yield bench
    bench.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Bench]:
    """One trainer at a time, two projects."""
    bench = Bench(tmp_path / "home")
    with bench.storage.write() as tx:
        tx.projects.insert(Project(id=OTHER, number="1000000002", name="other", created_at=1))
    yield bench
    bench.close()


def queued(bench: Bench, size_bytes: int = 0, **orders: object) -> Job:
    """A job that waits in the queue and needs so much memory."""
    job = bench.create(**{"steps": 200, "sleep_s": 0.01, **orders})  # type: ignore[arg-type]
    bench.until(lambda: bench.job(job.id).status == QUEUED)
    return sized(bench, job, size_bytes)


def sized(bench: Bench, job: Job, size_bytes: int) -> Job:
    with bench.storage.write() as tx:
        changed = tx.jobs.change(
            bench.job(job.id),
            resources={"memory_bytes": size_bytes, "limit_bytes": size_bytes + 1, "gpus": 0, "rows": 3},
        )
    assert changed is not None
    return changed


def starts(bench: Bench, *jobs: Job) -> list[str]:
    """Ids of the jobs in the order of their starts, once all are over."""
    seen: list[str] = []

    def look() -> bool:
        now = [bench.job(job.id) for job in jobs]
        seen.extend(job.id for job in now if job.attempt and job.id not in seen)
        return all(job.status == SUCCEEDED for job in now)

    bench.until(look)
    return seen


def other_job(bench: Bench) -> Job:
    """A short job of the other project."""
    file_id = bench.upload(steps=2)
    with bench.storage.write() as tx:
        file = tx.files.get(PROJECT, file_id)
        assert file is not None
        tx.files.delete(PROJECT, file_id)
        tx.files.insert(msgspec.structs.replace(file, project_id=OTHER))
    source = bench.home.blobs / "files" / PROJECT / file_id
    target = bench.home.blobs / "files" / OTHER / file_id
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return bench.jobs.create(OTHER, CreateJob(model="tiny", training_file=file_id))


def test_a_second_project_does_not_wait_for_the_whole_queue_of_the_first(alone: Bench) -> None:
    many = [alone.create(steps=3) for _ in range(4)]
    one = other_job(alone)
    seen: list[str] = []

    def over() -> bool:
        with alone.storage.read() as tx:
            left = tx.jobs.unfinished()
        seen.extend(job.id for job in left if job.attempt and job.id not in seen)
        return not left

    alone.until(over)
    assert seen.index(one.id) <= 1, "it waits for one job of the other project at most"
    assert len(seen) == len(many) + 1


def test_priority_decides_within_a_project_and_is_told(alone: Bench) -> None:
    first = alone.create(steps=500, holds=[1])
    alone.until_step(first.id, 1)
    second, third, fourth = (queued(alone, steps=2) for _ in range(3))
    alone.jobs.update(PROJECT, fourth.id, {"priority": "high"})
    alone.jobs.update(PROJECT, second.id, {"priority": "low"})
    places = alone.jobs.places()
    assert [places[job.id].position for job in (fourth, third, second)] == [1, 2, 3]
    assert places[fourth.id].waits_for == "place" and places[fourth.id].estimated_start is not None
    assert places[third.id].estimated_start is None, "nobody knows how long the fourth will take"
    events = [event for event in alone.events(fourth.id) if event.code == "priority_changed"]
    assert [event.values for event in events] == [{"earlier": "normal", "priority": "high"}]
    (alone.home.jobs / first.id / "go").touch()
    alone.jobs.cancel(PROJECT, first.id)
    assert starts(alone, second, third, fourth) == [fourth.id, third.id, second.id]


def test_an_interrupted_job_goes_on_before_others_and_a_resumed_one_does_not(alone: Bench) -> None:
    first = alone.create(steps=12, holds=[2])
    alone.until_step(first.id, 2)
    second = queued(alone, steps=4)
    alone.jobs.update(PROJECT, second.id, {"priority": "high"})
    os.kill(alone.process(first.id).pid, signal.SIGKILL)
    seen: list[tuple[str, int]] = []

    def look() -> bool:
        for job in (alone.job(first.id), alone.job(second.id)):
            if job.status == RUNNING and (job.id, job.attempt) not in seen:
                seen.append((job.id, job.attempt))
        return alone.job(second.id).status == SUCCEEDED

    alone.until(look)
    assert [each for each in seen if each != (first.id, 1)] == [(first.id, 2), (second.id, 1)]
    third = alone.create(steps=500, sleep_s=0.01)
    alone.until_step(third.id, 2)
    fourth = queued(alone, steps=2)
    alone.jobs.update(PROJECT, fourth.id, {"priority": "high"})
    alone.jobs.pause(PROJECT, third.id)
    alone.jobs.resume(PROJECT, third.id)
    alone.until(lambda: alone.job(fourth.id).status == SUCCEEDED)
    assert alone.job(third.id).attempt == 1
    alone.jobs.cancel(PROJECT, third.id)
    alone.until_over(third.id)


def test_two_jobs_never_take_more_than_there_is(bench: Bench) -> None:
    first = queued(bench, 6 * GB, holds=[1])
    bench.until_step(first.id, 1)
    second = queued(bench, 5 * GB, steps=2)
    small = queued(bench, 3 * GB, holds=[1])
    bench.until_step(small.id, 1)  # it passes the second
    assert bench.job(second.id).status == QUEUED and bench.job(second.id).passes == 1
    place = bench.jobs.places()[second.id]
    assert (place.position, place.waits_for) == (1, "memory")
    assert place.values == {"need": "5.0", "most": "10.0", "held": "9.0", "engines": "0.0"}
    spec = json.loads((bench.home.jobs / small.id / "spec.json").read_bytes())
    assert (spec["threads"], spec["memory_limit_bytes"]) == (8 // 3, 3 * GB + 1)
    (bench.home.jobs / first.id / "go").touch()
    bench.until(lambda: bench.job(second.id).attempt == 1)
    assert bench.job(first.id).status == SUCCEEDED, "it started when the first had given its memory back"
    (bench.home.jobs / small.id / "go").touch()
    bench.until_over(small.id)
    bench.until_over(second.id)


def test_nobody_passes_a_job_that_was_passed_often_enough(bench: Bench) -> None:
    first = queued(bench, 6 * GB, holds=[1])
    bench.until_step(first.id, 1)
    large = queued(bench, 5 * GB, steps=2)
    with bench.storage.write() as tx:
        tx.jobs.change(bench.job(large.id), passes=MOST_PASSES)
    small = queued(bench, GB, steps=2)
    for _ in range(10):
        bench.controller.run_once()
    assert bench.job(small.id).status == QUEUED
    assert bench.jobs.places()[small.id].waits_for == "turn"
    (bench.home.jobs / first.id / "go").touch()
    assert starts(bench, large, small)[0] == large.id


def test_engines_and_greedy_trainers_count(bench: Bench) -> None:
    bench.prover.held_bytes = 7 * GB
    first = queued(bench, GB, holds=[1])
    waits = queued(bench, 3 * GB, steps=2)
    bench.until_step(first.id, 1)
    for _ in range(5):
        bench.controller.run_once()
    place = bench.jobs.places()[waits.id]
    assert (place.waits_for, place.values["engines"]) == ("memory", "7.0")
    assert bench.job(waits.id).attempt == 0
    bench.prover.held_bytes = 8 * GB
    (bench.home.jobs / first.id / "go").touch()
    bench.until(lambda: bench.job(waits.id).status == SUCCEEDED)
    assert bench.job(first.id).status == SUCCEEDED, "alone it starts, and plans with what the engines leave"
    assert json.loads((bench.home.jobs / waits.id / "spec.json").read_bytes())["memory_limit_bytes"] == 2 * GB
    bench.prover.held_bytes = 0
    greedy = queued(bench, 1, holds=[1])  # it says so and takes more
    bench.until_step(greedy.id, 1)
    bench.machine.bytes = 2**20
    second = queued(bench, 2**20, steps=2)
    bench.until(lambda: bench.line.measured_bytes.get(greedy.id, 0) > 2**20)
    for _ in range(5):
        bench.controller.run_once()
    assert bench.jobs.places()[second.id].waits_for == "memory"
    (bench.home.jobs / greedy.id / "go").touch()
    bench.until_over(greedy.id)
    assert bench.until_over(second.id).status == SUCCEEDED


def test_a_job_that_can_never_fit_fails_at_once_with_both_numbers(bench: Bench) -> None:
    job = bench.create(steps=2)
    bench.machine.bytes = GB // 2
    done = bench.until_over(job.id)
    assert done.status == FAILED and done.error is not None and done.error.code == "not_enough_memory"
    assert done.error.values["most"] == "0.5" and float(done.error.values["need"]) > 0.5
    assert done.attempt == 0


def test_a_gpu_is_for_one_trainer(bench: Bench) -> None:
    bench.machine.number_of_gpus = 2
    first, second = (bench.create(steps=500, holds=[1]) for _ in range(2))
    bench.until_step(first.id, 1)
    for _ in range(5):
        bench.controller.run_once()
    assert bench.jobs.places()[second.id].waits_for == "gpu"
    spec = json.loads((bench.home.jobs / first.id / "spec.json").read_bytes())
    assert spec["memory_limit_bytes"] == 0, "what is free on the GPU, the trainer sees for itself"
    for job in (first, second):
        bench.jobs.cancel(PROJECT, job.id)
        bench.until_over(job.id)


def test_lengths_are_learned_from_like_jobs(alone: Bench) -> None:
    done = alone.until_over(alone.create(steps=20, sleep_s=0.02).id)
    assert done.elapsed_s == pytest.approx(0.4)
    first = alone.create(steps=400, holds=[1])
    alone.until_step(first.id, 1)
    second, third = queued(alone, steps=2), queued(alone, steps=2)
    places = alone.jobs.places()
    assert places[second.id].sources == ("progress",)
    assert places[third.id].sources == ("history", "progress")
    with alone.storage.write() as tx:
        tx.jobs.change(alone.job(second.id), rehearsal={"estimated_seconds": {"least": 500.0, "most": 700.0}})
    places = alone.jobs.places()
    start, after = places[second.id].estimated_start, places[third.id].estimated_start
    assert places[third.id].sources == ("progress", "rehearsal")
    assert start is not None and after is not None and after - start in (599, 600, 601) and start >= wall_s()
    fourth = alone.create(steps=2)
    with alone.storage.write() as tx:
        tx.jobs.change(alone.job(fourth.id), rehearsal={"status": "running"})
    assert alone.jobs.places()[second.id].values["running"] == 2, "a rehearsal takes a place"
    with alone.storage.write() as tx:
        tx.jobs.change(alone.job(fourth.id), rehearsal={})
    alone.jobs.cancel(PROJECT, fourth.id)
    alone.jobs.cancel(PROJECT, first.id)
    for job in (first, second, third):
        alone.until_over(job.id)


def test_shares_are_those_of_the_operator_if_there_are_any(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path / "home", memory_bytes=4 * GB, reserved_memory_bytes=GB, trainer_threads=5, max_running_jobs=2
    )
    assert (bench.line.room().memory_bytes, bench.line.threads()) == (3 * GB, 5)
    many = Line(bench.settings.model_copy(update={"trainer_threads": 0, "max_running_jobs": 16}), bench.machine)
    assert many.threads() == 1
    one = Line(bench.settings.model_copy(update={"trainer_threads": 0, "max_running_jobs": 1}), bench.machine)
    assert one.threads() == 0
    bench.close()
