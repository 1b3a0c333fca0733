"""Queries on tuned models."""

import builtins

import msgspec
import sqlalchemy as sa

from tunewright.models.records import TunedModel
from tunewright.storage.rows import every, one, to_columns, to_row
from tunewright.storage.tables import tuned_models


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
