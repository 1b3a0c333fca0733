"""Reads what a trainer wrote, from where the database left off."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import msgspec

from tunewright.jobs.spec import Failed, Finished, JournalRecord, Rehearsed, Started, Stopped, decode_record

Terminal = Finished | Rehearsed | Failed | Stopped
_READ_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 16 << 20


@dataclass
class Batch:
    """Whole records in their order.

    `offset` is where the next batch begins: behind `records`, but before `terminal`. The record that ends an attempt is
    consumed by the change of state that it causes, so a crash in between finds it again.
    """

    offset: int
    records: list[JournalRecord] = field(default_factory=list)
    terminal: Terminal | None = None
    damaged: int = 0
    """Lines that are no record. They are passed over and counted."""
    more: bool = False
    """Whether there are whole lines beyond this batch."""


def read_batch(path: Path, offset: int) -> Batch:
    """About 1 MiB of records from byte `offset` on. Empty if there is no file or no whole new line."""
    batch = Batch(offset)
    data = _whole_lines(path, offset)
    for line in BytesIO(data):
        try:
            record = decode_record(line)
        except msgspec.DecodeError:  # ValidationError is one too
            batch.damaged += 1
            batch.offset += len(line)
            continue
        if isinstance(record, Terminal):
            batch.terminal = record
            return batch
        batch.records.append(record)
        batch.offset += len(line)
    batch.more = len(data) > 0
    return batch


def first_record(path: Path) -> Started | None:
    """The record that opened the attempt, if it is there."""
    for record in read_batch(path, 0).records:
        if isinstance(record, Started):
            return record
    return None


def _whole_lines(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(_READ_BYTES)
            while b"\n" not in data and len(data) < _LONGEST_LINE_BYTES:
                block = stream.read(_READ_BYTES)
                if not block:
                    break
                data += block
    except FileNotFoundError:
        return b""
    if (
        len(data) >= _LONGEST_LINE_BYTES and b"\n" not in data
    ):  # no trainer writes that; do not wait for its end for ever
        return data
    return data[: data.rfind(b"\n") + 1]
