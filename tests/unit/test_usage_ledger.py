"""The ledger stores what happens, in time, and holds nobody up."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract.rows import NOON, project, usage
from tunewright.accounts.usage import MOST_OPEN, UsageLedger, UsageRow
from tunewright.errors import StorageFull
from tunewright.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    storage = Storage(f"sqlite:///{tmp_path / 'x.db'}")
    storage.migrate()
    with storage.write() as tx:
        tx.projects.insert(PROJECT)
    yield storage
    storage.close()


PROJECT = project("1")
END = {"status": "ok", "completion_tokens": 9}


@contextmanager
def running(storage: Any, server: str = "server-1") -> Iterator[UsageLedger]:
    ledger = UsageLedger(storage, server, 400)
    ledger.start()
    yield ledger
    ledger.stop()


def row(**changes: Any) -> UsageRow:
    return usage(PROJECT.id, **{"completion_tokens": 0, "created_at": int(time.time()), **changes})


def rows(storage: Storage) -> dict[str, UsageRow]:
    with storage.read() as tx:
        return {each.id: each for each in tx.usage.list(PROJECT.id, status=None, model=None, after=None, limit=99)}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_row_is_stored_before_its_first_token_and_follows_the_answer(storage: Storage) -> None:
    with running(storage) as ledger:
        begun = row()
        opened = ledger.begin(begun)
        opened.begun.result(10)
        assert rows(storage) == {begun.id: begun}
        opened.delivered = 5
        until(lambda: rows(storage)[begun.id].completion_tokens == 5)
        ledger.end(opened, msgspec.structs.replace(begun, **END))
        until(lambda: rows(storage)[begun.id].status == "ok")
    assert rows(storage)[begun.id].completion_tokens == 9


def test_what_ends_as_the_server_stops_is_stored(storage: Storage) -> None:
    with running(storage) as ledger:
        for _ in range(50):
            begun = row()
            ledger.end(ledger.begin(begun), msgspec.structs.replace(begun, **END))
    assert [each.status for each in rows(storage).values()] == ["ok"] * 50


def test_the_next_start_ends_what_was_running_on_this_server_only(storage: Storage) -> None:
    mine, others = row(completion_tokens=3), row(server="server-2")
    with storage.write() as tx:
        tx.usage.insert([mine, others])
    with running(storage):
        found = rows(storage)
    assert (found[mine.id].status, found[mine.id].completion_tokens) == ("interrupted", 3)
    assert found[others.id].status == "running"


class FullDisk:
    """A storage that takes writes only while told so."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.full = threading.Event()

    @contextmanager
    def write(self) -> Iterator[Any]:
        if self.full.is_set():
            raise StorageFull("storage_full", "full")
        with self._storage.write() as tx:
            yield tx


def test_a_full_disk_holds_nobody_up_and_loses_nothing(storage: Storage) -> None:
    full = FullDisk(storage)
    with running(full) as ledger:
        full.full.set()
        begun = row()
        opened = ledger.begin(begun)
        opened.begun.result(10)
        ledger.end(opened, msgspec.structs.replace(begun, **END))
        assert rows(storage) == {}
        full.full.clear()
        until(lambda: bool(rows(storage)))
    assert rows(storage)[begun.id].status == "ok"
    assert ledger.lost == 0


def test_rows_without_end_are_not_kept_in_memory(storage: Storage) -> None:
    full = FullDisk(storage)
    with running(full) as ledger:
        full.full.set()
        for _ in range(MOST_OPEN + 7):
            ledger.begin(row())
        assert ledger.lost == 7
        ledger._open.clear()


def test_old_rows_go(storage: Storage) -> None:
    old, new = row(created_at=int(time.time()) - 500 * 24 * 3600, status="ok"), row(status="ok")
    with storage.write() as tx:
        tx.usage.insert([old, new])
    with running(storage) as ledger:
        ledger.begin(row()).begun.result(10)
        until(lambda: old.id not in rows(storage))
        assert new.id in rows(storage)


def test_sums_are_those_of_the_rows(storage: Storage) -> None:
    day = NOON - NOON % 86400
    made = [
        row(created_at=day, model="a", key_id="k1", prompt_tokens=5, completion_tokens=2, status="ok"),
        row(created_at=day + 86399, model="a", key_id="k2", prompt_tokens=7, completion_tokens=1, status="interrupted"),
        row(created_at=day + 86400, model="b", key_id="k1", prompt_tokens=1, completion_tokens=1, status="error"),
    ]
    with storage.write() as tx:
        tx.usage.insert(made)

    def sums(*by: str, **limits: int) -> list[tuple[Any, ...]]:
        with storage.read() as tx:
            wanted = {"since": 0, "until": 2**40, "skip": 0, "limit": 9} | limits
            found = tx.usage.sums(PROJECT.id, by=frozenset(by), **wanted)
        return [(s.day, s.model, s.key_id, s.requests, s.prompt_tokens, s.completion_tokens) for s in found]

    assert sums("day") == [(day + 86400, None, None, 1, 1, 1), (day, None, None, 2, 12, 3)]
    assert sums("model") == [(None, "a", None, 2, 12, 3), (None, "b", None, 1, 1, 1)]
    assert sums("day", "model", "key_id", skip=1, limit=1) == [(day, "a", "k1", 1, 5, 2)]
    assert sums(since=day + 1, until=day + 86400) == [(None, None, None, 1, 7, 1)]
    assert sums(since=1, until=2) == []
