"""Queries on tuned models."""

import builtins

import msgspec
import sqlalchemy as sa

from tunewright.jobs.records import TERMINAL
from tunewright.models.records import TunedModel
from tunewright.storage.rows import chunks, every, one, to_columns, to_row
from tunewright.storage.tables import jobs, tuned_models


class Models:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, model: TunedModel) -> None:
        self._connection.execute(sa.insert(tuned_models).values(to_row(model)))

    def find(self, project_id: str, name: str) -> TunedModel | None:
        """By the name that callers use; deleted ones are found too (their status says so)."""
        return self._one(tuned_models.c.project_id == project_id, tuned_models.c.name == name)

    def get(self, project_id: str, model_id: str) -> TunedModel | None:
        return self._one(tuned_models.c.project_id == project_id, tuned_models.c.id == model_id)

    def list(self, project_id: str) -> builtins.list[TunedModel]:
        """Those with status `ready`, newest first."""
        statement = (
            sa.select(tuned_models)
            .where(tuned_models.c.project_id == project_id, tuned_models.c.status == "ready")
            .order_by(tuned_models.c.created_at.desc(), tuned_models.c.id.desc())
        )
        return every(self._connection, statement, TunedModel)

    def gone(self, model_ids: builtins.list[str]) -> builtins.list[str]:
        """Those of the given ids whose model was deleted, or reserved by a job that ended without making it. Of all
        projects: for the sweep at start only. Adapters are in folders named by id."""
        statement = (
            sa.select(tuned_models.c.id)
            .outerjoin(
                jobs, sa.and_(jobs.c.project_id == tuned_models.c.project_id, jobs.c.id == tuned_models.c.job_id)
            )
            .where(
                sa.or_(
                    tuned_models.c.status == "deleted",
                    sa.and_(tuned_models.c.status == "training", jobs.c.status.in_(sorted(TERMINAL))),
                )
            )
        )
        found: builtins.list[str] = []
        for some in chunks(model_ids):
            found += self._connection.scalars(statement.where(tuned_models.c.id.in_(some)))
        return found

    def deleted(self, model_ids: builtins.list[str]) -> builtins.list[str]:
        """Those of the given ids whose model was deleted. Of all projects: for the sweep at start only."""
        found: builtins.list[str] = []
        for some in chunks(model_ids):
            found += self._connection.scalars(
                sa.select(tuned_models.c.id).where(tuned_models.c.id.in_(some), tuned_models.c.status == "deleted")
            )
        return found

    def change(self, model: TunedModel, **changes: object) -> TunedModel | None:
        """Compare-and-set on the stored status being `model.status`; None if it is not."""
        wanted = msgspec.structs.replace(model, **changes)  # refuses names that are no fields
        if (wanted.id, wanted.project_id, wanted.name) != (model.id, model.project_id, model.name):
            raise ValueError("a model keeps its id, project and name")
        statement = (
            sa.update(tuned_models)
            .where(
                tuned_models.c.project_id == model.project_id,
                tuned_models.c.id == model.id,
                tuned_models.c.status == model.status,
            )
            .values(to_columns(changes) or {"status": model.status})
        )
        if self._connection.execute(statement).rowcount != 1:
            return None
        return self.get(model.project_id, model.id)

    def _one(self, *conditions: sa.ColumnElement[bool]) -> TunedModel | None:
        return one(self._connection, sa.select(tuned_models).where(*conditions), TunedModel)
