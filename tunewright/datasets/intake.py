"""How a file comes in, whoever made it: checked, its bytes stored, then its report, then the record that makes it visible."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tunewright.accounts.idempotency import find_earlier, remember
from tunewright.clock import wall_s
from tunewright.datasets.blob_keys import content_key, report_key
from tunewright.datasets.checking.check import check_in_child
from tunewright.datasets.images.image_service import PROGRESS, ImageService, Prepared
from tunewright.datasets.problem_list import BLOB_BYTES, sort_by_line
from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.datasets.report import Problem, Report
from tunewright.datasets.uploads import PART_PREFIX, Watch
from tunewright.errors import InvalidRequest, NotFound, Unavailable, quote
from tunewright.files_on_disk import sha256_of, write_atomically
from tunewright.i18n import mark, translate
from tunewright.ids import new_id, random_text
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.accounts.idempotency import IdempotencyKey
    from tunewright.storage import Blobs, Storage, Transaction

SHOWN_PROBLEMS = 20
MANY_BYTES = 64 * 2**20
"""A larger file is worth all cores."""
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


class Arrival(NamedTuple):
    """A checked file before anybody can see it. `problems` holds all of them, a line each, if the record has no room."""

    file: File
    data: Path
    problems: Path | None
    images: Prepared


class Intake:
    """The way in. Every method blocks."""

    def __init__(
        self, storage: "Storage", blobs: "Blobs", home: HomeFolder, settings: Settings, images: ImageService
    ) -> None:
        self._images = images
        self._storage = storage
        self._blobs = blobs
        self._home = home
        self._settings = settings

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path for a private file, which is gone at the end of the block, and at the next start if the process dies."""
        path = self._home.temporary / f"{PART_PREFIX}{random_text(20)}.part"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The same, a folder: for work by other processes, which may be killed beside half-written files."""
        with self.temporary() as path:
            path.mkdir(mode=0o700)
            try:
                yield path
            finally:
                shutil.rmtree(path)

    def check(self, data: Path, purpose: str, problems: Path, watch: Watch | None = None) -> Report:
        """The report on the rows of `data`; all that is wrong is written to `problems`. Raises Unavailable(`check_failed`)."""
        processes = (os.cpu_count() or 1) if data.stat().st_size > MANY_BYTES else 1
        try:
            return check_in_child(
                data, purpose, self._settings, problems_to=problems, processes=processes, progress=watch
            )
        except ChildProcessError:
            raise Unavailable("check_failed", mark("The file could not be checked now; send it again.")) from None

    def arrival(
        self,
        data: Path,
        problems: Path,
        report: Report,
        *,
        project_id: str,
        label: str,
        purpose: str,
        keep_problems: bool,
        sha256: str = "",
        parent: File | None = None,
        origin: dict[str, Any] | None = None,
    ) -> Arrival:
        """What is to be stored of a checked file; `sha256` is that of `data`, if known. Raises RowsRefused for a file
        with errors unless `keep_problems`, and for one that no mend of single rows helps."""
        if not report.ok and not (keep_problems and _mendable(report)):
            raise refusal(report)
        images = self._images.prepare(data, report, problems)
        if not report.ok and not (keep_problems and _mendable(report)):
            images.discard()
            raise refusal(report)
        plain = msgspec.to_builtins(report)
        statistics = plain.pop("statistics")
        if images.pending:
            plain[PROGRESS] = {"done": 0, "total": images.total}
        inline = len(report.problems) == report.errors + report.warnings or not problems.exists()
        plain[BLOB_BYTES] = 0 if inline else sort_by_line(problems)
        file = File(
            id=new_id("file"),
            project_id=project_id,
            filename=label,
            purpose=purpose,
            size_bytes=data.stat().st_size,
            sha256=sha256 or sha256_of(data),
            created_at=wall_s(),
            status="processing" if images.pending else "processed" if report.ok else "error",
            kind=report.kind,
            rows=report.rows if purpose in FINE_TUNE_PURPOSES else None,
            report=plain,
            statistics=statistics,
            parent_id=parent and parent.id,
            version=parent.version + 1 if parent else 1,
            origin=origin or {},
        )
        return Arrival(file, data, None if inline else problems, images)

    def made(self, project_id: str, data: Path, label: str, purpose: str) -> Arrival:
        """A file of the product's own, which nobody needs to check."""
        file = File(
            id=new_id("file"),
            project_id=project_id,
            filename=label,
            purpose=purpose,
            size_bytes=data.stat().st_size,
            sha256=sha256_of(data),
            created_at=wall_s(),
        )
        return Arrival(file, data, None, Prepared())

    def store(
        self,
        arrivals: Sequence[Arrival],
        route: str,
        idempotency: "IdempotencyKey | None",
        also: "Callable[[Transaction, File], None] | None" = None,
    ) -> File:
        """Make all visible at once; the first of them, or of an earlier try of the same request.

        Bytes first, records second: a record always has its bytes. The claims let `sweep` find bytes without a record.
        """
        project_id = arrivals[0].file.project_id
        claims = [Claim(self._home, project_id, arrival.file.id) for arrival in arrivals]
        kept = False
        try:
            for claim, arrival in zip(claims, arrivals, strict=True):
                claim.write()
                self._blobs.put_file(content_key(project_id, arrival.file.id), arrival.data)
                if arrival.problems is not None:
                    self._blobs.put_file(report_key(project_id, arrival.file.id), arrival.problems)
            images = self._images.storing([(arrival.file, arrival.images) for arrival in arrivals])
            with images as refer, self._storage.write() as tx:
                earlier = earlier_file(tx, project_id, route, idempotency)
                if earlier is None:
                    for arrival in arrivals:
                        tx.files.insert(arrival.file)
                        refer(tx, arrival.file)
                    if also is not None:
                        also(tx, arrivals[0].file)
                    if idempotency is not None:
                        remember(tx, project_id, route, idempotency, arrivals[0].file.id)
            kept = earlier is None
            return earlier or arrivals[0].file
        finally:
            for claim in claims:
                if not kept:
                    claim.remove(self._blobs)
                claim.drop()

    def earlier(self, project_id: str, route: str, idempotency: "IdempotencyKey | None") -> File | None:
        """As `earlier_file`, before any work is done."""
        if idempotency is None:
            return None
        with self._storage.read() as tx:
            return earlier_file(tx, project_id, route, idempotency)

    def sweep(self) -> None:
        """Remove what a crash left. Call it while no other server uses the home."""
        for pattern in (f"{PART_PREFIX}*", f".{PART_PREFIX}*", f".{_CLAIM_PREFIX}*.tmp"):
            for path in self._home.temporary.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        for claim in Claim.left_over(self._home):
            with self._storage.read() as tx:
                known = tx.files.get(claim.project_id, claim.file_id) is not None
            if not known:
                claim.remove(self._blobs)
            claim.drop()


