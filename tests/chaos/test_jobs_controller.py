"""The control loop with real processes that die, hang and disobey. The trainer is fake, everything else is real."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.job_bench import PROJECT, TRAINER, Bench, a_base, whole_run
from tunewright.clock import wall_ms
from tunewright.errors import InvalidRequest, Unavailable
from tunewright.files_on_disk import sha256_of
from tunewright.jobs import recovery
from tunewright.jobs.records import CANCELLED, FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED, VALIDATING
from tunewright.jobs.service import CreateJob
from tunewright.jobs.spec import Finished, Metrics, encode_record

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "PREEMPTED_DELAY_S", 0.01)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home")
    yield bench
    bench.close()


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Bench]:
    """It kills what does not obey soon; a trainer may need longer to save, on a busy machine."""
    bench = Bench(tmp_path / "home", cancel_grace_s=0.5)
    yield bench
    bench.close()


def restarted(bench: Bench) -> None:
    """The server is gone without a word, a new one is there."""
    bench.controller = bench.new_controller()


# --- the way through ------------------------------------------------------------------------------------------------


def test_a_job_from_created_to_a_ready_model(bench: Bench) -> None:
    job = bench.create(seed=5, steps=6, checkpoint_every=3)
    assert job.status == "validating"
    done = bench.until_over(job.id)
    assert done.status == SUCCEEDED, done.error
    assert (done.attempt, done.step, done.total_steps, done.trained_tokens) == (1, 6, 6, 60)
    assert done.created_at <= (done.running_at or 0) <= (done.finished_at or 0)
    assert done.estimated_finish is None
    assert done.rows == {"used": 3, "skipped": 0, "cut": 0}
    assert done.hyperparameters["n_epochs"] == 10 and done.hyperparameters["batch_size"] == 1
    assert bench.codes(job.id) == ["created", "queued", "started", "model_ready", "succeeded"]
    assert bench.losses(job.id) == whole_run(5, 6)
    with bench.storage.read() as tx:
        model = tx.models.find(PROJECT, job.tuned_model_name)
        file = tx.files.get(PROJECT, done.result_files[0])
    assert model is not None and model.status == "ready" and model.checkpoint_step == 6
    assert model.proof["tensors_applied"] == 2 and model.renderer_hash == "r" * 64
    assert bench.models.resolve(PROJECT, job.tuned_model_name).tuned == model
    assert file is not None and file.purpose == "fine-tune-results"
    table = b"".join(bench.blobs.read(f"files/{PROJECT}/{file.id}")).decode().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(table) == 7 and table[1].startswith("1,3.005,0.5,") and table[6].split(",")[3] == "2.0"
    steps = [checkpoint.step for checkpoint in bench.jobs.checkpoints(PROJECT, job.id).checkpoints]
    assert steps == [6, 3]
    assert bench.prover.warmed == ["tiny"]
    assert bench.processes_left(job.id) == []


def test_a_whole_model_needs_its_manifest_and_no_pool(bench: Bench) -> None:
    bench.bases.bases.append(a_base(bench.home, "rich", methods=("lora", "full")))
    request = CreateJob(model="rich", training_type="full", training_file=bench.upload(steps=2))
    job = bench.until_over(bench.jobs.create(PROJECT, request).id)
    assert (
        job.status == FAILED and job.error is not None and job.error.code == "adapter_invalid"
    )  # the fake wrote an adapter
    assert bench.prover.warmed == bench.prover.proved == []
    assert list(bench.home.adapters.iterdir()) == []


def test_metrics_carry_the_names_of_both_dialects(bench: Bench) -> None:
    job = bench.create(steps=2)
    bench.until_over(job.id)
    last = [event for event in bench.events(job.id) if event.type == "metrics"][-1]
    assert last.data is not None
    assert last.data["current_steps"] == last.data["step"] == last.step == 2
    assert last.data["loss"] == last.data["train_loss"] and last.data["acc"] == last.data["train_mean_token_accuracy"]
    assert last.data["eval_loss"] == last.data["valid_loss"] == 2.0
    assert last.data["elapsed_time"] == "0:00:00" and last.data["trained_tokens"] == 20


def test_one_trainer_at_a_time_oldest_first(bench: Bench) -> None:
    first = bench.create(steps=10, holds=[2])
    bench.until(lambda: bench.job(first.id).status != VALIDATING)  # files of both would be read at the same time
    second = bench.create(steps=2)
    bench.until_step(first.id, 2)
    bench.until(lambda: bench.job(second.id).status == QUEUED)
    bench.controller.run_once()
    assert bench.job(second.id).status == QUEUED
    (bench.home.jobs / first.id / "go").touch()
    assert bench.until_over(second.id).status == SUCCEEDED
    assert bench.job(first.id).status == SUCCEEDED
    assert (bench.job(first.id).finished_at or 0) <= (bench.job(second.id).running_at or 0)


def test_a_job_goes_on_from_a_tuned_model(bench: Bench) -> None:
    first = bench.until_over(bench.create(steps=2).id)
    request = CreateJob(model=first.tuned_model_name, training_file=bench.upload(steps=2))
    second = bench.until_over(bench.jobs.create(PROJECT, request).id)
    assert second.status == SUCCEEDED and second.base_code == "tiny"
    spec = json.loads((bench.home.jobs / second.id / "spec.json").read_bytes())
    folder = bench.home.adapters / first.tuned_model_id
    assert spec["start_adapter_path"] == str(folder)
    assert spec["start_adapter_sha256"] == sha256_of(folder / "adapter_model.safetensors")


# --- trainers that die, hang or fail --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 5, 11])
def test_a_killed_trainer_resumes_and_no_step_is_missing_or_doubled(bench: Bench, step: int) -> None:
    job = bench.create(steps=12, holds=[step])
    bench.until_step(job.id, step)
    os.kill(bench.process(job.id).pid, signal.SIGKILL)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (SUCCEEDED, 2)
    assert bench.losses(job.id) == whole_run(5, 12)
    codes = bench.codes(job.id)
    assert "trainer_died" in codes and codes.count("succeeded") == 1
    assert ("resumed" in codes) == (step >= 4)


def test_a_crash_loop_ends_with_the_reason(bench: Bench) -> None:
    last_words = "OSError: libgomp.so.1: cannot open shared object file\na row: my password"
    job = bench.create(crash_at=2, crashes=99, say_before_crash=last_words)
    done = bench.until_over(job.id)
    assert done.status == FAILED and done.error is not None and done.error.code == "crashed"
    assert done.attempt == bench.settings.max_attempts == done.error.values["failures"]
    assert "shared library" in done.error.cause
    assert done.error.evidence == ("exit: signal 9 (SIGKILL)\nOSError: libgomp.so.1: cannot open shared object file")
    assert done.error.suggestion is not None and "installation" in done.error.suggestion.message
    assert done.finished_at is not None and done.trained_tokens is None
    assert bench.processes_left(job.id) == []


def test_progress_between_crashes_resets_the_count(bench: Bench) -> None:
    """Each attempt gets one checkpoint further; five deaths are more than the three that are allowed without progress."""
    job = bench.create(steps=24, checkpoint_every=4, holds=[5, 9, 13, 17, 21])
    for step in (5, 9, 13, 17, 21):
        bench.until_step(job.id, step)
        os.kill(bench.process(job.id).pid, signal.SIGKILL)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (SUCCEEDED, 6)
    assert bench.losses(job.id) == whole_run(5, 24)


def halved(bench: Bench, job_id: str) -> list[bool]:
    """Of each attempt that started: whether it was told to take half the micro-batch."""
    started = [event.data for event in bench.events(job_id) if event.code in ("started", "resumed")]
    return [data["choices"]["halved"] for data in started if data is not None]


OUT_OF_MEMORY = "RuntimeError: [enforce fail] can't allocate memory"


def test_r13_want_of_memory_halves_the_micro_batch_once(bench: Bench) -> None:
    job = bench.create(steps=12, crash_at=6, crashes=1, say_before_crash=OUT_OF_MEMORY)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (SUCCEEDED, 2)
    assert halved(bench, job.id) == [False, True]
    assert [code for code in bench.codes(job.id) if code in ("micro_batch_halved", "trainer_died")] == [
        "micro_batch_halved"
    ]
    assert bench.losses(job.id) == whole_run(5, 12)


def test_r13_want_of_memory_that_stays_is_named_and_hurts_no_other_job(bench: Bench) -> None:
    starving = bench.create(crash_at=2, crashes=99, say_before_crash=OUT_OF_MEMORY)
    other = bench.create(steps=4)
    done = bench.until_over(starving.id)
    assert done.error is not None and done.error.code == "out_of_memory"
    assert (done.status, done.attempt) == (FAILED, 2), "at most one try with less"
    assert halved(bench, starving.id) == [False, True]
    assert "can't allocate memory" in done.error.evidence
    assert done.error.suggestion is not None
    assert done.error.suggestion.changes["hyperparameters"]["max_length"] == 256
    assert bench.until_over(other.id).status == SUCCEEDED


def test_a_trainer_that_is_ended_from_outside_goes_on_uncounted(bench: Bench) -> None:
    """Before it can save anything, and once more often than failures are allowed."""
    job = bench.create(steps=12, crash_at=6, crashes=bench.settings.max_attempts + 1, crash_signal=signal.SIGTERM)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.failures) == (SUCCEEDED, 5, 0)
    assert bench.codes(job.id).count("preempted") == 4 and "trainer_died" not in bench.codes(job.id)
    assert bench.losses(job.id) == whole_run(5, 12)


def test_a_trainer_that_saves_when_it_is_ended_from_outside_loses_nothing(bench: Bench) -> None:
    job = bench.create(steps=12, holds=[3])
    bench.until_step(job.id, 3)
    os.kill(bench.process(job.id).pid, signal.SIGTERM)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.failures) == (SUCCEEDED, 2, 0)
    preempted = next(event for event in bench.events(job.id) if event.code == "preempted")
    assert preempted.values == {"step": 3, "checkpoint": 3}


def test_a_disk_that_is_too_full_to_say_so_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "ROOM_DELAY_S", 0.1)
    words = "OSError: [Errno 28] No space left on device"
    job = bench.create(steps=12, crash_at=6, crashes=4, say_before_crash=words)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.failures) == (SUCCEEDED, 5, 0)
    assert bench.codes(job.id).count("insufficient_storage") == 4


def test_a_stopped_trainer_is_replaced(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", heartbeat_limit_s=3.0)
    try:
        job = bench.create(steps=12, holds=[5])
        bench.until_step(job.id, 5)
        old = bench.process(job.id)
        os.kill(old.pid, signal.SIGSTOP)
        done = bench.until_over(job.id)
        assert (done.status, done.attempt) == (SUCCEEDED, 2)
        assert "trainer_silent" in bench.codes(job.id)
        assert bench.losses(job.id) == whole_run(5, 12)
        assert not bench.runners[0].alive(old.pid, old.start_ticks)
    finally:
        bench.close()


def test_r14_writes_of_a_trainer_that_was_given_up_are_not_taken(bench: Bench) -> None:
    """As if it had survived its SIGKILL, on a machine that was cut off: it goes on writing where it wrote."""
    job = bench.create(steps=12, holds=[5, 6])
    bench.until_step(job.id, 5)
    os.kill(bench.process(job.id).pid, signal.SIGKILL)
    bench.until(lambda: bench.job(job.id).attempt == 2 and bench.job(job.id).step >= 6)
    stale = (bench.home.jobs / job.id / "journal-1.jsonl").open("ab")
    good = next(event for event in bench.events(job.id) if event.step == 5)
    for step in range(7, 27):
        record = Metrics(
            step=step,
            total_steps=99,
            epoch=1.0,
            loss=99.0,
            accuracy=0.0,
            learning_rate=1.0,
            tokens=10**6,
            elapsed_s=1.0,
            remaining_s=0.0,
        )
        stale.write(encode_record(record) + b"\n")
    stale.write(encode_record(Finished(trained_tokens=10**6, final_loss=99.0, adapter_sha256="0" * 64)) + b"\n")
    stale.close()
    for _ in range(20):
        bench.controller.run_once()
    assert (bench.job(job.id).status, bench.job(job.id).total_steps) == (RUNNING, 12)
    (bench.home.jobs / job.id / "go").touch()
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.trained_tokens) == (SUCCEEDED, 2, 120)
    assert bench.losses(job.id) == whole_run(5, 12) and good in bench.events(job.id)


def test_a_trainer_that_stands_still_again_and_again_is_stalled(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", heartbeat_limit_s=3.0, max_attempts=1)
    try:
        job = bench.create(steps=12, holds=[2])
        bench.until_step(job.id, 2)
        os.kill(bench.process(job.id).pid, signal.SIGSTOP)
        error = bench.until_over(job.id).error
        assert error is not None and error.code == "stalled" and error.suggestion is not None
    finally:
        bench.close()


def test_a_failure_that_a_retry_would_not_mend(bench: Bench) -> None:
    job = bench.create(fail="row_unusable")
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (FAILED, 1)
    assert done.error is not None and (done.error.code, done.error.values["row"]) == ("row_unusable", 7)
    assert bench.codes(job.id)[-1] == "row_unusable"
    assert done.error.evidence == "", "how a trainer ends that has said its last word is no evidence"


@pytest.mark.parametrize(
    ("error", "code"),
    [(InvalidRequest("no_effect", "The adapter changes nothing"), "no_effect"), (None, "adapter_invalid")],
)
def test_an_adapter_that_does_not_hold_makes_no_model(bench: Bench, error: Exception | None, code: str) -> None:
    if error is not None:
        bench.prover.errors.append(error)
    job = bench.create(steps=2, wrong_hash=error is None)
    done = bench.until_over(job.id)
    assert done.status == FAILED and done.error is not None and done.error.code == code
    assert list(bench.home.adapters.iterdir()) == []
    with bench.storage.read() as tx:
        assert tx.models.list(PROJECT) == []


def test_an_engine_that_is_not_there_yet_is_asked_again(bench: Bench) -> None:
    bench.prover.errors += [Unavailable("engine_starting", "The engine is starting")]
    job = bench.create(steps=2)
    assert bench.until_over(job.id).status == SUCCEEDED
    assert len(bench.prover.proved) == 2


def test_damaged_data_fails_before_training(bench: Bench) -> None:
    file_id = bench.upload()
    (bench.home.blobs / "files" / PROJECT / file_id).write_text("x")
    job = bench.jobs.create(PROJECT, CreateJob(model="tiny", training_file=file_id))
    done = bench.until_over(job.id)
    assert done.error is not None and (done.error.code, done.error.param) == ("file_integrity", "training_file")
    assert done.attempt == 0


def test_a_base_that_went_away(bench: Bench) -> None:
    job = bench.create()
    bench.bases.bases = [a_base(bench.home, path=None)]
    done = bench.until_over(job.id)
    assert done.error is not None and done.error.code == "model_not_pulled"


# --- cancel, pause --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [{}, {"ignore_sigterm": True}, {"fork_child": True}])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_cancel_leaves_no_process(impatient: Bench, orders: dict[str, bool], step: int) -> None:
    bench = impatient
    job = bench.create(steps=1000, sleep_s=0.01, **orders)
    if step == 0:
        bench.until(lambda: bench.job(job.id).status == RUNNING)
    else:
        bench.until_step(job.id, step)
    assert bench.jobs.cancel(PROJECT, job.id).status == "cancelling"
    assert bench.processes_left(job.id), "who cancels waits for nothing"
    done = bench.until_over(job.id)
    assert done.status == CANCELLED and done.finished_at is not None and done.error is None
    assert bench.processes_left(job.id) == []
    assert done.trained_tokens == (10 * done.step if done.step else None)
    assert bench.jobs.cancel(PROJECT, job.id) == done
    assert bench.codes(job.id)[-1] == "cancelled"


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(4, 40))])
def test_r16_cancel_at_any_moment(impatient: Bench, seed: int) -> None:
    """Before the trainer, while it starts, trains, saves, ends or is followed by another one; with a grandchild that
    disobeys."""
    bench = impatient
    chance = random.Random(seed)
    crash = {"crash_at": 6} if seed % 2 else {}
    job = bench.create(steps=12, checkpoint_every=2, fork_child=True, **crash)
    moment = time.monotonic() + chance.uniform(0.0, 1.2)
    bench.until(lambda: time.monotonic() >= moment or bench.job(job.id).status == SUCCEEDED)
    if bench.job(job.id).status == SUCCEEDED:
        return
    bench.jobs.cancel(PROJECT, job.id)
    assert bench.until_over(job.id).status == CANCELLED
    for _ in range(3):
        bench.controller.run_once()
    assert bench.job(job.id).status == CANCELLED and bench.processes_left(job.id) == []
    assert list(bench.home.adapters.iterdir()) == []
    with bench.storage.read() as tx:
        assert all(model.status != "ready" for model in tx.models.list(PROJECT))


def test_cancel_wins_over_a_model_that_is_not_published_yet(bench: Bench) -> None:
    job = bench.create(steps=2)
    bench.prover.wait_for = lambda: bench.job(job.id).status == CANCELLED
    bench.until(lambda: (bench.home.adapters / job.tuned_model_id).exists())
    bench.jobs.cancel(PROJECT, job.id)
    assert bench.until_over(job.id).status == CANCELLED
    assert list(bench.home.adapters.iterdir()) == []
    with bench.storage.read() as tx:
        assert tx.models.list(PROJECT) == []


def test_pause_and_resume_many_times_change_nothing(bench: Bench) -> None:
    job = bench.create(steps=40, checkpoint_every=1000, holds=[3, 11, 19, 27])
    for step in (3, 11, 19, 27):
        bench.until_step(job.id, step)
        assert bench.jobs.pause(PROJECT, job.id).status == PAUSED
        if step != 11:  # once resumed while its trainer is still ending
            bench.until(lambda: not bench.processes_left(job.id))
            assert not bench.controller.run_once()
        assert bench.jobs.resume(PROJECT, job.id).status == QUEUED
    done = bench.until_over(job.id)
    assert (done.status, done.failures) == (SUCCEEDED, 0)
    assert bench.losses(job.id) == whole_run(5, 40)


def test_cancel_of_a_paused_job_whose_trainer_disobeys(impatient: Bench) -> None:
    bench = impatient
    job = bench.create(steps=1000, ignore_sigterm=True)
    bench.until_step(job.id, 2)
    bench.jobs.pause(PROJECT, job.id)
    bench.controller.run_once()
    assert bench.processes_left(job.id)
    bench.jobs.cancel(PROJECT, job.id)
    assert bench.until_over(job.id).status == CANCELLED
    assert bench.processes_left(job.id) == []


# --- servers that die -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 6, 12])
def test_a_new_server_adopts_the_trainer(bench: Bench, step: int) -> None:
    job = bench.create(steps=12, holds=[step])
    bench.until_step(job.id, step)
    pid = bench.process(job.id).pid
    restarted(bench)
    (bench.home.jobs / job.id / "go").touch()
    done = bench.until_over(job.id)
    assert (done.status, done.attempt) == (SUCCEEDED, 1), "the trainer goes on under the new server"
    assert bench.process(job.id).pid == pid
    assert bench.losses(job.id) == whole_run(5, 12)


def test_a_trainer_that_ended_while_no_server_was_there(bench: Bench) -> None:
    job = bench.create(steps=12)
    bench.until_step(job.id, 1)
    bench.until(lambda: b'"finished"' in (bench.home.jobs / job.id / "journal-1.jsonl").read_bytes(), moving=False)
    restarted(bench)
    assert bench.until_over(job.id).status == SUCCEEDED
    assert bench.losses(job.id) == whole_run(5, 12)


def test_a_server_killed_between_its_decision_and_the_start(bench: Bench) -> None:
    job = bench.create(steps=4)
    bench.until(lambda: bench.job(job.id).status == QUEUED)
    with bench.storage.write() as tx:
        tx.jobs.change(bench.job(job.id), status=RUNNING, attempt=1, journal_offset=0)
    restarted(bench)
    done = bench.until_over(job.id)
    assert (done.status, done.attempt, done.failures) == (SUCCEEDED, 2, 0)
    assert bench.losses(job.id) == whole_run(5, 4)


def test_a_trainer_that_has_not_said_its_name_yet_is_found(bench: Bench) -> None:
    job = bench.create(steps=400, sleep_s=0.01)
    bench.until_step(job.id, 1)
    process = bench.process(job.id)
    (bench.home.jobs / job.id / "trainer.json").unlink()
    restarted(bench)
    bench.until_step(job.id, bench.job(job.id).step + 5)
    assert bench.job(job.id).attempt == 1
    bench.jobs.cancel(PROJECT, job.id)
    assert bench.until_over(job.id).status == CANCELLED
    assert bench.runners[0].group_empty(process.pid)


def test_killed_between_the_proof_and_its_commit(bench: Bench) -> None:
    """The adapter is in place and proven, but nothing of it is in the database: the next server does it again."""
    job = bench.create(steps=3)
    killed: list[bool] = []
    bench.prover.wait_for = lambda: bool(killed)
    bench.until(lambda: (bench.home.adapters / job.tuned_model_id).is_dir())
    killed.append(True)
    bench.until(lambda: bench.prover.proved, moving=False)
    restarted(bench)
    assert bench.until_over(job.id).status == SUCCEEDED
    assert len(bench.prover.proved) == 2
    with bench.storage.read() as tx:
        assert len(tx.files.list(PROJECT, purpose="fine-tune-results", after=None, limit=10)) == 1


def test_replaying_a_journal_adds_nothing(bench: Bench) -> None:
    """An offset that fell behind (a restored backup, say): steps and checkpoints stay unique."""
    job = bench.create(steps=8, checkpoint_every=2, holds=[5])
    bench.until_step(job.id, 5)
    with bench.storage.write() as tx:
        tx.jobs.change(bench.job(job.id), journal_offset=0)
    (bench.home.jobs / job.id / "go").touch()
    bench.until_over(job.id)
    assert bench.losses(job.id) == whole_run(5, 8)
    assert [checkpoint.step for checkpoint in bench.jobs.checkpoints(PROJECT, job.id).checkpoints] == [8, 6, 4, 2]


def test_a_second_loop_does_nothing_while_the_first_has_the_lease(bench: Bench) -> None:
    job = bench.create(steps=300, holds=[1])
    bench.until_step(job.id, 1)
    second = bench.new_controller(lease_holder="another home")
    bench.controller.run_once()  # which renews it: on a busy machine seconds may have gone by
    assert second.run_once() is False
    bench.controller.run_once()
    with bench.storage.write() as tx:
        assert tx.leases.take("jobs", "me", now_ms=wall_ms(), ttl_ms=1) is None
    bench.jobs.cancel(PROJECT, job.id)
    assert second.run_once() is False and bench.job(job.id).status == "cancelling"
    bench.until_over(job.id)


def newest_step(bench: Bench, job_id: str) -> int:
    """What the trainers have reached, by their journals."""
    journals = (bench.home.jobs / job_id).glob("journal-*.jsonl")
    lines = [line for journal in journals for line in journal.read_bytes().split(b"\n")[:-1]]
    return max((json.loads(line)["step"] for line in lines if b'"metrics"' in line), default=0)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_r04_kill_minus_9_of_the_server_at_random_moments(bench: Bench, kills: int) -> None:
    """A server process of its own, killed again and again while one job runs; some trainers are killed too."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    steps = 20 * kills
    job = bench.create(steps=steps, sleep_s=0.04, checkpoint_every=2)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    servers: list[subprocess.Popen[bytes]] = []
    most_trainers = 0
    try:
        for kill in range(kills):
            command = [sys.executable, "-m", "tests.job_bench", str(bench.home.root)]
            servers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
            assert servers[-1].stdout is not None and servers[-1].stdout.readline()
            moment = time.monotonic() + chance.uniform(0.0, 0.8)
            while time.monotonic() < moment:
                most_trainers = max(most_trainers, len(bench.runners[0].find(TRAINER, bench.home.jobs / job.id)))
                time.sleep(0.01)
            servers[-1].kill()
            servers[-1].wait()
            if kill % 3 == 2 and (bench.home.jobs / job.id / "trainer.json").exists():
                bench.runners[0].kill(bench.process(job.id).pid)
        reached = newest_step(bench, job.id)
        bench.until(lambda: bench.job(job.id).step >= reached, limit_s=15)  # the state is right again
        done = bench.until_over(job.id)
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    assert done.status == SUCCEEDED
    assert bench.losses(job.id) == whole_run(5, steps)
    assert most_trainers <= 1
    with bench.storage.read() as tx:
        assert len(tx.models.list(PROJECT)) == 1


