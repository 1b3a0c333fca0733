"""Queries on uploads in parts."""

import builtins

import msgspec
import sqlalchemy as sa

from tunewright.datasets.records import PartedUpload, UploadPart
from tunewright.storage.rows import every, one, to_columns, to_row
from tunewright.storage.tables import upload_parts, uploads


class Uploads:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, upload: PartedUpload) -> None:
        self._connection.execute(sa.insert(uploads).values(to_row(upload)))

    def get(self, project_id: str, upload_id: str) -> PartedUpload | None:
        statement = sa.select(uploads).where(uploads.c.project_id == project_id, uploads.c.id == upload_id)
        return one(self._connection, statement, PartedUpload)

    def count_pending(self, project_id: str) -> int:
        """Uploads of the project that still take parts."""
        statement = sa.select(sa.func.count()).where(uploads.c.project_id == project_id, uploads.c.status == "pending")
        return self._connection.execute(statement).scalar_one()

    def change(self, upload: PartedUpload, **changes: object) -> PartedUpload | None:
        """Compare-and-set: applies `changes` if the stored row still has `upload`'s status, else returns None."""
        wanted = msgspec.structs.replace(upload, **changes)  # refuses names that are no fields
        if (wanted.id, wanted.project_id) != (upload.id, upload.project_id):
            raise ValueError("an upload keeps its id and project")
        statement = (
            sa.update(uploads)
            .where(
                uploads.c.project_id == upload.project_id, uploads.c.id == upload.id, uploads.c.status == upload.status
            )
            .values(to_columns(changes))
        )
        return wanted if self._connection.execute(statement).rowcount == 1 else None

    def add_part(self, part: UploadPart) -> None:
        self._connection.execute(sa.insert(upload_parts).values(to_row(part)))

    def parts(
        self, project_id: str, upload_id: str, *, after: str | None = None, limit: int | None = None
    ) -> builtins.list[UploadPart]:
        """In the order of their ids, which is that of their arrival; `after` is exclusive."""
        statement = sa.select(upload_parts).where(*_of(project_id, upload_id))
        if after is not None:
            statement = statement.where(upload_parts.c.id > after)
        return every(self._connection, statement.order_by(upload_parts.c.id).limit(limit), UploadPart)

    def count_parts(self, project_id: str, upload_id: str) -> int:
        """How many there are."""
        statement = sa.select(sa.func.count()).where(*_of(project_id, upload_id))
        return self._connection.execute(statement).scalar_one()

    def received_bytes(self, project_id: str, upload_id: str) -> int:
        """The bytes of all its parts."""
        statement = sa.select(sa.func.sum(upload_parts.c.size_bytes)).where(*_of(project_id, upload_id))
        return int(self._connection.execute(statement).scalar_one() or 0)

    def drop_parts(self, project_id: str, upload_id: str) -> bool:
        """False if there were none."""
        return self._connection.execute(sa.delete(upload_parts).where(*_of(project_id, upload_id))).rowcount > 0

    def overdue(self, now_s: int) -> builtins.list[PartedUpload]:
        """Pending ones whose time is over. Of all projects: for the sweep only."""
        statement = sa.select(uploads).where(uploads.c.status == "pending", uploads.c.expires_at <= now_s)
        return every(self._connection, statement.order_by(uploads.c.expires_at).limit(1000), PartedUpload)

    def forget_expired_before(self, then_s: int) -> int:
        """Drop the records of ended uploads whose time was over by then; how many. Of all projects: for the sweep only."""
        ended = uploads.c.status.in_(("cancelled", "completed", "expired"))
        return self._connection.execute(sa.delete(uploads).where(ended, uploads.c.expires_at < then_s)).rowcount


def _of(project_id: str, upload_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return upload_parts.c.project_id == project_id, upload_parts.c.upload_id == upload_id
