"""One part of an upload as it arrives, and who may be at an upload at the same time."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright.datasets.records import UploadPart
from tunewright.datasets.uploads import Spool
from tunewright.errors import Conflict, InvalidRequest, TooLarge
from tunewright.i18n import mark
from tunewright.settings import Settings

KeepPart = Callable[["PartOnItsWay"], UploadPart]


class Doors:
    """Who is at which upload: any number of arriving parts, or one who ends it. In this process, the only one of its home."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arriving: Counter[str] = Counter()
        self._ending: set[str] = set()

    def enter(self, upload_id: str) -> None:
        """A part begins to arrive. Raises Conflict (`upload_busy`)."""
        with self._lock:
            if upload_id in self._ending:
                raise _busy()
            self._arriving[upload_id] += 1

    def leave(self, upload_id: str) -> None:
        """It is there, or given up."""
        with self._lock:
            self._arriving[upload_id] -= 1
            if not self._arriving[upload_id]:
                del self._arriving[upload_id]

    @contextmanager
    def alone(self, upload_id: str) -> Iterator[None]:
        """Nobody else is at the upload inside. Raises Conflict (`part_in_progress`, `upload_busy`)."""
        with self._lock:
            if upload_id in self._ending:
                raise _busy()
            if upload_id in self._arriving:
                raise Conflict(
                    "part_in_progress",
                    mark("A part of this upload is still arriving; try again when it has been answered."),
                    retryable=True,
                )
            self._ending.add(upload_id)
        try:
            yield
        finally:
            with self._lock:
                self._ending.discard(upload_id)


class PartOnItsWay(Spool):
    """One part as it arrives. Ends with `finish()` or `abort()`; any error of the former leaves nothing behind."""

    def __init__(
        self, project_id: str, upload_id: str, folder: Path, settings: Settings, keep: KeepPart, doors: Doors
    ) -> None:
        super().__init__(folder, settings.max_part_bytes, settings.min_free_disk_bytes)
        self.project_id = project_id
        self.upload_id = upload_id
        self._keep = keep
        self._doors = doors
        self._inside = True

    def finish(self, *expected: str | None) -> UploadPart:
        """Keep the part. `expected` are sha256 in hex that its sender knows, or None.

        Raises InvalidRequest (`empty_part`, `invalid_value`, `checksum_mismatch`), and what `begin_part` raises.
        """
        try:
            self.close()
            if not self.size_bytes:
                raise InvalidRequest("empty_part", mark("The part holds no bytes."), param="data")
            for sha256 in expected:
                if sha256 is not None and check_hex(sha256, 64, "sha256") != self.sha256:
                    raise wrong_checksum("sha256")
            return self._keep(self)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forget the part. No error if it is over already."""
        super().abort()
        if self._inside:
            self._inside = False
            self._doors.leave(self.upload_id)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            "part_too_large", mark("A part may have at most {limit} bytes."), param="data", limit=self._limit
        )


def wrong_checksum(name: str) -> InvalidRequest:
    """The error for bytes whose `name` (sha256, md5) is not what their sender said."""
    return InvalidRequest(
        "checksum_mismatch",
        mark("The bytes that arrived have another {name} than the one sent."),
        param=name,
        name=name,
    )


def check_hex(text: str, length: int, name: str) -> str:
    """The checksum in lower case. Raises InvalidRequest (`invalid_value`)."""
    if not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", text):
        raise InvalidRequest(
            "invalid_value", mark("{name} must be {length} hexadecimal digits."), param=name, name=name, length=length
        )
    return text.lower()


def _busy() -> Conflict:
    return Conflict(
        "upload_busy", mark("The upload is being completed or cancelled by another request."), retryable=True
    )
