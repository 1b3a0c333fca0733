"""Identifiers: sortable by time, 103 random bits, safe in a URL, a file name and a model name."""

import secrets
import string
from datetime import UTC, datetime

from tunewright.clock import wall_ms

_ALPHABET = string.digits + string.ascii_lowercase
_EVEN = 36 * 7
"""Bytes from here on would make some characters likelier than others."""


def random_text(length: int) -> str:
    """`length` characters of [0-9a-z] from the system's random source (5.17 bits each), all equally likely."""
    text = ""
    while len(text) < length:  # asked once as a rule: a request makes four ids
        text += "".join(_ALPHABET[byte % 36] for byte in secrets.token_bytes(2 * length) if byte < _EVEN)
    return text[:length]


def new_id(prefix: str) -> str:
    """`{prefix}-YYYYMMDDhhmmssSSS-{20 random}`: ids made later on one machine sort later (ties within 1 ms aside)."""
    now_ms = wall_ms()
    stamp = datetime.fromtimestamp(now_ms // 1000, UTC).strftime("%Y%m%d%H%M%S")
    return f"{prefix}-{stamp}{now_ms % 1000:03d}-{random_text(20)}"
