"""One pass over the images of one file: obtain and store each once, then say in the order of the rows what became of them."""

import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from tunewright.clock import mono_s
from tunewright.datasets.blob_keys import content_key, image_key, manifest_key, report_key
from tunewright.datasets.images.image_findings import Findings
from tunewright.datasets.images.image_records import Outcome, Placed
from tunewright.datasets.images.image_references import (
    PART_PREFIX,
    ImageStatistics,
    Obtainer,
    Reference,
    Stopped,
    complain,
    read_references,
)
from tunewright.datasets.presentation import report_of
from tunewright.datasets.problem_list import BLOB_BYTES, read_problems, sort_by_line
from tunewright.datasets.records import File
from tunewright.datasets.report import MAX_PROBLEMS, json_pointer
from tunewright.datasets.uploads import check_room
from tunewright.errors import NotFound
from tunewright.i18n import mark
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.storage import Blobs, Storage

PROGRESS = "images"
"""Where the record's report says how far the images are: `{"done": 3, "total": 5}`."""
_FETCHES = 4
_WINDOW = 2 * _FETCHES
_PROGRESS_EVERY_S = 2.0


class FileDeleted(Exception):
    """The file went while its images were processed."""


def part_of(file_id: str) -> str:
    """How the names of a pass's own files begin: `.journal`, `.problems`, `.jsonl` follow."""
    return f"{PART_PREFIX}{file_id}"


def image_lines(
    references: Iterable[Reference], outcomes: dict[bytes, Outcome], findings: Findings, statistics: ImageStatistics
) -> Iterator[bytes]:
    """The lines of the manifest (`Placed`); what failed or was changed is complained about on the way."""
    for reference in references:
        outcome = outcomes.get(reference.key)
        if outcome is None:  # not fetched for a reason that was reported when the file came in
            statistics.add(Outcome(code="remote_media_not_allowed"))
            continue
        statistics.add(outcome)
        complain(findings.add, reference, outcome)
        if outcome.code is None:
            placed = Placed(
                line=reference.line,
                pointer=json_pointer(reference.path),
                sha256=outcome.sha256,
                width=outcome.width,
                height=outcome.height,
                media_type=outcome.media_type,
                size_bytes=outcome.size_bytes,
                detail=reference.detail,
                source=reference.key.hex(),
                changed=outcome.changed,
            )
            yield msgspec.json.encode(placed) + b"\n"


