"""Marks that say where each character of a rendered text comes from: the template, or a user.

Every text of a conversation is wrapped in private-use characters that occur nowhere in it, the template is rendered, and
the marks then split the result. So a user's text can't turn into a control token, whatever it says.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark


class Segment(msgspec.Struct, frozen=True):
    """A run of text at `start` of the marked rendering. `plain`: a user's, to be encoded without control tokens."""

    start: int
    text: str
    plain: bool


class Marks:
    """Four characters that `texts` don't contain: begin and end of an answer's texts, and of all others."""

    def __init__(self, texts: Iterable[str]) -> None:
        used = set().union(*texts)
        free = (c for area in _PRIVATE_USE for c in map(chr, area) if c not in used)
        chosen = [c for c, _ in zip(free, range(4), strict=False)]
        if len(chosen) < 4:
            raise InvalidRequest(
                "invalid_unicode", mark("The conversation uses too many private-use characters."), param="messages"
            )
        self.answer = (chosen[0], chosen[1])
        self.other = (chosen[2], chosen[3])
        self._all = re.compile(f"([{''.join(chosen)}])")

    def wrap(self, text: str, *, answer: bool) -> str:
        """`text` between marks. Outer white space stays outside, so that templates which strip still strip."""
        core = text.strip()
        if not core:
            return text
        begin, end = self.answer if answer else self.other
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        return f"{before}{begin}{core}{end}{after}"

    def guard(self, value: Any, control: re.Pattern[str] | None, *, answer: bool) -> Any:
        """A JSON value with marks around only the control tokens in its texts and keys (templates compare the others)."""
        if control is None:
            return value
        if isinstance(value, str):
            begin, end = self.answer if answer else self.other
            return control.sub(lambda found: f"{begin}{found.group()}{end}", value)
        if isinstance(value, dict):
            return {
                self.guard(k, control, answer=answer): self.guard(v, control, answer=answer) for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.guard(item, control, answer=answer) for item in value]
        return value

    def removed(self, text: str) -> str:
        """`text` without marks."""
        return self._all.sub("", text)

    def segments(self, text: str, opening: str) -> list[Segment] | None:
        """The marked `text` in runs, split at marks and after every `opening` (what a template writes before an answer).

        Looks at nothing but what lies before, so the runs of a beginning of `text` that ends with an opening are a
        beginning of its runs. None when the marks don't pair up.
        """
        found: list[Segment] = []
        opened: set[int] = set()
        closing = {self.answer[0]: self.answer[1], self.other[0]: self.other[1]}
        expected: str | None = None
        start = 0
        for part in self._all.split(text):
            if self._all.fullmatch(part):
                if (expected is None) != (part in closing) or (expected is not None and part != expected):
                    return None
                expected = closing.get(part)
            else:
                plain = expected is not None
                after = [start + end for end in _ends(part, opening)] if not plain else []
                opened.update(after)
                edges = [start, *after, start + len(part)]
                found += [Segment(a, text[a:b], plain) for a, b in pairwise(edges) if b > a]
            start += len(part)
        return _with_leads(found, opened) if expected is None else None

    def is_border(self, text: str, place: int, segments: Sequence[Segment]) -> bool:
        """Whether `segments` of the marked `text` divide it at `place`."""
        if place >= len(text) or self._all.fullmatch(text[place]):
            return True
        nearest = bisect_left(segments, place, key=lambda segment: segment.start)
        return nearest < len(segments) and segments[nearest].start == place


def _ends(text: str, opening: str) -> list[int]:
    return [found.end() for found in re.finditer(re.escape(opening), text)] if opening else []


def _with_leads(segments: list[Segment], opened: set[int]) -> list[Segment]:
    """Join white space at the beginning of an answer to its text: the model writes both in one go, so they are encoded so."""
    joined: list[Segment] = []
    for segment in segments:
        before = joined[-1] if joined else None
        if segment.plain and before and before.start in opened and before.text.isspace():
            joined[-1] = Segment(before.start, before.text + segment.text, True)
        else:
            joined.append(segment)
    return joined


_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
