"""What callers may do with files: upload, list, read, delete."""

import builtins
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.datasets.blob_keys import content_key
from tunewright.datasets.contents import Contents
from tunewright.datasets.images.image_service import ImageService
from tunewright.datasets.intake import Claim, Intake, RowsRefused, not_found
from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.datasets.uploads import Also, Terms, Upload, check_room
from tunewright.datasets.versions import Versions
from tunewright.egress import Egress
from tunewright.errors import Conflict
from tunewright.i18n import mark
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.storage import Blobs, Storage, Transaction

__all__ = ["DatasetService", "RowsRefused"]

ROUTE = "POST /files"
PUBLISH_ROUTE = ""
"""Nobody asks twice for what the product makes by itself."""


class DatasetService:
    """Files of all projects; a dataset is a file with a purpose to train for. Every method blocks.

    `contents` reads rows and problems, `versions` makes new datasets out of old ones.
    """

    def __init__(
        self, storage: "Storage", blobs: "Blobs", home: HomeFolder, settings: Settings, egress: Egress | None = None
    ) -> None:
        self._storage = storage
        self._blobs = blobs
        self._home = home
        self._settings = settings
        self.images = ImageService(storage, blobs, home, settings, egress)
        self._intake = Intake(storage, blobs, home, settings, self.images)
        self.on_delete: Callable[[File], None] = lambda file: None
        """Called with each deleted file after its bytes are gone."""
        self.contents = Contents(blobs, settings.max_line_bytes)
        self.versions = Versions(storage, blobs, self._intake, settings)

    def begin_upload(self, project_id: str, *, limit_bytes: int | None = None, also: Also | None = None) -> Upload:
        """An upload to write to; `limit_bytes` and `also` as `Upload` has them. Raises StorageFull(`insufficient_storage`)."""
        return Upload(project_id, self._home.temporary, self._settings, self._keep, limit_bytes=limit_bytes, also=also)

    def get(self, project_id: str, file_id: str) -> File:
        """One file. Raises NotFound(`file_not_found`)."""
        with self._storage.read() as tx:
            file = tx.files.get(project_id, file_id)
        if file is None:
            raise not_found(file_id)
        return file

    def dataset(self, project_id: str, file_id: str) -> File:
        """One dataset. Raises NotFound(`file_not_found`), also for a file that is none."""
        file = self.get(project_id, file_id)
        if file.purpose not in FINE_TUNE_PURPOSES:
            raise not_found(file_id)
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

    def datasets(
        self,
        project_id: str,
        *,
        purpose: str | None = None,
        kind: str | None = None,
        status: str | None = None,
        after: str | None = None,
        limit: int,
    ) -> tuple[builtins.list[File], bool]:
        """A page of datasets, newest first, and whether more follow. Raises InvalidRequest(`invalid_cursor`)."""
        purposes: Sequence[str] = FINE_TUNE_PURPOSES if purpose is None else (purpose,)
        with self._storage.read() as tx:
            found = tx.files.list_datasets(
                project_id, purposes=purposes, kind=kind, status=status, after=after, limit=limit + 1
            )
        return found[:limit], len(found) > limit

    def delete(self, project_id: str, file_id: str) -> File:
        """Remove a file; the answer is what it was. Raises NotFound(`file_not_found`), Conflict(`file_in_use`)."""
        claim = Claim(self._home, project_id, file_id)
        with self._storage.write() as tx:
            file = tx.files.get(project_id, file_id)
            if file is None:
                raise not_found(file_id)
            jobs = tx.jobs.using_file(project_id, file_id)
            if jobs:
                raise Conflict(
                    "file_in_use",
                    mark("The file {file} is used by the unfinished job {job}; cancel the job or wait for its end."),
                    param="file_id",
                    file=file_id,
                    job=jobs[0],
                )
            batches = tx.batches.using_file(project_id, file_id)
            if batches:
                raise Conflict(
                    "file_in_use",
                    mark("The file {file} is used by the unfinished batch {batch}; cancel it or wait for its end."),
                    param="file_id",
                    file=file_id,
                    batch=batches[0],
                )
            claim.write()
            self.images.forget(tx, file)
            tx.files.delete(project_id, file_id)
        claim.remove(self._blobs)
        self.images.drop_unused(file_id)
        claim.drop()
        self.on_delete(file)
        return file

    def publish(
        self,
        project_id: str,
        made: Sequence[tuple[Path, str, str]],
        also: Callable[["Transaction", builtins.list[str]], None],
    ) -> None:
        """Store files that the product made: (bytes, name, purpose) of each. `also` is called with their ids in the
        transaction that makes them visible, and once if there are none. Raises what it raises, and StorageFull."""
        files = [self._intake.made(project_id, path, label, purpose) for path, label, purpose in made]
        ids = [arrival.file.id for arrival in files]
        if files:
            self._intake.store(files, PUBLISH_ROUTE, None, lambda tx, _file: also(tx, ids))
        else:
            with self._storage.write() as tx:
                also(tx, ids)

    def content(
        self, project_id: str, file_id: str, start: int = 0, end: int | None = None
    ) -> tuple[File, Iterator[bytes]]:
        """The file and its bytes [start, end). Raises NotFound(`file_not_found`, `blob_missing`)."""
        file = self.get(project_id, file_id)
        return file, self._blobs.read(content_key(project_id, file_id), start=start, end=end)

    def check_room(self, size_bytes: int) -> None:
        """Raises StorageFull(`insufficient_storage`) unless `size_bytes` fit above the floor of free disk."""
        check_room(self._home.temporary, self._settings.min_free_disk_bytes + size_bytes)

    def sweep(self) -> None:
        """Remove what uploads and deletions left that a crash cut short. Call it while no other server uses the home."""
        self._intake.sweep()
        self.images.sweep()

    def _keep(self, upload: Upload, terms: Terms) -> File:
        """Turn a whole upload into a file: check, store the bytes, then the record."""
        project_id = upload.project_id
        idempotency = terms.idempotency
        if idempotency is not None:
            more = ["keep"] * terms.keep_problems + ([terms.parent_id] if terms.parent_id else [])
            idempotency = idempotency.with_content(terms.label, terms.purpose, upload.sha256, *more)
            earlier = self._intake.earlier(project_id, ROUTE, idempotency)
            if earlier is not None:
                return earlier
        parent = self._parent(project_id, terms.parent_id)
        with self._intake.temporary() as problems:
            report = self._intake.check(upload.path, terms.purpose, problems, terms.watch)
            arrival = self._intake.arrival(
                upload.path,
                problems,
                report,
                project_id=project_id,
                label=terms.label,
                purpose=terms.purpose,
                keep_problems=terms.keep_problems,
                sha256=upload.sha256,
                parent=parent,
                origin={"made_by": "upload"} if parent else {},
            )
            return self._intake.store([arrival], ROUTE, idempotency, upload.also)

    def _parent(self, project_id: str, file_id: str | None) -> File | None:
        if file_id is None:
            return None
        with self._storage.read() as tx:
            parent = tx.files.get(project_id, file_id)
        if parent is None or parent.purpose not in FINE_TUNE_PURPOSES:
            raise not_found(file_id, "parent_id")
        return parent
