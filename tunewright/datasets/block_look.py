"""The cheap look of `quick_look.py` at many lines at once: numpy finds the few places where a pattern may begin.

A full pass over the bytes costs about 3 microseconds for 64 KiB, finding where an array is true five times as much: so
pairs of bytes are asked for first, and places only if there are some.
"""

import re
from collections.abc import Iterable
from typing import Any

from tunewright.datasets import quick_look

_BEFORE, _BEHIND = 8, 64
_CHUNK_BYTES = 1 << 18
_AROUND = 40
"""Bytes on both sides of a place where a number or key may be: more than half of the longest of them."""


def suspects(data: bytes) -> list[int]:
    """Offsets in `data` (whole lines) of what `hints.look` may have something to say of, in no order; mostly none.

    Of several things in one line at least one is named.
    """
    found: list[int] = []
    for start in range(0, len(data), _CHUNK_BYTES):
        found += _Chunk(data, start, min(start + _CHUNK_BYTES, len(data))).suspects()
    return found


class _Chunk:
    """The bytes of `data` from `start` to `end`, with room around them so that neighbours can be asked for."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        import numpy

        self.numpy = numpy
        self.data = data
        self.start = start
        self.size = end - start
        self.array = numpy.zeros(_BEFORE + self.size + _BEHIND, dtype=numpy.uint8)
        first, last = max(0, start - _BEFORE), min(len(data), end + _BEHIND)
        offset = first - start + _BEFORE
        self.array[offset : offset + last - first] = numpy.frombuffer(data, numpy.uint8, last - first, first)
        self._digits = (self.array - 48) < 10  # wraps round below "0"

    def suspects(self) -> list[int]:
        """Offsets in the whole data."""
        found = [*self._special(), *self._secret(), *self._escape(), *self._number(), *self._hexadecimal()]
        if not self.data.isascii():
            found += self._invisible()
        if b"\x7f" in self.data:
            found += self._places(self._at(0) == 0x7F).tolist()
        return [self.start - _BEFORE + place for place in found]

    def _at(self, shift: int) -> Any:
        """Every byte of the chunk, or its neighbour `shift` bytes behind."""
        return self.array[_BEFORE + shift : _BEFORE + shift + self.size]

    def _places(self, true: Any) -> Any:
        """Indices into `array`."""
        return true.nonzero()[0] + _BEFORE

    def _pair(self, first: int, second: int) -> Any:
        """The places of the second of two bytes that follow each other."""
        both = self._at(0) == second
        both &= self._at(-1) == first
        return self._places(both) if both.any() else ()

    def _is(self, places: Any, bytes_: bytes) -> Any:
        """Which of the places hold one of a few bytes."""
        found = self.array[places]
        result = found == bytes_[0]
        for byte in bytes_[1:]:
            result |= found == byte
        return result

    def _matching(self, pattern: re.Pattern[bytes], places: Iterable[int]) -> list[int]:
        match, offset = pattern.match, self.start - _BEFORE
        return [place for place in map(int, places) if match(self.data, offset + place)]

    def _special(self) -> list[int]:
        found: list[int] = []
        if b"<" in self.data:
            places = self._places(self._at(0) == ord("<"))
            found += self._matching(quick_look.SPECIAL, places[self._is(places + 1, b"|\xef</se")])
        for last in b"KT":  # [MASK], [INST]
            ends = self._pair(last, ord("]"))
            if len(ends):
                for length in (5, 6):
                    found += self._matching(quick_look.BRACKETED, ends - length)
        return found

    def _secret(self) -> list[int]:
        places = self._places(self._at(0) == ord("-"))
        likely = self._is(places - 1, b"k") | self._is(places + 1, b"B") | self._is(places - 2, b"x")
        found = self._matching(quick_look.DASHED, places[likely])
        if b"_" in self.data:
            places = self._places(self._at(0) == ord("_"))
            likely = self._is(places - 2, b"hga") & self._is(places - 1, b"pousrft")
            found += self._matching(quick_look.UNDERSCORED, places[likely])
        found += self._matching(quick_look.ACCESS_KEY, self._pair(ord("A"), ord("K")))
        found += self._matching(quick_look.API_KEY, self._pair(ord("I"), ord("z")))
        if b"@" in self.data:
            found += self._matching(quick_look.EMAIL, self._places(self._at(0) == ord("@")))
        return found

    def _invisible(self) -> list[int]:
        array, found = self.array, []
        if b"\xe2" in self.data:
            places = self._places(self._at(0) == 0xE2)
            second, third = array[places + 1], array[places + 2]
            marks = (third == 0x8B) | (third == 0x8E) | (third == 0x8F) | ((third >= 0xAA) & (third <= 0xAE))
            odd = ((second == 0x80) & marks) | ((second == 0x81) & (third >= 0xA0) & (third <= 0xAF))
            found += places[odd].tolist()
        if b"\xc2" in self.data:
            places = self._places(self._at(0) == 0xC2)
            found += places[array[places + 1] < 0xA0].tolist()
        if b"\xef" in self.data:
            places = self._pair(0xEF, 0xBB)
            if len(places):
                found += places[array[places + 1] == 0xBF].tolist()
        if b"\xcc" in self.data or b"\xcd" in self.data:
            places = self._places((self._at(0) == 0xCC) | (self._at(0) == 0xCD))
            found += self._matching(quick_look.MARKS, places)
        return found

    def _escape(self) -> list[int]:
        if b"\\" not in self.data:
            return []
        places = self._places(self._at(0) == ord("\\"))
        after = self.array[places + 1]
        short = places[(after == ord("b")) | (after == ord("f")) | (after == ord("\\"))]
        places = places[after == ord("u")]
        places = places[self._is(places + 2, b"02fF")]
        places = places[self._is(places + 3, b"03eEfF")]
        full_width = (self.array[places + 2] == ord("f")) & (self.array[places + 4] == ord("0"))
        return self._matching(quick_look.ESCAPE, short) + self._matching(quick_look.ESCAPE, places[~full_width])

    def _number(self) -> list[int]:
        """Eleven digits in a row, or two groups of four with one byte between: every form holds one of them."""
        digit = self._digits
        two = digit[:-1] & digit[1:]
        four = two[:-2] & two[2:]
        eight = four[:-4] & four[4:]
        eleven = eight[:-3] & four[7:]
        grouped = four[:-5] & four[5:]
        grouped &= ~digit[4 : 4 + len(grouped)]
        found: list[int] = []
        for places in (eleven, grouped):
            if places.any():
                found += self._around(quick_look.NUMBER, places.nonzero()[0])
        return found

    def _hexadecimal(self) -> list[int]:
        run = (self.array - 97) < 6
        run |= self._digits
        for step in (1, 2, 4, 8, 16):
            run = run[:-step] & run[step:]
        return self._around(quick_look.HEX_KEY, run.nonzero()[0]) if run.any() else []

    def _around(self, pattern: re.Pattern[bytes], places: Iterable[int]) -> list[int]:
        offset = self.start - _BEFORE
        found: list[int] = []
        seen = 0
        for place in map(int, places):
            if place >= seen:  # a long run has many places
                near = offset + place
                match = pattern.search(self.data, max(0, near - _AROUND), near + 2 * _AROUND)
                seen = place + _AROUND
                if match is not None:
                    found.append(match.start() - offset)
        return found
