"""The trainer as the server meets it: a process with a lock, a heartbeat and a journal, ended by signals."""

import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.contract import rows as contract_rows
from tests.recipes.job_folder import (
    codes,
    fork_trainer,
    log_text,
    losses,
    next_attempt,
    records,
    run_trainer,
    start_trainer,
    train_here,
    write_job,
)
from tunewright.jobs.last_words import evidence_of, recognise
from tunewright.jobs.spec import Failed, Finished, Stopped, TrainerProcess
from tunewright.jobs.trainers import Trainers
from tunewright.recipes import checkpoints
from tunewright.runners.local import LocalRunner


def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for(path: Path) -> None:
    until(path.exists)


def test_killed_and_stopped_trainers_end_as_if_nothing_had_happened(tmp_path: Path, base: Path) -> None:
    many = {"n_epochs": 40, "checkpoint_every_s": 0.1}
    whole = train_here(write_job(tmp_path / "whole", base, **many))
    spec = write_job(tmp_path / "job", base, **many)

    assert run_trainer(spec, ("after_step", 7)) == -signal.SIGKILL
    first = records(spec)
    spec = next_attempt(spec)
    assert run_trainer(spec, ("asked_after_step", 60)) == 0
    second = records(spec)
    last = second[-1]
    assert isinstance(last, Stopped)
    assert checkpoints.newest_step(tmp_path / "job") == last.step >= 60
    spec = next_attempt(spec)
    assert run_trainer(spec) == 0
    third = records(spec)

    assert isinstance(third[-1], Finished)
    assert third[-1] == whole[-1]
    assert losses(first) | losses(second) | losses(third) == losses(whole)
    for one in (losses(first), losses(second), losses(third)):  # repeated steps included
        assert one.items() <= losses(whole).items()
    assert log_text(spec) == ""


def test_identity_heartbeat_and_lock(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "job"
    spec = write_job(folder, base, n_epochs=100_000)
    process = fork_trainer(spec)
    try:
        wait_for(folder / "trainer.json")
        told = msgspec.json.decode((folder / "trainer.json").read_bytes(), type=TrainerProcess)
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert told == TrainerProcess(pid=process.pid, start_ticks=int(stat[19]), attempt=1)

        before = (folder / "heartbeat").stat().st_mtime_ns
        until(lambda: bool(losses(records(spec))))  # until then files come and go
        written = [path.name for path in folder.iterdir()]
        assert run_trainer(spec) == 75  # a second trainer finds the lock taken and touches nothing
        assert set(written) <= {path.name for path in folder.iterdir()}
        assert msgspec.json.decode((folder / "trainer.json").read_bytes(), type=TrainerProcess) == told
        until(lambda: (folder / "heartbeat").stat().st_mtime_ns > before)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert isinstance(records(spec)[-1], Stopped)


def test_a_newer_attempt_silences_the_older_one(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "job"
    spec = write_job(folder, base, n_epochs=100_000)
    process = fork_trainer(spec)
    wait_for(folder / "checkpoints" / "step-4")
    (folder / "attempt").write_text("2")
    assert process.wait(60) == 75
    journal = (folder / "journal-1.jsonl").read_bytes()
    assert not isinstance(records(spec)[-1], Finished | Stopped)
    assert not (folder / "result").exists()
    assert run_trainer(spec) == 75  # nor does it start again
    assert (folder / "journal-1.jsonl").read_bytes() == journal


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal."""
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    assert caught is not None
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def test_stopped_before_the_first_step(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "job"
    spec = write_job(folder, base)
    process = start_trainer(spec)
    until(lambda: catches(process.pid, signal.SIGTERM))  # long before the libraries are imported
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert records(spec) == [Stopped(step=0)]


def test_a_crash_says_nothing_to_the_server_and_all_to_the_log(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "job"
    spec = write_job(folder, base)
    (folder / "checkpoints").write_text("a file where a folder belongs")
    assert run_trainer(spec) not in (0, 75)
    assert not any(isinstance(record, Finished | Stopped) for record in records(spec))
    assert "NotADirectoryError" in log_text(spec) or "FileExistsError" in log_text(spec)


@pytest.mark.parametrize("limit", [15_000, 22_000, 30_000])
def test_r42_a_full_disk_costs_the_checkpoint_only(tmp_path: Path, base: Path, limit: int) -> None:
    """No file may grow beyond `limit`: the adapter (19848 bytes), the random states or the optimizer's do not fit."""
    spec = write_job(tmp_path / "job", base, n_epochs=2)
    assert run_trainer(spec, ("small_files", limit)) == 0
    found = records(spec)
    assert codes(found) == ["checkpoint_not_saved"] * 2
    if limit > 20_000:
        assert isinstance(found[-1], Finished), "the result has room"
    else:
        assert isinstance(found[-1], Failed) and found[-1].code == "insufficient_storage"
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not (tmp_path / "job" / "checkpoints").exists() or not list((tmp_path / "job" / "checkpoints").iterdir())
    assert left == []
    again = next_attempt(spec)
    assert run_trainer(again) == 0
    assert isinstance(records(again)[-1], Finished)


@pytest.mark.parametrize("megabytes", [300, 700])
def test_r13_want_of_memory_is_known_as_such(tmp_path: Path, base: Path, megabytes: int) -> None:
    """The address space ends while the libraries are loaded, or a little later: death by ImportError, abort, what not."""
    spec = write_job(tmp_path / "job", base)
    process = start_trainer(spec)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
    assert process.wait(120) != 0
    assert not any(isinstance(record, Finished | Failed) for record in records(spec))
    job = contract_rows.job("p", id=tmp_path.name, attempt=1)
    (tmp_path / tmp_path.name).symlink_to(tmp_path / "job")
    death = Trainers(tmp_path, LocalRunner(), "tunewright.recipes.run", 30.0).death(job)
    assert recognise(death).code == "out_of_memory", log_text(spec)[-500:]
    assert evidence_of(death)