# --- the thread, and shutting down ----------------------------------------------------------------------------------


def test_shutdown_checkpoints_and_the_next_start_goes_on(bench: Bench) -> None:
    bench.jobs.on_change = lambda: bench.controller.wake()
    bench.controller.start()
    job = bench.create(steps=20, checkpoint_every=1000, holds=[5])
    bench.until(lambda: bench.job(job.id).step >= 5, moving=False)
    started = time.monotonic()
    bench.controller.stop()
    assert time.monotonic() - started < 5, "it saved, and was not killed"
    parked = bench.job(job.id)
    assert (parked.status, parked.failures) == (QUEUED, 0) and parked.step == 5
    assert bench.processes_left(job.id) == []
    assert "parked" in bench.codes(job.id)
    restarted(bench)
    bench.controller.start()
    bench.until(lambda: bench.job(job.id).status == SUCCEEDED, moving=False)
    bench.controller.stop()
    assert "resumed" in bench.codes(job.id)
    assert bench.losses(job.id) == whole_run(5, 20)


def test_shutdown_may_leave_the_trainer_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", on_shutdown="continue")
    try:
        bench.controller.start()
        job = bench.create(steps=100, sleep_s=0.02)
        bench.until(lambda: bench.job(job.id).step >= 2, moving=False)
        bench.controller.stop()
        assert bench.job(job.id).status == RUNNING and bench.processes_left(job.id)
        restarted(bench)
        assert bench.until_over(job.id).attempt == 1
    finally:
        bench.close()


