"""Queries on batches and on requests whose answer is fetched later."""

import builtins
from typing import Any

import msgspec
import sqlalchemy as sa

from tunewright.batches.records import PROCESSING, UNFINISHED, AsyncTask, Batch
from tunewright.storage.paging import page
from tunewright.storage.rows import every, one, to_columns, to_row
from tunewright.storage.tables import async_tasks, batches


class Batches:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, batch: Batch) -> None:
        self._connection.execute(sa.insert(batches).values(to_row(batch)))

    def get(self, project_id: str, batch_id: str) -> Batch | None:
        statement = sa.select(batches).where(batches.c.project_id == project_id, batches.c.id == batch_id)
        return one(self._connection, statement, Batch)

    def list(self, project_id: str, *, after: str | None, limit: int) -> builtins.list[Batch]:
        """Newest first. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(batches).where(batches.c.project_id == project_id)
        cut = page(self._connection, batches, project_id, statement, after=after, limit=limit)
        return every(self._connection, cut, Batch)

    def count_unfinished(self, project_id: str) -> int:
        """Batches of the project that have not ended."""
        statement = sa.select(sa.func.count()).where(
            batches.c.project_id == project_id, batches.c.status.in_(UNFINISHED)
        )
        return self._connection.execute(statement).scalar_one()

    def using_file(self, project_id: str, file_id: str) -> builtins.list[str]:
        """Ids of unfinished batches that read this file."""
        statement = sa.select(batches.c.id).where(
            batches.c.project_id == project_id, batches.c.input_file_id == file_id, batches.c.status.in_(UNFINISHED)
        )
        return [row.id for row in self._connection.execute(statement)]

    def change(self, batch: Batch, **changes: object) -> Batch | None:
        """Compare-and-set: applies `changes` if the stored row still has `batch`'s status, else returns None."""
        wanted = msgspec.structs.replace(batch, **changes)  # refuses names that are no fields
        statement = sa.update(batches).where(
            batches.c.project_id == batch.project_id, batches.c.id == batch.id, batches.c.status == batch.status
        )
        found = self._connection.execute(statement.values(to_columns(changes))).rowcount
        return wanted if found == 1 else None

    def unfinished(self) -> builtins.list[Batch]:
        """Oldest first. Of all projects: for the control loop only."""
        statement = sa.select(batches).where(batches.c.status.in_(UNFINISHED))
        return every(self._connection, statement.order_by(batches.c.created_at, batches.c.id), Batch)

    def with_input_to_delete(self) -> builtins.list[Batch]:
        """Those that have ended. Of all projects: for the control loop only."""
        statement = sa.select(batches).where(batches.c.delete_input.is_(True), batches.c.status.not_in(UNFINISHED))
        return every(self._connection, statement, Batch)


class AsyncTasks:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, task: AsyncTask) -> None:
        self._connection.execute(sa.insert(async_tasks).values(to_row(task)))

    def get(self, project_id: str, task_id: str) -> AsyncTask | None:
        return self._one(project_id, async_tasks.c.id == task_id)

    def find_by_request_id(self, project_id: str, request_id: str) -> AsyncTask | None:
        return self._one(project_id, async_tasks.c.request_id == request_id)

    def count_unfinished(self, project_id: str) -> int:
        """Tasks of the project that have no answer yet."""
        statement = sa.select(sa.func.count()).where(
            async_tasks.c.project_id == project_id, async_tasks.c.status == PROCESSING
        )
        return self._connection.execute(statement).scalar_one()

    def end(self, task: AsyncTask, **changes: Any) -> AsyncTask | None:
        """Apply `changes` to a task that has not ended, else return None."""
        wanted = msgspec.structs.replace(task, **changes)
        statement = sa.update(async_tasks).where(
            async_tasks.c.project_id == task.project_id, async_tasks.c.id == task.id, async_tasks.c.status == PROCESSING
        )
        found = self._connection.execute(statement.values(to_columns(changes))).rowcount
        return wanted if found == 1 else None

    def unfinished(self, limit: int) -> builtins.list[tuple[str, str]]:
        """(project, id) of the oldest. Of all projects: for the control loop only."""
        statement = sa.select(async_tasks.c.project_id, async_tasks.c.id).where(async_tasks.c.status == PROCESSING)
        ordered = statement.order_by(async_tasks.c.created_at, async_tasks.c.id).limit(limit)
        return [(row.project_id, row.id) for row in self._connection.execute(ordered)]

    def forget_before(self, then_s: int) -> int:
        """Drop what ended before then. Of all projects: for the control loop only."""
        return self._connection.execute(sa.delete(async_tasks).where(async_tasks.c.ended_at < then_s)).rowcount

    def _one(self, project_id: str, condition: sa.ColumnElement[bool]) -> AsyncTask | None:
        statement = sa.select(async_tasks).where(async_tasks.c.project_id == project_id, condition)
        return one(self._connection, statement, AsyncTask)
