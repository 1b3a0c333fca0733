"""Broken JSON made whole, where there is only one way to read it.

One linear pass with a reader that forgives what people and other languages write: trailing and forgotten commas, single
or curly quotes, `True` and `None`, comments, raw line breaks and tabs inside texts, keys without quotes, several objects on
one line. Whatever it does not understand ends the attempt, and what comes out must pass the strict parser.
"""

import json
import re
from typing import NamedTuple

from tunewright import strict_json
from tunewright.datasets.report import Edit, Patch
from tunewright.errors import InvalidRequest

MAX_EDITS = 400
MAX_TOKENS = 100_000
"""Bounds the work for one line: about a quarter of a second."""

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SINGLE = re.compile(r"'((?:[^'\\\n]++|\\['\"\\/bfnrt])*+)'(?=[ \t\r\n]*(?:[,:}\]]|$))")
_IN_SINGLE = re.compile(r"\\.|\"")
_CURLY = re.compile(r"[“”]([^“”\"\\\n]*)[“”](?=[ \t\r\n]*[,:，：}\]])")
_SCALAR = re.compile(r"(?:-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null)(?![A-Za-z0-9_.+-])")
_WORD = re.compile(r"(?:True|TRUE|False|FALSE|None|NULL|Null)(?![A-Za-z0-9_])")
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}
_BARE_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,60})(?=[ \t]*:)")
_COMMENT = re.compile(r"//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f]|\\'")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f", "\\'": "'"}
_CLOSING = {"{": "}", "[": "]"}


class Fault(NamedTuple):
    """One place to mend: the edit, and the word that `strict_json` has for what is wrong there."""

    reason: str
    edit: Edit


def mend(data: bytes) -> Patch | None:
    """The edits that make `data` (one line) valid, or None if that is not certain.

    `data` with the edits applied is one JSON value per line: a newline is put between objects that share a line.
    """
    found = faults(data)
    return Patch(edits=tuple(fault.edit for fault in found)) if found else None


