"""Files of pretty-printed JSON: objects over many lines, one after another or in one list, read as rows.

Such a file is not JSONL and is refused, but its report says what is wrong inside it, with the lines of the file, and a repair
writes each object on a line of its own.
"""

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from tunewright import strict_json
from tunewright.datasets.mending.broken_json import edited, faults
from tunewright.datasets.report import Edit, Patch, Path, Reporter, Row
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark

MAX_LOOKED_AT = 32 << 20
"""So many bytes of a file are looked at for faults: it has to be rewritten anyway."""
MAX_PLACED = 200
"""Faults whose place inside an object is looked for; further ones are placed where their object begins."""
_PIECE_BYTES = 1 << 18
_MARK = re.compile(rb'["{}\[\]]')
_INSIDE = re.compile(rb'(?:[^"\\\n]++|\\[^\n])*+')
_SPACE = b" \t\r\n,"


class Document(NamedTuple):
    """An object, or what stands between two of them. `line` counts from 1, `byte_offset` from 0; both are where it begins.

    `before` bytes stand before it on its line. `data` is None if it is longer than the limit.
    """

    number: int
    line: int
    byte_offset: int
    before: int
    data: bytes | None


def read(stream: BinaryIO, max_bytes: int) -> Iterator[Document]:
    """The objects from where `stream` stands, in order; never holds more than about `max_bytes`.

    Brackets decide where an object ends. One with brackets left open ends before the next that begins a line at its column.
    """
    splitter = _Splitter(stream.tell(), max_bytes)
    while piece := stream.readline(_PIECE_BYTES):
        yield from splitter.feed(piece)
    yield from splitter.end()


