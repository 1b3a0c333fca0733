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

    def text(self, language: str = "en") -> str:
        """The sentence in 'en' or 'zh'."""
        return translate(self.message, language, **self.values)


class Report(msgspec.Struct, kw_only=True):
    """The result of a check. `problems` holds the first errors, then the first warnings; `counts` covers all of both."""

    kind: str | None = None
    rows: int = 0
    size_bytes: int = 0
    errors: int = 0
    warnings: int = 0
    counts: dict[str, int] = {}
    problems: list[Problem] = []

    @property
    def ok(self) -> bool:
        """Whether the file may be used; warnings do not forbid it."""
        return self.errors == 0


class Reporter:
    """Collects problems in bounded memory."""

    def __init__(self) -> None:
        self.errors = 0
        self.warnings = 0
        self.counts: dict[str, int] = {}
        self._kept: dict[str, list[Problem]] = {"error": [], "warning": []}

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
        """Count a problem, and keep it if it is among the first. `line` and `field` are filled into the sentence."""
        found = self.counts.get(code, 0)
        self.counts[code] = found + 1
        if severity == "error":
            self.errors += 1
        else:
            self.warnings += 1
        kept = self._kept[severity]
        if len(kept) >= MAX_PROBLEMS or (severity == "warning" and found >= MAX_WARNINGS_PER_CODE):
            return
        if line is not None:
            values["line"] = line
        if path is not None:
            values["field"] = field_name(path)
        kept.append(
            Problem(
                code=code,
                severity=severity,
                message=message,
                values=values,
                line=line,
                byte_offset=byte_offset,
                pointer=None if path is None else json_pointer(path),
            )
        )

    def report(self, kind: str | None, rows: int, size_bytes: int) -> Report:
        """All that was collected."""
        return Report(
            kind=kind,
            rows=rows,
            size_bytes=size_bytes,
            errors=self.errors,
            warnings=self.warnings,
            counts=dict(sorted(self.counts.items())),
            problems=[*self._kept["error"], *self._kept["warning"]][:MAX_PROBLEMS],
        )


class Row:
    """Where the rules of one row complain: it knows the line, they know the path inside it."""

    __slots__ = ("byte_offset", "line", "reporter")

    def __init__(self, reporter: Reporter, line: int, byte_offset: int) -> None:
        self.reporter = reporter
        self.line = line
        self.byte_offset = byte_offset

    def error(self, code: str, message: str, path: Path, **values: object) -> None:
        """The row can't be used. `message` may use `{line}` and `{field}` besides `values`."""
        self.reporter.add("error", code, message, line=self.line, byte_offset=self.byte_offset, path=path, **values)

    def warn(self, code: str, message: str, path: Path, **values: object) -> None:
        """The row is used as it is, but a person should know."""
        self.reporter.add("warning", code, message, line=self.line, byte_offset=self.byte_offset, path=path, **values)

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