class Claim:
    """A note on the disk: the blobs of this file may be there without a record in the database."""

    def __init__(self, home: HomeFolder, project_id: str, file_id: str) -> None:
        self.project_id = project_id
        self.file_id = file_id
        self._path = home.temporary / f"{_CLAIM_PREFIX}{file_id}.json"

    def write(self) -> None:
        """Durable once this returns."""
        write_atomically(self._path, msgspec.json.encode({"project_id": self.project_id, "file_id": self.file_id}))

    def remove(self, blobs: "Blobs") -> None:
        """Delete what the claim is about."""
        for key in (content_key(self.project_id, self.file_id), report_key(self.project_id, self.file_id)):
            blobs.delete(key)

    def drop(self) -> None:
        """Record and bytes agree again."""
        self._path.unlink(missing_ok=True)

    @classmethod
    def left_over(cls, home: HomeFolder) -> list["Claim"]:
        """The claims of a process that died."""
        found = []
        for path in home.temporary.glob(f"{_CLAIM_PREFIX}*.json"):
            try:
                note = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
                found.append(cls(home, note["project_id"], note["file_id"]))
            except (msgspec.DecodeError, KeyError):
                path.unlink(missing_ok=True)  # not one of ours: they are written in one step
        return found


def earlier_file(tx: "Transaction", project_id: str, route: str, idempotency: "IdempotencyKey | None") -> File | None:
    """The file that an earlier try of the same request made. Raises NotFound if it was deleted since."""
    file_id = find_earlier(tx, project_id, route, idempotency) if idempotency else None
    if file_id is None:
        return None
    file = tx.files.get(project_id, file_id)
    if file is None:
        raise not_found(file_id)
    return file


def not_found(file_id: str, param: str = "file_id") -> NotFound:
    """The error for a file that is not there, or not the caller's."""
    return NotFound("file_not_found", mark("There is no file {file}."), param=param, file=quote(file_id))


def refusal(report: Report) -> RowsRefused:
    """The error for a file with errors."""
    errors: list[Problem] = [problem for problem in report.problems if problem.severity == "error"]
    first = errors[0]
    values: dict[str, Any] = {
        **first.values,
        "pointer": first.pointer,
        "total": report.errors,
        "counts": report.counts,
        "problems": msgspec.to_builtins(errors[:SHOWN_PROBLEMS]),
    }
    return RowsRefused(first.code, first.message, param="file", **values)


def _mendable(report: Report) -> bool:
    """Whether all that is wrong with the file as a whole has a patch; what is wrong with single rows may stay."""
    rewrites = [
        problem
        for problem in report.problems
        if problem.severity == "error" and problem.line is None and problem.patch and problem.patch.rewrite
    ]
    return len(rewrites) == report.file_errors
