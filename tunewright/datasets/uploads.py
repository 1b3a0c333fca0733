"""Bytes on their way in: into a temporary file, hashed and counted. Nothing of them is visible until they are whole."""

import errno
import hashlib
import io
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tunewright.datasets.records import PURPOSES, File
from tunewright.errors import InvalidRequest, StorageFull, TooLarge, quote
from tunewright.i18n import mark
from tunewright.ids import random_text
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.accounts.idempotency import IdempotencyKey
    from tunewright.storage import Transaction

PART_PREFIX = "upload-"
MAX_FILENAME_BYTES = 255
_ROOM_EVERY_BYTES = 16 * 2**20
_BUFFER_BYTES = 1 << 18
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

REFUSE, KEEP = "refuse", "keep"
Watch = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), some times a second."""


class Terms(NamedTuple):
    """How an upload is to be kept: the arguments of `Upload.finish`, looked at."""

    label: str
    purpose: str
    idempotency: "IdempotencyKey | None"
    keep_problems: bool
    parent_id: str | None
    watch: Watch | None


Keep = Callable[["Upload", Terms], File]
Also = Callable[["Transaction", File], None]
"""What else belongs into the transaction that makes the file visible."""


class Spool:
    """A private temporary file that is written once, from its start. Not for several threads at once."""

    def __init__(self, folder: Path, limit_bytes: int, min_free_bytes: int) -> None:
        self.path = folder / f"{PART_PREFIX}{random_text(20)}.part"
        self.size_bytes = 0
        self._limit = limit_bytes
        self._min_free = min_free_bytes
        self._hash = hashlib.sha256()
        self._next_look = 0
        self._look_at_room()
        with _full_disk_translated():
            self._raw = io.FileIO(self.path, "x", opener=_private)
        self._stream = io.BufferedWriter(self._raw, _BUFFER_BYTES)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Take more bytes. Raises TooLarge at the byte that crosses the limit, StorageFull(`insufficient_storage`)."""
        if self.size_bytes + len(data) > self._limit:
            raise self._too_large()
        if self.size_bytes + len(data) >= self._next_look:
            self._look_at_room()
        with _full_disk_translated():
            self._stream.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)

    def close(self) -> None:
        """All bytes are handed to the system; no more may come. Raises StorageFull(`insufficient_storage`)."""
        with _full_disk_translated():
            self._stream.close()

    def abort(self) -> None:
        """Forget the bytes. No error if it is over already."""
        self._raw.close()  # not the buffer: what it still holds is thrown away, and a full disk could not take it
        self.path.unlink(missing_ok=True)

    def _too_large(self) -> TooLarge:
        return file_too_large(self._limit, "file")

    def _look_at_room(self) -> None:
        check_room(self.path.parent, self._min_free)
        self._next_look = self.size_bytes + _ROOM_EVERY_BYTES


class Upload(Spool):
    """A file on its way in. Ends with `finish()` or `abort()`; any error of the former leaves nothing behind."""

    def __init__(
        self,
        project_id: str,
        folder: Path,
        settings: Settings,
        keep: Keep,
        *,
        limit_bytes: int | None = None,
        also: Also | None = None,
    ) -> None:
        """`limit_bytes`: another limit than `max_file_bytes`. `also` runs in the transaction that makes the file visible."""
        super().__init__(folder, limit_bytes or settings.max_file_bytes, settings.min_free_disk_bytes)
        self.project_id = project_id
        self.also = also
        self._keep = keep

    def finish(
        self,
        filename: str,
        purpose: str,
        *,
        idempotency: "IdempotencyKey | None" = None,
        on_problems: str = REFUSE,
        parent_id: str | None = None,
        watch: Watch | None = None,
    ) -> File:
        """Check the rows and keep the file: the stored record, or the earlier one of a repeated request.

        `on_problems` is `refuse`, or `keep`: then rows with errors make the file's status `error`. `parent_id` names the
        dataset that this is a new version of. `watch` hears how far the check is; what it raises ends the upload.

        Raises InvalidRequest: `invalid_filename`, `invalid_purpose`, `invalid_value`, or the code of the first problem
        of the rows (`RowsRefused`, whose `values` say more). Also NotFound, IdempotencyMismatch, StorageFull, Unavailable.
        """
        try:
            self.close()
            label = file_label(filename)
            check_purpose(purpose)
            check_on_problems(on_problems)
            terms = Terms(label, purpose, idempotency, on_problems == KEEP, parent_id, watch)
            return self._keep(self, terms)
        finally:
            self.abort()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def check_room(folder: Path, floor_bytes: int) -> None:
    """Raises StorageFull(`insufficient_storage`) if the disk of `folder` has less than `floor_bytes` free."""
    if shutil.disk_usage(folder).free < floor_bytes:
        raise _storage_full()


def file_label(filename: str) -> str:
    """The name to show for a file: its last part, whichever slashes the sender uses. It is never used as a path.

    Raises InvalidRequest(`invalid_filename`) if it is empty, over 255 bytes, or holds control or direction characters.
    """
    label = filename.replace("\\", "/").rsplit("/", 1)[-1].strip()
    control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI for c in filename)
    if control or label in ("", ".", "..") or len(label.encode()) > MAX_FILENAME_BYTES:
        raise InvalidRequest(
            "invalid_filename",
            mark("The file name {filename} is not usable: 1 to {limit} bytes without control characters are."),
            param="file",
            filename=f'"{quote(filename)}"',
            limit=MAX_FILENAME_BYTES,
        )
    return label


def check_purpose(purpose: str) -> None:
    """Raises InvalidRequest(`invalid_purpose`)."""
    if purpose not in PURPOSES:
        raise InvalidRequest(
            "invalid_purpose",
            mark("The purpose {purpose} is unknown; allowed: {allowed}."),
            param="purpose",
            purpose=f'"{quote(purpose)}"',
            allowed=", ".join(PURPOSES),
        )


def check_on_problems(on_problems: str) -> None:
    """Raises InvalidRequest(`invalid_value`)."""
    if on_problems not in (REFUSE, KEEP):
        raise InvalidRequest(
            "invalid_value",
            mark("{field} must be one of {expected}, not {value}."),
            param="on_problems",
            field="on_problems",
            expected=f"{REFUSE}, {KEEP}",
            value=quote(on_problems),
        )


def file_too_large(limit: int, param: str) -> TooLarge:
    """The error for a file over `limit` bytes."""
    return TooLarge(
        "file_too_large",
        mark("The file is larger than {limit} bytes, the most that this server takes."),
        param=param,
        limit=limit,
    )


def _storage_full() -> StorageFull:
    return StorageFull("insufficient_storage", mark("The disk of this server has no room for the file."))


class _full_disk_translated:
    """A full disk is an answer, not a crash."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _storage_full() from None