class _Splitter:
    def __init__(self, offset: int, max_bytes: int) -> None:
        self.offset = offset
        self.max_bytes = max_bytes
        self.number = 0
        self.line = 1
        self.line_begin = offset
        self.depth = 0
        self.in_text = False
        self.escaped = False
        self.at_line_start = True
        self.begun: tuple[int, int, int] | None = None
        """Line, offset, and bytes before it on its line, of the object or the text that is being read."""
        self.column: int | None = None
        """Of an object that begins a line."""
        self.indented = False
        """Whether its second line is indented further: so it is laid out by depth."""
        self.last = b""
        self.held: list[bytes] = []
        self.size = 0

    def feed(self, piece: bytes) -> Iterator[Document]:
        """Take in the next bytes: a line, or a part of a long one."""
        place = 0
        if self.at_line_start:
            self.line_begin = self.offset
            if self.begun is not None and self._begins_anew(piece):
                yield self._taken()
            self.in_text = False  # a text can't go on over the end of a line
        if self.in_text:
            place = self._skip_text(piece, 0)
        start = 0
        while not self.in_text and (found := _MARK.search(piece, place)):
            place = found.end()
            if found[0] == b'"':
                self.in_text = True
                place = self._skip_text(piece, place)
            elif found[0] in b"{[":
                if self.depth == 0:
                    yield from self._between(piece, start, found.start())
                    start = place
                    if found[0] == b"[":
                        continue
                    start = found.start()
                    self._begin(piece, start)
                self.depth += 1
            elif self.depth > 0:
                self.depth -= 1
                if self.depth == 0:
                    self._hold(piece[start:place])
                    yield self._taken()
                    start = place
            elif found[0] == b"]":
                yield from self._between(piece, start, found.start())
                start = place
        yield from self._rest(piece, start)

    def _rest(self, piece: bytes, start: int) -> Iterator[Document]:
        if self.depth > 0:
            self._hold(piece[start:])
        else:
            yield from self._between(piece, start, len(piece))
        self.last = piece.rstrip(_SPACE[:4])[-1:] or self.last
        self.offset += len(piece)
        self.at_line_start = piece.endswith(b"\n")
        self.line += self.at_line_start

    def end(self) -> Iterator[Document]:
        """What is left at the end of the file."""
        if self.begun is not None:
            yield self._taken()

    def _begins_anew(self, piece: bytes) -> bool:
        """Whether this line begins an object at the column of the one being read, which can't be inside it."""
        indent = len(piece) - len(piece.lstrip(b" \t"))
        if self.column is not None and not self.indented and self.held and self.held[-1].endswith(b"\n"):
            self.indented = indent > self.column
        if self.column is None or not self.indented or indent > self.column:
            return False
        return piece[indent : indent + 1] == b"{" and self.last not in (b",", b"[", b":")

    def _skip_text(self, piece: bytes, place: int) -> int:
        """Where the text ends in which `place` is; at the end of the piece it may go on."""
        if self.escaped:
            self.escaped = False
            place += 1
        found = _INSIDE.match(piece, place)
        place = found.end() if found else place
        if place >= len(piece):
            return place
        if piece[place : place + 1] == b"\\":
            self.escaped = place + 1 == len(piece)
            self.in_text = self.escaped
            return len(piece) if self.escaped else place + 1
        self.in_text = False
        return place + 1

    def _begin(self, piece: bytes, place: int) -> None:
        self.begun = self._here(self.offset + place)
        at_start = self.at_line_start and not piece[:place].strip(b" \t")
        self.column = place if at_start else None
        self.indented = False

    def _here(self, offset: int) -> tuple[int, int, int]:
        return self.line, offset, offset - self.line_begin

    def _hold(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= self.max_bytes:
            self.held.append(data)
        else:
            self.held.clear()

    def _between(self, piece: bytes, start: int, end: int) -> Iterator[Document]:
        """What stands outside all objects is one only if it is more than space, commas and the brackets of a list."""
        text = piece[start:end].lstrip(_SPACE)
        if text.startswith(b"\xef\xbb\xbf") and self.offset + start == 0:
            text = text[3:].lstrip(_SPACE)
        if text.strip(_SPACE):
            self.begun = self._here(self.offset + end - len(text))
            self._hold(text.rstrip(_SPACE))
            yield self._taken()

    def _taken(self) -> Document:
        self.number += 1
        data = b"".join(self.held) if self.size <= self.max_bytes else None
        document = Document(self.number, *(self.begun or self._here(self.offset)), data)
        self.held.clear()
        self.size = self.depth = 0
        self.begun = self.column = None
        return document


def on_one_line(data: bytes) -> bytes:
    """A valid document without its line breaks and what they are indented by: none of them can be inside a text."""
    return re.sub(rb"[ \t\r]*\n[ \t\r\n]*", b"", data).strip()


def whole(data: bytes) -> bytes:
    """The document on one line, mended if it is broken and the mend is certain."""
    try:
        strict_json.loads(data)
        return on_one_line(data)
    except InvalidRequest:
        found = faults(data)
    if found:
        return on_one_line(edited(data, [fault.edit for fault in found]))
    # Not to be mended: but a row must be a line, even a bad one.
    return data.replace(b"\r", b" ").replace(b"\n", b" ").strip()


# --- the report ------------------------------------------------------------------------------------------------------


def check(stream: BinaryIO, reporter: Reporter, max_bytes: int, *, training: bool) -> tuple[str | None, int]:
    """Report what is wrong inside the objects, in the first 32 MiB. The answer is their kind and how many they are.

    The problems have the line and the byte of the fault in the file; edits are of that line, other patches of the row.
    """
    from tunewright.datasets.checking.line_check import check_line

    kind: str | None = None
    number = 0
    for document in read(stream, max_bytes):
        number = document.number
        if document.byte_offset > MAX_LOOKED_AT:
            break
        row = _DocumentRow(reporter, document)
        if document.data is None:
            row.error(
                "line_too_long", mark("line {line}: an object longer than {limit} bytes begins"), (), limit=max_bytes
            )
            continue
        if not _report_syntax(reporter, document, document.data):
            kind = check_line(row, document.data, training=training).kind or kind
    return kind, number


class _DocumentRow(Row):
    """Places problems where they are inside a document."""

    __slots__ = ("document",)

    def __init__(self, reporter: Reporter, document: Document) -> None:
        super().__init__(reporter, document.line, document.byte_offset)
        self.document = document

    def _add(
        self, severity: Any, code: str, message: str, path: Path, patch: Patch | None, values: dict[str, object]
    ) -> None:
        document = self.document
        if document.data is not None and sum(self.reporter.counts.values()) < MAX_PLACED:
            place = place_of(document.data, path)
            self.line = document.line + document.data.count(b"\n", 0, place)
            self.byte_offset = document.byte_offset + place
        super()._add(severity, code, message, path, patch, values)


def _report_syntax(reporter: Reporter, document: Document, data: bytes) -> bool:
    """Report what makes the document invalid JSON: each place to mend, or the first fault. False if nothing does."""
    from tunewright.datasets.checking.line_check import worded

    try:
        strict_json.loads(data)
        return False
    except InvalidRequest as error:
        refused = error
    for fault in faults(data):
        place = fault.edit.offset
        start = data.rfind(b"\n", 0, place) + 1
        # Edits are of the line of the file: the first line of an object may have more before it.
        before = 0 if start else document.before
        edit = Edit(offset=place - start + before, length=fault.edit.length, text=fault.edit.text)
        reporter.add(
            "error",
            "invalid_json",
            strict_json.SYNTAX_SENTENCES[fault.reason],
            line=document.line + data.count(b"\n", 0, place),
            byte_offset=document.byte_offset + place,
            patch=Patch(edits=(edit,)),
            column=len(data[start:place].decode()) + 1 + before,
            reason=fault.reason,
            found=data[place : place + fault.edit.length].decode(),
        )
        refused = None
    if refused is not None:
        code, sentence, values = worded(data, document.byte_offset, refused)
        offset = refused.values.get("offset")
        place = offset if isinstance(offset, int) else 0
        line = document.line + data.count(b"\n", 0, place)
        reporter.add("error", code, sentence, line=line, byte_offset=document.byte_offset + place, **values)
    return True


_KEY = re.compile(rb'[\s,]*("(?:[^"\\]++|\\.)*+")\s*:\s*', re.DOTALL)
_VALUE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[^\s,:{}\[\]"]+', re.DOTALL)
_NEXT = re.compile(rb"[\s,]*")
_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]', re.DOTALL)


def place_of(data: bytes, path: Path) -> int:
    """The byte in valid JSON where the value at `path` begins, or the innermost object or list around it if it is missing."""
    place = _skip(_NEXT, data, 0)
    for part in path:
        found = _member_place(data, place, part)
        if found is None:
            break
        place = found
    return place


def _member_place(data: bytes, place: int, part: str | int) -> int | None:
    if data[place : place + 1] != (b"{" if isinstance(part, str) else b"["):
        return None
    place += 1
    index = 0
    while True:
        place = _skip(_NEXT, data, place)
        if data[place : place + 1] in (b"}", b"]", b""):
            return None
        if isinstance(part, str):
            key = _KEY.match(data, place)
            if key is None:
                return None
            place = key.end()
            if strict_json.loads(key[1]) == part:
                return place
        elif index == part:
            return place
        index += 1
        place = _behind(data, place)


def _skip(pattern: re.Pattern[bytes], data: bytes, place: int) -> int:
    found = pattern.match(data, place)
    return found.end() if found else place


def _behind(data: bytes, place: int) -> int:
    """Where the value ends that begins at `place`."""
    if data[place : place + 1] not in (b"{", b"["):
        return max(place + 1, _skip(_VALUE, data, place))
    depth = 0
    for found in _BRACKET.finditer(data, place):
        depth += found[0] in (b"{", b"[")
        depth -= found[0] in (b"}", b"]")
        if depth == 0:
            return found.end()
    return len(data)
