"""A data file with its certain mends made: line by line, each mended line checked again until nothing is left to mend.

The choice is of problems by code and of lines by their number in the source. Lines that need no mend are copied byte for byte.
"""

import codecs
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from tunewright.datasets.checking import documents, fast_rows, fingerprints
from tunewright.datasets.checking.check import VALIDATION_LEAK, Progress, known_rows
from tunewright.datasets.checking.line_check import check_line
from tunewright.datasets.checking.scan import Depth, Limits, Scan, agreed_kind
from tunewright.datasets.checking.sniff import HEAD_BYTES, Verdict, sniff
from tunewright.datasets.lines import read_lines
from tunewright.datasets.mending import patches
from tunewright.datasets.records import FINE_TUNE_PURPOSES
from tunewright.datasets.report import Patch, Reporter, Row
from tunewright.errors import InvalidRequest

MAX_ROUNDS = 50
_DUPLICATE = "duplicate_row"
_TOLD_EVERY_LINES = 1000
_TRANSCODED_BYTES = 1 << 20


class Choice(NamedTuple):
    """Which problems to mend: of these codes (None: all), on these lines (None: all). `drop_bad_rows` leaves out every chosen
    line that still has an error afterwards."""

    codes: frozenset[str] | None = None
    lines: frozenset[int] | None = None
    drop_bad_rows: bool = False


class Repaired(NamedTuple):
    """How many rows were mended, how many left out, and how many with errors were left as they are."""

    patched: int
    dropped: int
    left: int


def repair(
    source: Path,
    target: Path,
    purpose: str,
    limits: Limits,
    choice: Choice,
    *,
    against: Path | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Write the mended file to `target`, in bounded memory. Raises only OSError.

    Rows that stand in the training file `against` are left out (code `validation_leak`). A file that can't be mended at all (or
    may not, by the choice) is copied; `left` is 1 then.
    """
    with source.open("rb") as stream, target.open("wb", buffering=1 << 18) as output:
        head = stream.read(HEAD_BYTES)
        verdict = sniff(head, whole=len(head) < HEAD_BYTES)
        stream.seek(0)
        repairer = _Repairer(output, purpose, limits, choice, against, progress)
        if verdict is None:
            repairer.repair_lines(stream, head.startswith(codecs.BOM_UTF8), source)
        elif verdict.patch is None or not _is_chosen(choice, verdict.code):
            shutil.copyfileobj(stream, output)
            return Repaired(0, 0, 1)
        elif verdict.documents:
            repairer.repair_documents(stream)
        else:
            return _transcoded(stream, target, output, verdict, repairer)
    return repairer.result()


def _transcoded(stream: BinaryIO, target: Path, output: BinaryIO, verdict: Verdict, repairer: "_Repairer") -> Repaired:
    """The lines of a file in UTF-16, or with lines that end in CR: first a copy in the usual form, then its lines."""
    copy = target.with_name(target.name + ".utf8")
    try:
        with copy.open("w+b") as usual:
            if verdict.code == "invalid_encoding":
                _to_utf8(stream, usual)
            else:
                while piece := stream.read(_TRANSCODED_BYTES):
                    usual.write(piece.replace(b"\r", b"\n"))
            usual.seek(0)
            repairer.rewritten = True
            repairer.repair_lines(usual, False, copy)
    finally:
        copy.unlink(missing_ok=True)
    return repairer.result()


def _to_utf8(stream: BinaryIO, target: BinaryIO) -> None:
    start = stream.read(4)
    stream.seek(0)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"
    else:
        name = "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    decoder = codecs.getincrementaldecoder(name)("replace")
    while piece := stream.read(_TRANSCODED_BYTES):
        target.write(decoder.decode(piece).encode())
    target.write(decoder.decode(b"", True).encode())


def _is_chosen(choice: Choice, code: str) -> bool:
    return choice.codes is None or code in choice.codes


class _Finding(NamedTuple):
    code: str
    error: bool
    patch: Patch | None


class _Findings(Reporter):
    """Keeps every problem of one line."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Finding] = []

    def add(
        self, severity: Literal["error", "warning"], code: str, message: str, *, patch: Patch | None = None, **rest: Any
    ) -> None:
        """Only what the repair needs."""
        self.found.append(_Finding(code, severity == "error", patch))


