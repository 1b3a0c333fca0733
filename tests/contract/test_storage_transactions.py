"""Whole or nothing, one writer at a time, and no endless wait: on every database."""

import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from tests.contract.rows import file, job, model, project
from tunewright.accounts.records import Project
from tunewright.errors import InvalidRequest, Misconfigured, Unavailable
from tunewright.storage import Storage, failures


def test_an_exception_takes_everything_back(storage: Storage, ours: Project) -> None:
    first, second = job(ours.id), model(ours.id)
    with pytest.raises(RuntimeError), storage.write() as tx:
        tx.jobs.insert(first)
        tx.models.insert(second)
        raise RuntimeError
    with storage.read() as tx:
        assert (tx.jobs.get(ours.id, first.id), tx.models.get(ours.id, second.id)) == (None, None)


def test_a_read_refuses_writes(storage: Storage, ours: Project) -> None:
    with pytest.raises(exc.DBAPIError), storage.read() as tx:
        tx.files.insert(file(ours.id))
    with storage.write() as tx:  # the refusal leaves nothing behind
        tx.files.insert(file(ours.id))


def test_a_read_is_one_consistent_view(storage: Storage, ours: Project) -> None:
    with storage.read() as before:
        assert before.files.list(ours.id, purpose=None, after=None, limit=9) == []
        with storage.write() as tx:
            tx.files.insert(file(ours.id))
        assert before.files.list(ours.id, purpose=None, after=None, limit=9) == []
    with storage.read() as after:
        assert len(after.files.list(ours.id, purpose=None, after=None, limit=9)) == 1


def test_rows_need_their_project(storage: Storage) -> None:
    with pytest.raises(exc.IntegrityError), storage.write() as tx:
        tx.files.insert(file("proj-none"))


def test_what_a_write_reads_stays_true(storage: Storage, ours: Project) -> None:
    """Count, then insert: a quota of five holds against many at once."""

    def create(_: int) -> bool:
        with storage.write() as tx:
            if tx.jobs.count(ours.id, frozenset({"queued"})) >= 5:
                return False
            time.sleep(0.02)  # room for the others to count the same
            tx.jobs.insert(job(ours.id, status="queued"))
            return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(40))) == 5


def test_one_change_of_many_wins(storage: Storage, ours: Project) -> None:
    seen = job(ours.id, status="queued", attempt=0)
    with storage.write() as tx:
        tx.jobs.insert(seen)

    def start(_: int) -> bool:
        with storage.write() as tx:
            return tx.jobs.change(seen, status="running", attempt=1) is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(start, range(16))) == 1


@pytest.fixture
def outsider(url: str, storage: Storage) -> Callable[[], AbstractContextManager[None]]:
    """Another program that holds the write lock."""
    other = Storage(url)

    @contextmanager
    def holding() -> Any:
        with other.write():
            yield
        other.close()

    return holding


def test_a_long_lock_is_an_error_in_time(
    storage: Storage, ours: Project, outsider: Callable[[], AbstractContextManager[None]]
) -> None:
    """Also for those that queue behind a waiting writer of this process."""
    refused: list[float] = []

    def write() -> None:
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught, storage.write() as tx:
            tx.files.insert(file(ours.id))
        assert caught.value.code == "database_busy"
        assert caught.value.retryable
        refused.append(time.monotonic() - started)

    with outsider():
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        with storage.read() as tx:  # readers go on meanwhile
            assert tx.projects.get(ours.id) == ours
        for thread in threads:
            thread.join()
    assert len(refused) == 3
    assert all(4.0 < waited < failures.LOCK_WAIT_S + 1.5 for waited in refused)
    with storage.write() as tx:
        tx.files.insert(file(ours.id))


def test_a_short_lock_is_waited_for(
    storage: Storage, ours: Project, outsider: Callable[[], AbstractContextManager[None]]
) -> None:
    holding, taken = outsider(), threading.Event()

    def hold() -> None:
        with holding:
            taken.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    with storage.write() as tx:
        tx.files.insert(file(ours.id))
    thread.join()


