"""Lines of a file in bounded memory. Only the byte \\n ends a line: never U+2028, a form feed or a lone \\r."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_SKIP_BYTES = 1 << 20
BLOCK_BYTES = 1 << 17
"""Small enough that a block and what is made of it stay in the processor's cache, large enough for numpy to pay."""


class Line(NamedTuple):
    """`number` counts from 1, `byte_offset` from 0. `data` is None for a line longer than the limit.

    `data` is without the newline, but keeps a \\r before it.
    """

    number: int
    byte_offset: int
    data: bytes | None


class Block(NamedTuple):
    """Whole lines, one after another, each with its newline (the last line of a file may lack it).

    `data` is None for a single line longer than the limit. `size` counts its bytes.
    """

    byte_offset: int
    data: bytes | None
    size: int


def read_lines(stream: BinaryIO, max_line_bytes: int) -> Iterator[Line]:
    """All lines from where `stream` stands; never holds more than `max_line_bytes` of one."""
    offset = stream.tell()
    number = 0
    while data := stream.readline(max_line_bytes + 2):
        number += 1
        start = offset
        offset += len(data)
        ended = data.endswith(b"\n")
        if len(data) - ended <= max_line_bytes:
            yield Line(number, start, data[:-1] if ended else data)
            continue
        offset += _skip_line(stream, ended)
        yield Line(number, start, None)


def read_blocks(stream: BinaryIO, end: int, max_line_bytes: int) -> Iterator[Block]:
    """The bytes from where `stream` stands up to `end` (the end of a line or of the file), in blocks of whole lines.

    Never holds more than a block and `max_line_bytes` of one line. Lines inside a block may be over the limit if that is
    smaller than a block.
    """
    offset = stream.tell()
    while offset < end and (data := stream.read(min(BLOCK_BYTES, end - offset))):
        if not data.endswith(b"\n"):
            data += stream.readline(max_line_bytes + 2)
        last = data.rfind(b"\n", 0, -1) + 1
        ended = data.endswith(b"\n")
        if len(data) - ended - last <= max_line_bytes:
            yield Block(offset, data, len(data))
            offset += len(data)
            continue
        if last:
            yield Block(offset, data[:last], last)
        skipped = _skip_line(stream, ended)
        yield Block(offset + last, None, len(data) - last + skipped)
        offset += len(data) + skipped


def _skip_line(stream: BinaryIO, ended: bool) -> int:
    """Go to the end of the line in which `stream` stands; the answer is how many bytes that took."""
    skipped = 0
    while not ended and (more := stream.readline(_SKIP_BYTES)):
        skipped += len(more)
        ended = more.endswith(b"\n")
    return skipped


def line_starts(stream: BinaryIO, begin: int, end: int, parts: int) -> list[int]:
    """Where to cut the bytes from `begin` to `end` into at most `parts` stretches of whole lines, about equally long.

    The answer begins with `begin` and ends with `end`.
    """
    cuts = [begin]
    for i in range(1, parts):
        target = begin + (end - begin) * i // parts
        if target <= cuts[-1]:
            continue
        stream.seek(target - 1)
        cut = target - 1 + _skip_line(stream, ended=False)
        if cuts[-1] < cut < end:
            cuts.append(cut)
    return [*cuts, end]
