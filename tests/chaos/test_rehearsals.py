"""The dress rehearsal with real processes that die, hang and disobey, under servers that die. The trainer is fake."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.job_bench import PROJECT, TRAINER, Bench, whole_run
from tunewright.jobs.records import CANCELLED, CANCELLING, FAILED, QUEUED, RUNNING, SUCCEEDED, VALIDATING, Job

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home", price_per_million_tokens=8.0)
    yield bench
    bench.close()


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Bench]:
    """It kills what does not obey soon."""
    bench = Bench(tmp_path / "home", cancel_grace_s=0.5)
    yield bench
    bench.close()


def held(bench: Bench, **orders: bool) -> Job:
    """A job whose rehearsal has begun and waits."""
    job = bench.create(5, "always", rehearsal_holds=True, steps=3, **orders)
    bench.until(lambda: bench.rehearsing(job.id))
    return job


def let_go(bench: Bench, job: Job) -> None:
    (bench.home.jobs / job.id / "rehearsal" / "go").touch()


# --- the way through ------------------------------------------------------------------------------------------------


def test_what_was_measured_is_on_the_job_before_it_is_queued(bench: Bench) -> None:
    job = bench.create(rehearsal="always", steps=3, rehearsal_s=0.05)
    bench.until(lambda: bench.job(job.id).rehearsal.get("status") == "running")
    assert bench.job(job.id).status == VALIDATING
    assert bench.job(job.id).hyperparameters["batch_size"] == 1
    bench.until(lambda: bench.job(job.id).status != VALIDATING)
    found = bench.job(job.id).rehearsal
    assert found | {"wanted": "always", "attempt": 1} == {
        "wanted": "always",
        "attempt": 1,
        "status": "done",
        "memory_peak_bytes": 2 * 10**9,
        "micro_batch_tokens": 1024,
        "seconds_per_step": 0.5,
        "estimated_seconds": {"least": 3, "most": 7000},
        "estimated_tokens": 250_000,
        "price": {"least": 2.0, "most": 2.0},
        "rows": [2, 1],
        "answer": "yes",
        "seconds": 0.3,
    }
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.rehearsal) == (SUCCEEDED, 1, found)
    assert bench.losses(job.id) == whole_run(5, 3)
    codes = ["created", "rehearsing", "rehearsed", "queued", "started", "model_ready", "succeeded"]
    assert bench.codes(job.id) == codes
    event = next(event for event in bench.events(job.id) if event.code == "rehearsed")
    assert event.message.format(**event.values) == (
        "Rehearsed with the rows of lines 2, 1: memory peak 2.0 GB, 0.5 s a step. Training will take between 0:00:03 and "
        "1:56:40, at a price of 2.0"
    )
    assert not (bench.home.jobs / job.id / "rehearsal" / "checkpoints").exists()


def test_what_fails_in_the_rehearsal_never_gets_into_the_queue(bench: Bench) -> None:
    job = bench.create(rehearsal="always", rehearsal_fail="out_of_memory")
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.rehearsal["status"]) == (FAILED, 0, "failed")
    assert done.error is not None and (done.error.code, done.error.values["max_length"]) == ("out_of_memory", 64)
    assert done.error.suggestion is not None
    assert bench.codes(job.id) == ["created", "rehearsing", "rehearsal_failed", "out_of_memory"]
    assert bench.processes_left(job.id) == []


def test_small_jobs_are_not_rehearsed_unless_it_is_asked_for(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=2).id)
    assert job.rehearsal == {"status": "skipped", "reason": "small_job"}
    job = bench.until_over(bench.create(steps=2, rehearsal="off").id)
    assert job.rehearsal == {"wanted": "off", "status": "skipped", "reason": "switched_off"}
    assert bench.codes(job.id) == ["created", "queued", "started", "model_ready", "succeeded"]


def test_the_setting_is_for_jobs_that_do_not_say(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", rehearsal="always")
    try:
        assert bench.until_over(bench.create(steps=2).id).rehearsal["status"] == "done"
        assert bench.until_over(bench.create(steps=2, rehearsal="off").id).rehearsal["status"] == "skipped"
    finally:
        bench.close()


def test_one_rehearsal_at_a_time_beside_a_training_that_has_the_only_place(bench: Bench) -> None:
    training = bench.create(steps=10, holds=[2])
    bench.until_step(training.id, 2)
    first = held(bench)
    second = bench.create(rehearsal="always", steps=2)
    bench.until(lambda: bench.job(second.id).rehearsal.get("status") == "waiting")
    for _ in range(5):
        bench.controller.run_once()
    assert bench.job(second.id).rehearsal["status"] == "waiting"
    let_go(bench, first)
    bench.until(lambda: bench.job(second.id).status == QUEUED)
    assert (bench.job(training.id).status, bench.job(first.id).status) == (RUNNING, QUEUED)
    (bench.home.jobs / training.id / "go").touch()
    assert all(bench.until_over(job.id).status == SUCCEEDED for job in (training, first, second))


def test_no_training_starts_while_a_rehearsal_has_its_place_and_none_waits_for_two(bench: Bench) -> None:
    queued = bench.create(steps=6, holds=[1])
    bench.until(lambda: bench.job(queued.id).status == QUEUED)
    bench.jobs.pause(PROJECT, queued.id)
    first = held(bench)
    second = bench.create(rehearsal="always", rehearsal_holds=True, steps=2)
    bench.until(lambda: bench.job(second.id).rehearsal.get("status") == "waiting")
    bench.jobs.resume(PROJECT, queued.id)
    for _ in range(5):
        bench.controller.run_once()
    assert bench.job(queued.id).status == QUEUED
    bench.jobs.cancel(PROJECT, first.id)
    bench.until(lambda: bench.job(queued.id).status == RUNNING)
    bench.until(lambda: bench.rehearsing(second.id))
    for job in (second, queued):
        bench.jobs.cancel(PROJECT, job.id)
        bench.until_over(job.id)


# --- processes that die ---------------------------------------------------------------------------------------------


def test_a_killed_rehearsal_is_done_again(bench: Bench) -> None:
    job = held(bench)
    first = bench.rehearsing(job.id)
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    let_go(bench, job)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (SUCCEEDED, 1)
    assert (done.rehearsal["status"], done.rehearsal["attempt"]) == ("done", 2)


@pytest.mark.parametrize(
    ("words", "code", "attempts"), [("", "crashed", 3), ("MemoryError: can't allocate memory", "out_of_memory", 2)]
)
def test_a_rehearsal_that_always_dies_fails_the_job(bench: Bench, words: str, code: str, attempts: int) -> None:
    job = bench.create(rehearsal="always", rehearsal_crashes=99, say_before_crash=words)
    done = bench.until_over(job.id)
    assert done.status == FAILED and done.error is not None and done.error.code == code
    assert (done.attempt, done.rehearsal["status"], done.rehearsal["attempt"]) == (0, "failed", attempts)
    assert bench.codes(job.id)[-2:] == ["rehearsal_failed", code]
    assert bench.processes_left(job.id) == []


def test_memory_that_runs_out_halves_the_micro_batch_of_rehearsal_and_training(bench: Bench) -> None:
    job = bench.create(rehearsal="always", steps=2, rehearsal_crashes=1, say_before_crash="MemoryError")
    done = bench.until_over(job.id)
    assert (done.status, done.rehearsal["status"]) == (SUCCEEDED, "done")
    assert bench.codes(job.id)[1:5] == ["rehearsing", "micro_batch_halved", "rehearsed", "queued"]
    for folder in (bench.home.jobs / job.id / "rehearsal", bench.home.jobs / job.id):
        assert json.loads((folder / "spec.json").read_bytes())["halve_micro_batch"] is True


def test_a_rehearsal_that_stands_still_is_replaced(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", heartbeat_limit_s=3.0)
    try:
        job = held(bench)
        first = bench.rehearsing(job.id)
        assert first is not None
        os.kill(first.pid, signal.SIGSTOP)
        let_go(bench, job)
        assert bench.until_over(job.id).rehearsal["attempt"] == 2
        assert not bench.runners[0].alive(first.pid, first.start_ticks)
    finally:
        bench.close()


@pytest.mark.parametrize("orders", [{}, {"ignore_sigterm": True}, {"fork_child": True}])
def test_cancel_during_the_rehearsal_leaves_no_process(impatient: Bench, orders: dict[str, bool]) -> None:
    bench = impatient
    job = held(bench, **orders)
    assert bench.jobs.cancel(PROJECT, job.id).status == CANCELLING
    process = bench.rehearsing(job.id)
    assert bench.until_over(job.id).status == CANCELLED
    assert process is not None and bench.runners[0].group_empty(process.pid) and bench.processes_left(job.id) == []
    assert bench.codes(job.id) == ["created", "rehearsing", "cancelling", "cancelled"]


# --- servers that die -----------------------------------------------------------------------------------------------


def test_a_new_server_finds_the_rehearsal(bench: Bench) -> None:
    job = held(bench)
    process = bench.rehearsing(job.id)
    bench.controller = bench.new_controller()
    let_go(bench, job)
    assert bench.until_over(job.id).rehearsal["attempt"] == 1
    assert bench.rehearsing(job.id) == process


def test_a_server_killed_between_its_decision_and_the_start_of_the_rehearsal(bench: Bench) -> None:
    job = bench.create(rehearsal="always", steps=3)
    bench.until(lambda: bench.job(job.id).rehearsal.get("status") == "waiting")
    with bench.storage.write() as tx:
        tx.jobs.change(bench.job(job.id), rehearsal={"wanted": "always", "status": "running", "attempt": 1})
    bench.controller = bench.new_controller()
    done = bench.until_over(job.id)
    assert (done.status, done.rehearsal["attempt"], done.rehearsal["failures"]) == (SUCCEEDED, 2, 0)


def test_shutdown_ends_the_rehearsal_and_the_next_start_does_it_again(bench: Bench) -> None:
    bench.jobs.on_change = lambda: bench.controller.wake()
    bench.controller.start()
    job = bench.create(rehearsal="always", rehearsal_holds=True, steps=2)
    bench.until(lambda: bench.rehearsing(job.id), moving=False)
    bench.controller.stop()
    assert bench.processes_left(job.id) == [] and bench.job(job.id).status == VALIDATING
    bench.controller = bench.new_controller()
    let_go(bench, job)
    done = bench.until_over(job.id)
    assert (done.status, done.rehearsal["attempt"], done.rehearsal["failures"]) == (SUCCEEDED, 2, 0)


def at_once(bench: Bench, folder: Path) -> int:
    """How many trainers of a job there are, in its rehearsal and after it: the first may end between two looks."""
    runner = bench.runners[0]
    rehearsing = [(pid, runner.start_ticks(pid)) for pid in runner.find(TRAINER, folder / "rehearsal")]
    training = runner.find(TRAINER, folder)
    return len(training) + sum(ticks is not None and runner.alive(pid, ticks) for pid, ticks in rehearsing)


def test_kill_minus_9_of_server_and_rehearsal_at_random_moments(bench: Bench) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    job = bench.create(rehearsal="always", rehearsal_s=1.0, steps=3)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    most, killed = 0, 0
    folder = bench.home.jobs / job.id
    for turn in range(5):
        command = [sys.executable, "-m", "tests.job_bench", str(bench.home.root)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None and server.stdout.readline()
            moment = time.monotonic() + chance.uniform(0.0, 0.8)
            while time.monotonic() < moment:
                most = max(most, at_once(bench, folder))
                time.sleep(0.01)
            server.kill()
        process = bench.rehearsing(job.id)
        if turn % 2 and process is not None and bench.runners[0].alive(process.pid, process.start_ticks):
            bench.runners[0].kill(process.pid)
            killed += 1
    assert killed < bench.settings.max_attempts
    done = bench.until_over(job.id)
    assert (done.status, done.rehearsal["status"]) == (SUCCEEDED, "done")
    assert bench.losses(job.id) == whole_run(5, 3) and bench.codes(job.id).count("rehearsed") == 1
    assert most <= 1
