"""The cheap look of `quick_look.py` at many lines at once: numpy finds the few places where a pattern may begin.

Every two bytes that follow each other are looked up in one table. It says of the pair whether one of the patterns begins
there, or whether it is part of a number. What it points at is compared with the pattern itself.
All arrays are kept from block to block: new ones would cost more than what is done with them.
"""

from collections.abc import Iterable
from functools import cache
from re import Pattern
from typing import Any

from tunewright.datasets.checking import quick_look

_BEFORE, _BEHIND = 8, 64
_CHUNK_BYTES = 1 << 17
_PIECE_PAIRS = 1 << 15
"""Indices take eight bytes each: so many of them stay in the processor's cache."""
_AROUND = 40
"""Bytes on both sides of a place where a number or key may be: more than half of the longest of them."""

_DIGITS, _HEXADECIMAL = 1, 2
# Frequent pairs, of which a third byte says more.
_PUNCTUATION, _UNDERSCORE, _UNICODE, _CONTROL = 3, 4, 5, 6
# The others: class -> (pattern, where it begins from the pair).
_RARE: dict[int, tuple[Pattern[bytes], tuple[int, ...]]] = {
    15: (quick_look.SPECIAL, (0,)),
    7: (quick_look.BRACKETED, (-4, -5)),
    8: (quick_look.DASHED, (0,)),
    9: (quick_look.DASHED, (1,)),
    10: (quick_look.DASHED, (4,)),
    11: (quick_look.ACCESS_KEY, (1,)),
    12: (quick_look.API_KEY, (1,)),
    13: (quick_look.EMAIL, (0,)),
    14: (quick_look.BYTE_ORDER_MARK, (0,)),
}
_PAIRS = (
    (_PUNCTUATION, b"\xe2", b"\x80\x81"),
    (_UNDERSCORE, b"pousrtf", b"_"),
    (_UNICODE, b"\\", b"u"),
    (_CONTROL, b"\\", b"bf"),
    (15, b"<", b"|\xef</se"),
    (7, b"KT", b"]"),
    (8, b"-", b"B"),
    (9, b"k", b"-"),
    (10, b"x", b"o"),
    (11, b"A", b"K"),
    (12, b"I", b"z"),
    (13, b"@", b"-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"),
    (14, b"\xef", b"\xbb"),
)


