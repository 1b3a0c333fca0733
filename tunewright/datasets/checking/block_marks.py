"""What the bytes of a block of lines say before anything is decoded: where lines end, how many texts it holds, what is odd."""

from typing import Any, NamedTuple

_NEWLINE, _QUOTE, _BACKSLASH, _OPENING, _CLOSING, _U = b'\n"\\{}u'


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
        if b"\r" in block or size < 2:
            return None
        if self._buffers is None or self._buffers.shape[1] < size:
            self._buffers = np.empty((3, size), dtype=bool)
        found, quoted, escaping = self._buffers[:, :size]
        data = np.frombuffer(block, dtype=np.uint8)
        ends = np.equal(data, _NEWLINE, out=found).nonzero()[0]
        whole = block.endswith(b"\n")
        inner = ends[:-1] if whole else ends
        if len(inner) and (inner[0] == 0 or (data[inner - 1] != _CLOSING).any() or (data[inner + 1] != _OPENING).any()):
            return None
        np.equal(data, _QUOTE, out=quoted)
        np.equal(data, _BACKSLASH, out=escaping)
        before, after = escaping[:-1], found[1:]
        np.equal(data, _U, out=found)
        if np.logical_and(before, after, out=after).any() and b"\\u0000" in block:
            return None
        if np.logical_and(before, escaping[1:], out=after).any():
            quotes = int(np.count_nonzero(quoted)) - int(
                np.count_nonzero(quoted[escapes(escaping[:-1].nonzero()[0]) + 1])
            )
        else:
            # The first byte is no quote, or the decoder refuses it.
            quotes = int(np.count_nonzero(np.greater(quoted[1:], before, out=after)))
        return Marks(ends.tolist() if whole else [*ends.tolist(), size], quotes)


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
