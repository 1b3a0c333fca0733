"""All problems of a dataset, in order of their lines: inside the record while they are few, else in a blob of JSON lines.

In the blob a place is found by bisection over byte ranges, so a page far behind costs what the first one does.
"""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tunewright.datasets.blob_keys import report_key
from tunewright.datasets.presentation import report_of
from tunewright.datasets.records import File
from tunewright.datasets.report import Problem

if TYPE_CHECKING:
    from tunewright.storage import Blobs

BLOB_BYTES = "problem_bytes"
"""Where the record's report says how large the blob is; 0 or absent: there is none."""
_NEAR_BYTES = 64 * 1024


class _Place(msgspec.Struct):
    line: int | None = None


_decode = msgspec.json.Decoder(Problem).decode
_place = msgspec.json.Decoder(_Place).decode


def read_problems(blobs: "Blobs", file: File, after_line: int = -1) -> Iterator[Problem]:
    """The problems of lines beyond `after_line`; those of the file as a whole come first, as if of line 0.

    Raises NotFound(`blob_missing`).
    """
    size = file.report.get(BLOB_BYTES) or 0
    if not size:
        kept = sorted(report_of(file).problems, key=lambda problem: problem.line or 0)
        yield from (problem for problem in kept if (problem.line or 0) > after_line)
        return
    key = report_key(file.project_id, file.id)
    start = _bisect(blobs, key, size, after_line) if after_line >= 0 else 0
    for line in _lines(blobs.read(key, start=start)):
        if (_place(line).line or 0) > after_line:
            yield _decode(line)


def sort_by_line(path: Path) -> int:
    """Bring a file of problems into the order of their lines, if it is not; its size in bytes.

    Checks look at a file several times (duplicates, leaks), so their findings come in several runs.
    """
    order, offsets = array("q"), array("q", [0])
    with path.open("rb") as stream:
        for line in stream:
            order.append(_place(line).line or 0)
            offsets.append(offsets[-1] + len(line))
    if any(order[i] > order[i + 1] for i in range(len(order) - 1)):
        ordered = path.with_name(f".{path.name}.tmp")
        try:
            with path.open("rb") as stream, ordered.open("wb") as target:
                for i in sorted(range(len(order)), key=order.__getitem__):
                    stream.seek(offsets[i])
                    target.write(stream.read(offsets[i + 1] - offsets[i]))
            os.replace(ordered, path)
        finally:
            ordered.unlink(missing_ok=True)
    return offsets[-1]


def _bisect(blobs: "Blobs", key: str, size: int, after_line: int) -> int:
    """The start of a line of the blob, a little before the first problem beyond `after_line`."""
    low, high = 0, size
    while high - low > _NEAR_BYTES:
        middle = (low + high) // 2
        found = _line_after(blobs, key, middle, high)
        if found is None or (_place(found[1]).line or 0) > after_line:
            high = middle
        else:
            low = found[0]
    return low


def _line_after(blobs: "Blobs", key: str, offset: int, end: int) -> tuple[int, bytes] | None:
    """The first line that begins behind `offset` and before `end`, and where it begins."""
    reach = _NEAR_BYTES
    while True:
        data = b"".join(blobs.read(key, start=offset, end=offset + reach))
        begin = data.find(b"\n") + 1
        if begin and offset + begin >= end:
            return None
        stop = data.find(b"\n", begin) if begin else -1
        if stop >= 0:
            return offset + begin, data[begin:stop]
        if offset + reach >= end and len(data) < reach:
            return None
        reach *= 8


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
