"""What the images add to a report that the check of the rows has made already."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import BinaryIO, Literal

import msgspec

from tunewright.datasets.report import MAX_PROBLEMS, Path, Problem, Report, Reporter, field_name, json_pointer


class Findings:
    """Collects problems like a `Reporter`, writes each of them to a stream, and joins them to a report."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._reporter = Reporter()
        self._stream = stream

    @property
    def count(self) -> int:
        """Problems so far."""
        return self._reporter.errors + self._reporter.warnings

    def add(
        self,
        severity: Literal["error", "warning"],
        code: str,
        message: str,
        *,
        line: int | None = None,
        byte_offset: int | None = None,
        path: Path | None = None,
        **values: object,
    ) -> None:
        """As `Reporter.add`."""
        self._reporter.add(severity, code, message, line=line, byte_offset=byte_offset, path=path, **values)  # type: ignore[arg-type]
        if self._stream is None:
            return
        if line is not None:
            values["line"] = line
        if path is not None:
            values["field"] = field_name(path)
        problem = Problem(
            code=code,
            severity=severity,
            message=message,
            values=values,
            line=line,
            byte_offset=byte_offset,
            pointer=None if path is None else json_pointer(path),
        )
        self._stream.write(msgspec.json.encode(problem) + b"\n")

    def join(self, report: Report) -> None:
        """Add what was found to `report`, errors before warnings as ever."""
        found = self._reporter.report(None, 0, 0)
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
