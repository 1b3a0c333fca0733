"""Queries on uploaded files."""

import builtins

import sqlalchemy as sa

from tunewright.datasets.records import File
from tunewright.storage.paging import page
from tunewright.storage.rows import every, one, to_row
from tunewright.storage.tables import files


class Files:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, file: File) -> None:
        self._connection.execute(sa.insert(files).values(to_row(file)))

    def get(self, project_id: str, file_id: str) -> File | None:
        statement = sa.select(files).where(files.c.project_id == project_id, files.c.id == file_id)
        return one(self._connection, statement, File)

    def list(
        self, project_id: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool = False
    ) -> builtins.list[File]:
        """Keyset page ordered by (created_at, id); `after` is exclusive and works for ids whose row is gone
        (ids sort by time). Descending unless `ascending`. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(files).where(files.c.project_id == project_id)
        if purpose is not None:
            statement = statement.where(files.c.purpose == purpose)
        cut = page(self._connection, files, project_id, statement, after=after, limit=limit, ascending=ascending)
        return every(self._connection, cut, File)

    def delete(self, project_id: str, file_id: str) -> bool:
        """False if there was none."""
        statement = sa.delete(files).where(files.c.project_id == project_id, files.c.id == file_id)
        return self._connection.execute(statement).rowcount == 1
