"""kill -9 of a writing process: what it was told is stored is there, and the file is sound."""

import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from tests.contract.rows import project
from tunewright.storage import Storage

ROUNDS = 10

WRITER = """
import sys
from tunewright.storage import Storage
from tests.contract.rows import job, metrics

storage = Storage(sys.argv[1])
storage.migrate()
print("ready", flush=True)
while True:
    of = job(sys.argv[2], metadata={"long": "x" * 3000})
    with storage.write() as tx:
        tx.jobs.insert(of)
        tx.jobs.add_events([metrics(of, step) for step in range(5)])
    print(of.id, flush=True)
"""


def test_no_acknowledged_row_is_lost(sqlite_url: str, tmp_path: Path) -> None:
    storage = Storage(sqlite_url)
    storage.migrate()
    ours = project("1")
    with storage.write() as tx:
        tx.projects.insert(ours)
    storage.close()
    chance = random.Random(7)
    acknowledged: list[str] = []
    rounds = 0
    while rounds < ROUNDS or len(acknowledged) < ROUNDS:  # a slow disk may take long for one
        rounds += 1
        acknowledged += killed_writer(sqlite_url, ours.id, chance.uniform(0.01, 0.3))
        plain = sqlite3.connect(tmp_path / "test.db")
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        plain.close()

    storage = Storage(sqlite_url)
    storage.migrate()
    stored: list[str] = []
    with storage.read() as tx:
        while page := tx.jobs.list(ours.id, after=stored[-1] if stored else None, limit=100):
            for of in page:
                events = tx.jobs.events_since(ours.id, of.id, after_id=None, limit=100)
                assert [event.sequence for event in events] == [1, 2, 3, 4, 5], "a unit is whole or absent"
            stored += [of.id for of in page]
    storage.close()
    assert set(acknowledged) <= set(stored)
    assert len(stored) - len(acknowledged) <= rounds, "at most one unit a round may be stored without word of it"


def killed_writer(url: str, project_id: str, after_s: float) -> list[str]:
    """Ids that a writer said were stored before it was killed."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, url, project_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(after_s)
        writer.kill()
        said = writer.stdout.read()
    return said[: said.rfind("\n") + 1].split()  # a line without its end was not said
