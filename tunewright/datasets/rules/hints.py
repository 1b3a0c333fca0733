"""Things in texts that are allowed but worth a look: special tokens, invisible characters, secrets, personal data.

Every pattern is linear. A cheap look at the raw bytes (`quick_look.py`) decides whether the texts inside are looked at.
"""

import re
from collections.abc import Iterator
from typing import Any

from tunewright.datasets.checking.quick_look import may_need_look
from tunewright.datasets.report import Path, Row, shown
from tunewright.datasets.rules import personal_data
from tunewright.i18n import mark

_SPECIAL = re.compile(
    r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|\[(?:gMASK|sMASK|MASK|INST|/INST)\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>"
)
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
# In all of them, and far more quickly found.
_SECRET_PARTS = ("sk-", "AKIA", "_", "xox", "AIza", "PRIVATE KEY-")
_HEXADECIMAL = re.compile("[0-9a-f]{32}")
_PERSONAL = {
    personal_data.EMAIL: mark(
        "line {line}, {field} seems to hold personal data (an e-mail address); keep it only with consent"
    ),
    personal_data.MOBILE: mark(
        "line {line}, {field} seems to hold personal data (a mobile phone number); keep it only with consent"
    ),
    personal_data.RESIDENT_ID: mark(
        "line {line}, {field} seems to hold personal data (a resident identity number); keep it only with consent"
    ),
    personal_data.BANK_CARD: mark(
        "line {line}, {field} seems to hold personal data (a bank card number); keep it only with consent"
    ),
}


def look(row: Row, data: bytes, value: object) -> None:
    """Warn about the texts of one row; `data` is its raw line, `value` what it holds."""
    if may_need_look(data):
        look_closely(row, data, value)


def look_closely(row: Row, data: bytes, value: object) -> None:
    """The same for a line that is known to need it."""
    plain = data.isascii() and b"\x7f" not in data and not any(escape in data for escape in (b"\\u", b"\\b", b"\\f"))
    for path, text in _texts(value):
        if not may_need_look(text.encode("utf-8", "replace")):
            continue
        if ("<" in text or "[" in text) and (found := _SPECIAL.search(text)):
            sentence = mark("line {line}, {field} holds {found}, a model's special token; it is treated as plain text")
            row.warn("special_token_in_text", sentence, path, found=shown(found[0]))
        if not plain and (found := _INVISIBLE.search(text)):
            sentence = mark("line {line}, {field} holds an invisible or control character ({found})")
            row.warn("invisible_character", sentence, path, found=f"U+{ord(found[0][0]):04X}")
        if (any(part in text for part in _SECRET_PARTS) or _HEXADECIMAL.search(text)) and _SECRET.search(text):
            sentence = mark("line {line}, {field} seems to hold a secret (a key or token)")
            row.warn("possible_secret", sentence, path)
        if kind := personal_data.kind_in(text):
            row.warn("possible_personal_data", _PERSONAL[kind], path)


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
