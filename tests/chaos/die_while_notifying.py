"""A server that ends one job, tells one receiver and is killed on the way: `python -m tests.chaos.die_while_notifying HOME
POINT`. What it sends is a line in the file `sent`: the id that the receiver would see."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.webhook_world import NotificationWorld
from tunewright.clock import wall_s
from tunewright.egress import Egress
from tunewright.ids import new_id
from tunewright.jobs.records import RUNNING, SUCCEEDED, Job
from tunewright.notifications.outbox import record_end
from tunewright.notifications.records import Delivery, Outcome

POINTS = ("ended", "recorded", "committed", "claimed", "sent", "never")


class Sender:
    """Writes to a file, and dies where it is told to."""

    def __init__(self, path: Path, point: str) -> None:
        self.egress = Egress()
        self.path = path
        self.point = point

    def send(self, url: str, secrets: Sequence[str], delivery: Delivery) -> Outcome:
        die_at("claimed", self.point)
        with self.path.open("a") as file:
            file.write(delivery.event_id + "\n")
        die_at("sent", self.point)
        return Outcome()


def die_at(here: str, point: str) -> None:
    if here == point:
        os.kill(os.getpid(), signal.SIGKILL)


def world_at(home: Path, point: str) -> NotificationWorld:
    world = NotificationWorld(home, Egress())
    sender: Any = Sender(home / "sent", point)
    world.sending.webhooks = sender
    return world


def end_job(world: NotificationWorld, job: Job, point: str) -> None:
    """As the control loop does, once."""
    with world.storage.write() as tx:
        changed = tx.jobs.change(job, status=SUCCEEDED, finished_at=wall_s())
        if changed is None:
            return
        die_at("ended", point)
        record_end(tx, changed)
        die_at("recorded", point)
    die_at("committed", point)


def main(home: Path, point: str) -> None:
    world = world_at(home, point)
    project = world.project.id
    world.webhook()
    job = Job(
        id=new_id("ftjob"), project_id=project, base_code="tiny", model="tiny", tuned_model_id="model-1",
        tuned_model_name="tiny:1", training_file="file-1", created_at=wall_s(), status=RUNNING,
    )  # fmt: skip
    with world.storage.write() as tx:
        tx.jobs.insert(job)
    end_job(world, job, point)
    world.deliver()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