def test_r17_a_file_of_an_unfinished_job_is_in_use(bench: Bench) -> None:
    job = bench.create(steps=2)
    with bench.storage.read() as tx:
        assert tx.jobs.using_file(PROJECT, job.training_file) == [job.id]
    bench.until_over(job.id)
    with bench.storage.read() as tx:
        assert tx.jobs.using_file(PROJECT, job.training_file) == []


def test_the_trainer_gets_a_clean_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_DATABASE_URL", "postgresql://user:secret@host/name")
    job = bench.create(steps=500, holds=[1])
    bench.until_step(job.id, 1)
    pid = bench.process(job.id).pid
    variables = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"secret" not in variables and b"HF_HUB_OFFLINE=1" in variables
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert os.getsid(pid) == pid
    log = bench.home.jobs / job.id / "log-1.txt"
    assert log.stat().st_mode & 0o777 == 0o600
    bench.jobs.cancel(PROJECT, job.id)
    bench.until_over(job.id)


def test_deleting_a_finished_job_removes_its_folder_and_keeps_the_model(bench: Bench) -> None:
    job = bench.until_over(bench.create(steps=2).id)
    deleted = bench.jobs.delete(PROJECT, job.id)
    assert msgspec.structs.replace(deleted, deleted_at=None) == job
    assert not (bench.home.jobs / job.id).exists()
    assert bench.models.resolve(PROJECT, job.tuned_model_name).tuned is not None
