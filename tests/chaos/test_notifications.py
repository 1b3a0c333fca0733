"""Whatever dies between the end of a job and the receiver: nothing is lost, and what comes twice has one id."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.die_while_notifying import POINTS, end_job, world_at
from tests.contract.rows import channel
from tests.job_bench import PROJECT, Bench
from tunewright.jobs.records import CANCELLED, FAILED, RUNNING, SUCCEEDED
from tunewright.notifications.outbox import record_end
from tunewright.notifications.sending import CLAIM_S

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, point: str) -> None:
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.die_while_notifying", str(home), point],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (0 if point == "never" else -signal.SIGKILL), done.stderr
    world = world_at(home, "never")
    try:
        [told] = world.service.list(world.project.id)
        with world.storage.read() as tx:
            unfinished = tx.jobs.unfinished()
        ended = point not in ("ended", "recorded")
        assert len(world.deliveries(told)) == ended == (not unfinished), "a job's end and its message are one"
        for job in unfinished:  # the next server ends it again
            end_job(world, job, "never")
        world.deliver()
        if point == "claimed":
            assert not (home / "sent").exists(), "whoever claimed it might still be sending"
        world.ahead_s = CLAIM_S
        world.deliver()
        [delivery] = world.deliveries(told)
        assert (delivery.status, delivery.error) == ("delivered", None)
        sent = (home / "sent").read_text().split()
        assert set(sent) == {delivery.event_id}
        assert len(sent) == (2 if point == "sent" else 1)
    finally:
        world.close()


def test_every_way_to_end_writes_to_the_outbox_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    bench = Bench(tmp_path / "home")
    told = channel(PROJECT)
    with bench.storage.write() as tx:
        tx.channels.insert(told)
    bench.jobs.on_end = bench.on_end = record_end
    bench.controller = bench.new_controller()
    try:
        done = bench.until_over(bench.create(steps=2).id)
        failed = bench.until_over(bench.create(steps=2, fail="loss_not_finite").id)
        waiting = bench.create(steps=2)
        bench.jobs.cancel(PROJECT, waiting.id)
        running = bench.create(steps=10_000)
        bench.until(lambda: bench.job(running.id).status == RUNNING)
        bench.jobs.cancel(PROJECT, running.id)
        bench.jobs.cancel(PROJECT, running.id)
        cancelled = bench.until_over(running.id)
        for _ in range(3):
            bench.controller.run_once()
        assert (done.status, failed.status, cancelled.status) == (SUCCEEDED, FAILED, CANCELLED)
        with bench.storage.read() as tx:
            written = tx.deliveries.list(PROJECT, told.id, after=None, limit=100)
        assert sorted((each.subject_id, each.type.rpartition(".")[2]) for each in written) == sorted(
            [(done.id, SUCCEEDED), (failed.id, FAILED), (waiting.id, CANCELLED), (running.id, CANCELLED)]
        )
        assert len({each.event_id for each in written}) == 4
    finally:
        bench.close()
