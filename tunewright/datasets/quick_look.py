r"""A cheap look at raw lines: may `hints.look` have something to say of them? Yes too often, never no too often.

Every pattern of `hints.py` and `personal_data.py` holds a byte that most texts have seldom: `<`, `-`, `@`, a backslash ...
Lines are searched from one such byte to the next; for blocks of lines numpy finds the places where the bytes around
fit too, at about a gigabyte per second. What an escape might change (the "n" of "\n" stands before a match, "\u003c" is a
"<") is never trusted.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_SPECIAL = re.compile("<(?:(?:[|]|｜)(?:[A-Za-z0-9_]|▁){1,40}(?:[|]|｜)>|</?SYS>>|/s>|(?:start|end)_of_turn>)".encode())
_BRACKETED = re.compile(rb"\[(?:[gs]?MASK|/?INST)\]")
_INVISIBLE_E2 = re.compile(rb"\xe2(?:\x80[\x8b\x8e\x8f\xaa-\xae]|\x81[\xa0-\xaf])")
_INVISIBLE_C2 = re.compile(rb"\xc2[\x80-\x9f]")
_MARKS = re.compile(rb"(?:\xcc[\x80-\xbf]|\xcd[\x80-\xaf]){9}")
_DASHED = re.compile(rb"-(?:(?<=sk-)[A-Za-z0-9_-]{20}|(?<=xox[abprs]-)[A-Za-z0-9-]{10}|(?<=-----)BEGIN )")
_UNDERSCORED = re.compile(
    rb"_(?:(?<=gh[pousr]_)[A-Za-z0-9]{36}|(?<=github_pat_)[A-Za-z0-9_]{22}|(?<=hf_)[A-Za-z0-9]{30})"
)
_ACCESS_KEY = re.compile(rb"K(?<=AK)IA[0-9A-Z]{16}")
_API_KEY = re.compile(rb"z(?<=AIz)a[A-Za-z0-9_-]{35}")
_EMAIL = re.compile(rb"@(?!example\.)[A-Za-z0-9-]{1,63}\.[A-Za-z0-9]")
# Control characters, and escapes of: ASCII (a "<" may begin a token), invisible characters, combining marks, the wide bar.
# The first backslash of a run is taken, then pairs of them: "\\b" in JSON is a backslash and a letter.
_ESCAPE = re.compile(
    rb"\\(?<!\\\\)(?:\\\\)*"
    rb"(?:[bf]|u(?:00[0-9]|03[0-6]|20(?:0[bBeEfF]|2[a-eA-E]|6)|[fF][eE][fF][fF]|[fF][fF]5[cC]))"
)
_HEX_KEY = re.compile(rb"[0-9a-f]{32}\.[A-Za-z0-9]{16}")
_NUMBER = re.compile(
    rb"[0-9]{15}|[0-9]{0,4}1[3-9][0-9]{9}|1[3-9][0-9][ -][0-9]{4}[ -][0-9]{4}"
    rb"|[0-9]{4}[ -][0-9]{4}[ -][0-9]{4}[ -][0-9]{3}"
)
_HEX_BYTES = bytes(ord("0") if chr(b) in "0123456789abcdef" else ord(" ") for b in range(256))
_NUMBER_BYTES = bytes(
    ord("0") if chr(b) in "0123456789" else ord("-") if chr(b) in " -" else ord("x") for b in range(256)
)
_NUMBER_SHAPES = (b"0" * 11, b"000-0000-0000", b"0000-0000-0000-000")

_BLOCK_BYTES = 1 << 15
"""From here on numpy is faster."""
_CHUNK_BYTES = 1 << 18


def may_need_look(data: bytes) -> bool:
    """False only if `hints.look` would say nothing of any of the lines in `data` (one line, or a block of many).

    Ordinary texts in Chinese and English answer False.
    """
    if len(data) >= _BLOCK_BYTES:
        return _block_may_need_look(data)
    anchored = (
        *((b"<", _SPECIAL), (b"[", _BRACKETED), (b"-", _DASHED), (b"_", _UNDERSCORED)),
        *((b"K", _ACCESS_KEY), (b"z", _API_KEY), (b"@", _EMAIL), (b"\\", _ESCAPE)),
    )
    if any(first in data and _follows(pattern, data, first) for first, pattern in anchored):
        return True
    if b"\x7f" in data or (not data.isascii() and _may_hold_invisible(data)):
        return True
    # 32 hexadecimal digits in a row touch four samples of every eighth byte.
    if b"0000" in data[::8].translate(_HEX_BYTES) and _HEX_KEY.search(data):
        return True
    shape = data.translate(_NUMBER_BYTES)
    return any(form in shape and _holds_number(data, shape, form) for form in _NUMBER_SHAPES)


def _follows(pattern: re.Pattern[bytes], data: bytes, first: bytes) -> bool:
    """Whether `pattern`, which begins with the byte `first`, is in `data`: by jumps, unless that byte is frequent."""
    start = data.find(first)
    for _ in range(5 + len(data) // 500):
        if start < 0:
            return False
        if pattern.match(data, start):
            return True
        start = data.find(first, start + 1)
    return start >= 0 and pattern.search(data, start) is not None


def _may_hold_invisible(data: bytes) -> bool:
    return (
        (b"\xe2" in data and _INVISIBLE_E2.search(data) is not None)
        or (b"\xc2" in data and _INVISIBLE_C2.search(data) is not None)
        or b"\xef\xbb\xbf" in data
        or ((b"\xcc" in data or b"\xcd" in data) and _MARKS.search(data) is not None)
    )


def _holds_number(data: bytes, shape: bytes, form: bytes) -> bool:
    start = shape.find(form)
    while start >= 0:
        if _NUMBER.match(data, start):
            return True
        start = shape.find(form, start + 1)
    return False


# --- blocks ----------------------------------------------------------------------------------------------------------

_BEFORE, _BEHIND = 8, 64


def _block_may_need_look(data: bytes) -> bool:
    import numpy

    for start in range(0, len(data), _CHUNK_BYTES):
        before = min(start, _BEFORE)
        piece = data[start - before : start + _CHUNK_BYTES + _BEHIND]
        padded = numpy.zeros(_BEFORE + len(piece) - before + _BEHIND, dtype=numpy.uint8)
        padded[_BEFORE - before : _BEFORE - before + len(piece)] = numpy.frombuffer(piece, dtype=numpy.uint8)
        if _Block(numpy, data, start - _BEFORE, padded).may_need_look():
            return True
    return False


class _Block:
    """A piece of `data` as an array with room around it: index i of the array is byte `offset + i` of `data`."""

    def __init__(self, numpy: Any, data: bytes, offset: int, array: Any) -> None:
        self.numpy = numpy
        self.data = data
        self.offset = offset
        self.array = array
        self.inside = array[_BEFORE:-_BEHIND]

    def may_need_look(self) -> bool:
        return self._special() or self._secret() or self._invisible() or self._escape() or self._number()

    def _places(self, byte: int) -> Any:
        return self.numpy.flatnonzero(self.inside == byte) + _BEFORE

    def _is(self, places: Any, bytes_: bytes) -> Any:
        """Which of the places hold one of a few bytes."""
        found = self.array[places]
        result = found == bytes_[0]
        for byte in bytes_[1:]:
            result |= found == byte
        return result

    def _any(self, pattern: re.Pattern[bytes], places: "Iterable[int]") -> bool:
        return any(pattern.match(self.data, self.offset + int(place)) for place in places)

    def _special(self) -> bool:
        places = self._places(ord("<"))
        if self._any(_SPECIAL, places[self._is(places + 1, b"|\xef</se")]):
            return True
        places = self._places(ord("["))
        return self._any(_BRACKETED, places[self._is(places + 1, b"gsMI/")])

    def _secret(self) -> bool:
        places = self._places(ord("-"))
        likely = self._is(places - 1, b"k") | self._is(places + 1, b"B") | self._is(places - 2, b"x")
        if self._any(_DASHED, places[likely]):
            return True
        places = self._places(ord("_"))
        if self._any(_UNDERSCORED, places[self._is(places - 2, b"hga") & self._is(places - 1, b"pousrft")]):
            return True
        places = self._places(ord("K"))
        if self._any(_ACCESS_KEY, places[self._is(places - 1, b"A")]):
            return True
        places = self._places(ord("z"))
        return self._any(_API_KEY, places[self._is(places - 1, b"I")]) or self._any(_EMAIL, self._places(ord("@")))

    def _invisible(self) -> bool:
        places = self._places(0xE2)
        second, third = self.array[places + 1], self.array[places + 2]
        mark = (third == 0x8B) | (third == 0x8E) | (third == 0x8F) | ((third >= 0xAA) & (third <= 0xAE))
        if (((second == 0x80) & mark) | ((second == 0x81) & (third >= 0xA0) & (third <= 0xAF))).any():
            return True
        places = self._places(0xC2)
        if (self.array[places + 1] < 0xA0).any() or (self.inside == 0x7F).any():
            return True
        places = self._places(0xBB)
        if ((self.array[places - 1] == 0xEF) & (self.array[places + 1] == 0xBF)).any():
            return True
        return bool(((self.inside == 0xCC) | (self.inside == 0xCD)).any()) and _MARKS.search(self.data) is not None

    def _escape(self) -> bool:
        places = self._places(ord("\\"))
        after = self.array[places + 1]
        if self._any(_ESCAPE, places[(after == ord("b")) | (after == ord("f")) | (after == ord("\\"))]):
            return True
        places = places[after == ord("u")]
        places = places[self._is(places + 2, b"02fF")]
        places = places[self._is(places + 3, b"03eEfF")]
        return self._any(
            _ESCAPE, places[~((self.array[places + 2] == ord("f")) & (self.array[places + 4] == ord("0")))]
        )

    def _number(self) -> bool:
        digit = (self.array - 48) < 10  # wraps round below "0"
        two = digit[:-1] & digit[1:]
        four = two[:-2] & two[2:]
        eight = four[:-4] & four[4:]
        if self._any(_NUMBER, self.numpy.flatnonzero(eight[:-3] & eight[3:])):
            return True
        places = self.numpy.flatnonzero(four)
        # Groups of four with one byte between: the second of "138-1234-5678", the first of "6222 0212 ...".
        places = places[places + 10 < len(self.array)]
        grouped = places[~digit[places + 4] & digit[places + 5] & digit[places + 8]]
        if self._any(_NUMBER, grouped) or self._any(_NUMBER, grouped[grouped >= 4] - 4):
            return True
        hexadecimal = digit | ((self.array - 97) < 6)
        for step in (1, 2, 4, 8, 16):
            hexadecimal = hexadecimal[:-step] & hexadecimal[step:]
        return bool(hexadecimal.any()) and _HEX_KEY.search(self.data) is not None
