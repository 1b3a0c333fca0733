"""The cheap look of `quick_look.py` at many lines at once: numpy finds the few places where a pattern may begin.

A full pass over 64 KiB costs about 3 microseconds, finding where an array is true five times as much: so pairs of bytes are
asked for first, and places only if there are some. Every pass writes to room that is kept: new room costs more than the pass.
"""

import re
from collections.abc import Iterable
from typing import Any

from tunewright.datasets import quick_look

_BEFORE, _BEHIND = 8, 64
_CHUNK_BYTES = 1 << 18
_AROUND = 40
"""Bytes on both sides of a place where a number or key may be: more than half of the longest of them."""


class BlockLook:
    """Looks at one block after another. Loads numpy; not for several threads at once."""

    def __init__(self) -> None:
        self._room: _Room | None = None

    def suspects(self, data: bytes) -> list[int]:
        """Offsets in `data` (whole lines) of what `hints.look` may have something to say of, in no order; mostly none.

        Of several things in one line at least one is named.
        """
        found: list[int] = []
        for start in range(0, len(data), _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, len(data))
            if self._room is None or self._room.size < end - start:
                self._room = _Room(end - start)
            found += _Chunk(self._room, data, start, end).suspects()
        return found


class _Room:
    """Arrays for chunks of up to `size` bytes."""

    def __init__(self, size: int) -> None:
        import numpy

        self.numpy = numpy
        self.size = size
        length = _BEFORE + size + _BEHIND
        self.array = numpy.empty(length, dtype=numpy.uint8)
        self.shifted = numpy.empty(length, dtype=numpy.uint8)
        self.true = numpy.empty((4, length), dtype=bool)
        self.telling = numpy.zeros(256, dtype=bool)
        self.telling[list(b"bf\\u")] = True


