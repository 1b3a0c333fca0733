"""What a driver raises, as errors of the product. A fault that is neither here is a bug and stays as it is."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exc

from tunewright.errors import InvalidRequest, Misconfigured, StorageFull, TunewrightError, Unavailable
from tunewright.i18n import mark

LOCK_WAIT_S = 5.0
"""The longest that a caller waits for a lock or a connection."""


@contextmanager
def driver_errors_translated() -> Iterator[None]:
    """Raises Unavailable, StorageFull, Misconfigured or InvalidRequest in place of the driver's error."""
    try:
        yield
    except exc.TimeoutError as error:  # no connection of the pool became free
        raise database_busy() from error
    except exc.DBAPIError as error:
        known = _of_sqlite(error.orig) if isinstance(error.orig, sqlite3.Error) else _of_postgres(error)
        if known is None:
            raise
        raise known from error


def database_busy() -> Unavailable:
    return Unavailable("database_busy", mark("The database is busy; try again in a moment"))


def database_unavailable() -> Unavailable:
    return Unavailable("database_unavailable", mark("The database does not answer"))


def database_corrupt() -> Misconfigured:
    return Misconfigured(
        "database_corrupt",
        mark("The database file is damaged or is no database; nothing was changed. Restore it from a backup"),
    )


def _storage_full() -> StorageFull:
    return StorageFull("storage_full", mark("The disk is full"))


def _of_sqlite(error: sqlite3.Error) -> TunewrightError | None:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return database_busy()
    if code == sqlite3.SQLITE_FULL:
        return _storage_full()
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return database_corrupt()
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return database_unavailable()
    return None


def _of_postgres(error: exc.DBAPIError) -> TunewrightError | None:
    state = getattr(error.orig, "sqlstate", None) or ""
    # lock_not_available, statement_timeout, serialization_failure, deadlock_detected
    if state in ("55P03", "57014", "40001", "40P01"):
        return database_busy()
    if state == "53100":
        return _storage_full()
    if state.startswith(("08", "53", "57P")) or (not state and isinstance(error, exc.OperationalError)):
        return database_unavailable()
    if isinstance(error, exc.DataError):
        return InvalidRequest("invalid_value", mark("A text holds a character that can't be stored"))
    return None
