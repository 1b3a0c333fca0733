"""What the check of a data file has to say: problems with place, code and sentence, and how often each occurred.

However many problems a file has, a report stays small: the first 100 are kept with their place, all are counted.
"""

from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import msgspec

from tunewright.errors import quote
from tunewright.i18n import mark, translate

MAX_PROBLEMS = 100
MAX_WARNINGS_PER_CODE = 10
MAX_WRITTEN = 1_000_000
"""Problems that a file of all problems holds at most."""

Path = tuple[str | int, ...]
"""Where in a row: `("messages", 2, "role")`."""


class Edit(msgspec.Struct, frozen=True):
    """Replace `length` bytes at `offset` (from 0, in bytes of the line) by `text`."""

    offset: int
    length: int
    text: str


class Patch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A mend that is certain, in exactly one of four forms.

    - `operations`: JSON Patch (RFC 6902) on the row: `{"op": "replace", "path": "/messages/0/role", "value": "user"}`
    - `edits`: replacements in the line's bytes, for lines that are not JSON; offsets are of the line as it stands
    - `drop`: leave the line out
    - `rewrite`: the whole file, by name: `one_row_per_line`, `utf8` (from the encoding in the problem's `values`)
    """

    operations: tuple[dict[str, Any], ...] = ()
    edits: tuple[Edit, ...] = ()
    drop: bool = False
    rewrite: str | None = None


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that is wrong (`error`: the file is refused) or worth a look (`warning`).

    `message` is an English template, `values` fill it; `line` counts from 1 and `byte_offset` from 0, both in the file
    as uploaded; `pointer` is a JSON pointer into the row.
    """

    code: str
    severity: Literal["error", "warning"]
    message: str
    values: dict[str, Any] = {}
    line: int | None = None
    byte_offset: int | None = None
    pointer: str | None = None
    patch: Patch | None = None

    def text(self, language: str = "en") -> str:
        """The sentence in 'en' or 'zh'."""
        return translate(self.message, language, **self.values)

    def moved(self, lines: int) -> "Problem":
        """The same, `lines` lines further down."""
        if not lines or self.line is None:
            return self
        line = self.line + lines
        return msgspec.structs.replace(self, line=line, values={**self.values, "line": line})


class Report(msgspec.Struct, kw_only=True):
    """The result of a check. `problems` holds the first errors, then the first warnings; `counts` covers all of both.

    `bad_rows` counts lines with at least one error; `file_errors` errors of the file as a whole, which no job can put up with;
    `patchable` problems of each code that have a patch; `firsts` the first problem of each code of which `problems` has none.
    """

    kind: str | None = None
    rows: int = 0
    size_bytes: int = 0
    errors: int = 0
    warnings: int = 0
    bad_rows: int = 0
    file_errors: int = 0
    counts: dict[str, int] = {}
    patchable: dict[str, int] = {}
    statistics: dict[str, Any] = {}
    problems_truncated: bool = False
    problems: list[Problem] = []
    firsts: list[Problem] = []

    @property
    def ok(self) -> bool:
        """Whether the file may be used; warnings do not forbid it."""
        return self.errors == 0


class Tally(msgspec.Struct, kw_only=True):
    """What a `Reporter` has collected, as plain values: so one process can tell another."""

    errors: int = 0
    warnings: int = 0
    bad_rows: int = 0
    file_errors: int = 0
    counts: dict[str, int] = {}
    patchable: dict[str, int] = {}
    first_errors: list[Problem] = []
    first_warnings: list[Problem] = []
    firsts: dict[str, Problem] = {}
    written: int = 0
    truncated: bool = False


class Reporter:
    """Collects problems in bounded memory. A context manager if it writes: leaving it closes the file."""

    def __init__(self, problems_to: FilePath | None = None) -> None:
        """`problems_to`: a new file that gets every problem, one `Problem` as JSON per line, up to `MAX_WRITTEN`."""
        self.tally = Tally()
        self._bad_line: int | None = None
        self._stream: BinaryIO | None = None if problems_to is None else problems_to.open("wb", buffering=1 << 18)

    @property
    def writes(self) -> bool:
        """Whether every problem goes to a file."""
        return self._stream is not None

    @property
    def errors(self) -> int:
        """Errors so far."""
        return self.tally.errors

    @property
    def warnings(self) -> int:
        """Warnings so far."""
        return self.tally.warnings

    @property
    def counts(self) -> dict[str, int]:
        """How often each code occurred so far."""
        return self.tally.counts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(
        self,
        severity: Literal["error", "warning"],
        code: str,
        message: str,
        *,
        line: int | None = None,
        byte_offset: int | None = None,
        path: Path | None = None,
        patch: Patch | None = None,
        **values: object,
    ) -> None:
        """Count a problem, and keep it if it is among the first. `line` and `field` are filled into the sentence."""
        if severity == "error":
            if line is None:
                self.tally.file_errors += 1
            elif line != self._bad_line:
                self.tally.bad_rows += 1
                self._bad_line = line
        full = self._count(severity, code, patch is not None)
        if full and self._stream is None:
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
            patch=patch,
        )
        self._write(problem)
        if not full:
            self._keep(problem)

    def _count(self, severity: str, code: str, patchable: bool) -> bool:
        """Whether enough of this code are kept."""
        tally = self.tally
        found = tally.counts.get(code, 0)
        tally.counts[code] = found + 1
        if patchable:
            tally.patchable[code] = tally.patchable.get(code, 0) + 1
        if severity == "error":
            tally.errors += 1
            return found > 0 and len(tally.first_errors) >= MAX_PROBLEMS
        tally.warnings += 1
        return found > 0 and (found >= MAX_WARNINGS_PER_CODE or len(tally.first_warnings) >= MAX_PROBLEMS)

    def _keep(self, problem: Problem) -> None:
        tally = self.tally
        tally.firsts.setdefault(problem.code, problem)
        kept = tally.first_errors if problem.severity == "error" else tally.first_warnings
        if len(kept) < MAX_PROBLEMS:
            kept.append(problem)

    def _write(self, problem: Problem) -> None:
        if self._stream is None:
            return
        if self.tally.written < MAX_WRITTEN:
            self.tally.written += 1
            self._stream.write(msgspec.json.encode(problem) + b"\n")
        else:
            self.tally.truncated = True

    def absorb(self, other: Tally, written: FilePath | None, lines: int) -> None:
        """Take over what was collected of the part of the file after `lines` lines; `written` are all its problems.

        `other` counts its lines from 1 and is not to be used afterwards.
        """
        tally = self.tally
        tally.bad_rows += other.bad_rows
        tally.file_errors += other.file_errors
        known = [*other.first_errors, *other.first_warnings]
        codes = {problem.code for problem in known}
        known += [problem for code, problem in other.firsts.items() if code not in codes]
        for problem in known:
            # Counted one by one, so that the caps hold for all parts together; those not known follow as numbers.
            full = self._count(problem.severity, problem.code, problem.patch is not None)
            if not full:
                self._keep(problem.moved(lines))
            other.counts[problem.code] -= 1
            if problem.patch is not None:
                other.patchable[problem.code] -= 1
        for code, more in other.counts.items():
            tally.counts[code] = tally.counts.get(code, 0) + more
        for code, more in other.patchable.items():
            tally.patchable[code] = tally.patchable.get(code, 0) + more
        tally.errors += other.errors - sum(problem.severity == "error" for problem in known)
        tally.warnings += other.warnings - sum(problem.severity == "warning" for problem in known)
        tally.truncated |= other.truncated
        if written is not None and self._stream is not None:
            with written.open("rb") as stream:
                for text in stream:
                    self._write(_PROBLEM.decode(text).moved(lines))

    def report(self, kind: str | None, rows: int, size_bytes: int) -> Report:
        """All that was collected: first the errors, then the warnings, both by line."""
        tally = self.tally
        # The search for repeated rows comes after all lines, but its findings belong among the others.
        warnings = sorted(tally.first_warnings, key=lambda problem: (problem.line is None, problem.line or 0))
        problems = [*tally.first_errors, *warnings][:MAX_PROBLEMS]
        shown = {problem.code for problem in problems}
        return Report(
            kind=kind,
            rows=rows,
            size_bytes=size_bytes,
            errors=tally.errors,
            warnings=tally.warnings,
            bad_rows=tally.bad_rows,
            file_errors=tally.file_errors,
            counts=dict(sorted(tally.counts.items())),
            patchable=dict(sorted(tally.patchable.items())),
            problems_truncated=tally.truncated,
            problems=problems,
            firsts=[problem for code, problem in tally.firsts.items() if code not in shown],
        )


