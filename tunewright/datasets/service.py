"""What callers may do with files: upload, list, read, delete."""

import builtins
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.accounts.idempotency import find_earlier, remember
from tunewright.clock import wall_s
from tunewright.datasets.check import check
from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.datasets.report import Problem, Report
from tunewright.datasets.uploads import PART_PREFIX, Upload, check_room
from tunewright.errors import Conflict, InvalidRequest, NotFound, quote
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark, translate
from tunewright.ids import new_id
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.accounts.idempotency import IdempotencyKey
    from tunewright.storage import Blobs, Storage, Transaction

ROUTE = "POST /files"
SHOWN_PROBLEMS = 20
_CLAIM_PREFIX = "claim-"


class RowsRefused(InvalidRequest):
    """A data file with errors. The sentence is the first problem's, and how many more there are.

    `code` is the first problem's; `values` hold its places and `pointer`, `total` (errors in all), `counts` (of every code) and
    `problems` (the first 20, as `datasets.report.Problem` has them).
    """

    def text(self, language: str = "en") -> str:
        """The sentence in 'en' or 'zh'."""
        sentence = super().text(language)
        total = self.values.get("total")
        if isinstance(total, int) and total > 1:
            sentence += translate(mark("; the file has {total} errors in all"), language, total=total)
        return sentence


class DatasetService:
    """Files of all projects. Every method blocks."""

    def __init__(self, storage: "Storage", blobs: "Blobs", home: HomeFolder, settings: Settings) -> None:
        self._storage = storage
        self._blobs = blobs
        self._home = home
        self._settings = settings

    def begin_upload(self, project_id: str) -> Upload:
        """An upload to write to. Raises StorageFull(`insufficient_storage`)."""
        return Upload(project_id, self._home.temporary, self._settings, self._keep)

    def get(self, project_id: str, file_id: str) -> File:
        """One file. Raises NotFound(`file_not_found`)."""
        with self._storage.read() as tx:
            file = tx.files.get(project_id, file_id)
        if file is None:
            raise _not_found(file_id)
        return file

    def list(
        self,
        project_id: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        ascending: bool = False,
    ) -> tuple[builtins.list[File], bool]:
        """A page, newest first unless `ascending`, and whether more follow. Raises InvalidRequest(`invalid_cursor`)."""
        with self._storage.read() as tx:
            found = tx.files.list(project_id, purpose=purpose, after=after, limit=limit + 1, ascending=ascending)
        return found[:limit], len(found) > limit

    def delete(self, project_id: str, file_id: str) -> File:
        """Remove a file; the answer is what it was. Raises NotFound(`file_not_found`), Conflict(`file_in_use`)."""
        claim = _Claim(self._home, project_id, file_id)
        with self._storage.write() as tx:
            file = tx.files.get(project_id, file_id)
            if file is None:
                raise _not_found(file_id)
            jobs = tx.jobs.using_file(project_id, file_id)
            if jobs:
                raise Conflict(
                    "file_in_use",
                    mark("The file {file} is used by the unfinished job {job}; cancel the job or wait for its end."),
                    param="file_id",
                    file=file_id,
                    job=jobs[0],
                )
            claim.write()
            tx.files.delete(project_id, file_id)
        self._blobs.delete(claim.blob_key)
        claim.drop()
        return file

    def content(self, project_id: str, file_id: str) -> tuple[File, Iterator[bytes]]:
        """The file and its bytes. Raises NotFound(`file_not_found`, `blob_missing`)."""
        file = self.get(project_id, file_id)
        return file, self._blobs.read(_blob_key(project_id, file_id))

    def check_room(self, size_bytes: int) -> None:
        """Raises StorageFull(`insufficient_storage`) unless `size_bytes` fit above the floor of free disk."""
        check_room(self._home.temporary, self._settings.min_free_disk_bytes + size_bytes)

    def sweep(self) -> None:
        """Remove what uploads and deletions left that a crash cut short. Call it while no other server uses the home."""
        for pattern in (f"{PART_PREFIX}*.part", f".{_CLAIM_PREFIX}*.tmp"):
            for path in self._home.temporary.glob(pattern):
                path.unlink(missing_ok=True)
        for claim in _Claim.left_over(self._home):
            with self._storage.read() as tx:
                known = tx.files.get(claim.project_id, claim.file_id) is not None
            if not known:
                self._blobs.delete(claim.blob_key)
            claim.drop()

    def _keep(self, upload: Upload, label: str, purpose: str, idempotency: "IdempotencyKey | None") -> File:
        """Turn a whole upload into a file: check, store the bytes, then the record."""
        project_id = upload.project_id
        if idempotency is not None:
            idempotency = idempotency.with_content(label, purpose, upload.sha256)
            with self._storage.read() as tx:
                earlier = _earlier(tx, project_id, idempotency)
            if earlier is not None:
                return earlier
        report = check(upload.path, purpose, self._settings)
        if not report.ok:
            raise _refusal(report)
        file = File(
            id=new_id("file"),
            project_id=project_id,
            filename=label,
            purpose=purpose,
            size_bytes=upload.size_bytes,
            sha256=upload.sha256,
            created_at=wall_s(),
            kind=report.kind,
            rows=report.rows if purpose in FINE_TUNE_PURPOSES else None,
            report=msgspec.to_builtins(report),
        )
        return self._store(upload, file, idempotency)

    def _store(self, upload: Upload, file: File, idempotency: "IdempotencyKey | None") -> File:
        """Bytes first, record second: a record always has its bytes. The claim lets `sweep` find bytes without a record."""
        claim = _Claim(self._home, file.project_id, file.id)
        claim.write()
        kept = False
        try:
            self._blobs.put_file(claim.blob_key, upload.path)
            with self._storage.write() as tx:
                earlier = _earlier(tx, file.project_id, idempotency) if idempotency is not None else None
                if earlier is None:
                    tx.files.insert(file)
                    if idempotency is not None:
                        remember(tx, file.project_id, ROUTE, idempotency, file.id)
            kept = earlier is None
            return earlier or file
        finally:
            if not kept:
                self._blobs.delete(claim.blob_key)
            claim.drop()


