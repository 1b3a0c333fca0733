"""A server that does not keep the deployments knows of a replica when its row does, not half a second later."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.contract.rows import deployment
from tests.unit.test_models_service import World
from tunewright.deployments.decision import READY, STARTING
from tunewright.deployments.reconciler import Reconciler, Running
from tunewright.deployments.records import Deployment, ReplicaRecord
from tunewright.deployments.replicas import Replica
from tunewright.deployments.serving import Serving
from tunewright.errors import Unavailable
from tunewright.jobs.line import Line
from tunewright.runners.local import LocalRunner
from tunewright.runners.machine import LocalMachine
from tunewright.settings import Settings


class Desk:
    """A reconciler whose passes do what the test says, and a row that tells of a replica."""

    def __init__(self, world: World) -> None:
        settings, line = Settings(home=world.home.root), Line(Settings(home=world.home.root), LocalMachine())
        self.loop = Reconciler(world.storage, world.models, world.home, settings, LocalRunner(), line, lambda: 0)
        none: Any = None
        self.serving = Serving(world.storage, world.models, none, self.loop, world.home, settings)
        self.folder = world.home.workers / "x"

    def row(self, state: str) -> Deployment:
        return deployment("p", replica_records=(ReplicaRecord(number=1, state=state),))

    def known(self, row: Deployment, *, ready: bool) -> Running:
        running = Running(row)
        replica = Replica(self.folder, row.replica_records[0])
        worker: Any = SimpleNamespace()
        replica.worker = worker if ready else None
        running.replicas.append(replica)
        return running


@pytest.fixture
def desk(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    world = World(tmp_path, tiny_base)
    desk = Desk(world)
    monkeypatch.setattr(desk.loop._probes, "start", lambda: None)  # there is no process to ask
    yield desk
    desk.loop.stop()
    world.storage.close()


@pytest.mark.parametrize("seen", ["nothing", "not ready"])
async def test_a_replica_of_another_server_takes_calls_as_soon_as_its_row_says_so(
    desk: Desk, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = desk.row(READY)
    found = desk.known(row, ready=True)

    def run_once() -> bool:
        desk.loop._leads = False
        desk.loop._running[row.id] = desk.known(row, ready=False) if seen == "not ready" else found
        monkeypatch.setattr(desk.loop, "run_once", lambda: desk.loop._running.update({row.id: found}) or False)
        return False

    monkeypatch.setattr(desk.loop, "run_once", run_once)
    monkeypatch.setattr("tunewright.deployments.reconciler._IDLE_PAUSE_S", 60.0)
    if seen == "not ready":
        desk.loop.start()
        while not desk.loop._ended:
            await asyncio.sleep(0.01)
        assert await desk.serving._awake(row) is found
    else:
        waiting = asyncio.ensure_future(desk.serving._awake(row))
        await asyncio.sleep(0)
        desk.loop.start()
        assert await waiting is found


async def test_who_keeps_the_deployments_and_what_is_not_ready_costs_no_look(desk: Desk) -> None:
    for row in (desk.row(READY), desk.row(STARTING)):
        desk.loop._running[row.id] = known = desk.known(row, ready=False)
        assert await desk.serving._awake(row) is known
    with pytest.raises(Unavailable):
        await desk.serving._awake(desk.row(STARTING))
    assert not desk.loop._woken.is_set()


async def test_a_pass_that_had_begun_before_is_not_waited_for_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have read the rows already."""
    go_on, passes = threading.Event(), [0]

    def run_once() -> bool:
        passes[0] += 1
        go_on.wait(60)
        return False

    monkeypatch.setattr(desk.loop, "run_once", run_once)
    monkeypatch.setattr("tunewright.deployments.reconciler._IDLE_PAUSE_S", 60.0)
    monkeypatch.setattr("tunewright.deployments.reconciler._LOOK_LIMIT_S", 60.0)
    desk.loop.start()
    while not passes[0]:
        await asyncio.sleep(0.01)
    waiting = asyncio.ensure_future(desk.loop.look_again())
    await asyncio.sleep(0.05)
    assert passes == [1] and not waiting.done()
    go_on.set()
    await waiting
    assert passes[0] >= 2
    monkeypatch.setattr("tunewright.deployments.reconciler._LOOK_LIMIT_S", 0.05)
    go_on.clear()
    await desk.loop.look_again()  # gives up
    go_on.set()
