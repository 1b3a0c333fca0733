"""Files in parts on a real database and disk: whole or absent, whatever comes in between."""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bad_rows import GOOD, file
from tunewright.accounts.idempotency import from_headers
from tunewright.accounts.records import Project
from tunewright.datasets import parted_uploads, uploads
from tunewright.datasets.parted_uploads import PartedUploads, UploadState
from tunewright.datasets.records import UploadPart
from tunewright.datasets.service import DatasetService
from tunewright.datasets.upload_parts import PartOnItsWay
from tunewright.errors import (
    Conflict,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    RateLimited,
    StorageFull,
    TooLarge,
    TunewrightError,
)
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Blobs, Storage

PROJECT, OTHER = "proj-a", "proj-b"
DATA = file(*[GOOD] * 20)


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Dock:
    """A service on a home of its own; `again()` is the same after a crash."""

    def __init__(self, root: Path, **changes: object) -> None:
        self.settings = Settings.model_validate({"home": root, "min_free_disk_bytes": 0, **changes})
        self.home = HomeFolder(root)
        self.home.create()
        self.storage = Storage(f"sqlite:///{self.home.database}")
        self.storage.migrate()
        with self.storage.write() as tx:
            for number, project in (("1234567890", PROJECT), ("1234567891", OTHER)):
                if tx.projects.get(project) is None:
                    tx.projects.insert(Project(id=project, number=number, name=project, created_at=1))
        self.files = DatasetService(self.storage, Blobs(f"file://{self.home.blobs}"), self.home, self.settings)
        self.service = PartedUploads(self.storage, self.files, self.home, self.settings)

    def create(self, size: int = len(DATA), project: str = PROJECT, **changes: Any) -> str:
        fields = {"filename": "a.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl", **changes}
        return self.service.create(project, size_bytes=size, **fields).upload.id

    def send(self, upload_id: str, data: bytes, *sha256: str) -> UploadPart:
        part = self.service.begin_part(PROJECT, upload_id)
        try:
            part.write(data)
        except Killed:
            part._raw.close()  # as the system does for the dead
            raise
        except BaseException:
            part.abort()
            raise
        return part.finish(*sha256)

    def send_all(self, upload_id: str, data: bytes = DATA, size: int = 700) -> list[str]:
        return [self.send(upload_id, data[at : at + size]).id for at in range(0, len(data), size)]

    def complete(self, upload_id: str, part_ids: list[str], md5: str | None = None) -> UploadState:
        return self.service.complete(PROJECT, upload_id, part_ids, md5)

    def on_disk(self) -> list[str]:
        """Everything under the home but the database."""
        return sorted(
            path.relative_to(self.home.root).as_posix()
            for path in self.home.root.rglob("*")
            if path.is_file() and not path.name.startswith("tunewright.db")
        )

    def left_beside(self, file_id: str) -> list[str]:
        """What is on the disk that is not that file's."""
        return [path for path in self.on_disk() if not (path.startswith("blobs/") and file_id in path)]

    def file_ids(self) -> list[str]:
        return [each.id for each in self.files.list(PROJECT, limit=100)[0]]


@pytest.fixture
def dock(tmp_path: Path) -> Iterator[Dock]:
    made = Dock(tmp_path / "home", max_part_bytes=2000, max_file_bytes=1000, max_upload_parts=12, max_open_uploads=3)
    yield made
    made.storage.close()


def refused(kind: type[TunewrightError], code: str, function: Any, *args: Any) -> TunewrightError:
    with pytest.raises(kind) as caught:
        function(*args)
    assert caught.value.code == code
    return caught.value


