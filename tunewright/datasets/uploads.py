"""One upload: bytes into a temporary file, hashed and counted on the way. Nothing of it is visible until it is whole."""

import errno
import hashlib
import io
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.datasets.records import PURPOSES, File
from tunewright.errors import InvalidRequest, StorageFull, TooLarge, quote
from tunewright.i18n import mark
from tunewright.ids import random_text
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.accounts.idempotency import IdempotencyKey

PART_PREFIX = "upload-"
MAX_FILENAME_BYTES = 255
_ROOM_EVERY_BYTES = 16 * 2**20
_BUFFER_BYTES = 1 << 18
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Keep = Callable[["Upload", str, str, "IdempotencyKey | None"], File]


class Upload:
    """A file on its way in. Ends with `finish()` or `abort()`; any error of the former leaves nothing behind.

    Not for several threads at once.
    """

    def __init__(self, project_id: str, folder: Path, settings: Settings, keep: Keep) -> None:
        self.project_id = project_id
        self.path = folder / f"{PART_PREFIX}{random_text(20)}.part"
        self.size_bytes = 0
        self._limit = settings.max_file_bytes
        self._min_free = settings.min_free_disk_bytes
        self._keep = keep
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
        """Take more bytes.

        Raises TooLarge(`file_too_large`) at the byte that crosses the limit, StorageFull(`insufficient_storage`).
        """
        if self.size_bytes + len(data) > self._limit:
            raise TooLarge(
                "file_too_large",
                mark("The file is larger than {limit} bytes, the most that this server takes."),
                param="file",
                limit=self._limit,
            )
        if self.size_bytes + len(data) >= self._next_look:
            self._look_at_room()
        with _full_disk_translated():
            self._stream.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)

    def finish(self, filename: str, purpose: str, *, idempotency: "IdempotencyKey | None" = None) -> File:
        """Check the rows and keep the file: the stored record, or the earlier one of a repeated request.

        Raises InvalidRequest: `invalid_filename`, `invalid_purpose`, or the code of the first problem of the rows
        (`RowsRefused`, whose `values` say more). Also IdempotencyMismatch, StorageFull, Unavailable.
        """
        try:
            with _full_disk_translated():
                self._stream.close()
            label = file_label(filename)
            if purpose not in PURPOSES:
                raise InvalidRequest(
                    "invalid_purpose",
                    mark("The purpose {purpose} is unknown; allowed: {allowed}."),
                    param="purpose",
                    purpose=f'"{quote(purpose)}"',
                    allowed=", ".join(PURPOSES),
                )
            return self._keep(self, label, purpose, idempotency)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forget the upload. No error if it is over already."""
        self._raw.close()  # not the buffer: what it still holds is thrown away, and a full disk could not take it
        self.path.unlink(missing_ok=True)

    def _look_at_room(self) -> None:
        check_room(self.path.parent, self._min_free)
        self._next_look = self.size_bytes + _ROOM_EVERY_BYTES


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


def _storage_full() -> StorageFull:
    return StorageFull("insufficient_storage", mark("The disk of this server has no room for the file."))


class _full_disk_translated:
    """A full disk is an answer, not a crash."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _storage_full() from None
