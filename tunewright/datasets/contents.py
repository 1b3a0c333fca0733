"""Rows of a stored dataset, page by page: never the whole file in memory, and no page costs more than another.

A cursor carries a place in the file, so the next page begins there. A page ends when it has enough rows, enough bytes, or
has looked at as much of the file as one request may; then its cursor goes on with the search.
"""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tunewright import strict_json
from tunewright.datasets.blob_keys import content_key
from tunewright.datasets.problem_list import read_problems
from tunewright.datasets.records import File
from tunewright.datasets.report import Problem
from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

if TYPE_CHECKING:
    from tunewright.storage import Blobs

SCANNED_BYTES = 64 * 2**20
"""How much of a file one request looks at."""
PAGE_BYTES = 4 * 2**20
"""A page with so much in it is full, however few its rows."""
PROBLEMS_OF_A_ROW = 20
_TEXT_CHARACTERS = 20_000
_CHUNK_BYTES = 256 * 1024
_NEAR_BYTES = 64 * 1024
_BOM = b"\xef\xbb\xbf"
_CURSOR = re.compile(r"r([0-9]{1,15})-([0-9]{1,15})|p([0-9]{1,15})")
_NOT_TEXT = frozenset({"role", "type"})
_ESCAPED = re.compile(r'["\\/\x00-\x1f]')


class ShownRow(msgspec.Struct, kw_only=True):
    """A line of the file: `data` if it is JSON, else `text`, the beginning of what stands there (None: longer than any line
    may be). `problems` are at most 20."""

    line: int
    data: bytes | None = None
    text: str | None = None
    problems: list[Problem] = []


class RowPage(NamedTuple):
    """`next_after` is where to go on; None at the end of the file."""

    rows: list[ShownRow]
    next_after: str | None


class Contents:
    """Every method blocks."""

    def __init__(self, blobs: "Blobs", max_line_bytes: int) -> None:
        self._blobs = blobs
        self._max_line_bytes = max_line_bytes

    def problems(self, file: File, *, code: str | None = None, severity: str | None = None) -> Iterator[Problem]:
        """All problems in order of their lines, those of the whole file first. Raises NotFound(`blob_missing`)."""
        for problem in read_problems(self._blobs, file):
            if code in (None, problem.code) and severity in (None, problem.severity):
                yield problem

    def rows(
        self, file: File, *, after: str | None = None, limit: int, search: str = "", problems_only: bool = False
    ) -> RowPage:
        """A page of at most `limit` rows that hold `search` in a text, in whatever case; blank lines are no rows.

        Raises InvalidRequest(`invalid_cursor`), NotFound(`blob_missing`).
        """
        page = _Page(limit, _Search(search) if search else None)
        if problems_only:
            return self._rows_with_problems(file, _line_of(after), page)
        line, start = self._place_of(file, after)
        place = start
        for found in self._lines(file, line, start):
            page.take(found.number, found.data)
            line, place = found.number, found.end
            if page.full or place - start >= SCANNED_BYTES:
                break
        self._add_problems(file, page.rows)
        return RowPage(page.rows, f"r{line}-{place}" if place < file.size_bytes else None)

    def _rows_with_problems(self, file: File, line: int, page: "_Page") -> RowPage:
        """The report leads: rows without problems are not even read."""
        groups = groupby(read_problems(self._blobs, file, line), key=lambda problem: problem.line or 0)
        looked_at = 0
        for line, group in groups:
            problems = list(islice(group, PROBLEMS_OF_A_ROW))
            data = self._line_at(file, problems[0].byte_offset)
            page.take(line, data, problems)
            looked_at += len(data or b"")
            if page.full or looked_at >= SCANNED_BYTES:
                return RowPage(page.rows, f"p{line}" if next(groups, None) else None)
        return RowPage(page.rows, None)

    def _place_of(self, file: File, after: str | None) -> tuple[int, int]:
        """(number of the last line seen, where the next one begins)."""
        if after is None:
            return 0, 0
        place = _CURSOR.fullmatch(after)
        if place is None or place[2] is None:
            raise _invalid_cursor(after)
        line, start = int(place[1]), int(place[2])
        before = b"".join(self._read(file, start - 1, start)) if 0 < start <= file.size_bytes else b""
        if before != b"\n":
            raise _invalid_cursor(after)
        return line, start

    def _lines(self, file: File, line: int, start: int) -> Iterator["_Line"]:
        """Every line from `start` on; what is too long is passed over in pieces."""
        end, rest, passed = start, b"", 0
        for chunk in self._read(file, start):
            *whole, rest = (rest + chunk).split(b"\n")
            for data in whole:
                line += 1
                end += passed + len(data) + 1
                yield _Line(line, self._fitting(data, line, passed), end)
                passed = 0
            if len(rest) > self._max_line_bytes + 1:
                passed += len(rest)
                rest = b""
        if rest or passed:
            yield _Line(line + 1, self._fitting(rest, line + 1, passed), end + passed + len(rest))

    def _fitting(self, data: bytes, line: int, passed: int = 0) -> bytes | None:
        if line == 1:
            data = data.removeprefix(_BOM)
        return None if passed or len(data) > self._max_line_bytes else data

    def _line_at(self, file: File, offset: int | None) -> bytes | None:
        """The line that holds the byte at `offset`; None if it is too long to be shown."""
        if offset is None:
            return None
        reach = _NEAR_BYTES
        while True:
            low = max(0, offset - reach)
            begin = b"".join(self._read(file, low, offset)).rfind(b"\n") + 1
            if begin or low == 0:
                break
            if reach > self._max_line_bytes:
                return None
            reach *= 8
        start, data = low + begin, b""
        for chunk in self._read(file, start, start + self._max_line_bytes + 2):
            head, newline, _ = chunk.partition(b"\n")
            data += head
            if newline:
                break
        return self._fitting(data, 0 if start else 1)

    def _add_problems(self, file: File, rows: list[ShownRow]) -> None:
        if not rows:
            return
        by_line = {row.line: row.problems for row in rows}
        for problem in read_problems(self._blobs, file, rows[0].line - 1):
            if (problem.line or 0) > rows[-1].line:
                break
            found = by_line.get(problem.line or 0)
            if found is not None and len(found) < PROBLEMS_OF_A_ROW:
                found.append(problem)

    def _read(self, file: File, start: int, end: int | None = None) -> Iterator[bytes]:
        return self._blobs.read(content_key(file.project_id, file.id), _CHUNK_BYTES, start, end)