def faults(data: bytes) -> list[Fault]:
    """The places to mend, from left to right; empty if there is nothing to mend or no certain way to do it."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return []
    reader = _Reader(text)
    try:
        reader.read()
    except _GivenUp:
        return []
    found = _in_bytes(text, reader.found)
    try:
        for line in edited(data, [fault.edit for fault in found]).split(b"\n") if reader.several else ():
            strict_json.loads(line)
        if not reader.several:
            strict_json.loads(edited(data, [fault.edit for fault in found]))
    except InvalidRequest:
        return []
    return found


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """`data` with all edits made; their offsets are of `data` as it stands, from left to right and without overlap."""
    pieces: list[bytes] = []
    place = 0
    for edit in edits:
        pieces += [data[place : edit.offset], edit.text.encode()]
        place = edit.offset + edit.length
    return b"".join([*pieces, data[place:]])


def _in_bytes(text: str, found: list[tuple[str, int, int, str]]) -> list[Fault]:
    """Edits in characters -> edits in bytes."""
    result: list[Fault] = []
    place = offset = 0
    for reason, start, end, new in sorted(found, key=lambda item: item[1]):
        if start < place:
            return []  # two edits of one place: no certain reading
        offset += len(text[place:start].encode())
        length = len(text[start:end].encode())
        result.append(Fault(reason, Edit(offset=offset, length=length, text=new)))
        place, offset = end, offset + length
    return result


class _GivenUp(Exception):
    """There is no certain reading."""


class _Reader:
    """Reads a text leniently and notes (reason, start, end, new text) in characters wherever it had to forgive."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.after = 0
        """Where the last value ended: a forgotten comma belongs there."""
        self.stack: list[str] = []
        self.found: list[tuple[str, int, int, str]] = []
        self.several = False

    def read(self) -> None:
        """Go over the whole text. Raises _GivenUp."""
        if self.text.startswith("\ufeff"):
            self._note("byte_order_mark", 0, 1, "")
            self.place = 1
        for _ in range(MAX_TOKENS):
            self._value()
            if not self._next():
                return
        raise _GivenUp

    def _note(self, reason: str, start: int, end: int, new: str) -> None:
        if len(self.found) >= MAX_EDITS:
            raise _GivenUp
        self.found.append((reason, start, end, new))

    def _peek(self) -> str:
        """The next character that counts, or the empty text; comments are taken out."""
        while True:
            found = _SPACE.match(self.text, self.place)
            self.place = found.end() if found else self.place
            here = self.text[self.place : self.place + 1]
            if not here or here not in "/#":
                return here
            comment = _COMMENT.match(self.text, self.place)
            if comment is None:
                raise _GivenUp
            self._note("comment", comment.start(), comment.end(), "")
            self.place = comment.end()

    def _value(self) -> None:
        """Read one scalar, or open an object or list and read to its first scalar, or over an empty one."""
        while (here := self._peek()) in ("{", "["):
            self.stack.append(here)
            self.place += 1
            if len(self.stack) > strict_json.MAX_DEPTH:
                raise _GivenUp
            if self._peek() == _CLOSING[here]:
                self._close()
                return
            if here == "{":
                self._key()
        self._scalar(here)
        self.after = self.place

    def _close(self) -> None:
        self.stack.pop()
        self.place += 1
        self.after = self.place

    def _key(self) -> None:
        here = self._peek()
        bare = _BARE_KEY.match(self.text, self.place)
        if bare is not None:
            self._note("key", bare.start(), bare.end(), f'"{bare[0]}"')
            self.place = bare.end()
        elif not here or here not in "\"'“”" or not self._quoted(here):
            raise _GivenUp
        here = self._peek()
        if here == "：":
            self._note("colon", self.place, self.place + 1, ":")
        elif here != ":":
            raise _GivenUp
        self.place += 1

    def _scalar(self, here: str) -> None:
        if here and here in "\"'“”" and self._quoted(here):
            return
        if found := _SCALAR.match(self.text, self.place):
            self.place = found.end()
        elif found := _WORD.match(self.text, self.place):
            self._note("python_word", found.start(), found.end(), _WORDS[found[0].lower()])
            self.place = found.end()
        else:
            raise _GivenUp

    def _quoted(self, quote: str) -> bool:
        if quote == '"':
            found = _STRING.match(self.text, self.place)
            if found is not None:
                self._note_characters(found.start(), found.end())
                self.place = found.end()
            return found is not None
        found = (_SINGLE if quote == "'" else _CURLY).match(self.text, self.place)
        if found is None:
            return False
        inner = found[1]
        if quote == "'":
            inner = _IN_SINGLE.sub(_in_double, inner)
        self._note("single_quotes", found.start(), found.end(), f'"{inner}"')
        self.place = found.end()
        return True

    def _note_characters(self, start: int, end: int) -> None:
        """Raw control characters inside a text, and the escaped apostrophe of other languages."""
        body = self.text[start:end]
        if body.isprintable() and "\\'" not in body:
            return
        escaped = {i for i, _ in _escaped_places(body)} if "\\" in body else set()
        for found in _CONTROL.finditer(body):
            if found[0] == "\\'" and found.start() not in escaped:
                continue
            new = _ESCAPES.get(found[0])
            if new is None:
                new = json.dumps(found[0])[1:-1]
            reason = "escape" if found[0] == "\\'" else "control_character"
            self._note(reason, start + found.start(), start + found.end(), new)

    def _next(self) -> bool:
        """Go on behind a value: close what ends here, step over the comma. False at the end of the text."""
        while self.stack:
            here = self._peek()
            if here == _CLOSING[self.stack[-1]]:
                self._close()
            elif here and here in ",，":
                comma = self.place
                self.place += 1
                if self._peek() == _CLOSING[self.stack[-1]]:
                    self._note("trailing_comma", comma, comma + 1, "")
                    self._close()
                    continue
                if here == "，":
                    self._note("comma", comma, comma + 1, ",")
                self._begin_member()
                return True
            else:
                self._forgotten_comma(here)
                return True
        return self._next_object()

    def _begin_member(self) -> None:
        if self.stack[-1] == "{":
            self._key()

    def _forgotten_comma(self, here: str) -> None:
        """A value follows a value. Two texts need room between them: else it may be one text with quotes inside."""
        apart = self.place > self.after
        if not here or here not in "{[\"'" or (here in "\"'" and not apart):
            raise _GivenUp
        if here in "{[" and self.stack[-1] == "{":
            raise _GivenUp
        self._note("comma", self.after, self.after, ",")
        self._begin_member()

    def _next_object(self) -> bool:
        """At the top: the end, a comma too many before it, or one more object."""
        here = self._peek()
        if not here:
            return False
        if here == ",":
            comma = self.place
            self.place += 1
            if not self._peek():
                self._note("trailing_data", comma, comma + 1, "")
                return False
            self._note("trailing_data", comma, self.place, "\n")
        elif here == "{":
            self._note("trailing_data", self.after, self.place, "\n")
        if self._peek() != "{" or "\n" in self.text:
            raise _GivenUp
        self.several = True
        return True


def _in_double(found: re.Match[str]) -> str:
    """What a character or escape of a text in single quotes is in double quotes."""
    return {"\\'": "'", '"': '\\"'}.get(found[0], found[0])


def _escaped_places(body: str) -> list[tuple[int, str]]:
    """(index of the backslash, the character behind it) of every escape."""
    return [(found.start(), found[0][1]) for found in re.finditer(r"\\.", body, re.DOTALL)]
