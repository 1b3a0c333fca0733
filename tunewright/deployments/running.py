"""What a server knows of a deployment that its row does not say, of its own or by following the server that keeps it."""

from pathlib import Path
from typing import Any

from tunewright.clock import mono_s, wall_s
from tunewright.deployments.decision import DRAINING, READY, SILENT
from tunewright.deployments.quarantine import Quarantine
from tunewright.deployments.records import Deployment, DeploymentEvent, ReplicaRecord
from tunewright.deployments.replicas import Replica
from tunewright.deployments.workers import Workers
from tunewright.ids import new_id
from tunewright.settings import HomeFolder


class Running:
    """What this server knows of one deployment that its row does not say."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.replicas: list[Replica] = []
        self.next_number = 1
        self.retired = False
        self.called_s = mono_s()
        """When a call last began or ended."""
        self.news: list[DeploymentEvent] = []

    def tell(self, code: str, message: str, level: str = "info", **values: Any) -> None:
        """An event that is stored with the next change."""
        self.news.append(event_of(self.deployment, code, message, level, **values))

    def in_flight(self) -> int:
        """Calls that its replicas have not ended yet."""
        return sum(replica.in_flight for replica in list(self.replicas))

    def held_bytes(self) -> int:
        """What its replicas hold in memory."""
        return sum(replica.memory_bytes for replica in list(self.replicas))


def event_of(deployment: Deployment, code: str, message: str, level: str = "info", **values: Any) -> DeploymentEvent:
    """An event of now; `message` is a marked text."""
    return DeploymentEvent(
        project_id=deployment.project_id,
        deployment_id=deployment.id,
        id=new_id("depevent"),
        level=level,
        code=code,
        message=message,
        values=values,
        created_at=wall_s(),
    )


class Follower:
    """Knows the replicas that another server of the home keeps, so that calls can be sent to them."""

    def __init__(self, home: HomeFolder, workers: Workers, quarantine: Quarantine) -> None:
        self._home = home
        self._workers = workers
        self._quarantine = quarantine
        self._told_s = mono_s()

    def follow(self, all_running: dict[str, Running], wishes: list[Deployment]) -> None:
        """Bring `all_running` up to what the rows say, and tell whoever keeps the deployments which of them were called."""
        told_s, self._told_s = self._told_s, mono_s()
        for deployment_id in set(all_running) - {each.id for each in wishes}:
            gone = all_running.pop(deployment_id)
            gone.retired = True
            for replica in gone.replicas:
                replica.ended = True
                replica.suspect()
        for deployment in wishes:
            running = all_running.setdefault(deployment.id, Running(deployment))
            running.deployment = deployment
            known = {replica.record.number: replica for replica in running.replicas}
            running.replicas = [
                self._followed(deployment, known.get(record.number), record) for record in deployment.replica_records
            ]
            if deployment.idle_minutes and (running.in_flight() or running.called_s > told_s):
                note = called_note(self._home, deployment)
                if note.parent.is_dir():
                    note.touch()

    def _followed(self, deployment: Deployment, replica: Replica | None, record: ReplicaRecord) -> Replica:
        if replica is None:
            replica = Replica(self._home.workers / deployment.id / str(record.number), record)
        replica.record, replica.state = record, record.state
        if record.state not in (READY, SILENT, DRAINING):
            replica.worker = None
        elif replica.worker is None or not self._workers.alive(replica.worker):
            if replica.worker is not None:
                self._quarantine.died(replica.worker.process.pid, replica.stuck_at)
            found = self._workers.find(replica.folder)
            replica.worker = None if found is None else found[0]
            if replica.worker is not None:
                replica.cleared()
                replica.memory_bytes = self._workers.memory_bytes(replica.worker)
        return replica


def called_note(home: HomeFolder, deployment: Deployment) -> Path:
    """A file whose time says when a server that only follows last had a call for the deployment."""
    return home.workers / deployment.id / "called"
