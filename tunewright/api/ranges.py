"""The one kind of range that is served: a single run of bytes, so that a download that was cut can go on."""

import re

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark

_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]{0,19})\s*-\s*([0-9]{0,19})\s*", re.ASCII | re.IGNORECASE)


def wanted_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """(start, end), end exclusive; None for everything: no header, several ranges, or one that is not well formed.

    Raises InvalidRequest (`range_not_satisfiable`) if none of the range is there.
    """
    found = _RANGE.fullmatch(header) if header is not None and len(header) < 100 else None
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":  # the last so many
        start, end = max(0, size_bytes - int(found[2])), size_bytes
    else:
        start, last = int(found[1]), int(found[2]) if found[2] else size_bytes - 1
        if found[2] and last < start:
            return None
        end = min(last + 1, size_bytes)
    if start >= end:
        raise InvalidRequest(
            "range_not_satisfiable",
            mark("The file has {size} bytes, and none of them is in the range asked for."),
            param="Range",
            size=size_bytes,
        )
    return start, end