@cache
def _table() -> Any:
    """The class of each pair of bytes, as a number of the machine's byte order reads them; 0 for most."""
    import numpy

    table = numpy.zeros((256, 256), dtype=numpy.uint8)
    digits, hexadecimal = list(b"0123456789"), list(b"0123456789abcdef")
    table[numpy.ix_(hexadecimal, hexadecimal)] = _HEXADECIMAL
    table[numpy.ix_(digits, digits)] = _DIGITS
    for number, first, second in _PAIRS:
        table[numpy.ix_(list(first), list(second))] = number
    pairs = numpy.arange(1 << 16, dtype=numpy.uint16).view(numpy.uint8).reshape(-1, 2)
    return table[pairs[:, 0], pairs[:, 1]]


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
        length = _even(_BEFORE + size + _BEHIND)
        self.bytes = numpy.empty((2, length), dtype=numpy.uint8)
        self.wide = numpy.empty(_PIECE_PAIRS, dtype=numpy.intp)
        self.classes = numpy.empty((2, length // 2), dtype=numpy.uint8)
        self.true = numpy.empty((3, length // 2), dtype=bool)


def _even(number: int) -> int:
    return number + number % 2


class _Chunk:
    """The bytes of `data` from `start` to `end`, with some around them so that neighbours can be asked for.

    All answers are indices into `array`.
    """

    def __init__(self, room: _Room, data: bytes, start: int, end: int) -> None:
        numpy = self.numpy = room.numpy
        self.room = room
        self.data = data
        self.offset = start - _BEFORE
        length = _even(_BEFORE + end - start + _BEHIND)
        self.array, shifted = room.bytes[:, :length]
        first, last = max(0, start - _BEFORE), min(len(data), end + _BEHIND)
        filled = first - self.offset, last - self.offset
        self.array[: filled[0]] = 0
        self.array[filled[0] : filled[1]] = numpy.frombuffer(data, numpy.uint8, last - first, first)
        self.array[filled[1] :] = 0
        shifted[:-1] = self.array[1:]
        shifted[-1] = 0
        self.even, self.odd = (
            self._classes(part, out) for part, out in zip((self.array, shifted), room.classes, strict=True)
        )

    def _classes(self, array: Any, out: Any) -> Any:
        """The class of every other pair of bytes."""
        pairs, table, take = array.view(self.numpy.uint16), _table(), self.numpy.take
        for start in range(0, len(pairs), _PIECE_PAIRS):
            piece = pairs[start : start + _PIECE_PAIRS]
            wide = self.room.wide[: len(piece)]
            wide[:] = piece
            take(table, wide, out=out[start : start + len(piece)], mode="clip")
        return out[: len(pairs)]

    def suspects(self) -> list[int]:
        """Offsets in the whole data."""
        found = [*self._anchored(), *self._numbers()]
        if b"\x7f" in self.data:
            found += self._places(0x7F).tolist()
        if b"\xc2" in self.data:
            places = self._places(0xC2)
            found += places[self.array[places + 1] < 0xA0].tolist()
        for byte in (0xCC, 0xCD):
            if byte in self.data:
                found += self._matching(quick_look.MARKS, self._places(byte).tolist())
        return [self.offset + place for place in found]

    def _places(self, byte: int) -> Any:
        """Where a byte is, but for the room behind."""
        return (self.array[:-_BEHIND] == byte).nonzero()[0]

    def _anchored(self) -> list[int]:
        """Everything that begins with a pair of bytes that is seldom."""
        numpy = self.numpy
        pairs = []
        for shift, classes in ((0, self.even), (1, self.odd)):
            high = numpy.greater(classes, _HEXADECIMAL, out=self.room.true[0, : len(classes)])
            places = high.nonzero()[0]
            pairs.append((places * 2 + shift, classes[places]))
        places, classes = (numpy.concatenate(parts) for parts in zip(*pairs, strict=True))
        inside = places < len(self.array) - _BEHIND
        places, classes = places[inside], classes[inside]
        found: list[int] = self._punctuation(places[classes == _PUNCTUATION])
        found += self._underscored(places[classes == _UNDERSCORE])
        found += self._unicode(places[classes == _UNICODE])
        found += self._escaping(places[classes == _CONTROL])
        rare = classes > _CONTROL
        for place, number in zip(places[rare].tolist(), classes[rare].tolist(), strict=True):
            pattern, begins = _RARE[number]
            if any(pattern.match(self.data, max(0, self.offset + place + begin)) for begin in begins):
                found.append(place)
        return found

    def _punctuation(self, places: Any) -> list[int]:
        second, third = self.array[places + 1], self.array[places + 2]
        marks = (third == 0x8B) | (third == 0x8E) | (third == 0x8F) | ((third >= 0xAA) & (third <= 0xAE))
        odd = ((second == 0x80) & marks) | ((second == 0x81) & (third >= 0xA0) & (third <= 0xAF))
        return places[odd].tolist()

    def _underscored(self, places: Any) -> list[int]:
        places = places[self._is(places - 1, b"hga")] + 1
        return self._matching(quick_look.UNDERSCORED, places.tolist())

    def _unicode(self, places: Any) -> list[int]:
        places = places[self._is(places + 2, b"02fF")]
        places = places[self._is(places + 3, b"03eEfF")]
        full_width = (self.array[places + 2] == ord("f")) & (self.array[places + 4] == ord("0"))
        places = self._escaping(places[~full_width])
        return self._matching(quick_look.ESCAPE_BEHIND, places)

    def _escaping(self, places: Any) -> list[int]:
        """Those of the backslashes that escape what follows: an even number of others stands before them."""
        before, long = self.array[places - 1] == ord("\\"), self.array[places - 2] == ord("\\")
        found: list[int] = places[~before].tolist()
        for place in places[before & long].tolist():
            run = self.offset + place
            while run > 0 and self.data[run - 1] == ord("\\"):
                run -= 1
            if (self.offset + place - run) % 2 == 0:
                found.append(place)
        return found

    def _is(self, places: Any, bytes_: bytes) -> Any:
        """Which of the places hold one of a few bytes."""
        found = self.array[places]
        result = found == bytes_[0]
        for byte in bytes_[1:]:
            result |= found == byte
        return result

    def _matching(self, pattern: Pattern[bytes], places: Iterable[int]) -> list[int]:
        match, offset, data = pattern.match, self.offset, self.data
        return [place for place in places if match(data, max(0, offset + place))]

    def _numbers(self) -> list[int]:
        """Numbers hold eight digits in a row, or two groups of four with one byte between; keys 32 hexadecimal digits.

        Of every other pair of bytes that is: two pairs of digits, and the third behind the first or before the last too.
        """
        numpy, count = self.numpy, len(self.even)
        digits, two, found = self.room.true[:, :count]
        numpy.equal(self.even, _DIGITS, out=digits)
        numpy.logical_and(digits[:-1], digits[1:], out=two[:-1])
        either = numpy.logical_and(two[:-3], digits[3:], out=found[:-3])
        numpy.logical_and(digits[:-3], two[2:-1], out=two[:-3])
        numpy.logical_or(either, two[:-3], out=either)
        places = self._around(quick_look.NUMBER, either)
        run, other = digits, two
        numpy.subtract(self.even, 1, out=self.room.classes[1, :count])  # the odd pairs were asked before
        numpy.less(self.room.classes[1, :count], _HEXADECIMAL, out=run)
        reach = 1
        while reach < 8:
            end = count - 2 * reach + 1
            numpy.logical_and(run[:end], run[reach : reach + end], out=other[:end])
            run, other = other, run
            reach *= 2
        return places + self._around(quick_look.HEX_KEY, run[: count - 7])

    def _around(self, pattern: Pattern[bytes], true: Any) -> list[int]:
        """The pattern near the pairs that are true."""
        found: list[int] = []
        seen = -1
        for place in (true.nonzero()[0] * 2).tolist() if true.any() else ():
            if place < seen:
                continue  # one in a line is enough, and a long run has many places
            near = self.offset + place
            match = pattern.search(self.data, max(0, near - _AROUND), max(0, near + 2 * _AROUND))
            seen = place + _AROUND
            if match is not None:
                found.append(match.start() - self.offset)
                seen = max(seen, self.data.find(b"\n", match.start()) - self.offset)
        return found
