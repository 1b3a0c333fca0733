"""What the check of a data file has to say: problems with place, code and sentence, and how often each occurred.

However many problems a file has, a report stays small: the first 100 are kept with their place, all are counted.
"""

from typing import Any, Literal

import msgspec

from tunewright.errors import quote
from tunewright.i18n import mark, translate

MAX_PROBLEMS = 100
MAX_WARNINGS_PER_CODE = 10

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


class Reporter:
    """Collects problems in bounded memory."""

    def __init__(self) -> None:
        self.errors = 0
        self.warnings = 0
        self.bad_rows = 0
        self.file_errors = 0
        self.counts: dict[str, int] = {}
        self.patchable: dict[str, int] = {}
        self._bad_line: int | None = None
        self._kept: dict[str, list[Problem]] = {"error": [], "warning": []}
        self._firsts: dict[str, Problem] = {}

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
        found = self.counts.get(code, 0)
        if patch is not None:
            self.patchable[code] = self.patchable.get(code, 0) + 1
        self.counts[code] = found + 1
        if severity == "error":
            self.errors += 1
            if line is None:
                self.file_errors += 1
            elif line != self._bad_line:
                self.bad_rows += 1
                self._bad_line = line
        else:
            self.warnings += 1
        kept = self._kept[severity]
        full = len(kept) >= MAX_PROBLEMS or (severity == "warning" and found >= MAX_WARNINGS_PER_CODE)
        if full and found:
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
        if not found:
            self._firsts[code] = problem
        if not full:
            kept.append(problem)

    def report(self, kind: str | None, rows: int, size_bytes: int) -> Report:
        """All that was collected."""
        problems = [*self._kept["error"], *self._kept["warning"]][:MAX_PROBLEMS]
        shown = {problem.code for problem in problems}
        return Report(
            kind=kind,
            rows=rows,
            size_bytes=size_bytes,
            errors=self.errors,
            warnings=self.warnings,
            bad_rows=self.bad_rows,
            file_errors=self.file_errors,
            counts=dict(sorted(self.counts.items())),
            patchable=dict(sorted(self.patchable.items())),
            problems=problems,
            firsts=[problem for code, problem in self._firsts.items() if code not in shown],
        )


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

    def wrong_type(self, path: Path, expected: str, found: object) -> None:
        """`expected` in JSON's words: `string`, `array`, `object`, or several."""
        self.error(
            "invalid_type",
            mark("line {line}, {field} must be of type {expected}, not {found}"),
            path,
            expected=expected,
            found=json_type(found),
        )

    def unknown_fields(self, value: dict[str, Any], known: frozenset[str], path: Path) -> None:
        """Count fields that no rule knows; they are ignored. An explicit null says nothing and is let pass."""
        for key in value.keys() - known:
            if value[key] is not None:
                # The key is the caller's text and may be megabytes long.
                self.warn(
                    "unknown_field",
                    mark("line {line}, {field} is not a known field and is ignored"),
                    (*path, quote(key)),
                )


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
