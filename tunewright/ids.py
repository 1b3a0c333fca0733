"""Identifiers: sortable by time, 103 random bits, safe in a URL, a file name and a model name."""

import secrets
import string
from datetime import UTC, datetime

from tunewright.clock import wall_ms

_ALPHABET = string.digits + string.ascii_lowercase


def random_text(length: int) -> str:
    """`length` characters of [0-9a-z] from the system's random source (5.17 bits each)."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new_id(prefix: str) -> str:
    """`{prefix}-YYYYMMDDhhmmssSSS-{20 random}`: ids made later on one machine sort later (ties within 1 ms aside)."""
    now_ms = wall_ms()
    stamp = datetime.fromtimestamp(now_ms // 1000, UTC).strftime("%Y%m%d%H%M%S")
    return f"{prefix}-{stamp}{now_ms % 1000:03d}-{random_text(20)}"
