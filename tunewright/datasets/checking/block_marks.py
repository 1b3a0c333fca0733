"""What the bytes of a block of lines say before anything is decoded: where lines end, how many texts it holds, what is odd."""

from typing import Any, NamedTuple

_QUOTE, _BACKSLASH, _OPENING, _CLOSING, _U, _ZERO = b'"\\{}u0'


class Marks(NamedTuple):
    """`ends` has the offset of the end of each line (of its newline, or of the block's end)."""

    ends: list[int]
    quotes: int
    """Quotes that open or close a text, not those inside one."""


class BlockMarks:
    """Looks at one block after another. Loads numpy; not for several threads at once."""

    def __init__(self) -> None:
        self._buffers: Any = None

    def of(self, block: bytes) -> Marks | None:
        """None if the block needs a look line by line: for a CR, a blank line, an escaped NUL, or space at the ends of lines.

        Otherwise every newline, but for the last byte, stands between "}" and "{".
        """
        import numpy as np

        size = len(block)
        if size < 2 or b"\r" in block or block[0] != _OPENING:
            return None
        if self._buffers is None or self._buffers.shape[1] < size:
            self._buffers = np.empty((4, size), dtype=bool)
        ends = _ends(block)
        if ends is None:
            return None
        room, quoted, escaping, more = self._buffers[:, :size]
        data = np.frombuffer(block, dtype=np.uint8)
        np.equal(data, _QUOTE, out=quoted)
        np.equal(data, _BACKSLASH, out=escaping)
        np.equal(data, _U, out=room)
        if np.logical_and(escaping[:-1], room[1:], out=room[1:]).any():
            np.equal(data, _ZERO, out=more)  # the search for it costs as much as all else here
            if np.logical_and(room[1:-1], more[2:], out=more[2:]).any() and b"\\u0000" in block:
                return None
        return Marks(ends, self._quotes(quoted, escaping))

    def _quotes(self, quoted: Any, escaping: Any) -> int:
        """How many quotes no backslash escapes. The first byte is neither, or the decoder refuses it."""
        import numpy as np

        size = len(quoted)
        room, pairs = self._buffers[0], self._buffers[3, : size - 1]
        free = np.greater(quoted[1:], escaping[:-1], out=room[1:size])
        quotes = int(np.count_nonzero(free))
        if size < 4 or not np.logical_and(escaping[:-1], escaping[1:], out=pairs).any():
            return quotes
        if np.logical_and(pairs[:-2], pairs[2:], out=room[: size - 3]).any():  # four in a row: any number may follow
            escaped = quoted[escapes(escaping[:-1].nonzero()[0]) + 1]
            return int(np.count_nonzero(quoted)) - int(np.count_nonzero(escaped))
        # Of one or three in a row the last escapes what follows, of two it does not.
        two = np.greater(pairs[1:-1], escaping[:-3], out=room[3:size])
        return quotes + int(np.count_nonzero(np.logical_and(quoted[3:], two, out=two)))


def _ends(block: bytes) -> list[int] | None:
    """Of each line; None unless every newline, but for the last byte, stands between "}" and "{"."""
    ends: list[int] = []
    find, last = block.find, len(block) - 1
    end = find(b"\n")
    while 0 <= end < last:
        if block[end - 1] != _CLOSING or block[end + 1] != _OPENING:
            return None
        ends.append(end)
        end = find(b"\n", end + 1)
    ends.append(last if end == last else last + 1)
    return ends


def escapes(backslashes: Any) -> Any:
    """Of the places of all backslashes those that escape the next byte: of a run every other, beginning with the first."""
    import numpy as np

    together = backslashes[1:] == backslashes[:-1] + 1
    if not together.any():
        return backslashes
    order = np.arange(len(backslashes))
    first = np.concatenate(([True], ~together))
    place = order - np.maximum.accumulate(np.where(first, order, 0))
    return backslashes[place % 2 == 0]