def test_parts_become_one_file_in_the_order_of_the_completion(dock: Dock) -> None:
    upload_id = dock.create()
    state = dock.service.get(PROJECT, upload_id)
    assert (state.upload.status, state.parts, state.received_bytes, state.file) == ("pending", 0, 0, None)
    assert state.upload.expires_at - state.upload.created_at == 24 * 3600
    half = len(DATA) // 2
    last = dock.send(upload_id, DATA[half:])
    first = dock.send(upload_id, DATA[:half])
    assert first.sha256 == hashlib.sha256(DATA[:half]).hexdigest()
    state = dock.service.get(PROJECT, upload_id)
    assert (state.parts, state.received_bytes) == (2, len(DATA))
    assert dock.service.parts(PROJECT, upload_id, after=None, limit=1) == ([last], True)
    assert dock.service.parts(PROJECT, upload_id, after=last.id, limit=1) == ([first], False)
    assert dock.file_ids() == [], "nothing is visible before the completion"

    done = dock.complete(upload_id, [first.id, last.id], hashlib.md5(DATA).hexdigest().upper())
    assert done.file is not None
    assert (done.upload.status, done.received_bytes, done.parts) == ("completed", len(DATA), 0)
    assert (done.file.rows, done.file.size_bytes, done.file.filename) == (20, len(DATA), "a.jsonl")
    assert done.file.sha256 == hashlib.sha256(DATA).hexdigest(), "larger than the limit of one request"
    assert b"".join(dock.files.content(PROJECT, done.file.id)[1]) == DATA
    assert dock.left_beside(done.file.id) == []


def test_a_completion_can_be_repeated_but_not_changed(dock: Dock) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    first = dock.complete(upload_id, ids)
    assert dock.complete(upload_id, ids) == first
    refused(InvalidRequest, "invalid_parts", dock.complete, upload_id, ids[::-1])
    assert len(dock.file_ids()) == 1
    refused(Conflict, "upload_not_pending", dock.send, upload_id, b"x")
    refused(Conflict, "upload_not_pending", dock.service.cancel, PROJECT, upload_id)
    assert first.file is not None
    dock.files.delete(PROJECT, first.file.id)
    assert dock.complete(upload_id, ids).file is None, "the file is gone and does not come back"


def test_a_part_sent_twice_is_two_parts(dock: Dock) -> None:
    row = file(GOOD)
    upload_id = dock.create(2 * len(row))
    one, two = dock.send(upload_id, row), dock.send(upload_id, row)
    assert one.id != two.id and one.sha256 == two.sha256
    done = dock.complete(upload_id, [one.id, two.id])
    assert done.file is not None and done.file.rows == 2


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("empty", "invalid_parts"),
        ("twice", "invalid_parts"),
        ("foreign", "invalid_parts"),
        ("unknown", "invalid_parts"),
        ("odd", "invalid_parts"),
        ("too few", "size_mismatch"),
        ("too many", "size_mismatch"),
        ("md5", "checksum_mismatch"),
        ("no md5", "invalid_value"),
    ],
)
def test_f13_a_refused_completion_leaves_the_parts(dock: Dock, name: str, code: str) -> None:
    upload_id, other = dock.create(), dock.create()
    ids = dock.send_all(upload_id)
    extra = dock.send(upload_id, b"x").id
    foreign = dock.send(other, DATA[:700]).id
    before = dock.on_disk()
    asked, md5 = {
        "empty": ([], None),
        "twice": ([ids[0], *ids], None),
        "foreign": ([foreign, *ids[1:]], None),
        "unknown": (["part-x", *ids[1:]], None),
        "odd": (["../../x\x00" * 50, *ids[1:]], None),
        "too few": (ids[1:], None),
        "too many": ([*ids, extra], None),
        "md5": (ids, "0" * 32),
        "no md5": (ids, "x" * 32),
    }[name]
    error = refused(InvalidRequest, code, dock.complete, upload_id, asked, md5)
    assert error.text("zh") and len(error.text()) < 300
    assert (dock.on_disk(), dock.file_ids()) == (before, [])
    assert dock.complete(upload_id, ids).file is not None


