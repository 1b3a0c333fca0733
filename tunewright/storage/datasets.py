"""Queries on uploaded files."""

import builtins
from collections.abc import Sequence

import sqlalchemy as sa

from tunewright.datasets.records import File
from tunewright.storage.paging import page
from tunewright.storage.rows import every, one, to_row
from tunewright.storage.tables import file_images, files


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

    def list_datasets(
        self,
        project_id: str,
        *,
        purposes: Sequence[str],
        kind: str | None,
        status: str | None,
        after: str | None,
        limit: int,
    ) -> builtins.list[File]:
        """As `list`, newest first, for several purposes; `kind` and `status` None take any."""
        # The empty text keeps the planner from looking up each purpose and sorting all that it finds.
        statement = sa.select(files).where(files.c.project_id == project_id, (files.c.purpose + "").in_(purposes))
        if kind is not None:
            statement = statement.where(files.c.kind == kind)
        if status is not None:
            statement = statement.where(files.c.status == status)
        return every(
            self._connection, page(self._connection, files, project_id, statement, after=after, limit=limit), File
        )

    def children(self, project_id: str, file_id: str, *, limit: int) -> builtins.list[File]:
        """What was made from a file, oldest first."""
        statement = sa.select(files).where(files.c.project_id == project_id, files.c.parent_id == file_id)
        return every(self._connection, statement.order_by(files.c.created_at, files.c.id).limit(limit), File)

    def delete(self, project_id: str, file_id: str) -> bool:
        """Also what the file refers to. False if there was none."""
        images = sa.delete(file_images).where(file_images.c.project_id == project_id, file_images.c.file_id == file_id)
        self._connection.execute(images)
        statement = sa.delete(files).where(files.c.project_id == project_id, files.c.id == file_id)
        return self._connection.execute(statement).rowcount == 1
