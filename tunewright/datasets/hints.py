"""Things in texts that are allowed but worth a look: special tokens, invisible characters, what looks like a secret.

Every pattern is linear, and a cheap look at the raw line decides whether the texts inside are looked at at all.
"""

import re
from collections.abc import Iterator
from typing import Any

from tunewright.datasets.report import Path, Row, shown
from tunewright.i18n import mark

_SPECIAL = re.compile(
    r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|\[(?:gMASK|sMASK|MASK|INST|/INST)\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>"
)
_FULLWIDTH_BAR = "<｜".encode()
# Zero-width joiner and non-joiner are left out: emoji and several scripts need them.
_INVISIBLE = re.compile(
    "[\u0001-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
    "|[\u0300-\u036f]{9}"
)
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{20}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}"
    r"|xox[abprs]-[A-Za-z0-9-]{10}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30}|[0-9a-f]{32}\.[A-Za-z0-9]{16})"
)
_HEX = bytes(ord("0") if chr(b) in "0123456789abcdef" else ord(" ") for b in range(256))


def look(row: Row, data: bytes, value: object) -> None:
    """Warn about the texts of one row; `data` is its raw line, `value` what it holds."""
    escaped = b"\\" in data and b"\\u" in data
    special = escaped or _may_hold_special(data)
    odd = escaped or _may_hold_invisible(data)
    secret = escaped or _may_hold_secret(data)
    if not (special or odd or secret):
        return
    for path, text in _texts(value):
        if special and (found := _SPECIAL.search(text)):
            sentence = mark("line {line}, {field} holds {found}, a model's special token; it is treated as plain text")
            row.warn("special_token_in_text", sentence, path, found=shown(found[0]))
        if odd and (found := _INVISIBLE.search(text)):
            sentence = mark("line {line}, {field} holds an invisible or control character ({found})")
            row.warn("invisible_character", sentence, path, found=f"U+{ord(found[0][0]):04X}")
        if secret and _SECRET.search(text):
            sentence = mark("line {line}, {field} seems to hold a secret (a key or token)")
            row.warn("possible_secret", sentence, path)


# The three looks below ask for single rare bytes first: that costs next to nothing, and most lines have none of them.


def _may_hold_special(data: bytes) -> bool:
    if b"<" in data and (
        b"<|" in data or b"</s>" in data or b"_of_turn>" in data or b"SYS>>" in data or _FULLWIDTH_BAR in data
    ):
        return True
    return b"MASK]" in data or b"INST]" in data


def _may_hold_invisible(data: bytes) -> bool:
    if b"\x7f" in data or (b"\\" in data and (b"\\b" in data or b"\\f" in data)):
        return True
    if data.isascii():
        return False
    if b"\xe2" in data and (b"\xe2\x80" in data or b"\xe2\x81" in data):
        return True
    return b"\xc2" in data or b"\xcc" in data or b"\xcd" in data or b"\xef\xbb\xbf" in data


def _may_hold_secret(data: bytes) -> bool:
    if b"-" in data and (b"sk-" in data or b"PRIVATE KEY-" in data or b"xox" in data):
        return True
    if b"_" in data and (b"hf_" in data or b"gh" in data):
        return True
    if b"AKIA" in data or b"AIza" in data:
        return True
    # 32 hexadecimal digits in a row touch four samples of every eighth byte.
    return b"0000" in data[::8].translate(_HEX) and b"0" * 32 in data.translate(_HEX)


def _texts(value: object) -> Iterator[tuple[Path, str]]:
    """Every text of a row with its path, without images."""
    waiting: list[tuple[Path, Any]] = [((), value)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict):
            waiting.extend(((*path, key), item) for key, item in node.items() if key != "image_url" and len(key) < 100)
        elif isinstance(node, list):
            waiting.extend(((*path, i), item) for i, item in enumerate(node))
        elif isinstance(node, str) and node:
            yield path, node
