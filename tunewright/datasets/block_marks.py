"""What the bytes of a block of lines say before anything is decoded: where lines end, how many texts it holds, what is odd."""

from typing import Any, NamedTuple

_NEWLINE, _QUOTE, _BACKSLASH, _OPENING, _CLOSING, _U = b'\n"\\{}u'


class Marks(NamedTuple):
    """`ends` has the offset of the end of each line (of its newline, or of the block's end)."""

    ends: list[int]
    quotes: int
    """Quotes that open or close a text, not those inside one."""


def marks_of(block: bytes) -> Marks | None:
    """None if the block needs a look line by line: for a CR, a blank line, an escaped NUL, or space at the ends of lines.

    Otherwise every newline, but for the last byte, stands between "}" and "{".
    """
    import numpy as np

    if b"\r" in block:
        return None
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    whole = len(ends) > 0 and int(ends[-1]) == len(block) - 1
    inner = ends[:-1] if whole else ends
    if len(inner) and (inner[0] == 0 or (data[inner - 1] != _CLOSING).any() or (data[inner + 1] != _OPENING).any()):
        return None
    quoted = data == _QUOTE
    quotes = int(np.count_nonzero(quoted))
    before, after = (data == _BACKSLASH)[:-1], data[1:]
    if (before & (after == _BACKSLASH)).any():
        starts = _escapes(data)
        quotes -= int(np.count_nonzero(quoted[starts + 1]))
    else:
        quotes -= int(np.count_nonzero(before & quoted[1:]))
    if (before & (after == _U)).any() and b"\\u0000" in block:
        return None
    return Marks(ends.tolist() if whole else [*ends.tolist(), len(block)], quotes)


def _escapes(data: Any) -> Any:
    """Offsets of the backslashes that escape the next byte (in "\\\\\\\\n" the first and, if there are three, the third)."""
    import numpy as np

    found = np.flatnonzero(data == _BACKSLASH)
    if len(found) and found[-1] == len(data) - 1:
        found = found[:-1]  # the decoder will refuse it
    together = found[1:] == found[:-1] + 1
    if not together.any():
        return found
    order = np.arange(len(found))
    first = np.concatenate(([True], ~together))
    place = order - np.maximum.accumulate(np.where(first, order, 0))
    return found[place % 2 == 0]
