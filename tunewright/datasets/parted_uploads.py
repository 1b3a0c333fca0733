"""Files that come in parts: begun, filled in any order and by several connections, completed at once or not at all.

A part lies in `uploads/{project}/{upload}/{part}` of the home from its own answer until the upload ends. On the local disk
and not among the blobs: there is one server for each home, completion reads every byte again, and a sweep must be able to
see what a crash left; a bucket would add two transfers of everything and show nothing sooner. The whole file goes to the
blobs like any other.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tunewright.accounts.idempotency import find_earlier, remember
from tunewright.clock import wall_s
from tunewright.datasets.records import File, PartedUpload, UploadPart
from tunewright.datasets.service import DatasetService
from tunewright.datasets.upload_parts import Doors, PartOnItsWay, check_hex, wrong_checksum
from tunewright.datasets.uploads import REFUSE, check_on_problems, check_purpose, file_label, file_too_large
from tunewright.errors import Conflict, InvalidRequest, NotFound, RateLimited, quote
from tunewright.files_on_disk import fsync_file, fsync_folder
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.accounts.idempotency import IdempotencyKey
    from tunewright.storage import Storage, Transaction

ROUTE = "POST /uploads"
KEPT_AFTER_EXPIRY_S = 7 * 24 * 3600
"""For so long an ended upload can still be asked for."""
MOST_MIME_CHARACTERS = 255
_CHUNK_BYTES = 1 << 20


class UploadState(msgspec.Struct, frozen=True, kw_only=True):
    """An upload as it is now; `file` is None until it is completed, and again when that file has been deleted.

    `completing` is how much of the work of a completion that is under way has been done, from 0 to 1; None if none is.
    """

    upload: PartedUpload
    parts: int
    received_bytes: int
    file: File | None
    completing: float | None = None


class PartedUploads:
    """Uploads in parts of all projects. Every method blocks."""

    def __init__(self, storage: "Storage", datasets: DatasetService, home: HomeFolder, settings: Settings) -> None:
        self._storage = storage
        self._datasets = datasets
        self._home = home
        self._settings = settings
        self._doors = Doors()
        self._completing: dict[str, float] = {}

    def create(
        self,
        project_id: str,
        *,
        filename: str,
        purpose: str,
        size_bytes: int,
        mime_type: str,
        on_problems: str = REFUSE,
        idempotency: "IdempotencyKey | None" = None,
    ) -> UploadState:
        """A new upload, or the earlier one of a repeated request.

        Raises InvalidRequest (`invalid_filename`, `invalid_purpose`, `invalid_value`), TooLarge (`file_too_large`),
        RateLimited (`too_many_uploads`), StorageFull (`insufficient_storage`), IdempotencyMismatch.
        """
        label = file_label(filename)
        check_purpose(purpose)
        check_on_problems(on_problems)
        _check_mime_type(mime_type)
        if size_bytes > self._settings.max_upload_bytes:
            raise file_too_large(self._settings.max_upload_bytes, "bytes")
        self._expire_overdue()
        self._datasets.check_room(size_bytes)
        now = wall_s()
        upload = PartedUpload(
            id=new_id("upload"),
            project_id=project_id,
            filename=label,
            purpose=purpose,
            mime_type=mime_type,
            size_bytes=size_bytes,
            created_at=now,
            expires_at=now + self._settings.upload_expiry_s,
            on_problems=on_problems,
        )
        with self._storage.write() as tx:
            earlier = find_earlier(tx, project_id, ROUTE, idempotency) if idempotency is not None else None
            if earlier is None:
                self._check_count(tx, project_id)
                tx.uploads.insert(upload)
                if idempotency is not None:
                    remember(tx, project_id, ROUTE, idempotency, upload.id)
        return self.get(project_id, earlier or upload.id)

    def get(self, project_id: str, upload_id: str) -> UploadState:
        """One upload, with how much of it is there. Raises NotFound (`upload_not_found`)."""
        with self._storage.read() as tx:
            upload = _found(tx, project_id, upload_id)
            file = tx.files.get(project_id, upload.file_id) if upload.file_id is not None else None
            parts = tx.uploads.count_parts(project_id, upload_id)
            received = tx.uploads.received_bytes(project_id, upload_id)
        if upload.status == "completed":
            received = upload.size_bytes
        completing = self._completing.get(upload_id)
        return UploadState(upload=upload, parts=parts, received_bytes=received, file=file, completing=completing)

    def parts(self, project_id: str, upload_id: str, *, after: str | None, limit: int) -> tuple[list[UploadPart], bool]:
        """The parts that are there, oldest first, and whether more follow; none once the upload has ended.

        Raises NotFound (`upload_not_found`).
        """
        with self._storage.read() as tx:
            _found(tx, project_id, upload_id)
            found = tx.uploads.parts(project_id, upload_id, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def begin_part(self, project_id: str, upload_id: str) -> PartOnItsWay:
        """A part to write to; end it with its `finish()` or `abort()`.

        Raises NotFound (`upload_not_found`), Conflict (`upload_not_pending`, `upload_busy`), InvalidRequest
        (`upload_expired`, `too_many_parts`, `size_mismatch`), StorageFull.
        """
        with self._storage.read() as tx:
            self._check_takes_part(tx, project_id, upload_id, 0)
        self._doors.enter(upload_id)
        try:
            return PartOnItsWay(project_id, upload_id, self._home.temporary, self._settings, self._keep, self._doors)
        except BaseException:
            self._doors.leave(upload_id)
            raise

    def complete(self, project_id: str, upload_id: str, part_ids: Sequence[str], md5: str | None = None) -> UploadState:
        """Join the parts in this order, check the rows and keep the file. The same completion again answers the same.

        Whatever it raises, no file is there and the upload stays as it was: NotFound (`upload_not_found`), Conflict
        (`part_in_progress`, `upload_busy`, `upload_not_pending`), InvalidRequest (`upload_expired`, `invalid_parts`,
        `size_mismatch`, `checksum_mismatch`, and what `Upload.finish` raises), StorageFull.
        """
        if md5 is not None:
            check_hex(md5, 32, "md5")
        with self._doors.alone(upload_id):  # so `_completing` has one writer for each upload
            with self._storage.read() as tx:
                upload = _found(tx, project_id, upload_id)
                known = {part.id: part for part in tx.uploads.parts(project_id, upload_id)}
            if upload.status == "completed":
                if upload.completed_with != _digest(part_ids):
                    raise _invalid_parts(mark("The upload was completed with other parts."))
                return self.get(project_id, upload_id)
            _check_pending(upload)
            parts = _chosen(upload, known, part_ids)
            self._datasets.check_room(upload.size_bytes)  # while it is joined, everything is there twice
            self._join(upload, parts, md5)
            self._drop_bytes(project_id, upload_id)
        return self.get(project_id, upload_id)

    def cancel(self, project_id: str, upload_id: str) -> UploadState:
        """End an upload and drop its parts; a second time changes nothing.

        Raises NotFound (`upload_not_found`), Conflict (`part_in_progress`, `upload_busy`, `upload_not_pending`),
        InvalidRequest (`upload_expired`).
        """
        with self._doors.alone(upload_id):
            with self._storage.write() as tx:
                upload = _found(tx, project_id, upload_id)
                if upload.status != "cancelled":
                    _check_pending(upload)
                    tx.uploads.change(upload, status="cancelled")
                    tx.uploads.drop_parts(project_id, upload_id)
            self._drop_bytes(project_id, upload_id)
        return self.get(project_id, upload_id)

    def sweep(self) -> None:
        """Remove what ended uploads and a crash left. Call it while no other server uses the home."""
        self._expire_overdue()
        for folder in self._home.uploads.glob("*/*"):
            if not folder.is_dir():
                continue
            with self._storage.read() as tx:
                upload = tx.uploads.get(folder.parent.name, folder.name)
                known = {part.id for part in tx.uploads.parts(folder.parent.name, folder.name)}
            if upload is None or upload.status != "pending":
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for path in folder.iterdir():
                if path.name not in known:
                    path.unlink(missing_ok=True)
        with self._storage.write() as tx:
            tx.uploads.forget_expired_before(wall_s() - KEPT_AFTER_EXPIRY_S)

    def _expire_overdue(self) -> None:
        """Drop the parts of uploads whose time is over. One that somebody is at is left for the next time."""
        with self._storage.read() as tx:
            overdue = tx.uploads.overdue(wall_s())
        for upload in overdue:
            try:
                with self._doors.alone(upload.id):
                    with self._storage.write() as tx:
                        if tx.uploads.change(upload, status="expired") is not None:
                            tx.uploads.drop_parts(upload.project_id, upload.id)
                    self._drop_bytes(upload.project_id, upload.id)
            except Conflict:
                continue

    def _check_count(self, tx: "Transaction", project_id: str) -> None:
        if tx.uploads.count_pending(project_id) >= self._settings.max_open_uploads:
            raise RateLimited(
                "too_many_uploads",
                mark("The project has {limit} uploads that are not completed, its limit; complete or cancel one."),
                retry_after_s=60,
                limit=self._settings.max_open_uploads,
            )

    def _check_takes_part(self, tx: "Transaction", project_id: str, upload_id: str, size_bytes: int) -> None:
        upload = _found(tx, project_id, upload_id)
        _check_pending(upload)
        if tx.uploads.count_parts(project_id, upload_id) >= self._settings.max_upload_parts:
            raise InvalidRequest(
                "too_many_parts",
                mark("The upload has {limit} parts, the most that it may have."),
                limit=self._settings.max_upload_parts,
            )
        # A part may be sent again, so more than the whole may come; but not without end.
        if tx.uploads.received_bytes(project_id, upload_id) + size_bytes > self._most_bytes(upload):
            raise InvalidRequest(
                "size_mismatch",
                mark("The parts hold more than twice the {bytes} bytes that the upload was created for."),
                bytes=upload.size_bytes,
            )

    def _most_bytes(self, upload: PartedUpload) -> int:
        return 2 * upload.size_bytes + self._settings.max_part_bytes

    def _keep(self, part: PartOnItsWay) -> UploadPart:
        """Bytes first, record second: a record always has its bytes."""
        made = UploadPart(
            id=new_id("part"),
            project_id=part.project_id,
            upload_id=part.upload_id,
            size_bytes=part.size_bytes,
            sha256=part.sha256,
            created_at=wall_s(),
        )
        path = self._path(made)
        folder = path.parent
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fsync_folder(folder.parent.parent)
            fsync_folder(folder.parent)
        kept = False
        try:
            fsync_file(part.path)
            os.replace(part.path, path)
            fsync_folder(folder)
            with self._storage.write() as tx:
                self._check_takes_part(tx, made.project_id, made.upload_id, made.size_bytes)
                tx.uploads.add_part(made)
            kept = True
        finally:
            if not kept:
                path.unlink(missing_ok=True)
        return made

    def _join(self, upload: PartedUpload, parts: list[UploadPart], md5: str | None) -> File:
        def close(tx: "Transaction", file: File) -> None:
            """File and end of the upload come in one transaction: a crash leaves both or neither."""
            ended = tx.uploads.change(
                upload, status="completed", file_id=file.id, completed_with=_digest([part.id for part in parts])
            )
            if ended is None:
                raise _not_pending(_found(tx, upload.project_id, upload.id))
            tx.uploads.drop_parts(upload.project_id, upload.id)

        whole = self._datasets.begin_upload(upload.project_id, limit_bytes=upload.size_bytes, also=close)
        try:
            digest = hashlib.md5(usedforsecurity=False)
            for part in parts:
                for chunk in self._read(part):
                    whole.write(chunk)
                    self._completing[upload.id] = whole.size_bytes / upload.size_bytes / 2
                    if md5 is not None:
                        digest.update(chunk)
            if md5 is not None and digest.hexdigest() != md5.lower():
                raise wrong_checksum("md5")
            return whole.finish(
                upload.filename, upload.purpose, on_problems=upload.on_problems, watch=partial(self._checked, upload.id)
            )
        except BaseException:
            whole.abort()
            raise
        finally:
            self._completing.pop(upload.id, None)

    def _checked(self, upload_id: str, done: int, total: int) -> None:
        self._completing[upload_id] = 0.5 + done / max(total, 1) / 2  # the first half was to join the parts

    def _read(self, part: UploadPart) -> Iterator[bytes]:
        """The bytes of a part, which are those that were answered for, or an error at their end."""
        digest = hashlib.sha256()
        try:
            with self._path(part).open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk
        except FileNotFoundError:
            pass
        if digest.hexdigest() != part.sha256:
            raise InvalidRequest(
                "checksum_mismatch",
                mark("The part {part} is no longer whole on the server's disk; send it again."),
                param="part_ids",
                part=part.id,
            )

    def _path(self, part: UploadPart) -> Path:
        return self._home.uploads / part.project_id / part.upload_id / part.id

    def _drop_bytes(self, project_id: str, upload_id: str) -> None:
        shutil.rmtree(self._home.uploads / project_id / upload_id, ignore_errors=True)  # else the sweep does it


def _found(tx: "Transaction", project_id: str, upload_id: str) -> PartedUpload:
    """The upload; one whose time is over is expired, whether or not that was written down already."""
    upload = tx.uploads.get(project_id, upload_id)
    if upload is None:
        raise NotFound(
            "upload_not_found", mark("There is no upload {upload}."), param="upload_id", upload=quote(upload_id)
        )
    if upload.status == "pending" and upload.expires_at <= wall_s():
        return msgspec.structs.replace(upload, status="expired")
    return upload


def _check_pending(upload: PartedUpload) -> None:
    if upload.status == "expired":
        raise InvalidRequest(
            "upload_expired",
            mark("The upload was not completed in time; create a new one and send its parts again."),
            param="upload_id",
        )
    if upload.status != "pending":
        raise _not_pending(upload)


def _not_pending(upload: PartedUpload) -> Conflict:
    return Conflict(
        "upload_not_pending", mark("The upload has ended: it is {status}."), param="upload_id", status=upload.status
    )


def _chosen(upload: PartedUpload, known: dict[str, UploadPart], part_ids: Sequence[str]) -> list[UploadPart]:
    """The parts in the order asked for, which together have the size of the upload."""
    if not part_ids:
        raise _invalid_parts(mark("Name at least one part."))
    if len(set(part_ids)) != len(part_ids):
        raise _invalid_parts(mark("A part is named twice."))
    for part_id in part_ids:
        if part_id not in known:
            raise _invalid_parts(mark("The upload has no part {part}."), part=quote(part_id))
    parts = [known[part_id] for part_id in part_ids]
    total = sum(part.size_bytes for part in parts)
    if total != upload.size_bytes:
        raise InvalidRequest(
            "size_mismatch",
            mark("The parts hold {total} bytes, but the upload was created for {bytes}."),
            param="part_ids",
            total=total,
            bytes=upload.size_bytes,
        )
    return parts


def _invalid_parts(sentence: str, **values: object) -> InvalidRequest:
    return InvalidRequest("invalid_parts", sentence, param="part_ids", **values)  # type: ignore[arg-type]


def _check_mime_type(text: str) -> None:
    if not (text.isascii() and text.isprintable() and 0 < len(text) <= MOST_MIME_CHARACTERS):
        raise InvalidRequest(
            "invalid_value",
            mark("mime_type must be 1 to {limit} printable ASCII characters."),
            param="mime_type",
            limit=MOST_MIME_CHARACTERS,
        )


def _digest(part_ids: Sequence[str]) -> str:
    return hashlib.sha256(msgspec.json.encode(list(part_ids))).hexdigest()