def test_wrong_rows_are_refused_or_kept_as_asked(dock: Dock) -> None:
    bad = file(GOOD, {"messages": []}) * 10
    upload_id = dock.create(len(bad))
    ids = dock.send_all(upload_id, bad)
    with pytest.raises(InvalidRequest) as caught:
        dock.complete(upload_id, ids)
    assert "problems" in caught.value.values
    assert dock.file_ids() == []
    assert dock.service.get(PROJECT, upload_id).parts == len(ids), "its sender decides what to do"
    keeping = dock.create(len(bad), on_problems="keep")
    kept = dock.complete(keeping, dock.send_all(keeping, bad)).file
    assert kept is not None and kept.status == "error"


def test_f12_a_wrong_part_leaves_nothing(dock: Dock) -> None:
    upload_id = dock.create()
    good = hashlib.sha256(b"x").hexdigest()
    before = dock.on_disk()
    refused(InvalidRequest, "checksum_mismatch", dock.send, upload_id, b"y", good)
    refused(InvalidRequest, "checksum_mismatch", dock.send, upload_id, b"x", good, "0" * 64)
    refused(InvalidRequest, "invalid_value", dock.send, upload_id, b"x", "sha")
    refused(InvalidRequest, "empty_part", dock.send, upload_id, b"")
    refused(TooLarge, "part_too_large", dock.send, upload_id, b"x" * 2001)
    refused(NotFound, "upload_not_found", dock.service.begin_part, OTHER, upload_id)
    assert (dock.on_disk(), dock.service.get(PROJECT, upload_id).parts) == (before, 0)
    assert dock.send(upload_id, b"x", good.upper()).size_bytes == 1
    dock.service.cancel(PROJECT, upload_id)  # none of the refused ones is still "arriving"


def test_f14_an_upload_ends_only_while_no_part_arrives(dock: Dock) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    part = dock.service.begin_part(PROJECT, upload_id)
    part.write(b"x")
    assert refused(Conflict, "part_in_progress", dock.complete, upload_id, ids).retryable
    refused(Conflict, "part_in_progress", dock.service.cancel, PROJECT, upload_id)
    part.abort()
    part.abort()
    assert dock.complete(upload_id, ids).file is not None


