"""The same suite runs on SQLite and, where its programs are installed, on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.rows import project
from tunewright.accounts.records import Project
from tunewright.storage import Storage


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


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