def test_probe(storage: Storage) -> None:
    storage.probe()
    storage.probe()


def test_text_that_can_not_be_stored_is_the_callers_fault(postgres_url: str) -> None:
    storage = Storage(postgres_url)
    storage.migrate()
    with pytest.raises(InvalidRequest) as caught, storage.write() as tx:
        tx.projects.insert(Project(id="proj-1", number="1", name="a\0b", created_at=0))
    assert caught.value.code == "invalid_value"
    storage.close()


def test_a_server_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    storage = Storage(f"postgresql://nobody@/none?host={tmp_path}")
    for act in (storage.probe, storage.migrate):
        with pytest.raises(Unavailable) as caught:
            act()
        assert caught.value.code == "database_unavailable"
    storage.close()


def test_lost_connections_heal(postgres_url: str) -> None:
    storage = Storage(postgres_url)
    storage.migrate()
    ours = project("1")
    with storage.write() as tx:
        tx.projects.insert(ours)
    end_sessions(postgres_url)
    with storage.read() as tx:
        assert tx.projects.get(ours.id) == ours
    with pytest.raises(Unavailable) as caught, storage.write() as tx:
        tx.files.insert(file(ours.id))
        end_sessions(postgres_url)
        tx.files.insert(file(ours.id))
    assert caught.value.code == "database_unavailable"
    with storage.write() as tx:
        assert tx.files.list(ours.id, purpose=None, after=None, limit=9) == []
    storage.close()


def end_sessions(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()


def test_sqlite_settings(sqlite_url: str, tmp_path: Path) -> None:
    storage = Storage(sqlite_url)
    storage.migrate()
    for unit in (storage.write, storage.read):
        with unit() as tx:
            connection = tx.projects._connection
            values: list[Any] = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
            assert values[:3] == ["wal", 2, 1]
            assert 4900 <= values[3] <= 5000
    assert (tmp_path / "test.db").stat().st_mode & 0o777 == 0o600
    storage.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://secret:secret@host/db",
        "sqlite:////no/such/folder/x.db",
        "postgresql://h:port/x",
    ],
)
def test_urls_that_can_not_work(url: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        Storage(url)
    assert caught.value.code in ("database_url_invalid", "database_folder_missing")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("sqlite_code", "code"),
    [
        (sqlite3.SQLITE_FULL, "storage_full"),
        (sqlite3.SQLITE_BUSY, "database_busy"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "database_busy"),
        (sqlite3.SQLITE_CORRUPT, "database_corrupt"),
        (sqlite3.SQLITE_IOERR_FSYNC, "database_unavailable"),
        (sqlite3.SQLITE_CANTOPEN, "database_unavailable"),
    ],
)
def test_codes_of_sqlite(sqlite_code: int, code: str) -> None:
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode = sqlite_code
    with pytest.raises(Exception) as caught, failures.driver_errors_translated():
        raise exc.OperationalError("x", {}, error)
    assert getattr(caught.value, "code", None) == code


def test_a_full_sqlite_file(sqlite_url: str) -> None:
    """The same through the driver: a file that may not grow."""
    from tunewright.errors import StorageFull

    storage = Storage(sqlite_url)
    storage.migrate()
    ours = project("1")
    with storage.write() as tx:
        tx.projects.insert(ours)
        connection = tx.projects._connection
        connection.exec_driver_sql(
            f"PRAGMA max_page_count = {connection.exec_driver_sql('PRAGMA page_count').scalar()}"
        )
    with pytest.raises(StorageFull), storage.write() as tx:
        tx.files.insert(file(ours.id, report={"long": "x" * 100_000}))
    with storage.read() as tx:
        assert tx.projects.get(ours.id) == ours
    storage.close()