class _Claim:
    """A note on the disk: the blob of this file may be there without a record in the database."""

    def __init__(self, home: HomeFolder, project_id: str, file_id: str) -> None:
        self.project_id = project_id
        self.file_id = file_id
        self.blob_key = _blob_key(project_id, file_id)
        self._path = home.temporary / f"{_CLAIM_PREFIX}{file_id}.json"

    def write(self) -> None:
        """Durable once this returns."""
        write_atomically(self._path, msgspec.json.encode({"project_id": self.project_id, "file_id": self.file_id}))

    def drop(self) -> None:
        """Record and bytes agree again."""
        self._path.unlink(missing_ok=True)

    @classmethod
    def left_over(cls, home: HomeFolder) -> builtins.list["_Claim"]:
        """The claims of a process that died."""
        found = []
        for path in home.temporary.glob(f"{_CLAIM_PREFIX}*.json"):
            try:
                note = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
                found.append(cls(home, note["project_id"], note["file_id"]))
            except (msgspec.DecodeError, KeyError):
                path.unlink(missing_ok=True)  # not one of ours: they are written in one step
        return found


def _blob_key(project_id: str, file_id: str) -> str:
    return f"files/{project_id}/{file_id}"


def _earlier(tx: "Transaction", project_id: str, idempotency: "IdempotencyKey") -> File | None:
    """The file that an earlier try of the same request made. Raises NotFound if it was deleted since."""
    file_id = find_earlier(tx, project_id, ROUTE, idempotency)
    if file_id is None:
        return None
    file = tx.files.get(project_id, file_id)
    if file is None:
        raise _not_found(file_id)
    return file


def _not_found(file_id: str) -> NotFound:
    return NotFound("file_not_found", mark("There is no file {file}."), param="file_id", file=quote(file_id))


def _refusal(report: Report) -> RowsRefused:
    errors: builtins.list[Problem] = [problem for problem in report.problems if problem.severity == "error"]
    first = errors[0]
    values: dict[str, Any] = {
        **first.values,
        "pointer": first.pointer,
        "total": report.errors,
        "counts": report.counts,
        "problems": msgspec.to_builtins(errors[:SHOWN_PROBLEMS]),
    }
    return RowsRefused(first.code, first.message, param="file", **values)