def test_nobody_comes_in_while_an_upload_is_completed(dock: Dock, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    seen: list[TunewrightError] = []
    read = PartedUploads._read

    def while_reading(self: PartedUploads, part: UploadPart) -> Iterator[bytes]:
        seen.append(refused(Conflict, "upload_busy", dock.send, upload_id, b"x"))
        seen.append(refused(Conflict, "upload_busy", dock.complete, upload_id, ids))
        seen.append(refused(Conflict, "upload_busy", dock.service.cancel, PROJECT, upload_id))
        yield from read(self, part)

    monkeypatch.setattr(PartedUploads, "_read", while_reading)
    assert dock.complete(upload_id, ids).file is not None
    assert len(seen) == 3 * len(ids) and all(error.retryable for error in seen)


def test_a_completion_says_how_far_it_is(dock: Dock, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    seen: list[float | None] = []
    write = uploads.Upload.write

    def writing(self: uploads.Upload, data: bytes) -> None:
        seen.append(dock.service.get(PROJECT, upload_id).completing)
        write(self, data)

    def finishing(self: uploads.Upload, *args: Any, watch: Any, **rest: Any) -> Any:
        seen.append(dock.service.get(PROJECT, upload_id).completing)
        watch(3, 4)  # the check of a small file says nothing on its way
        seen.append(dock.service.get(PROJECT, upload_id).completing)
        return finish(self, *args, watch=watch, **rest)

    finish = uploads.Upload.finish
    monkeypatch.setattr(uploads.Upload, "write", writing)
    monkeypatch.setattr(uploads.Upload, "finish", finishing)
    done = dock.complete(upload_id, ids)
    first, *numbers = seen
    assert first is None and None not in numbers and len(numbers) == len(ids) + 1
    assert numbers == sorted(numbers) and numbers[-2:] == [0.5, 0.875]  # type: ignore[type-var]
    assert done.completing is None


def test_parts_may_arrive_together(dock: Dock) -> None:
    upload_id = dock.create()
    size = -(-len(DATA) // 8)
    made: dict[int, str] = {}

    def send(number: int) -> None:
        made[number] = dock.send(upload_id, DATA[number * size : (number + 1) * size]).id

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = dock.complete(upload_id, [made[number] for number in range(8)])
    assert done.file is not None and done.file.sha256 == hashlib.sha256(DATA).hexdigest()


def test_f15_limits(dock: Dock) -> None:
    uploads_made = [dock.create() for _ in range(3)]
    refused(RateLimited, "too_many_uploads", dock.create)
    assert dock.create(project=OTHER), "each project has its own"
    dock.service.cancel(PROJECT, uploads_made[0])
    upload_id = dock.create()
    for _ in range(12):
        dock.send(upload_id, b"x")
    refused(InvalidRequest, "too_many_parts", dock.send, upload_id, b"x")
    small = uploads_made[1]
    with dock.storage.write() as tx:
        upload = tx.uploads.get(PROJECT, small)
        assert upload is not None
        tx.uploads.change(upload, size_bytes=10)
    dock.send(small, b"x" * 1900)
    refused(InvalidRequest, "size_mismatch", dock.send, small, b"x" * 121)
    assert dock.service.get(PROJECT, small).received_bytes == 1900


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"filename": ""}, "invalid_filename"),
        ({"filename": "a\u202eb"}, "invalid_filename"),
        ({"purpose": "evil"}, "invalid_purpose"),
        ({"size": 2**35}, "file_too_large"),
        ({"mime_type": ""}, "invalid_value"),
        ({"mime_type": "a\nb"}, "invalid_value"),
        ({"mime_type": "a" * 256}, "invalid_value"),
        ({"on_problems": "maybe"}, "invalid_value"),
    ],
)
def test_a_refused_create_leaves_nothing(dock: Dock, changes: dict[str, Any], code: str) -> None:
    refused(TunewrightError, code, lambda: dock.create(**changes))
    with dock.storage.read() as tx:
        assert tx.uploads.count_pending(PROJECT) == 0


def test_a_create_that_is_sent_twice_happens_once(dock: Dock) -> None:
    def idempotency(body: bytes) -> Any:
        route = "POST /v1/uploads"
        return from_headers(idempotency_key="k", retry_count=None, key_id="key-1", route=route, body=body)

    one = dock.create(idempotency=idempotency(b"1"))
    assert dock.create(idempotency=idempotency(b"1")) == one
    refused(IdempotencyMismatch, "idempotency_key_reused", lambda: dock.create(idempotency=idempotency(b"2")))