_PROBLEM = msgspec.json.Decoder(Problem)


class Row:
    """Where the rules of one row complain: it knows the line, they know the path inside it."""

    __slots__ = ("byte_offset", "line", "reporter")

    def __init__(self, reporter: Reporter, line: int, byte_offset: int) -> None:
        self.reporter = reporter
        self.line = line
        self.byte_offset = byte_offset

    def error(self, code: str, message: str, path: Path, *, patch: Patch | None = None, **values: object) -> None:
        """The row can't be used. `message` may use `{line}` and `{field}` besides `values`."""
        self._add("error", code, message, path, patch, values)

    def warn(self, code: str, message: str, path: Path, *, patch: Patch | None = None, **values: object) -> None:
        """The row is used as it is, but a person should know."""
        self._add("warning", code, message, path, patch, values)

    def _add(
        self,
        severity: Literal["error", "warning"],
        code: str,
        message: str,
        path: Path,
        patch: Patch | None,
        values: dict[str, object],
    ) -> None:
        add = self.reporter.add
        add(
            severity,
            code,
            message,
            line=self.line,
            byte_offset=self.byte_offset,
            path=path,
            patch=patch,
            **values,  # type: ignore[arg-type]
        )

    def missing(self, path: Path) -> None:
        """A field that must be there is not."""
        self.error("missing_field", mark("line {line}, {field} is missing"), path)

    def wrong_type(self, path: Path, expected: str, found: object, patch: Patch | None = None) -> None:
        """`expected` in JSON's words: `string`, `array`, `object`, or several."""
        self.error(
            "invalid_type",
            mark("line {line}, {field} must be of type {expected}, not {found}"),
            path,
            patch=patch,
            expected=expected,
            found=json_type(found),
        )

    def unknown_fields(self, value: dict[str, Any], known: frozenset[str], path: Path) -> None:
        """Count fields that no rule knows; they are ignored. An explicit null says nothing and is let pass."""
        from tunewright.datasets.mending import row_mends  # it makes patches, which are defined here

        for key in value.keys() - known:
            if value[key] is not None:
                sentence = mark("line {line}, {field} is not a known field and is ignored")
                patch = row_mends.unknown_field(value, key, known, path)
                # The key is the caller's text and may be megabytes long.
                self.warn("unknown_field", sentence, (*path, quote(key)), patch=patch)


def field_name(path: Path) -> str:
    """`messages[2].role`; the row itself is `row`."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += f".{part}" if name else part
    return name or "row"


def json_pointer(path: Path) -> str:
    """`/messages/2/role` (RFC 6901); the row itself is the empty text."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def json_type(value: object) -> str:
    """The word JSON has for the type of a parsed value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def shown(value: object) -> str:
    """A parsed value for use inside a sentence, at most 40 characters of it."""
    if isinstance(value, str):
        return f'"{quote(value)}"'
    if isinstance(value, (dict, list)):
        return json_type(value)
    return quote(msgspec.json.encode(value).decode())
