"""Which rows of a job's files are used: bad ones that the job puts up with are passed over, some are kept for validation.

Line numbers stay those of the uploaded file, whatever is left out: in the two files of a split, the rows of the other
side are blank lines. That is why trainers can name lines that a user finds.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tunewright.datasets.blob_keys import report_key
from tunewright.datasets.checking.check import Limits, check
from tunewright.datasets.lines import read_lines
from tunewright.datasets.records import File
from tunewright.datasets.report import Problem, Report
from tunewright.datasets.splitting import side
from tunewright.errors import InvalidRequest, NotFound
from tunewright.files_on_disk import writing
from tunewright.i18n import mark

if TYPE_CHECKING:
    from tunewright.storage import Blobs

_BOM = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 18
_PLACEHOLDER = b"-\n"
"""Stands for a bad line in the training file of a split: not blank, so that the trainer counts it, and short."""


def bad_lines(file: File, data: Path, blobs: "Blobs", limits: Limits, param: str) -> list[int]:
    """The numbers of the lines with errors, ascending, of a file that was kept although it has some.

    They come from its report: the record if that holds them all, else the stored blob. If neither does, the file is
    checked again (`data` holds its bytes). Raises InvalidRequest(`file_has_errors`) if there are more than a report can hold,
    Unavailable.
    """
    known = msgspec.convert(file.report, Report)
    expected = known.bad_rows
    found = _with_errors(known.problems)
    report = data.with_name(f"{data.stem}-report.jsonl")
    if len(found) != expected:
        try:
            blobs.local_copy(report_key(file.project_id, file.id), report)
            found = _in_report(report)
        except (NotFound, msgspec.DecodeError):
            pass
    if len(found) != expected:
        report.unlink(missing_ok=True)  # a copy may be the blob itself
        expected = check(data, file.purpose, limits, problems_to=report, statistics=False).bad_rows
        found = _in_report(report)
    report.unlink(missing_ok=True)
    if len(found) != expected:
        raise InvalidRequest(
            "file_has_errors",
            mark("The report of file {file} is too long to name every bad row. Mend the file and train on the result."),
            param=param,
            file=file.id,
        )
    return sorted(found)


def _in_report(report: Path) -> set[int]:
    decode = msgspec.json.Decoder(Problem).decode
    with report.open("rb") as stream:
        return _with_errors(decode(line) for line in stream)


def _with_errors(problems: Iterable[Problem]) -> set[int]:
    return {problem.line for problem in problems if problem.severity == "error" and problem.line is not None}


class Sides(NamedTuple):
    """Good rows on each side of a split."""

    train: int
    validation: int


def split(
    source: Path, train: Path, validation: Path, *, ratio: float, seed: int, bad: list[int], max_line_bytes: int
) -> Sides:
    """Write the two files of a split; each is whole or absent. Equal rows always come to lie on the same side.

    Bad lines are placeholders in the training file, to be passed over there. Raises InvalidRequest(`split_leaves_nothing`).
    """
    skipped = set(bad)
    counts = [0, 0]
    with writing(train) as kept, writing(validation) as measured:
        for number, row in _rows(source, max_line_bytes):
            if number in skipped:
                kept.write(_PLACEHOLDER)
                measured.write(b"\n")
            elif row is None:
                kept.write(b"\n")
                measured.write(b"\n")
            else:
                for_validation = side(row, ratio, seed)
                counts[for_validation] += 1
                kept.write(b"\n" if for_validation else row + b"\n")
                measured.write(row + b"\n" if for_validation else b"\n")
        if 0 in counts:
            raise InvalidRequest(
                "split_leaves_nothing",
                mark(
                    "A validation_split of {ratio} puts {validation} of {rows} rows aside, so one side is empty. "
                    "Use more rows, another ratio or another seed, or name a validation_file."
                ),
                param="validation_split",
                ratio=ratio,
                validation=counts[1],
                rows=sum(counts),
            )
    return Sides(*counts)


def _rows(source: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number, the row without its line end); None for a blank line and for one that is too long, which is bad."""
    with source.open("rb", _BUFFER_BYTES) as stream:
        if stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        for line in read_lines(stream, max_line_bytes):
            row = (line.data or b"").removesuffix(b"\r")
            yield line.number, None if not row or row.isspace() else row
