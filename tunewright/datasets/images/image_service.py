"""Images of datasets, from the arrival of a file to its deletion.

A few images that stand in their rows are decoded while their file comes in. Everything else is done by a loop: the file is
`processing` until each image was fetched, decoded and stored under its hash (`images/{project}/{sha256}`), and a manifest
says which one stands where. What is done is noted in a journal beside the uploads, so a server that was killed goes on where
it was and asks no host twice.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.datasets.blob_keys import image_key, manifest_key
from tunewright.datasets.images.image_decoder import Decoder
from tunewright.datasets.images.image_findings import Findings, appending
from tunewright.datasets.images.image_pass import PROGRESS, FileDeleted, ImagePass, image_lines, part_of
from tunewright.datasets.images.image_records import Outcome
from tunewright.datasets.images.image_references import (
    IMAGE_KINDS,
    PART_PREFIX,
    ImageStatistics,
    Obtainer,
    Stopped,
    complain,
    read_references,
)
from tunewright.datasets.records import File
from tunewright.datasets.report import Report
from tunewright.egress import Egress
from tunewright.errors import TunewrightError
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.ids import random_text
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.storage import Blobs, Storage, Transaction

__all__ = ["PROGRESS", "ImageService", "Prepared"]

log = structlog.get_logger()

AT_ONCE = 20
"""So many images, all of them in their rows, are decoded during the upload; the answer is final."""
_LANES = 2
_PAUSE_S = 2.0
_MAX_TRIES = 5
_LONGEST_BACK_OFF_S = 60.0
_NOTE_PREFIX = "images-gone-"

Refer = Callable[["Transaction", File], None]


class Prepared:
    """The images of a file that is coming in. `total` > 0 and `pending`: the loop has to do them. Else they are decoded, and
    wait in `staged` (hash -> file) for their place."""

    def __init__(self, total: int = 0, *, pending: bool = False) -> None:
        self.total = total
        self.pending = pending
        self.staged: dict[str, Path] = {}
        self.manifest: Path | None = None

    def discard(self) -> None:
        """Remove what was not stored. No error if all was."""
        for path in (*self.staged.values(), *([self.manifest] if self.manifest else [])):
            path.unlink(missing_ok=True)


class ImageService:
    """`start()` runs the loop in threads of its own; tests may call `run_once()` instead. Every method blocks."""

    def __init__(
        self, storage: "Storage", blobs: "Blobs", home: HomeFolder, settings: Settings, egress: Egress | None = None
    ) -> None:
        self._storage = storage
        self._blobs = blobs
        self._folder = home.temporary
        self._settings = settings
        allowed = egress or Egress(settings.remote_media_hosts)
        self._egress = None if settings.remote_media == "off" else allowed
        self.blobs_lock: AbstractContextManager[object] = threading.RLock()
        """Held while an image is stored and referred to, and while one without references is deleted. Reentrant. Servers that
        share the store need one that they share too."""
        self.acts: Callable[[], bool] = lambda: True
        """Whether this server's loop is the one that acts, where there may be several."""
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._busy: dict[str, str] = {}
        """File -> project, of the passes under way; one for each project."""
        self._troubles: dict[str, tuple[int, float]] = {}
        self._thread: threading.Thread | None = None

    # --- on arrival

    def prepare(self, data: Path, report: Report, problems: Path | None = None) -> Prepared:
        """Look at the images of the rows in `data`, whose check said `report`.

        What is wrong is added to `report` and to the list in `problems`. Raises Unavailable(`image_decoder_failed`).
        """
        if report.kind not in IMAGE_KINDS or report.file_errors:
            return Prepared()
        with appending(problems) as stream:
            findings = Findings(stream)
            try:
                return self._look(data, report, findings)
            finally:
                findings.join(report)

    def _look(self, data: Path, report: Report, findings: Findings) -> Prepared:
        limit = self._settings.max_images_per_file
        counted = report.statistics.get("images")
        if self._egress is not None and isinstance(counted, int) and AT_ONCE < counted <= limit:
            return Prepared(counted, pending=True)  # a large file is not read once more for this
        total = remote = 0
        for reference in read_references(data, self._settings.max_line_bytes):
            total += 1
            if total > limit:
                findings.add(
                    "error", "too_many_images", mark("The rows of the file hold more than {limit} images."), limit=limit
                )
                return Prepared()
            if reference.remote:
                remote += 1
                if self._egress is None:
                    complain(findings.add, reference, Outcome(code="remote_media_not_allowed"))
        if total == 0 or (remote == total and self._egress is None):
            return Prepared()
        if total > AT_ONCE or (remote and self._egress is not None):
            return Prepared(total, pending=True)
        return self._decode_now(data, report, findings)

    def _decode_now(self, data: Path, report: Report, findings: Findings) -> Prepared:
        prepared = Prepared()
        try:
            with Decoder() as decoder:
                obtainer = Obtainer(self._folder, None, decoder, self._stopping)
                outcomes: dict[bytes, Outcome] = {}
                for reference in read_references(data, self._settings.max_line_bytes):
                    prepared.total += 1
                    if reference.key not in outcomes and not obtainer.refuses(reference):
                        outcome, path = obtainer.obtain(reference.url)
                        outcomes[reference.key] = outcome
                        if path is not None:
                            replaced = prepared.staged.pop(outcome.sha256, None)
                            if replaced is not None:
                                replaced.unlink()
                            prepared.staged[outcome.sha256] = path
            statistics = ImageStatistics()
            prepared.manifest = self._folder / f"{PART_PREFIX}{random_text(20)}.part"
            with prepared.manifest.open("wb") as stream:
                references = read_references(data, self._settings.max_line_bytes)
                stream.writelines(image_lines(references, outcomes, findings, statistics))
            report.statistics["image_files"] = statistics.result()
        except BaseException:
            prepared.discard()
            raise
        return prepared

    @contextmanager
    def storing(self, arrivals: Sequence[tuple[File, Prepared]]) -> Iterator[Refer]:
        """Put the decoded images where they belong; the block inserts the files and calls what it is given for each, in the
        same transaction. If it does not come to that, the images go again, also after a crash (`sweep`)."""
        kept: list[str] = []

        def refer(tx: "Transaction", file: File) -> None:
            for hashed in staged.get(file.id, ()):
                tx.images.add(file.project_id, file.id, hashed)
            kept.append(file.id)

        staged = {file.id: list(prepared.staged) for file, prepared in arrivals if prepared.manifest is not None}
        with self.blobs_lock:
            try:
                for file, prepared in arrivals:
                    if prepared.manifest is not None:
                        self._note(file, list(prepared.staged))
                        for hashed, path in prepared.staged.items():
                            self._blobs.put_file(image_key(file.project_id, hashed), path)
                        self._blobs.put_file(manifest_key(file.project_id, file.id), prepared.manifest)
                yield refer
            except BaseException:
                kept.clear()
                raise
            finally:
                for file, prepared in arrivals:
                    prepared.discard()
                    if file.id in kept:
                        self._note_of(file.id).unlink(missing_ok=True)
                    elif prepared.manifest is not None:
                        self.drop_unused(file.id)
        self.wake()

    # --- on deletion

    def forget(self, tx: "Transaction", file: File) -> None:
        """In the transaction that deletes `file`: its references go too. Call `drop_unused` after it."""
        if file.kind in IMAGE_KINDS:
            self._note(file, tx.images.remove(file.project_id, file.id))

    def drop_unused(self, file_id: str) -> None:
        """Delete the images of a file that is gone and that no other file of its project refers to."""
        note = self._note_of(file_id)
        try:
            project_id, hashes = msgspec.json.decode(note.read_bytes(), type=tuple[str, list[str]])
        except FileNotFoundError:
            return
        except msgspec.DecodeError:  # not one of ours: they are written in one step
            note.unlink()
            return
        with self.blobs_lock:
            with self._storage.read() as tx:
                known = tx.files.get(project_id, file_id) is not None
                unused = [hashed for hashed in hashes if not tx.images.used(project_id, hashed)]
            for hashed in unused:
                self._blobs.delete(image_key(project_id, hashed))
            if not known:
                self._blobs.delete(manifest_key(project_id, file_id))
        note.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a crash left. Call it while no other server uses the home."""
        for path in self._folder.glob(f"{_NOTE_PREFIX}*.json"):
            self.drop_unused(path.stem.removeprefix(_NOTE_PREFIX))
        with self._storage.read() as tx:
            waiting = {part_of(file.id) for file in tx.images.processing(10_000)}
        for pattern in (f"{PART_PREFIX}*", f".{PART_PREFIX}*"):
            for path in self._folder.glob(pattern):
                if path.name.split(".")[0] not in waiting:
                    path.unlink(missing_ok=True)

    def _note(self, file: File, hashes: list[str]) -> None:
        write_atomically(self._note_of(file.id), msgspec.json.encode((file.project_id, hashes)))

    def _note_of(self, file_id: str) -> Path:
        return self._folder / f"{_NOTE_PREFIX}{file_id}.json"

    # --- the loop

    def start(self) -> None:
        """Go on with what an earlier server left, then take files as they come."""
        self._thread = threading.Thread(target=self._run, name="images", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look now: there may be a new file."""
        self._woken.set()

    def stop(self) -> None:
        """End the loop; files under way stay `processing` and are gone on with at the next start. Safe to call twice."""
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(12.0)
            self._thread = None

    def run_once(self) -> None:
        """Do all files that wait, one after another."""
        with self._storage.read() as tx:
            files = tx.images.processing(100)
        for file in files:
            self._do(file)

    def _run(self) -> None:
        with ThreadPoolExecutor(_LANES, thread_name_prefix="images") as lanes:
            while not self._stopping.is_set():
                self._woken.clear()
                try:
                    self._fill(lanes)
                except TunewrightError as error:
                    log.warning("images_pass_failed", code=error.code)
                except Exception:
                    log.exception("images_pass_failed")
                self._woken.wait(_PAUSE_S)

    def _fill(self, lanes: ThreadPoolExecutor) -> None:
        if len(self._busy) >= _LANES:
            return
        with self._storage.read() as tx:
            files = tx.images.processing(1000)
        if not files or not self.acts():
            return
        for file in files:
            due_s = self._troubles.get(file.id, (0, 0.0))[1]
            if len(self._busy) < _LANES and file.project_id not in self._busy.values() and mono_s() >= due_s:
                self._busy[file.id] = file.project_id
                lanes.submit(self._do_lane, file)

    def _do_lane(self, file: File) -> None:
        try:
            self._do(file)
        finally:
            self._busy.pop(file.id, None)
            self.wake()

    def _do(self, file: File) -> None:
        """One pass over one file. Trouble (a full disk, a lost store, a bug) is tried again later."""
        try:
            with Decoder() as decoder:
                obtainer = Obtainer(self._folder, self._egress, decoder, self._stopping)
                one = ImagePass(self._storage, self._blobs, self._folder, self._settings, file)
                one.run(obtainer, self.blobs_lock, self._stopping)
            self._troubles.pop(file.id, None)
        except (FileDeleted, Stopped):
            self._troubles.pop(file.id, None)
        except Exception as error:
            tries = self._troubles.get(file.id, (0, 0.0))[0] + 1
            self._troubles[file.id] = (tries, mono_s() + min(_LONGEST_BACK_OFF_S, 2.0**tries))
            if isinstance(error, TunewrightError):
                log.warning("images_of_file_failed", file=file.id, code=error.code, tries=tries)
                return
            log.error("images_of_file_failed", file=file.id, tries=tries, exc_info=error)
            if tries >= _MAX_TRIES:
                ImagePass(self._storage, self._blobs, self._folder, self._settings, file).give_up()
