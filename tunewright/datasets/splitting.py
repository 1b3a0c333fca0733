"""Which rows are for validation: decided by the row alone, so that it is the same whatever stands around it."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from tunewright.datasets.lines import read_lines
from tunewright.errors import InvalidRequest
from tunewright.files_on_disk import writing
from tunewright.i18n import mark

_SEEDS = 2**64
_TOLD_EVERY_LINES = 1000


def side(row_bytes: bytes, ratio: float, seed: int) -> bool:
    """Whether the row (its line, line end or not) belongs to the validation rows, about `ratio` (0 to 1) of all.

    Rows that say the same always land on the same side, so a repeated row never stands on both; any int is a `seed`.
    """
    return xxhash.xxh3_64_intdigest(canonical(row_bytes), seed % _SEEDS) < ratio * _SEEDS


def canonical(row_bytes: bytes) -> bytes:
    """The same bytes for rows that say the same, whatever the order of their fields and the white space between."""
    try:
        return msgspec.json.encode(msgspec.json.decode(row_bytes), order="sorted")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return row_bytes.strip()


class Split(NamedTuple):
    """Rows on each side."""

    train: int
    validation: int


def split(
    source: Path,
    train: Path,
    validation: Path,
    *,
    ratio: float,
    seed: int,
    max_line_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> Split:
    """Write each row of `source`, as it stands, to one of the two files; they appear whole or not at all.

    Blank lines are left out. `progress` hears of bytes done and in all. Raises InvalidRequest (`split_leaves_nothing` if one side
    would be empty, `line_too_long`), OSError.
    """
    counts = [0, 0]
    size = source.stat().st_size
    with source.open("rb", buffering=1 << 18) as stream, writing(train) as kept, writing(validation) as measured:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        for line in read_lines(stream, max_line_bytes):
            if progress is not None and line.number % _TOLD_EVERY_LINES == 0:
                progress(line.byte_offset, size)
            if line.data is None:
                sentence = mark("line {line} is longer than {limit} bytes")
                raise InvalidRequest("line_too_long", sentence, line=line.number, limit=max_line_bytes)
            row = line.data.removesuffix(b"\r")
            if row and not row.isspace():
                for_validation = side(row, ratio, seed)
                counts[for_validation] += 1
                (measured if for_validation else kept).write(row + b"\n")
        if 0 in counts:
            sentence = mark(
                "A ratio of {ratio} puts {validation} of {rows} rows aside, so one side is empty. "
                "Use more rows, another ratio or another seed."
            )
            raise InvalidRequest("split_leaves_nothing", sentence, ratio=ratio, validation=counts[1], rows=sum(counts))
    return Split(*counts)
