"""What training did to one row, as a line of a file, and when a row counts as never learned."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np

NEVER_LEARNED = "never_learned"
COLUMNS = ("line", "tokens", "trained_tokens", "loss_before", "loss_after", "never_learned", "contradicts")
_LEAST_PART = 0.1
_PIECE_BYTES = 256 * 1024


class RowReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """`line` is that of the training file. Losses are means over the trained tokens, None where they are no number.

    `contradicts` is another line with the same prompt and another answer.
    """

    line: int
    tokens: int
    trained_tokens: int
    loss_before: float | None
    loss_after: float | None
    flags: list[str]
    contradicts: int | None = None


def flags_of(before: "np.ndarray", after: "np.ndarray") -> "np.ndarray":
    """Which rows were never learned, bool (rows,): the loss fell by less than a tenth of what it fell for the median row, and is
    still above that of the median row, so that what the model knew before is not meant."""
    import numpy as np

    gains = before - after
    least = _LEAST_PART * max(0.0, float(np.nanmedian(gains)))
    return ~(gains > least) & ~(after <= np.nanmedian(after))


def table(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file of receipts as CSV with a head line, in pieces."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(COLUMNS)
    decode = msgspec.json.Decoder(RowReceipt).decode
    for line in lines:
        receipt = decode(line)
        shown = msgspec.structs.asdict(receipt) | {"never_learned": int(NEVER_LEARNED in receipt.flags)}
        write(["" if shown[name] is None else shown[name] for name in COLUMNS])
        if text.tell() >= _PIECE_BYTES:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def lines_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines of a file that comes in pieces."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest
