"""Connections to one SQLite file: many readers, one writer.

Python's driver would begin transactions by itself, late and deferred; `isolation_level = None` turns that off and the
`begin` events below say BEGIN. A write takes the lock at once (IMMEDIATE), so it can't fail half way for having read
an older state. Writers of this process queue at a pool of one connection, fairly and without polling the file.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import event, pool

from tunewright.clock import mono_s
from tunewright.errors import Misconfigured
from tunewright.i18n import mark
from tunewright.storage.failures import LOCK_WAIT_S, database_busy, database_corrupt

CHECKED_BYTES = 64 * 2**20
"""Files up to this size are checked as a whole at start: tens of milliseconds."""


def json_text(value: object) -> str:
    """JSON as both databases take it (NaN becomes null)."""
    return msgspec.json.encode(value).decode()


class SqliteConnections:
    """See `Storage` for what reading and writing promise."""

    def __init__(self, url: sa.URL) -> None:
        if not url.database or url.database == ":memory:":
            raise Misconfigured("database_url_invalid", mark("The database needs a file: sqlite:////absolute/path"))
        self.path = Path(url.database)
        if not self.path.parent.is_dir():
            raise Misconfigured(
                "database_folder_missing", mark("The folder of the database, {path}, is missing"), path=self.path.parent
            )
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite would make it readable for all
        self._readers = _engine(url, pool_size=8, overflow=32, begin="BEGIN", prepare=_prepare_reader)
        self._writer = _engine(url, pool_size=1, overflow=0, begin="BEGIN IMMEDIATE", prepare=_prepare_writer)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._readers.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        asked_at = mono_s()
        with self._writer.connect() as connection:
            left_s = LOCK_WAIT_S - (mono_s() - asked_at)
            if left_s < 0:
                raise database_busy()
            # The wait for our own writers and for other processes together stays within the limit. A PRAGMA takes no
            # parameters; the number is ours.
            pragma = f"PRAGMA busy_timeout = {int(left_s * 1000)}"
            driver: Any = connection.connection.dbapi_connection
            driver.execute(pragma)
            with connection.begin():
                yield connection

    def check(self) -> None:
        """Raises Misconfigured if a file small enough to be read at start is damaged."""
        if self.path.stat().st_size <= CHECKED_BYTES:
            with self._readers.connect() as connection:
                if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
                    raise database_corrupt()

    def close(self) -> None:
        self._readers.dispose()
        self._writer.dispose()


def _engine(
    url: sa.URL, *, pool_size: int, overflow: int, begin: str, prepare: Callable[[sqlite3.Connection, object], None]
) -> sa.Engine:
    engine = sa.create_engine(
        url,
        poolclass=pool.QueuePool,
        pool_size=pool_size,
        max_overflow=overflow,
        pool_timeout=LOCK_WAIT_S,
        json_serializer=json_text,
        json_deserializer=msgspec.json.decode,
    )
    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _prepare_writer(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 5000")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise Misconfigured(
            "database_wal_refused", mark("SQLite can't use its write-ahead log here; is the folder on a network disk?")
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_reader(connection: sqlite3.Connection, record: object) -> None:
    _prepare_writer(connection, record)
    connection.execute("PRAGMA query_only = ON")
