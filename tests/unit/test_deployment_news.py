"""When a deployment is ready or has failed: told once, in the transaction that says so, to the channels that want it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.rows import channel, deployment
from tests.unit.test_models_service import World
from tunewright.deployments.decision import BACKING_OFF, READY
from tunewright.deployments.reconciler import Reconciler, Running
from tunewright.deployments.records import Deployment, Reason, ReplicaRecord
from tunewright.deployments.replicas import Replica
from tunewright.jobs.line import Line
from tunewright.notifications.records import Delivery
from tunewright.notifications.texts import title_and_body
from tunewright.runners.local import LocalRunner
from tunewright.runners.machine import LocalMachine
from tunewright.settings import Settings


class Desk:
    """A reconciler whose loop does not run, with one deployment of one replica."""

    def __init__(self, world: World) -> None:
        self.storage = world.storage
        settings = Settings(home=world.home.root)
        line = Line(settings, LocalMachine())
        self.loop = Reconciler(world.storage, world.models, world.home, settings, LocalRunner(), line, lambda: 0)
        self.channel = channel(world.mine.id, kind="apprise", events=("deployment.ready", "deployment.failed"))
        self.deaf = channel(world.mine.id, events=("fine_tuning.job.failed",))
        made = deployment(
            world.mine.id, name="mine", status="deploying", replicas=1, ready_at=None, reason=None, replica_records=()
        )
        with self.storage.write() as tx:
            tx.channels.insert(self.channel)
            tx.channels.insert(self.deaf)
            tx.deployments.insert(made)
        self.running = Running(made)
        self.replica = Replica(world.home.workers / "x", ReplicaRecord(number=1))
        self.running.replicas.append(self.replica)

    def now(self, state: str, **record: Any) -> Deployment:
        self.replica.enter(state, **record)
        self.loop._settle(self.running)
        return self.running.deployment

    def told(self) -> list[Delivery]:
        with self.storage.read() as tx:
            assert tx.deliveries.list(self.deaf.project_id, self.deaf.id, after=None, limit=9) == []
            return tx.deliveries.list(self.channel.project_id, self.channel.id, after=None, limit=9)[::-1]

    def codes(self) -> list[str]:
        made = self.running.deployment
        with self.storage.read() as tx:
            return [event.code for event in tx.deployments.events(made.project_id, made.id, after=None, limit=99)][::-1]


@pytest.fixture
def desk(tmp_path: Path, tiny_base: Path) -> Iterator[Desk]:
    world = World(tmp_path, tiny_base)
    yield Desk(world)
    world.storage.close()


def test_ready_is_told_once_and_not_at_every_restart(desk: Desk) -> None:
    assert desk.now("starting").status == "deploying" and desk.told() == []
    made = desk.now(READY)
    assert made.status == "ready" and made.ready_at is not None
    desk.now(READY)
    assert desk.now("starting").status == "scaling" and desk.now(READY).status == "ready"
    (delivery,) = desk.told()
    assert (delivery.type, delivery.subject_id, delivery.metered) == ("deployment.ready", made.id, True)
    assert title_and_body(delivery, "en") == (
        "Instance ready: mine",
        f"Deployment {made.id} is ready. Call it as mine.",
    )
    assert title_and_body(delivery, "zh")[1] == f"部署 {made.id} 已就绪，可用模型编码 mine 调用。"
    assert desk.codes() == ["ready"]


def test_a_failure_is_told_with_its_cause_and_so_is_the_recovery(desk: Desk) -> None:
    text = "Its process ended with code {exit_code} before it was ready; see workers/{log}."
    why = Reason(code="replica_start_failed", message=text, values={"exit_code": 1, "log": "dep/1/log.txt"})
    assert desk.now(BACKING_OFF, failures=2, reason=why).status == "deploying"
    made = desk.now(BACKING_OFF, failures=3, reason=why)
    assert made.status == "failed" and made.reason == why
    desk.now("starting")
    desk.now(BACKING_OFF, failures=4, reason=why)
    desk.now(READY)
    failed, ready = desk.told()
    assert (failed.type, ready.type) == ("deployment.failed", "deployment.ready")
    body = title_and_body(failed, "en")[1]
    assert "replica_start_failed" in body and "code 1 before" in body
    assert "log.txt" not in body, "places of the server stay on the server"
    assert desk.codes() == ["failed", "ready"]


def test_what_is_undeployed_meanwhile_tells_nothing(desk: Desk) -> None:
    made = desk.running.deployment
    with desk.storage.write() as tx:
        assert tx.deployments.retire(made.project_id, made.id, 1)
    desk.now(READY)
    assert desk.told() == [] and desk.codes() == []
