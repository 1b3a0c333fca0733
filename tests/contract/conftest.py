"""The same suite runs on SQLite and, where its programs are installed, on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.contract.postgres_cluster import NoPostgres, postgres_cluster
from tests.contract.rows import project
from tunewright.accounts.records import Project
from tunewright.storage import Storage


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a database in a real server; skips where there is none."""
    try:
        with postgres_cluster() as url:
            yield url
    except NoPostgres as reason:
        pytest.skip(str(reason))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """A fresh schema: as good as a database, and made in a tenth of the time."""
    import psycopg
    from psycopg import sql

    name = f"test_{uuid4().hex}"
    with psycopg.connect(postgres.replace("postgresql+psycopg:", "postgresql:"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    return f"{postgres}&options=-csearch_path%3D{name}"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def storage(url: str) -> Iterator[Storage]:
    storage = Storage(url)
    storage.migrate()
    yield storage
    storage.close()


@pytest.fixture
def ours(storage: Storage) -> Project:
    return _stored(storage, project("1"))


@pytest.fixture
def theirs(storage: Storage) -> Project:
    return _stored(storage, project("2"))


def _stored(storage: Storage, record: Project) -> Project:
    with storage.write() as tx:
        tx.projects.insert(record)
    return record
