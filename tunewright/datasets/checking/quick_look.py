r"""A cheap look at raw lines: may `hints.look` have something to say of them? Yes too often, never no too often.

Every pattern of `hints.py` and `personal_data.py` has a looser one here, of bytes. RE2 looks for all of them at once, in one pass
of linear time, which costs less than half of what numpy or `re` take to find the few bytes that patterns begin with.
Lookbehinds, which RE2 lacks, are left out; what an escape might change (the "n" of "\n" stands before a match, "\u003c" is
a "<") is never trusted.
"""

from typing import Any

import re2

from tunewright.datasets.rules import personal_data

_SPECIAL = "<(?:(?:[|]|｜)(?:[A-Za-z0-9_]|▁){1,40}(?:[|]|｜)>|</?SYS>>|/s>|(?:start|end)_of_turn>)".encode()
_BRACKETED = rb"\[(?:[gs]?MASK|/?INST)\]"
_INVISIBLE = (
    rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\x8b\x8e\x8f\xaa-\xae]|\xe2\x81[\xa0-\xaf]|\xef\xbb\xbf"
    rb"|(?:\xcc[\x80-\xbf]|\xcd[\x80-\xaf]){9}"
)
_SECRET = (
    rb"-----BEGIN |sk-[A-Za-z0-9_-]{20}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}"
    rb"|xox[abprs]-[A-Za-z0-9-]{10}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30}|[0-9a-f]{32}\.[A-Za-z0-9]{16}"
)
_EMAIL = rb"@[A-Za-z0-9-]{1,63}\.[A-Za-z0-9]"
_NUMBER = rb"[0-9]{15}|1[3-9][0-9]{9}|1[3-9][0-9](?:[ -][0-9]{4}){2}|(?:[0-9]{4}[ -]){3}[0-9]{3}"
# Escapes of control characters, ASCII (a "<" may begin a token), invisible characters, combining marks, the wide bar.
# The first backslash of a run is taken, then pairs of them: "\\b" in JSON is a backslash and a letter.
_ESCAPE = (
    rb"[^\\](?:\\\\)*\\"
    rb"(?:[bf]|u(?:00[0-9]|03[0-6]|20(?:0[bBeEfF]|2[a-eA-E]|6)|[fF][eE][fF][fF]|[fF][fF]5[cC]))"
)
_DFA_BYTES = 32 << 20


def _compiled() -> Any:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1  # bytes as they are
    options.max_mem = _DFA_BYTES
    options.log_errors = False  # a cache that is full is begun anew
    options.never_capture = True
    options.dot_nl = True
    return re2.compile(b"|".join((_SPECIAL, _BRACKETED, _INVISIBLE, _SECRET, _EMAIL, _NUMBER, _ESCAPE)), options)


_SEARCH = _compiled().search


def may_need_look(data: bytes) -> bool:
    """False only if `hints.look` would say nothing of `data`: one line, a block of many, or a text that a line holds.

    Ordinary texts in Chinese and English answer False.
    """
    return _next(data, 0) >= 0


def suspects(data: bytes) -> list[int]:
    """An offset in each line of `data` that may need a look, rising."""
    found: list[int] = []
    place = _next(data, 0)
    while place >= 0:
        found.append(place)
        end = data.find(b"\n", place)
        if end < 0:
            break
        place = _next(data, end)
    return found


def _next(data: bytes, start: int) -> int:
    """Where something odd ends (its last byte), at or after `start`; -1 if nothing does."""
    while match := _SEARCH(data, start):
        if not match[0].startswith(b"@") or personal_data.may_be_someones(data, match.start()):
            return match.end() - 1
        start = match.end() - 1
    return -1
