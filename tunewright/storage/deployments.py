"""Queries on private instances and their events."""

import builtins

import msgspec
import sqlalchemy as sa

from tunewright.deployments.records import LIVE, RETIRED, Deployment, DeploymentEvent
from tunewright.storage.paging import invalid_cursor, page
from tunewright.storage.rows import every, one, to_columns, to_row
from tunewright.storage.tables import deployment_events, deployments

_MOST_EVENTS = 1000
"""Of one deployment: one that crashes for ever must not fill the disk."""


class Deployments:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, deployment: Deployment) -> None:
        self._connection.execute(sa.insert(deployments).values(to_row(deployment)))

    def get(self, project_id: str, deployment_id: str) -> Deployment | None:
        """Live or retired."""
        statement = sa.select(deployments).where(*_is_deployment(project_id, deployment_id))
        return one(self._connection, statement, Deployment)

    def list(self, project_id: str, *, after: str | None, limit: int) -> builtins.list[Deployment]:
        """The live ones, newest first. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(deployments).where(deployments.c.project_id == project_id, deployments.c.phase == LIVE)
        paged = page(self._connection, deployments, project_id, statement, after=after, limit=limit)
        return every(self._connection, paged, Deployment)

    def named(self, project_id: str, name: str) -> Deployment | None:
        """The one that was made last under a name, live or retired."""
        statement = sa.select(deployments).where(deployments.c.project_id == project_id, deployments.c.name == name)
        return one(self._connection, _newest(statement), Deployment)

    def serving(self, project_id: str, model: str) -> Deployment | None:
        """The live one of a model, by the model's name; the newest if there are several."""
        statement = sa.select(deployments).where(
            deployments.c.project_id == project_id, deployments.c.model == model, deployments.c.phase == LIVE
        )
        return one(self._connection, _newest(statement), Deployment)

    def measured(self, project_id: str, model: str, merge: bool) -> int | None:
        """What a replica of this model was last found to hold in memory."""
        statement = sa.select(deployments).where(
            deployments.c.project_id == project_id,
            deployments.c.model == model,
            deployments.c.merge.is_(merge),
            deployments.c.memory_source == "measured",
        )
        found = one(self._connection, _newest(statement), Deployment)
        return None if found is None else found.memory_bytes

    def live(self) -> builtins.list[Deployment]:
        """Of all projects, oldest first: for the control loop only."""
        statement = sa.select(deployments).where(deployments.c.phase == LIVE)
        return every(self._connection, statement.order_by(deployments.c.created_at, deployments.c.id), Deployment)

    def change(self, deployment: Deployment, **changes: object) -> Deployment | None:
        """The stored deployment with the changes, or None if it is not live any more."""
        msgspec.structs.replace(deployment, **changes)  # refuses names that are no fields
        statement = sa.update(deployments).where(
            *_is_deployment(deployment.project_id, deployment.id), deployments.c.phase == LIVE
        )
        if self._connection.execute(statement.values(to_columns(changes))).rowcount != 1:
            return None
        return self.get(deployment.project_id, deployment.id)

    def retire(self, project_id: str, deployment_id: str, now_s: int) -> bool:
        """Undeploy; False if there is no live one of that id."""
        statement = sa.update(deployments).where(
            *_is_deployment(project_id, deployment_id), deployments.c.phase == LIVE
        )
        changes = {"phase": RETIRED, "status": "stopped", "retired_at": now_s}
        return self._connection.execute(statement.values(changes)).rowcount == 1

    def retire_of_models(self, project_id: str, model_ids: builtins.list[str], now_s: int) -> builtins.list[Deployment]:
        """Undeploy everything that serves one of these tuned models; what that was."""
        statement = sa.select(deployments).where(
            deployments.c.project_id == project_id,
            deployments.c.phase == LIVE,
            deployments.c.tuned_model_id.in_(model_ids),
        )
        found = every(self._connection, statement, Deployment)
        return [each for each in found if self.retire(project_id, each.id, now_s)]

    def add_event(self, event: DeploymentEvent) -> None:
        """At the end; the oldest are dropped where there are very many."""
        own = (
            deployment_events.c.project_id == event.project_id,
            deployment_events.c.deployment_id == event.deployment_id,
        )
        last = self._connection.scalar(sa.select(sa.func.max(deployment_events.c.sequence)).where(*own)) or 0
        self._connection.execute(sa.insert(deployment_events).values({**to_row(event), "sequence": last + 1}))
        old = deployment_events.c.sequence <= last + 1 - _MOST_EVENTS
        self._connection.execute(sa.delete(deployment_events).where(*own, old))

    def events(
        self, project_id: str, deployment_id: str, *, after: str | None, limit: int
    ) -> builtins.list[DeploymentEvent]:
        """Newest first. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(deployment_events).where(
            deployment_events.c.project_id == project_id, deployment_events.c.deployment_id == deployment_id
        )
        if after is not None:
            statement = statement.where(deployment_events.c.sequence < self._place(project_id, deployment_id, after))
        statement = statement.order_by(deployment_events.c.sequence.desc()).limit(limit)
        return every(self._connection, statement, DeploymentEvent)

    def _place(self, project_id: str, deployment_id: str, event_id: str) -> int:
        """The sequence number of an event."""
        statement = sa.select(deployment_events.c.sequence).where(
            deployment_events.c.project_id == project_id,
            deployment_events.c.deployment_id == deployment_id,
            deployment_events.c.id == event_id,
        )
        place = self._connection.scalar(statement)
        if place is None:
            raise invalid_cursor(event_id)
        return place


def _is_deployment(project_id: str, deployment_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return deployments.c.project_id == project_id, deployments.c.id == deployment_id


def _newest(statement: sa.Select[tuple[object, ...]]) -> sa.Select[tuple[object, ...]]:
    return statement.order_by(deployments.c.created_at.desc(), deployments.c.id.desc()).limit(1)
