"""Uploads, lists, reads and deletions on a real database and disk: what is refused leaves nothing behind."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.bad_rows import ASSISTANT, GOOD, USER, file
from tunewright.accounts.idempotency import IdempotencyKey, from_headers
from tunewright.accounts.records import Project
from tunewright.datasets import intake, uploads
from tunewright.datasets.records import PURPOSES, File
from tunewright.datasets.report import Patch, Problem, Report
from tunewright.datasets.service import DatasetService, RowsRefused
from tunewright.datasets.uploads import file_label
from tunewright.errors import (
    Conflict,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    StorageFull,
    TooLarge,
    TunewrightError,
    Unavailable,
)
from tunewright.jobs.records import Job
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Blobs, Storage

PROJECT = "proj-a"
BAD = file(GOOD, {"messages": [USER, {**ASSISTANT, "role": "human"}]}, {"messages": []})


class Shop:
    """A service on a home of its own."""

    def __init__(self, root: Path, **changes: object) -> None:
        settings = Settings.model_validate({"home": root, "min_free_disk_bytes": 0, **changes})
        self.home = HomeFolder(root)
        self.home.create()
        self.storage = Storage(f"sqlite:///{self.home.database}")
        self.storage.migrate()
        self.blobs = Blobs(f"file://{self.home.blobs}")
        self.service = DatasetService(self.storage, self.blobs, self.home, settings)
        with self.storage.write() as tx:
            for number, project in (("1234567890", PROJECT), ("1234567891", "proj-b")):
                tx.projects.insert(Project(id=project, number=number, name=project, created_at=1))

    def upload(
        self, data: bytes = file(GOOD), name: str = "a.jsonl", purpose: str = "fine-tune", **more: object
    ) -> File:
        upload = self.service.begin_upload(PROJECT)
        for start in range(0, len(data), 1000):
            upload.write(data[start : start + 1000])
        return upload.finish(name, purpose, **more)  # type: ignore[arg-type]

    def files_on_disk(self) -> list[str]:
        """Everything under the home but the database."""
        return sorted(
            str(p.relative_to(self.home.root))
            for p in self.home.root.rglob("*")
            if p.is_file() and not p.name.startswith("tunewright.db")
        )

    def records(self) -> list[str]:
        return [f.id for f in self.service.list(PROJECT, limit=100)[0]]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path / "home")
    yield made
    made.storage.close()


def key(text: str | None = "k", *, retry: bool = False, key_id: str = "key-1") -> IdempotencyKey:
    return from_headers(
        idempotency_key=text, retry_count="1" if retry else None, key_id=key_id, route="POST /files", body=b""
    )


def test_a_good_file_is_kept_with_hash_kind_rows_and_report(shop: Shop) -> None:
    data = file(GOOD, {"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    kept = shop.upload(data, "/tmp/x\\train.jsonl")
    assert (kept.filename, kept.kind, kept.rows, kept.status) == ("train.jsonl", "chat", 2, "processed")
    assert (kept.sha256, kept.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert kept.report["counts"] == {"few_rows": 1}
    assert shop.service.get(PROJECT, kept.id) == kept
    found, chunks = shop.service.content(PROJECT, kept.id)
    assert (found, b"".join(chunks)) == (kept, data)
    assert shop.files_on_disk() == [f"blobs/files/{PROJECT}/{kept.id}"]


@pytest.mark.parametrize(
    ("data", "name", "purpose", "code"),
    [
        (BAD, "a.jsonl", "fine-tune", "invalid_role"),
        (b"", "a.jsonl", "fine-tune", "file_empty"),
        (b"PAR1", "a.jsonl", "fine-tune", "unsupported_format"),
        (file(GOOD), "a.jsonl", "evil", "invalid_purpose"),
        (file(GOOD), "a.jsonl", "", "invalid_purpose"),
        (file(GOOD), "a.jsonl", "x" * 10_000, "invalid_purpose"),
        (file(GOOD), "", "fine-tune", "invalid_filename"),
        (file(GOOD), "a\nb", "fine-tune", "invalid_filename"),
        (b"{}\n[1]\n", "a.jsonl", "batch", "line_not_object"),
    ],
)
def test_a_refused_upload_leaves_no_trace(shop: Shop, data: bytes, name: str, purpose: str, code: str) -> None:
    shop.upload()
    before = shop.files_on_disk(), shop.records()
    with pytest.raises(InvalidRequest) as caught:
        shop.upload(data, name, purpose, idempotency=key())
    assert caught.value.code == code
    assert len(caught.value.text()) < 300
    assert (shop.files_on_disk(), shop.records()) == before
    assert shop.upload(idempotency=key()).rows == 1, "a failed create burns no key"


def test_a_refusal_names_the_first_problem_and_how_many_there_are(shop: Shop) -> None:
    with pytest.raises(RowsRefused) as caught:
        shop.upload(BAD * 30)
    error = caught.value
    assert error.text() == (
        'line 2, messages[1].role is "human"; allowed: system, user, assistant, tool. Did you mean "user"?'
        "; the file has 60 errors in all"
    )
    assert error.text("zh").endswith("；文件中共有 60 处错误")
    assert (error.values["line"], error.values["pointer"], error.values["total"]) == (2, "/messages/1/role", 60)
    counts = error.values["counts"]
    assert isinstance(counts, dict) and counts["invalid_role"] == counts["messages_empty"] == 30
    problems = error.values["problems"]
    assert isinstance(problems, list) and len(problems) == 20
    assert json.dumps(problems)
    with pytest.raises(RowsRefused) as alone:
        shop.upload(file(GOOD) + b"[]\n")
    assert "in all" not in alone.value.text()


def test_every_purpose_is_taken(shop: Shop) -> None:
    assert [shop.upload(purpose=purpose).purpose for purpose in PURPOSES] == list(PURPOSES)
    batch = shop.upload(b'{"custom_id": "1"}\n', purpose="batch")
    assert (batch.kind, batch.rows) == (None, None)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("../../etc/x", "x"),
        ("C:\\x\\训练 数据.jsonl", "训练 数据.jsonl"),
        ("con", "con"),
        ("%2e%2e%2fx", "%2e%2e%2fx"),
        ("😀.jsonl", "😀.jsonl"),
        ("x" * 255, "x" * 255),
    ],
)
def test_file_names_are_labels(name: str, label: str) -> None:
    assert file_label(name) == label


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/", "\\", " ", "a\0", "a\nb", "x" * 256, "汉" * 86, "a\u202egnp.exe", "a\x7f", "\x1b[2J"]
)
def test_unusable_file_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        file_label(name)
    assert caught.value.code == "invalid_filename"
    assert caught.value.text().isprintable()


def test_the_limit_holds_at_the_byte_that_crosses_it(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "home", max_file_bytes=1000)
    upload = shop.service.begin_upload(PROJECT)
    upload.write(b"x" * 1000)
    with pytest.raises(TooLarge) as caught:
        upload.write(b"x")
    assert (caught.value.code, caught.value.values["limit"]) == ("file_too_large", 1000)
    upload.abort()
    upload.abort()
    assert shop.files_on_disk() == []
    shop.storage.close()


def test_a_disk_below_the_floor_takes_no_upload(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "home", min_free_disk_bytes=2**62)
    with pytest.raises(StorageFull) as caught:
        shop.service.begin_upload(PROJECT)
    assert caught.value.code == "insufficient_storage"
    with pytest.raises(StorageFull):
        shop.service.check_room(0)
    assert shop.files_on_disk() == []
    shop.storage.close()


def test_the_floor_is_watched_during_an_upload(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = shop.service.begin_upload(PROJECT)

    def full(folder: Path, floor_bytes: int) -> None:
        raise StorageFull("insufficient_storage", "full")

    upload.write(b"x")
    monkeypatch.setattr(uploads, "check_room", full)
    with pytest.raises(StorageFull):
        upload.write(b"x" * 16 * 2**20)
    upload.abort()
    assert shop.files_on_disk() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_answer(shop: Shop) -> None:
    upload = shop.service.begin_upload(PROJECT)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, upload._raw.fileno())
    os.close(full)
    with pytest.raises(StorageFull):
        upload.write(b"x" * 2**20)
    upload.abort()
    assert shop.files_on_disk() == []


def test_two_uploads_with_one_key_make_one_file(shop: Shop) -> None:
    first = shop.upload(idempotency=key())
    assert shop.upload(idempotency=key()) == first
    assert shop.upload(idempotency=key("other")).id != first.id
    with pytest.raises(IdempotencyMismatch):
        shop.upload(file(GOOD, GOOD), idempotency=key())
    with pytest.raises(IdempotencyMismatch):
        shop.upload(name="b.jsonl", idempotency=key())
    assert len(shop.records()) == 2
    assert len(shop.files_on_disk()) == 2
    shop.service.delete(PROJECT, first.id)
    with pytest.raises(NotFound):
        shop.upload(idempotency=key())


def test_a_retry_without_a_key_finds_the_first_try(shop: Shop) -> None:
    first = shop.upload(idempotency=key(None))
    assert shop.upload(idempotency=key(None, retry=True)) == first
    assert shop.upload(idempotency=key(None)).id != first.id, "not marked as a retry"
    assert shop.upload(idempotency=key(None, retry=True, key_id="key-2")).id != first.id


def test_twenty_at_once_with_one_key_make_one_file(shop: Shop) -> None:
    made: list[str] = []
    together = threading.Barrier(20)

    def run() -> None:
        together.wait()
        made.append(shop.upload(idempotency=key()).id)

    threads = [threading.Thread(target=run) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 20
    assert len(set(made)) == len(shop.records()) == len(shop.files_on_disk()) == 1


def test_deleted_files_are_gone_with_their_bytes(shop: Shop) -> None:
    kept = shop.upload()
    assert shop.service.delete(PROJECT, kept.id) == kept
    assert shop.files_on_disk() == []
    for ask in (shop.service.get, shop.service.delete, shop.service.content):
        with pytest.raises(NotFound) as caught:
            ask(PROJECT, kept.id)
        assert caught.value.code == "file_not_found"


@pytest.mark.parametrize("file_id", ["", "file-../x", "../../master.key", "x" * 10**6, "a\0b", "汉"])
def test_odd_ids_are_not_found(shop: Shop, file_id: str) -> None:
    for ask in (shop.service.get, shop.service.delete, shop.service.content):
        with pytest.raises(NotFound) as caught:
            ask(PROJECT, file_id)
        assert len(caught.value.text()) < 100


def test_another_project_sees_and_removes_nothing(shop: Shop) -> None:
    kept = shop.upload()
    for ask in (shop.service.get, shop.service.delete, shop.service.content):
        with pytest.raises(NotFound):
            ask("proj-b", kept.id)
    assert shop.service.list("proj-b", limit=10) == ([], False)
    assert shop.records() == [kept.id]


def test_a_file_in_use_is_not_deleted(shop: Shop) -> None:
    kept = shop.upload()
    job = Job(
        id="ftjob-1", project_id=PROJECT, base_code="m", model="m", tuned_model_id="t", tuned_model_name="n",
        training_file=kept.id, created_at=1,
    )  # fmt: skip
    with shop.storage.write() as tx:
        tx.jobs.insert(job)
    with pytest.raises(Conflict) as caught:
        shop.service.delete(PROJECT, kept.id)
    assert caught.value.code == "file_in_use"
    assert "ftjob-1" in caught.value.text()
    assert shop.service.get(PROJECT, kept.id) == kept
    assert shop.files_on_disk() == [f"blobs/files/{PROJECT}/{kept.id}"]


def test_lists_are_pages_that_follow_each_other(shop: Shop) -> None:
    ids = [shop.upload(purpose="batch" if i % 2 else "fine-tune").id for i in range(5)]
    page, more = shop.service.list(PROJECT, limit=2, ascending=True)
    assert ([f.id for f in page], more) == (sorted(ids)[:2], True)
    page, more = shop.service.list(PROJECT, limit=3, ascending=True, after=page[-1].id)
    assert ([f.id for f in page], more) == (sorted(ids)[2:], False)
    assert len(shop.service.list(PROJECT, purpose="batch", limit=10)[0]) == 2
    assert shop.records() == sorted(ids, reverse=True)


def test_sweep_removes_what_a_crash_left(shop: Shop) -> None:
    kept = shop.upload()
    lost = shop.service.begin_upload(PROJECT)
    lost.write(b"x")
    lost._stream.close()
    orphan = shop.home.temporary / "orphan"
    orphan.write_bytes(b"bytes without a record")
    shop.blobs.put_file(f"files/{PROJECT}/file-1", orphan)
    for file_id in ("file-1", kept.id):
        note = {"project_id": PROJECT, "file_id": file_id}
        (shop.home.temporary / f"claim-{file_id}.json").write_text(json.dumps(note))
    (shop.home.temporary / "claim-torn.json").write_bytes(b"")
    (shop.home.temporary / ".claim-file-2.json.17.tmp").write_bytes(b"{")
    shop.service.sweep()
    assert shop.files_on_disk() == [f"blobs/files/{PROJECT}/{kept.id}"]


def test_a_database_that_fails_takes_the_bytes_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EIO, "broken")

    upload = shop.service.begin_upload(PROJECT)
    upload.write(file(GOOD))
    monkeypatch.setattr(shop.storage, "write", refuse)
    with pytest.raises(OSError, match="broken"):
        upload.finish("a.jsonl", "fine-tune")
    assert shop.files_on_disk() == []


def test_errors_cross_process_borders(shop: Shop) -> None:
    import pickle

    with pytest.raises(TunewrightError) as caught:
        shop.upload(BAD)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # own bytes
    assert isinstance(again, RowsRefused)
    assert again.text("zh") == caught.value.text("zh")


MANY_BAD = file(*[{"messages": [USER, {**ASSISTANT, "role": "human"}]}] * 150)


def test_wrong_rows_are_kept_when_asked_to_with_every_problem(shop: Shop) -> None:
    few = shop.upload(BAD, on_problems="keep")
    assert (few.status, few.kind, few.rows, few.report["bad_rows"]) == ("error", "chat", 3, 2)
    assert shop.files_on_disk() == [f"blobs/files/{PROJECT}/{few.id}"], "the record has room for all"
    many = shop.upload(MANY_BAD, on_problems="keep")
    assert f"blobs/reports/{PROJECT}/{many.id}.jsonl" in shop.files_on_disk()
    for kept in (few, many):
        found = list(shop.service.contents.problems(shop.service.get(PROJECT, kept.id)))
        assert len(found) == kept.report["errors"] + kept.report["warnings"]
    assert len(many.report["problems"]) == 100
    shop.service.delete(PROJECT, many.id)
    shop.service.delete(PROJECT, few.id)
    assert shop.files_on_disk() == []


@pytest.mark.parametrize("data", [b"", b"PAR1", b"\n\n"])
def test_what_no_mend_of_rows_helps_is_refused_even_then(shop: Shop, data: bytes) -> None:
    with pytest.raises(RowsRefused):
        shop.upload(data, on_problems="keep")
    assert (shop.files_on_disk(), shop.records()) == ([], [])


def test_a_fault_of_the_file_that_has_a_mend_is_kept(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Problem(code="not_jsonl", severity="error", message="x", patch=Patch(rewrite="one_row_per_line"))
    other = Problem(code="too_few_examples", severity="error", message="x")
    problems = [whole]
    monkeypatch.setattr(
        intake,
        "check_in_child",
        lambda *args, **kwargs: Report(errors=len(problems), file_errors=len(problems), problems=problems),
    )
    with pytest.raises(RowsRefused):
        shop.upload()
    assert shop.upload(on_problems="keep").status == "error"
    problems.append(other)
    with pytest.raises(RowsRefused):
        shop.upload(on_problems="keep")


def test_keeping_is_another_request_than_refusing(shop: Shop) -> None:
    kept = shop.upload(idempotency=key(), on_problems="keep")
    assert shop.upload(idempotency=key(), on_problems="keep") == kept
    for parent_id, on_problems in ((None, "refuse"), (kept.id, "keep")):
        with pytest.raises(IdempotencyMismatch):
            shop.upload(idempotency=key(), parent_id=parent_id, on_problems=on_problems)


def test_a_new_version_names_its_parent(shop: Shop) -> None:
    first = shop.upload()
    second = shop.upload(file(GOOD, GOOD), parent_id=first.id)
    assert (second.parent_id, second.version, second.origin) == (first.id, 2, {"made_by": "upload"})
    batch = shop.upload(b"{}\n", purpose="batch")
    for parent_id in ("file-x", batch.id):
        with pytest.raises(NotFound) as caught:
            shop.upload(parent_id=parent_id)
        assert caught.value.param == "parent_id"


def test_sweep_removes_the_reports_of_files_that_never_were(shop: Shop) -> None:
    kept = shop.upload(MANY_BAD, on_problems="keep")
    before = shop.files_on_disk()
    for number, file_id in enumerate(("file-1", kept.id)):
        note = {"project_id": PROJECT, "file_id": file_id}
        (shop.home.temporary / f"claim-{file_id}.json").write_text(json.dumps(note))
        if number == 0:
            orphan = shop.home.temporary / "orphan"
            orphan.write_bytes(b"problems without a record")
            shop.blobs.put_file(f"reports/{PROJECT}/{file_id}.jsonl", orphan)
    (shop.home.temporary / ".upload-x.part.17.tmp").write_bytes(b"{")
    shop.service.sweep()
    assert shop.files_on_disk() == before


@pytest.mark.parametrize("fault", ["database", "child", "watch"])
def test_a_kept_file_that_fails_on_its_way_leaves_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ChildProcessError if fault == "child" else OSError(errno.EIO, "broken")

    def watched(*_args: object, progress: Callable[[int, int], None], **_kwargs: object) -> None:
        progress(1, 2)

    upload = shop.service.begin_upload(PROJECT)
    upload.write(MANY_BAD)
    if fault == "database":
        monkeypatch.setattr(shop.storage, "write", broken)
    else:
        monkeypatch.setattr(intake, "check_in_child", broken if fault == "child" else watched)
    with pytest.raises(Unavailable if fault == "child" else OSError):
        upload.finish("a.jsonl", "fine-tune", on_problems="keep", watch=broken)
    assert shop.files_on_disk() == []
