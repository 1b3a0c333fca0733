"""Appends records to an attempt's journal, the only way a trainer speaks to the server."""

import os
from pathlib import Path

from tunewright.jobs.spec import Checkpoint, Failed, Finished, JournalRecord, Rehearsed, Stopped, encode_record

DURABLE = (Checkpoint, Failed, Finished, Rehearsed, Stopped)
"""Records that must be on the disk before the trainer goes on: the server acts on them."""


class JournalWriter:
    """One JSON object per line, flushed at once. A half line that a crash left behind is dropped when the file is opened."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("ab")
        _drop_half_line(path)

    def write(self, record: JournalRecord) -> None:
        """Append one record; returns when it is readable, for `DURABLE` ones when it is on the disk."""
        self._stream.write(encode_record(record) + b"\n")
        self._stream.flush()
        if isinstance(record, DURABLE):
            self.sync()

    def sync(self) -> None:
        """Bring all written records to the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        self._stream.close()


def _drop_half_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
