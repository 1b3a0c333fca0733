r"""A cheap look at raw lines: may `hints.look` have something to say of them? Yes too often, never no too often.

Every pattern of `hints.py` and `personal_data.py` holds a byte that most texts have seldom: `<`, `-`, `@`, a backslash ...
Lines are searched from one such byte to the next; for blocks of lines numpy finds the places where the bytes around
fit too (`block_look.py`). What an escape might change (the "n" of "\n" stands before a match, "\u003c" is a
"<") is never trusted.
"""

import re

SPECIAL = re.compile("<(?:(?:[|]|｜)(?:[A-Za-z0-9_]|▁){1,40}(?:[|]|｜)>|</?SYS>>|/s>|(?:start|end)_of_turn>)".encode())
BRACKETED = re.compile(rb"\[(?:[gs]?MASK|/?INST)\]")
_INVISIBLE_E2 = re.compile(rb"\xe2(?:\x80[\x8b\x8e\x8f\xaa-\xae]|\x81[\xa0-\xaf])")
_INVISIBLE_C2 = re.compile(rb"\xc2[\x80-\x9f]")
MARKS = re.compile(rb"(?:\xcc[\x80-\xbf]|\xcd[\x80-\xaf]){9}")
DASHED = re.compile(rb"-(?:(?<=sk-)[A-Za-z0-9_-]{20}|(?<=xox[abprs]-)[A-Za-z0-9-]{10}|(?<=-----)BEGIN )")
UNDERSCORED = re.compile(
    rb"_(?:(?<=gh[pousr]_)[A-Za-z0-9]{36}|(?<=github_pat_)[A-Za-z0-9_]{22}|(?<=hf_)[A-Za-z0-9]{30})"
)
ACCESS_KEY = re.compile(rb"K(?<=AK)IA[0-9A-Z]{16}")
API_KEY = re.compile(rb"z(?<=AIz)a[A-Za-z0-9_-]{35}")
EMAIL = re.compile(rb"@(?!example\.)[A-Za-z0-9-]{1,63}\.[A-Za-z0-9]")
# Control characters, and escapes of: ASCII (a "<" may begin a token), invisible characters, combining marks, the wide bar.
# The first backslash of a run is taken, then pairs of them: "\\b" in JSON is a backslash and a letter.
_ODD_ESCAPE = rb"(?:[bf]|u(?:00[0-9]|03[0-6]|20(?:0[bBeEfF]|2[a-eA-E]|6)|[fF][eE][fF][fF]|[fF][fF]5[cC]))"
ESCAPE = re.compile(rb"\\(?<!\\\\)(?:\\\\)*" + _ODD_ESCAPE)
ESCAPE_BEHIND = re.compile(rb"\\" + _ODD_ESCAPE)
"""The same at a backslash that is known to escape."""
BYTE_ORDER_MARK = re.compile(rb"\xef\xbb\xbf")
HEX_KEY = re.compile(rb"[0-9a-f]{32}\.[A-Za-z0-9]{16}")
NUMBER = re.compile(
    rb"[0-9]{15}|[0-9]{0,4}1[3-9][0-9]{9}|1[3-9][0-9][ -][0-9]{4}[ -][0-9]{4}"
    rb"|[0-9]{4}[ -][0-9]{4}[ -][0-9]{4}[ -][0-9]{3}"
)
_HEX_BYTES = bytes(ord("0") if chr(b) in "0123456789abcdef" else ord(" ") for b in range(256))
_NUMBER_BYTES = bytes(
    ord("0") if chr(b) in "0123456789" else ord("-") if chr(b) in " -" else ord("x") for b in range(256)
)
_NUMBER_SHAPES = (b"0" * 11, b"000-0000-0000", b"0000-0000-0000-000")

_BLOCK_BYTES = 1 << 15
"""From here on numpy is faster."""


def may_need_look(data: bytes) -> bool:
    """False only if `hints.look` would say nothing of any of the lines in `data` (one line, or a block of many).

    Ordinary texts in Chinese and English answer False.
    """
    if len(data) >= _BLOCK_BYTES:
        from tunewright.datasets.checking.block_look import BlockLook  # it builds upon the patterns here

        return bool(BlockLook().suspects(data))
    anchored = (
        *((b"<", SPECIAL), (b"[", BRACKETED), (b"-", DASHED), (b"_", UNDERSCORED)),
        *((b"K", ACCESS_KEY), (b"z", API_KEY), (b"@", EMAIL), (b"\\", ESCAPE)),
    )
    if any(first in data and _follows(pattern, data, first) for first, pattern in anchored):
        return True
    if b"\x7f" in data or (not data.isascii() and _may_hold_invisible(data)):
        return True
    # 32 hexadecimal digits in a row touch four samples of every eighth byte.
    if b"0000" in data[::8].translate(_HEX_BYTES) and HEX_KEY.search(data):
        return True
    shape = data.translate(_NUMBER_BYTES)
    return any(form in shape and _holds_number(data, shape, form) for form in _NUMBER_SHAPES)


def _follows(pattern: re.Pattern[bytes], data: bytes, first: bytes) -> bool:
    """Whether `pattern`, which begins with the byte `first`, is in `data`: by jumps, unless that byte is frequent."""
    start = data.find(first)
    for _ in range(5 + len(data) // 500):
        if start < 0:
            return False
        if pattern.match(data, start):
            return True
        start = data.find(first, start + 1)
    return start >= 0 and pattern.search(data, start) is not None


def _may_hold_invisible(data: bytes) -> bool:
    return (
        (b"\xe2" in data and _INVISIBLE_E2.search(data) is not None)
        or (b"\xc2" in data and _INVISIBLE_C2.search(data) is not None)
        or b"\xef\xbb\xbf" in data
        or ((b"\xcc" in data or b"\xcd" in data) and MARKS.search(data) is not None)
    )


def _holds_number(data: bytes, shape: bytes, form: bytes) -> bool:
    start = shape.find(form)
    while start >= 0:
        if NUMBER.match(data, start):
            return True
        start = shape.find(form, start + 1)
    return False
