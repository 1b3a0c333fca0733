"""What the images add to a report that the check of the rows has made already."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import BinaryIO

from tunewright.datasets.report import MAX_PROBLEMS, Report, Reporter


class Findings(Reporter):
    """A reporter that writes to a stream that is open already, and joins what it has to an earlier report."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    @property
    def count(self) -> int:
        """Problems so far."""
        return self.errors + self.warnings

    def join(self, report: Report) -> None:
        """Add what was found to `report`, errors before warnings as ever."""
        found = self.report(None, 0, 0)
        report.errors += found.errors
        report.warnings += found.warnings
        report.bad_rows += found.bad_rows
        report.file_errors += found.file_errors
        for code, count in found.counts.items():
            report.counts[code] = report.counts.get(code, 0) + count
        report.counts = dict(sorted(report.counts.items()))
        both = [*report.problems, *found.problems]
        report.problems = sorted(both, key=lambda problem: problem.severity != "error")[:MAX_PROBLEMS]


@contextmanager
def appending(path: FilePath | None) -> Iterator[BinaryIO | None]:
    """A stream at the end of a list of problems, None if there is no such list."""
    if path is None or not path.exists():
        yield None
        return
    with path.open("ab") as stream:
        yield stream
