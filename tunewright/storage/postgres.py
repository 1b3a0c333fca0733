"""Connections to PostgreSQL, with the same promises as SQLite.

Writes take one advisory lock first, so that they follow one another as they do on SQLite: a service may read, decide and
write (count the queued jobs, then add one) without a race. They last milliseconds; reads never wait for them.
Row locks or SERIALIZABLE with retries would let more writes run at once, at the price of a second way to think.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import event

from tunewright.errors import Misconfigured
from tunewright.i18n import mark
from tunewright.storage.failures import LOCK_WAIT_S
from tunewright.storage.sqlite import json_text

WRITE_LOCK = 0x74756E6577  # "tunew": any number, the same for all servers of one database


class PostgresConnections:
    """See `Storage` for what reading and writing promise."""

    def __init__(self, url: sa.URL) -> None:
        try:
            self._writers = sa.create_engine(
                url,
                pool_size=8,
                max_overflow=32,
                pool_timeout=LOCK_WAIT_S,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 5, "application_name": "tunewright"},
                json_serializer=json_text,
                json_deserializer=msgspec.json.decode,
            )
        except ModuleNotFoundError as error:
            raise Misconfigured(
                "postgres_driver_missing", mark("PostgreSQL needs its driver: pip install 'tunewright[postgres]'")
            ) from error
        event.listen(self._writers, "connect", _prepare)
        self._readers = self._writers.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._readers.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        with self._writers.connect() as connection, connection.begin():
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITE_LOCK)))
            yield connection

    def check(self) -> None:
        """PostgreSQL checks itself."""

    def close(self) -> None:
        self._writers.dispose()


def _prepare(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '5s'")
        cursor.execute("SET statement_timeout = '60s'")
    connection.commit()