class ImagePass:
    """Everything here may be cut off anywhere and done again."""

    def __init__(self, storage: "Storage", blobs: "Blobs", folder: Path, settings: Settings, file: File) -> None:
        self._storage = storage
        self._blobs = blobs
        self._folder = folder
        self._settings = settings
        self._file = file
        part = part_of(file.id)
        self._data = folder / f"{part}.jsonl"
        self._journal = folder / f"{part}.journal"
        self._problems = folder / f"{part}.problems"
        self._merged = folder / f"{part}.merged"
        self._manifest = folder / f"{part}.manifest"
        self._told_s = 0.0

    def run(self, obtainer: Obtainer, blobs_lock: AbstractContextManager[object], stopping: threading.Event) -> None:
        """Raises FileDeleted, Stopped, OSError, StorageFull, Unavailable; what is done until then need not be done again."""
        try:
            self._blobs.local_copy(content_key(self._file.project_id, self._file.id), self._data)
            outcomes = self._obtain_all(obtainer, blobs_lock, stopping)
            self._finish(outcomes)
        except FileDeleted:
            self._clean_up()
            raise
        self._clean_up()

    def give_up(self) -> None:
        """A bug of ours keeps the images from being processed: the file is in error and says so."""
        report = report_of(self._file)
        findings = Findings()
        findings.add(
            "error", "image_processing_failed", mark("The images of the file could not be processed; upload it again.")
        )
        findings.join(report)
        plain = {**msgspec.to_builtins(report), BLOB_BYTES: self._file.report.get(BLOB_BYTES, 0)}
        plain.pop("statistics", None)
        with self._storage.write() as tx:
            tx.images.change(self._file, status="error", report=plain)
        self._clean_up()

    # --- obtaining

    def _obtain_all(
        self, obtainer: Obtainer, blobs_lock: AbstractContextManager[object], stopping: threading.Event
    ) -> dict[bytes, Outcome]:
        outcomes, inherited = self._read_journal(), self._inherited()
        size = sum({outcome.sha256: outcome.size_bytes for outcome in outcomes.values()}.values())
        stored = {outcome.sha256 for outcome in outcomes.values()}
        doing: dict[Future[Outcome], tuple[bytes, int]] = {}

        def one(key: bytes, url: str) -> Outcome:
            if stopping.is_set():
                raise Stopped
            known = inherited.get(key)
            if known is not None and self._take_over(known, blobs_lock):
                return known
            return self._obtain_one(url, obtainer, blobs_lock)

        with self._journal.open("ab") as journal, ThreadPoolExecutor(_FETCHES, "fetch") as threads:

            def settle() -> int:
                grown = 0
                for future in wait(doing, return_when=FIRST_COMPLETED).done:
                    key, _ = doing.pop(future)
                    outcome = outcomes[key] = future.result()
                    journal.write(msgspec.json.encode((key.hex(), outcome)) + b"\n")
                    if outcome.sha256 not in stored:
                        stored.add(outcome.sha256)
                        grown += outcome.size_bytes
                journal.flush()
                self._tell(len(outcomes))
                return grown

            try:
                for reference in read_references(self._data, self._settings.max_line_bytes):
                    key = reference.key
                    if (
                        key in outcomes
                        or any(key == other for other, _ in doing.values())
                        or obtainer.refuses(reference)
                    ):
                        continue
                    while len(doing) >= _WINDOW:
                        size += settle()
                    if size > self._settings.max_image_bytes_per_file:
                        outcomes[key] = Outcome(code="too_many_image_bytes")
                    else:
                        doing[threads.submit(one, key, reference.url)] = (key, reference.line)
                while doing:
                    settle()
            except BaseException:
                for future in doing:
                    future.cancel()
                raise
        return outcomes

    def _obtain_one(self, url: str, obtainer: Obtainer, blobs_lock: AbstractContextManager[object]) -> Outcome:
        check_room(self._folder, self._settings.min_free_disk_bytes)
        outcome, path = obtainer.obtain(url)
        if path is None:
            return outcome
        project_id = self._file.project_id
        try:
            # Reference first: who deletes unused images looks and deletes under this lock, and will find it in use.
            with blobs_lock, self._storage.write() as tx:
                if not tx.images.add(project_id, self._file.id, outcome.sha256):
                    raise FileDeleted
            self._blobs.put_file(image_key(project_id, outcome.sha256), path)
            with blobs_lock, self._storage.read() as tx:
                if not tx.images.used(
                    project_id, outcome.sha256
                ):  # the file went before the image was there to be deleted
                    self._blobs.delete(image_key(project_id, outcome.sha256))
                    raise FileDeleted
        finally:
            path.unlink(missing_ok=True)
        return outcome

    def _inherited(self) -> dict[bytes, Outcome]:
        """What is known from the file that this one was made of, if it was: nothing is fetched twice for a repair or a split."""
        if self._file.parent_id is None:
            return {}
        known: dict[bytes, Outcome] = {}
        rest = b""
        try:
            for chunk in self._blobs.read(manifest_key(self._file.project_id, self._file.parent_id)):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    placed = msgspec.json.decode(line, type=Placed)
                    known[bytes.fromhex(placed.source)] = Outcome(
                        sha256=placed.sha256,
                        size_bytes=placed.size_bytes,
                        width=placed.width,
                        height=placed.height,
                        media_type=placed.media_type,
                        changed=placed.changed,
                    )
        except NotFound:
            pass  # it had no images, or is gone
        return known

    def _take_over(self, known: Outcome, blobs_lock: AbstractContextManager[object]) -> bool:
        """Refer to an image that is stored already; False if it has gone meanwhile."""
        with blobs_lock, self._storage.write() as tx:
            if not tx.images.used(self._file.project_id, known.sha256):
                return False
            if not tx.images.add(self._file.project_id, self._file.id, known.sha256):
                raise FileDeleted
        return True

    def _read_journal(self) -> dict[bytes, Outcome]:
        """What an earlier server did. Its last line may be torn."""
        outcomes: dict[bytes, Outcome] = {}
        try:
            with self._journal.open("rb+") as stream:
                whole = 0
                for line in stream:
                    try:
                        key, outcome = msgspec.json.decode(line, type=tuple[str, Outcome])
                    except msgspec.DecodeError:
                        break
                    outcomes[bytes.fromhex(key)] = outcome
                    whole += len(line)
                stream.truncate(whole)
        except FileNotFoundError:
            pass
        return outcomes

    def _tell(self, done: int) -> None:
        if mono_s() - self._told_s < _PROGRESS_EVERY_S:
            return
        self._told_s = mono_s()
        before = self._file.report.get(PROGRESS) or {}
        report = {**self._file.report, PROGRESS: {"done": done, "total": before.get("total", done)}}
        with self._storage.write() as tx:
            if not tx.images.change(self._file, report=report):
                raise FileDeleted

    # --- the end

    def _finish(self, outcomes: dict[bytes, Outcome]) -> None:
        file, statistics = self._file, ImageStatistics()
        self._copy_problems()
        shutil.copyfile(self._problems, self._merged)
        with self._merged.open("ab") as problems, self._manifest.open("wb") as manifest:
            findings = Findings(problems)
            references = read_references(self._data, self._settings.max_line_bytes)
            manifest.writelines(image_lines(references, outcomes, findings, statistics))
        report = report_of(file)
        findings.join(report)
        plain = msgspec.to_builtins(report)
        plain.pop("statistics", None)
        plain[BLOB_BYTES] = 0
        if report.errors + report.warnings > min(len(report.problems), MAX_PROBLEMS):
            plain[BLOB_BYTES] = sort_by_line(self._merged)
            self._blobs.put_file(report_key(file.project_id, file.id), self._merged)
        self._blobs.put_file(manifest_key(file.project_id, file.id), self._manifest)
        with self._storage.write() as tx:
            changed = tx.images.change(
                file,
                status="processed" if report.ok else "error",
                report=plain,
                statistics={**file.statistics, "image_files": statistics.result()},
            )
        if not changed:
            for key in (report_key(file.project_id, file.id), manifest_key(file.project_id, file.id)):
                self._blobs.delete(key)
            raise FileDeleted

    def _copy_problems(self) -> None:
        """The problems as the check found them. They are kept apart until the end, for the blob is replaced before the record."""
        if self._problems.exists():
            return
        with self._merged.open("wb") as stream:
            _write_problems(self._blobs, self._file, stream)
        self._merged.replace(self._problems)

    def _clean_up(self) -> None:
        for path in (self._data, self._journal, self._problems, self._merged, self._manifest):
            path.unlink(missing_ok=True)


def _write_problems(blobs: "Blobs", file: File, stream: BinaryIO) -> None:
    for problem in read_problems(blobs, file):
        stream.write(msgspec.json.encode(problem) + b"\n")
