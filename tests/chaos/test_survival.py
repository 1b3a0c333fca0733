"""kill -9 of the server and of the trainer at random points of a real job."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.live_server import LiveServer, chat_rows
from tunewright.runners.local import LocalRunner

pytestmark = pytest.mark.timeout(900)  # thousands of steps, on a machine that may be slow

KILLS = 10
ROWS = 60
HYPERPARAMETERS = {"n_epochs": 25, "batch_size": 1}
SEED = 11


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path) -> Iterator[LiveServer]:
    # A trainer may be killed again and again before it has saved anything new, which is no crash loop of its own.
    settings = {"TUNEWRIGHT_CHECKPOINT_EVERY_S": "0.2", "TUNEWRIGHT_MAX_ATTEMPTS": str(KILLS)}
    server = LiveServer(tmp_path / "home", **settings)
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def run_job(server: LiveServer) -> str:
    return server.create_job(server.upload(chat_rows(ROWS)), seed=SEED, hyperparameters=HYPERPARAMETERS)


def losses(server: LiveServer, job_id: str) -> list[tuple[int, float]]:
    """(step, loss) of every metrics event, oldest first."""
    with server.api() as api:
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = api.get(
                f"/fine_tuning/jobs/{job_id}/events", params={"limit": 100, "after": after} if after else {"limit": 100}
            ).json()
            found += page["data"]
            if not page["has_more"]:
                break
            after = page["data"][-1]["id"]
    return [(e["data"]["step"], e["data"]["train_loss"]) for e in reversed(found) if e["type"] == "metrics"]


def adapter_hash(server: LiveServer) -> list[bytes]:
    return [path.read_bytes() for path in sorted(server.home.glob("adapters/*/adapter_model.safetensors"))]


def newest_step(work: Path) -> int:
    """The step that the newest journal has reached, read the way a user would look: from the file."""
    journals = sorted(work.glob("journal-*.jsonl"), key=lambda path: int(path.stem.split("-")[1]))
    for journal in reversed(journals):
        for line in reversed(journal.read_bytes().split(b"\n")[:-1]):
            record = json.loads(line)
            if record["type"] == "metrics":
                return record["step"]
    return 0


def wait_for_step(server: LiveServer, work: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while newest_step(work) < step:
        if time.monotonic() > deadline:
            pytest.fail(f"stuck before step {step}: {server.log.read_text()[-2000:]}")
        time.sleep(0.005)


def kill_trainer(work: Path, dead: set[int]) -> int:
    """Kill the trainer that is at work and give its process id; one killed before may still be the one on record."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        pid = json.loads((work / "trainer.json").read_bytes())["pid"]
        if pid not in dead:
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.005)
    pytest.fail("no trainer has followed the killed one")


@contextmanager
def resting(server: LiveServer, work: Path, after: int) -> Iterator[None]:
    """The trainer, if there is one, makes so many steps more and no others in the block, however long that takes."""
    trainer = json.loads((work / "trainer.json").read_bytes())
    pid = trainer["pid"]
    if not LocalRunner().alive(pid, trainer["start_ticks"]):
        yield
        return
    wait_for_step(server, work, newest_step(work) + after)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_ten_kills_change_nothing(server: LiveServer, tmp_path: Path, tiny_base: Path) -> None:
    calm = LiveServer(tmp_path / "calm", TUNEWRIGHT_CHECKPOINT_EVERY_S="0.2")
    calm.add_base(tiny_base)
    calm.start()
    try:
        calm_job = calm.wait(run_job(calm))
        calm_losses = losses(calm, calm_job["id"])
        calm_adapter = adapter_hash(calm)
    finally:
        calm.stop()

    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    victims = ["server", "trainer"] * (KILLS // 2)
    chance.shuffle(victims)
    job_id = run_job(server)
    work = server.home / "jobs" / job_id
    dead: set[int] = set()
    for victim in victims:
        # Counted from where the run is: it goes on while there is no server.
        wait_for_step(server, work, newest_step(work) + chance.randint(1, 40))
        if victim == "server":
            server.kill()
            with resting(server, work, chance.randint(0, 20)):
                server.start()
        else:
            dead.add(kill_trainer(work, dead))
        assert newest_step(work) < len(calm_losses), "the job ended before its last kill: it needs more steps"
    job = server.wait(job_id)
    assert job["status"] == "succeeded", job
    assert len(dead) == KILLS // 2
    with server.api() as api:
        assert [each["id"] for each in api.get("/fine_tuning/jobs").json()["data"]] == [job_id]
    assert losses(server, job_id) == calm_losses, "a step is missing, doubled, or has another loss"
    assert adapter_hash(server) == calm_adapter
    assert job["trained_tokens"] == calm_job["trained_tokens"]


@pytest.mark.soak
def test_r13_a_starved_trainer_is_named_and_the_server_does_not_notice(server: LiveServer) -> None:
    """Every attempt gets 700 MiB of address space, while /healthz is asked all the time."""
    job_id = run_job(server)
    work = server.home / "jobs" / job_id
    starved: set[int] = set()
    probes: list[float] = []
    deadline = time.monotonic() + 240
    with server.api() as api:
        while server.job(job_id)["status"] not in ("succeeded", "failed") and time.monotonic() < deadline:
            with suppress(OSError, ValueError):
                pid = json.loads((work / "trainer.json").read_bytes())["pid"]
                if pid not in starved:
                    resource.prlimit(pid, resource.RLIMIT_AS, (700 * 2**20, 700 * 2**20))
                    starved.add(pid)
            began = time.monotonic()
            api.get(server.address + "/healthz").raise_for_status()
            probes.append(time.monotonic() - began)
            time.sleep(0.02)
        job = server.job(job_id)
        codes = [event["code"] for event in api.get(f"/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]]
    probes.sort()
    print(f"{len(starved)} starved, {job['status']}, {job['error']}, p99 {probes[int(len(probes) * 0.99)]:.3f} s")
    assert len(starved) == 2 and codes.count("micro_batch_halved") == 1, "one try with less, no more"
    assert job["error"]["code"] == "out_of_memory" and job["error"]["suggestion"]["changes"]
    assert probes[int(len(probes) * 0.99)] < 1.0


def test_cancel_leaves_no_process_behind(server: LiveServer) -> None:
    job_id = run_job(server)
    work = server.home / "jobs" / job_id
    wait_for_step(server, work, 3)
    trainer = json.loads((work / "trainer.json").read_bytes())
    with server.api() as api:
        started = time.monotonic()
        api.post(f"/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
        assert time.monotonic() - started < 5
    assert server.wait(job_id)["status"] == "cancelled"
    # Not a look at /proc: what has ended stands there until the last of its threads is gone and its parent has noticed.
    assert not LocalRunner().alive(trainer["pid"], trainer["start_ticks"])
    with server.api() as api:
        names = [model["id"] for model in api.get("/models").json()["data"]]
    assert all(not name.startswith("tiny:") for name in names)


def test_sigterm_of_the_server_checkpoints_and_a_new_one_goes_on(server: LiveServer) -> None:
    job_id = run_job(server)
    work = server.home / "jobs" / job_id
    wait_for_step(server, work, 10)
    trainer = json.loads((work / "trainer.json").read_bytes())
    assert server.stop() == 0
    # Not a look at /proc: what has ended stands there until its new parent has taken notice.
    assert not LocalRunner().alive(trainer["pid"], trainer["start_ticks"]), "on_shutdown=checkpoint ends the trainer"
    server.start()
    assert server.wait(job_id)["status"] == "succeeded"
    steps = [step for step, _ in losses(server, job_id)]
    assert steps == list(range(1, len(steps) + 1))