class _Chunk:
    """The bytes of `data` from `start` to `end`, with some around them so that neighbours can be asked for.

    All answers are indices into `array`.
    """

    def __init__(self, room: _Room, data: bytes, start: int, end: int) -> None:
        numpy = self.numpy = room.numpy
        self.room = room
        self.data = data
        self.offset = start - _BEFORE
        self.size = end - start
        length = _BEFORE + self.size + _BEHIND
        self.array = room.array[:length]
        self.true = room.true[:, :length]
        first, last = max(0, start - _BEFORE), min(len(data), end + _BEHIND)
        filled = first - self.offset, last - self.offset
        self.array[: filled[0]] = 0
        self.array[filled[0] : filled[1]] = numpy.frombuffer(data, numpy.uint8, last - first, first)
        self.array[filled[1] :] = 0

    def suspects(self) -> list[int]:
        """Offsets in the whole data."""
        found = [*self._special(), *self._secret(), *self._escape(), *self._numbers()]
        if not self.data.isascii():
            found += self._invisible()
        if b"\x7f" in self.data:
            found += self._places(0x7F).tolist()
        return [self.offset + place for place in found]

    def _is_byte(self, byte: int, shift: int = 0, room: int = 0) -> Any:
        """Whether each byte, or its neighbour `shift` bytes behind, is `byte`."""
        there = self.array[_BEFORE + shift : _BEFORE + shift + self.size]
        return self.numpy.equal(there, byte, out=self.true[room, : self.size])

    def _places(self, byte: int) -> Any:
        return self._is_byte(byte).nonzero()[0] + _BEFORE

    def _where(self, true: Any) -> Any:
        """Where `true` is true, if that is so seldom that asking first pays."""
        return true.nonzero()[0] + _BEFORE if true.any() else ()

    def _pair(self, first: int, second: int) -> Any:
        """The places of the second of two bytes that follow each other."""
        both = self._is_byte(second)
        both &= self._is_byte(first, -1, 1)
        return self._where(both)

    def _is(self, places: Any, bytes_: bytes) -> Any:
        """Which of the places hold one of a few bytes."""
        found = self.array[places]
        result = found == bytes_[0]
        for byte in bytes_[1:]:
            result |= found == byte
        return result

    def _matching(self, pattern: re.Pattern[bytes], places: Iterable[int]) -> list[int]:
        match, offset, data = pattern.match, self.offset, self.data
        return [place for place in map(int, places) if match(data, offset + place)]

    def _special(self) -> list[int]:
        found: list[int] = []
        if b"<" in self.data:
            places = self._places(ord("<"))
            found += self._matching(quick_look.SPECIAL, places[self._is(places + 1, b"|\xef</se")])
        last = self._is_byte(ord("K"), -1)  # [MASK], [INST]
        last |= self._is_byte(ord("T"), -1, 1)
        last &= self._is_byte(ord("]"), 0, 1)
        ends = self._where(last)
        if len(ends):
            for length in (5, 6):
                found += self._matching(quick_look.BRACKETED, ends - length)
        return found

    def _secret(self) -> list[int]:
        dash = self._is_byte(ord("k"), -1)
        dash |= self._is_byte(ord("B"), 1, 1)
        dash |= self._is_byte(ord("x"), -2, 1)
        dash &= self._is_byte(ord("-"), 0, 1)
        found = self._matching(quick_look.DASHED, self._where(dash))
        if b"_" in self.data:
            places = self._places(ord("_"))
            places = places[self._is(places - 2, b"hga")]
            found += self._matching(quick_look.UNDERSCORED, places[self._is(places - 1, b"pousrft")])
        found += self._matching(quick_look.ACCESS_KEY, self._pair(ord("A"), ord("K")))
        found += self._matching(quick_look.API_KEY, self._pair(ord("I"), ord("z")))
        if b"@" in self.data:
            found += self._matching(quick_look.EMAIL, self._places(ord("@")))
        return found

    def _invisible(self) -> list[int]:
        array = self.array
        found: list[int] = []
        if b"\xe2" in self.data:
            places = self._places(0xE2)
            second, third = array[places + 1], array[places + 2]
            marks = (third == 0x8B) | (third == 0x8E) | (third == 0x8F) | ((third >= 0xAA) & (third <= 0xAE))
            odd = ((second == 0x80) & marks) | ((second == 0x81) & (third >= 0xA0) & (third <= 0xAF))
            found += places[odd].tolist()
        if b"\xc2" in self.data:
            places = self._places(0xC2)
            found += places[array[places + 1] < 0xA0].tolist()
        if b"\xef" in self.data:
            places = self._pair(0xEF, 0xBB)
            if len(places):
                found += places[array[places + 1] == 0xBF].tolist()
        for byte in (0xCC, 0xCD):
            if byte in self.data:
                found += self._matching(quick_look.MARKS, self._places(byte))
        return found

    def _escape(self) -> list[int]:
        if b"\\" not in self.data:
            return []
        places = self._places(ord("\\"))
        after = self.array[places + 1]
        telling = self.room.telling[after]
        places, after = places[telling], after[telling]
        if not len(places):
            return []
        short = places[after != ord("u")]
        places = places[after == ord("u")]
        places = places[self._is(places + 2, b"02fF")]
        places = places[self._is(places + 3, b"03eEfF")]
        full_width = (self.array[places + 2] == ord("f")) & (self.array[places + 4] == ord("0"))
        return self._matching(quick_look.ESCAPE, short) + self._matching(quick_look.ESCAPE, places[~full_width])

    def _numbers(self) -> list[int]:
        """Numbers hold eleven digits in a row, or two groups of four with one byte between."""
        numpy, length = self.numpy, len(self.array)
        digit, two, four, eight = self.true
        shifted = numpy.subtract(self.array, ord("0"), out=self.room.shifted[:length])  # wraps round below "0"
        numpy.less(shifted, 10, out=digit)
        numpy.logical_and(digit[:-1], digit[1:], out=two[:-1])
        numpy.logical_and(two[:-3], two[2:-1], out=four[:-3])
        numpy.logical_and(four[:-7], four[4:-3], out=eight[:-7])
        found: list[int] = []
        if eight[:-7].any():
            eleven = numpy.logical_and(eight[:-10], four[7:-3], out=two[:-10])
            found += self._around(quick_look.NUMBER, eleven)
        grouped = numpy.logical_and(four[:-8], four[5:-3], out=two[:-8])
        if grouped.any():
            numpy.greater(grouped, digit[4:-4], out=grouped)
            found += self._around(quick_look.NUMBER, grouped)
        return found + self._keys(digit)

    def _keys(self, digit: Any) -> list[int]:
        """32 hexadecimal digits and a dot."""
        numpy, length = self.numpy, len(self.array)
        _, run, other, _ = self.true
        shifted = numpy.subtract(self.array, ord("a"), out=self.room.shifted[:length])
        numpy.less(shifted, 6, out=run)
        numpy.logical_or(run, digit, out=run)
        reach = 1
        while reach < 32:
            end = length - 2 * reach + 1
            numpy.logical_and(run[:end], run[reach : reach + end], out=other[:end])
            run, other = other, run
            reach *= 2
            if reach == 8 and not run[:end].any():
                return []
        end = length - 32
        numpy.equal(self.array[32:], ord("."), out=other[:end])
        return self._around(quick_look.HEX_KEY, numpy.logical_and(run[:end], other[:end], out=run[:end]))

    def _around(self, pattern: re.Pattern[bytes], true: Any) -> list[int]:
        found: list[int] = []
        seen = 0
        for place in true.nonzero()[0].tolist() if true.any() else ():
            if place < seen:
                continue  # one in a line is enough, and a long run has many places
            near = self.offset + place
            match = pattern.search(self.data, max(0, near - _AROUND), near + 2 * _AROUND)
            seen = place + _AROUND
            if match is not None:
                found.append(match.start() - self.offset)
                seen = max(seen, self.data.find(b"\n", match.start()) - self.offset)
        return found