class _Line(NamedTuple):
    """`data` without the line end, None if too long; `end` is where the next line begins."""

    number: int
    data: bytes | None
    end: int


class _Page:
    """Takes rows until it is full."""

    def __init__(self, limit: int, search: "_Search | None") -> None:
        self.rows: list[ShownRow] = []
        self._limit = limit
        self._search = search
        self._bytes = 0

    @property
    def full(self) -> bool:
        return len(self.rows) >= self._limit or self._bytes >= PAGE_BYTES

    def take(self, line: int, data: bytes | None, problems: list[Problem] | None = None) -> None:
        """Add the line if it is a row and what is searched for."""
        if data is not None and (not data or data.isspace()):
            return
        if self._search is not None and not (data and self._search.finds(data)):
            return
        self._bytes += len(data or b"")
        self.rows.append(_shown(line, data, problems or []))


def _shown(line: int, data: bytes | None, problems: list[Problem]) -> ShownRow:
    if data is None:
        return ShownRow(line=line, problems=problems)
    data = data.removesuffix(b"\r")
    try:
        strict_json.loads(data)
    except InvalidRequest:
        text = data[: 4 * _TEXT_CHARACTERS].decode("utf-8", "replace")[:_TEXT_CHARACTERS]
        return ShownRow(line=line, text=text, problems=problems)
    return ShownRow(line=line, data=data, problems=problems)


class _Search:
    """A substring of any text in a row, in whatever case. Names of fields and roles are no texts."""

    def __init__(self, text: str) -> None:
        self._text = text.casefold()
        self._plain = _ESCAPED.search(text) is None

    def finds(self, data: bytes) -> bool:
        """Whether the row holds the text. The raw line decides where it can: to parse every row would take far longer."""
        raw = data.decode("utf-8", "replace")
        if self._plain and b"\\u" not in data and self._text not in raw.casefold():
            return False
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._text in raw.casefold()
        return any(self._text in text.casefold() for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting.extend(inner for name, inner in value.items() if name not in _NOT_TEXT)
        elif isinstance(value, list):
            waiting.extend(value)


def _line_of(after: str | None) -> int:
    """The number of the last line seen."""
    place = _CURSOR.fullmatch(after or "p0")
    if place is None or place[3] is None:
        raise _invalid_cursor(after or "")
    return int(place[3])


def _invalid_cursor(after: str) -> InvalidRequest:
    return InvalidRequest("invalid_cursor", mark("{value} is no place in this list"), param="after", value=quote(after))
