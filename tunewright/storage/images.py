"""Queries on the images that files refer to."""

import builtins

import sqlalchemy as sa

from tunewright.datasets.records import File
from tunewright.storage.rows import every, to_columns
from tunewright.storage.tables import file_images, files


class FileImages:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def add(self, project_id: str, file_id: str, sha256: str) -> bool:
        """Note that a file uses a stored image; again is no error. False if there is no such file (any more)."""
        key = {"project_id": project_id, "file_id": file_id, "sha256": sha256}
        if self._connection.execute(sa.select(files.c.id).where(_is(files, project_id, file_id))).first() is None:
            return False
        known = sa.select(file_images.c.sha256).where(*(file_images.c[name] == value for name, value in key.items()))
        if self._connection.execute(known).first() is None:
            self._connection.execute(sa.insert(file_images).values(key))
        return True

    def remove(self, project_id: str, file_id: str) -> builtins.list[str]:
        """Forget what a file uses; the hashes it used."""
        of_file = (file_images.c.project_id == project_id, file_images.c.file_id == file_id)
        hashes = list(self._connection.execute(sa.select(file_images.c.sha256).where(*of_file)).scalars())
        self._connection.execute(sa.delete(file_images).where(*of_file))
        return hashes

    def used(self, project_id: str, sha256: str) -> bool:
        """Whether any file of the project uses this image."""
        statement = (
            sa.select(file_images.c.file_id)
            .where(file_images.c.project_id == project_id, file_images.c.sha256 == sha256)
            .limit(1)
        )
        return self._connection.execute(statement).first() is not None

    def processing(self, limit: int) -> builtins.list[File]:
        """Files of all projects whose images are being fetched, oldest first. For the loop that fetches them."""
        statement = sa.select(files).where(files.c.status == "processing").order_by(files.c.id).limit(limit)
        return every(self._connection, statement, File)

    def change(self, file: File, **values: object) -> bool:
        """Set columns of a file that is still being processed; False if it is not (any more)."""
        statement = sa.update(files).where(_is(files, file.project_id, file.id), files.c.status == "processing")
        return self._connection.execute(statement.values(to_columns(values))).rowcount == 1


def _is(table: sa.Table, project_id: str, file_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.project_id == project_id, table.c.id == file_id)