class _Repairer:
    def __init__(
        self,
        output: BinaryIO,
        purpose: str,
        limits: Limits,
        choice: Choice,
        against: Path | None,
        progress: Progress | None,
    ) -> None:
        self.output = output
        self.against = against
        self.progress = progress
        self.purpose = purpose
        self.training = purpose in FINE_TUNE_PURPOSES
        self.limits = limits
        self.choice = choice
        self.rewritten = False
        """Whether every line is a change already, since the whole file was rewritten."""
        self.kind: str | None = None
        """What the rows written so far agree on."""
        self.patched = self.dropped = self.left = 0

    def result(self) -> Repaired:
        """The counts so far."""
        return Repaired(self.patched, self.dropped, self.left)

    def repair_lines(self, stream: BinaryIO, has_mark: bool, path: Path) -> None:
        """Every line of a file that is JSONL."""
        repeated = self._repeated_lines(path)
        size = path.stat().st_size
        if has_mark:
            stream.seek(len(codecs.BOM_UTF8))
            if _is_chosen(self.choice, "byte_order_mark"):
                self.patched += 1
            else:
                self.output.write(codecs.BOM_UTF8)
        for line in read_lines(stream, self.limits.max_line_bytes):
            if self.progress is not None and line.number % _TOLD_EVERY_LINES == 0:
                self.progress(line.byte_offset, size)
            chosen = self.choice.lines is None or line.number in self.choice.lines
            if line.data is None:
                self._handle_long_line(stream, line.byte_offset, chosen)
            elif line.number in repeated and chosen:
                self.dropped += 1
            elif not chosen:
                self._copy(line.data)
            else:
                self._repair(line.data, changed=self.rewritten and bool(line.data.strip()))

    def repair_documents(self, stream: BinaryIO) -> None:
        """Every object of a file that is pretty-printed, each onto a line of its own."""
        for document in documents.read(stream, self.limits.max_line_bytes):
            if document.data is None:
                self._drop_or_leave(b"")
                continue
            self._repair(documents.whole(document.data), changed=True)

    def _repeated_lines(self, path: Path) -> frozenset[int]:
        """The numbers of lines that repeat an earlier one or stand in the training file, if such are to be left out."""
        repeats = self.training and _is_chosen(self.choice, _DUPLICATE)
        against = self.against if self.training and _is_chosen(self.choice, VALIDATION_LEAK) else None
        if not repeats and against is None:
            return frozenset()
        scan = Scan(Reporter(), self.purpose, self.limits, Depth(texts=False, statistics=False))
        with path.open("rb") as stream:
            if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                stream.seek(0)
            scan.read(stream, path.stat().st_size)
        found = [fingerprints.duplicates(scan.fingerprints)] if repeats else []
        if against is not None:
            found.append(known_rows(against, self.purpose, self.limits).common(scan.fingerprints))
        return frozenset(row.line_index + 1 for rows in found for row in rows)

    def _handle_long_line(self, stream: BinaryIO, offset: int, chosen: bool) -> None:
        """A line over the limit is left out with the bad rows; else its beginning is kept, which is as bad."""
        if chosen and self.choice.drop_bad_rows:
            self.dropped += 1
            return
        self.left += 1
        place = stream.tell()
        stream.seek(offset)
        while (piece := stream.readline(1 << 20)) and not piece.endswith(b"\n"):
            self.output.write(piece)
        self.output.write(piece.rstrip(b"\n") + b"\n")
        stream.seek(place)

    def _copy(self, data: bytes) -> None:
        self._write(data)
        self.left += self._is_bad(*self._findings(data))

    def _write(self, data: bytes) -> None:
        self.output.write(data + b"\n")

    def _repair(self, data: bytes, *, changed: bool) -> None:
        rows, mended, bad = self._mended(data)
        if not rows:
            self.dropped += 1
            return
        self.patched += changed or mended
        for row, is_bad in zip(rows, bad, strict=True):
            if is_bad:
                self._drop_or_leave(row)
            else:
                self._write(row)

    def _drop_or_leave(self, data: bytes) -> None:
        if self.choice.drop_bad_rows:
            self.dropped += 1
        else:
            self.left += 1
            self._write(data)

    def _mended(self, data: bytes) -> tuple[list[bytes], bool, list[bool]]:
        """The rows that the line becomes (none if it is left out), whether anything was mended, and which still have errors."""
        done: list[bytes] = []
        bad: list[bool] = []
        mended = False
        waiting = [data]
        for _ in range(MAX_ROUNDS):
            if not waiting:
                break
            row = waiting.pop(0)
            findings, kind = self._findings(row)
            patch = next(_batches([f for f in findings if f.patch and _is_chosen(self.choice, f.code)]), None)
            try:
                result = row if patch is None else patches.apply(row, patch)
            except InvalidRequest:
                patch, result = None, row
            if patch is None:
                done.append(row)
                bad.append(self._is_bad(findings, kind))
                continue
            mended = True
            if result is not None:
                waiting[:0] = [part for part in result.split(b"\n") if part.strip() or result == part]
        for row in waiting:
            done.append(row)
            bad.append(self._is_bad(*self._findings(row)))
        return done, mended, bad

    def _findings(self, data: bytes) -> tuple[list[_Finding], str | None]:
        """What is wrong with one line, and its kind."""
        clean = fast_rows.one_row(data) if self.training and not data.endswith(b"\r") else None
        if clean is not None:
            return [], clean.kind
        findings = _Findings()
        checked = check_line(Row(findings, 1, 0), data, training=self.training, texts=False)
        return findings.found, checked.kind

    def _is_bad(self, findings: list[_Finding], kind: str | None) -> bool:
        """Whether a row has errors, or is of a kind that can't stand beside those before it."""
        if kind is not None:
            agreed = agreed_kind(self.kind, kind)
            if agreed is None:
                return True
            self.kind = agreed
        return any(finding.error for finding in findings)


def _batches(findings: list[_Finding]) -> Iterator[Patch]:
    """One patch that does as much at once as is safe: changes of different fields together, anything else alone."""
    together: list[dict[str, Any]] = []
    taken: list[str] = []
    for finding in findings:
        patch = finding.patch
        if patch is None:
            continue
        if not patch.operations:
            if not together:
                yield patch
            continue
        if all(_is_of_a_field(operation) and _is_apart(operation["path"], taken) for operation in patch.operations):
            together += patch.operations
            taken += [operation["path"] for operation in patch.operations]
        elif not together:
            yield patch
            return
    if together:
        yield Patch(operations=tuple(together))


def _is_of_a_field(operation: dict[str, Any]) -> bool:
    """Whether it touches a field of an object, not an item of a list or the whole row."""
    last = operation["path"].rpartition("/")[2]
    return operation["op"] in ("add", "replace", "remove") and bool(last) and not last.isdigit()


def _is_apart(path: str, taken: list[str]) -> bool:
    return not any(path == other or path.startswith(other + "/") or other.startswith(path + "/") for other in taken)