def test_no_room_is_told_before_anything_is_taken(dock: Dock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    before = dock.on_disk()
    free = len(DATA) - 1
    real = uploads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(uploads.shutil, "disk_usage", lambda _: real._replace(free=free))
    refused(StorageFull, "insufficient_storage", dock.create)
    refused(StorageFull, "insufficient_storage", dock.complete, upload_id, ids)
    assert dock.on_disk() == before
    free = -1
    refused(StorageFull, "insufficient_storage", dock.send, upload_id, b"x")
    free = 2**40
    assert dock.complete(upload_id, ids).file is not None, "the parts waited for room"


def test_cancel_drops_everything_and_can_be_repeated(dock: Dock) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    for _ in range(2):
        state = dock.service.cancel(PROJECT, upload_id)
        assert (state.upload.status, state.parts) == ("cancelled", 0)
    refused(Conflict, "upload_not_pending", dock.complete, upload_id, ids)
    refused(Conflict, "upload_not_pending", dock.send, upload_id, b"x")
    assert dock.on_disk() == []


def test_an_upload_expires(dock: Dock, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    busy = dock.create()
    arriving = dock.service.begin_part(PROJECT, busy)
    arriving.write(b"x")
    later = parted_uploads.wall_s() + 24 * 3600
    monkeypatch.setattr(parted_uploads, "wall_s", lambda: later)
    assert dock.service.get(PROJECT, upload_id).upload.status == "expired"
    refused(InvalidRequest, "upload_expired", dock.send, upload_id, b"x")
    refused(InvalidRequest, "upload_expired", dock.complete, upload_id, ids)
    refused(InvalidRequest, "upload_expired", dock.service.cancel, PROJECT, upload_id)
    dock.create()  # sweeps
    assert not (dock.home.uploads / PROJECT / upload_id).exists()
    state = dock.service.get(PROJECT, upload_id)
    assert (state.upload.status, state.parts) == ("expired", 0)
    refused(InvalidRequest, "upload_expired", arriving.finish)
    dock.create()
    assert dock.on_disk() == []
    monkeypatch.setattr(parted_uploads, "wall_s", lambda: later + 8 * 24 * 3600)
    dock.service.sweep()
    refused(NotFound, "upload_not_found", dock.service.get, PROJECT, upload_id)


def test_a_part_that_rots_on_the_disk_is_noticed(dock: Dock) -> None:
    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    folder = dock.home.uploads / PROJECT / upload_id
    sound = (folder / ids[1]).read_bytes()
    (folder / ids[1]).write_bytes(sound[:-1] + b"!")
    assert refused(InvalidRequest, "checksum_mismatch", dock.complete, upload_id, ids).values["part"] == ids[1]
    (folder / ids[1]).unlink()
    refused(InvalidRequest, "checksum_mismatch", dock.complete, upload_id, ids)
    again = dock.send(upload_id, sound).id
    assert dock.complete(upload_id, [ids[0], again, *ids[2:]]).file is not None


def die_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, after: bool) -> None:
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("point", ["write", "fsync_file", "replace", "add_part"])
def test_a_kill_in_a_part_costs_that_part_only(
    dock: Dock, monkeypatch: pytest.MonkeyPatch, point: str, after: bool
) -> None:
    from tunewright.storage.uploads import Uploads

    upload_id = dock.create()
    ids = dock.send_all(upload_id, DATA[:1400])
    before = dock.on_disk()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # the dead clean up nothing
        owner = {"write": PartOnItsWay, "add_part": Uploads, "replace": os}.get(point, parted_uploads)
        die_at(patch, owner, point, after=after)
        with pytest.raises(Killed):
            dock.send(upload_id, DATA[1400:2100])
    dock.storage.close()
    again = Dock(dock.home.root, max_part_bytes=2000)
    again.files.sweep()
    again.service.sweep()
    assert again.on_disk() == before
    rest = again.send_all(upload_id, DATA[1400:])
    done = again.complete(upload_id, [*ids, *rest])
    assert done.file is not None and done.file.sha256 == hashlib.sha256(DATA).hexdigest()
    assert again.left_beside(done.file.id) == []
    again.storage.close()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("point", ["write", "put_file", "change", "drop_parts", "rmtree"])
def test_a_kill_in_a_completion_leaves_file_and_end_or_neither(
    dock: Dock, monkeypatch: pytest.MonkeyPatch, point: str, after: bool
) -> None:
    from tunewright.storage.uploads import Uploads

    upload_id = dock.create()
    ids = dock.send_all(upload_id)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(Blobs, "delete", lambda *_: None)
        owner = {"write": uploads.Upload, "put_file": Blobs, "rmtree": parted_uploads.shutil}.get(point, Uploads)
        die_at(patch, owner, point, after=after)
        with pytest.raises(Killed):
            dock.complete(upload_id, ids)
    dock.storage.close()
    again = Dock(dock.home.root, max_part_bytes=2000)
    again.files.sweep()
    again.service.sweep()
    assert len(again.file_ids()) == (1 if point == "rmtree" else 0)
    done = again.complete(upload_id, ids)
    assert done.file is not None
    assert again.file_ids() == [done.file.id]
    assert again.left_beside(done.file.id) == []
    again.storage.close()
