"""Migrations, and databases that are not ours, newer or broken."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from tests.contract.rows import project
from tunewright.errors import Misconfigured
from tunewright.storage import Storage, schema
from tunewright.storage.tables import metadata


def test_migrations_make_the_tables_of_this_release(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    storage = Storage(url)
    storage.migrate()
    storage.close()
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_the_history_is_that_of_the_files() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    revisions = ScriptDirectory.from_config(config).walk_revisions()
    assert tuple(revision.revision for revision in reversed(list(revisions))) == schema.HISTORY


def test_migrating_again_changes_nothing(storage: Storage, url: str) -> None:
    ours = project("1")
    with storage.write() as tx:
        tx.projects.insert(ours)
    storage.migrate()
    again = Storage(url)
    again.migrate()
    with again.read() as tx:
        assert tx.projects.all() == [ours]
    again.close()


def test_two_first_starts_at_once(url: str) -> None:
    stores = [Storage(url) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Storage.migrate, stores))
    with stores[0].write() as tx:
        tx.projects.insert(project("1"))
    for store in stores:
        store.close()


def test_a_migration_that_fails_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = schema.upgrade

    def breaks(connection: sa.Connection) -> None:
        whole(connection)
        raise RuntimeError

    storage = Storage(url)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(schema, "upgrade", breaks)
        storage.migrate()
    engine = sa.create_engine(url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    storage.migrate()
    storage.probe()
    storage.close()


def refused(url: str) -> Misconfigured:
    storage = Storage(url)
    with pytest.raises(Misconfigured) as caught:
        storage.migrate()
    storage.close()
    return caught.value


def execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_a_newer_database_is_refused(storage: Storage, url: str) -> None:
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    error = refused(url)
    assert error.code == "database_newer"
    assert "9999" in str(error)


def test_tables_of_another_program_are_refused(url: str) -> None:
    execute(url, "CREATE TABLE projects (id INTEGER)")
    assert refused(url).code == "database_foreign"


@pytest.mark.parametrize("content", [b"no database" * 1000, bytes(4096), b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_database_is_refused_and_kept(sqlite_url: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "test.db").write_bytes(content)
    assert refused(sqlite_url).code == "database_corrupt"
    assert (tmp_path / "test.db").read_bytes() == content


def test_a_damaged_page_is_noticed_at_start(sqlite_url: str, tmp_path: Path) -> None:
    storage = Storage(sqlite_url)
    storage.migrate()
    with storage.write() as tx:
        for number in range(200):
            tx.projects.insert(msgspec.structs.replace(project("1"), number=str(number)))
    storage.close()
    path = tmp_path / "test.db"
    plain = sqlite3.connect(path)
    page = plain.execute("SELECT rootpage FROM sqlite_master WHERE name = 'projects'").fetchone()[0]
    size = plain.execute("PRAGMA page_size").fetchone()[0]
    plain.close()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = b"\xa5" * size
    path.write_bytes(content)
    assert refused(sqlite_url).code == "database_corrupt"
    assert path.read_bytes() == content


def test_a_cut_file_is_noticed_at_start(sqlite_url: str, tmp_path: Path) -> None:
    storage = Storage(sqlite_url)
    storage.migrate()
    storage.close()
    path = tmp_path / "test.db"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(sqlite_url).code == "database_corrupt"


def test_alembic_is_imported_only_when_there_is_work(sqlite_url: str) -> None:
    Storage(sqlite_url).migrate()
    script = (
        "import sys; from tunewright.storage import Storage; s = Storage(sys.argv[1]); s.migrate(); s.close(); "
        "sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, sqlite_url], check=False).returncode == 0
