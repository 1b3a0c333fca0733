"""Lines of a file in bounded memory. Only the byte \\n ends a line: never U+2028, a form feed or a lone \\r."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_SKIP_BYTES = 1 << 20


class Line(NamedTuple):
    """`number` counts from 1, `byte_offset` from 0. `data` is None for a line longer than the limit.

    `data` is without the newline, but keeps a \\r before it.
    """

    number: int
    byte_offset: int
    data: bytes | None


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
        while not ended and (more := stream.readline(_SKIP_BYTES)):
            offset += len(more)
            ended = more.endswith(b"\n")
        yield Line(number, start, None)
