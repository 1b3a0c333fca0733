"""Reads a model's answer as it streams: text, reasoning, and calls of tools (docs/tool-format.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tunewright.ids import random_text
from tunewright.rendering.call_forms import ObjectEnd, Offered, read_bare_call, read_call, read_cut_call


class TextPiece(msgspec.Struct, frozen=True):
    """More of the answer's text."""

    text: str


class ReasoningPiece(msgspec.Struct, frozen=True):
    """More of the reasoning before the answer."""

    text: str


class CallPiece(msgspec.Struct, frozen=True):
    """A call in one piece: `index` counts from 0, `arguments` is JSON text, or what the model wrote in its place, or where
    the answer was cut off its beginning."""

    index: int
    id: str | None
    name: str | None
    arguments: str


Piece = TextPiece | ReasoningPiece | CallPiece

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_THINK, _THINK_END = "<think>", "</think>"
_SURELY_TAG = 2
"""Characters of a tag at which an answer is cut off; a single one may be text."""


class AnswerParser:
    """Feed it text in any portions: the pieces put together don't depend on where the portions end.

    `<think>…</think>` at the very start is reasoning; `reasoning_open` says that the prompt opened it already. Calls are
    looked for only if there are `tools`; `bare_calls` says that this base writes them without tags. A block that is no call
    comes out as text: nothing is lost but white space that borders on a call or on reasoning.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]], *, bare_calls: bool = False, reasoning_open: bool = False
    ) -> None:
        self._offered = Offered(tools)
        self._answer = self._bare_call if bare_calls and tools else self._text
        self._step = self._think if reasoning_open else self._start
        self._buffer = ""
        self._searched = 0
        self._object = ObjectEnd()
        self._calls = 0
        self._gap = ""
        self._cut = False
        # White space waits in `_gap` until it is known whether text follows; at a border it is dropped.
        self._border = reasoning_open
        self._found: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text` makes certain."""
        self._buffer += text
        return self._advance(at_end=False)

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """The rest, after the last `push`. Of an answer that was `cut` off the call that it breaks off in is a call, too, with
        the arguments as far as they are written; without its name it is nothing at all."""
        self._cut = cut
        return self._advance(at_end=True)

    def _advance(self, *, at_end: bool) -> list[Piece]:
        self._found = []
        while self._step(at_end):
            pass
        return self._found

    def _start(self, at_end: bool) -> bool:
        """Nothing is known yet. Every step returns whether another step can go on at once."""
        content = self._buffer.lstrip()
        if content.startswith(_THINK):
            self._buffer = content[len(_THINK) :]
            self._border = True
            self._step = self._think
        elif _THINK.startswith(content) and not at_end:
            return False
        else:
            self._step = self._answer
        return True

    def _think(self, at_end: bool) -> bool:
        thought, end, after = self._buffer.partition(_THINK_END)
        if end:
            self._emit(ReasoningPiece, thought)
            self._buffer, self._gap, self._border = after, "", True
            self._step = self._answer
            return True
        self._emit_but_tag(ReasoningPiece, _THINK_END, at_end)
        return False

    def _text(self, at_end: bool) -> bool:
        before, tag, after = self._buffer.partition(_CALL) if self._offered else (self._buffer, "", "")
        if tag:
            self._emit(TextPiece, before)
            self._buffer, self._searched, self._object = after, 0, ObjectEnd()
            self._step = self._call
            return True
        self._emit_but_tag(TextPiece, _CALL if self._offered else "", at_end)
        if self._gap and not self._border and (at_end or not self._offered):
            self._add(TextPiece, self._gap)
            self._gap = ""
        return False

    def _call(self, at_end: bool) -> bool:
        # A closing tag in a text of the JSON does not close: it is looked for behind the object, and only in what is new, so
        # that a long call costs its length and not its square.
        behind = self._object.find(self._buffer)
        if behind is None and not at_end:
            return False
        end = self._buffer.find(_CALL_END, max(behind or 0, self._searched - len(_CALL_END)))
        if end < 0 and not at_end:
            self._searched = len(self._buffer)
            return False
        body = self._buffer if end < 0 else self._buffer[:end]
        if end < 0 and behind:
            body = body[: len(body) - _overlap(body, _CALL_END)]
        whole = end >= 0 or not self._cut or bool(behind)
        call = read_call(body, self._offered) if whole else read_cut_call(body, self._offered)
        if call is None:
            self._emit(TextPiece, _CALL)
        else:
            self._take(call, len(self._buffer) if end < 0 else end + len(_CALL_END))
        self._step = self._text
        return True

    def _bare_call(self, at_end: bool) -> bool:
        """The answer begins: with an object that is a call, or with anything else."""
        end = self._object.find(self._buffer)
        if end is None and not at_end:
            return False
        call = read_bare_call(self._buffer[:end], self._offered) if end else None
        if end is None and self._cut:  # an answer in JSON may begin like a call up to the word `arguments`
            call = read_cut_call(self._buffer, self._offered)
            call = call if call is not None and call[1] else None
        if call is not None:
            self._take(call, end or len(self._buffer))
        self._step = self._text
        return True

    def _take(self, call: tuple[str, str], end: int) -> None:
        """Emit `call`, which takes the buffer up to `end`; one without a name is left out."""
        if call[0]:
            self._found.append(CallPiece(self._calls, f"call_{random_text(24)}", *call))
            self._calls += 1
        self._buffer = self._buffer[end:]
        self._gap, self._border = "", True

    def _emit_but_tag(self, kind: type[TextPiece] | type[ReasoningPiece], tag: str, at_end: bool) -> None:
        """Emit the buffer, but keep an end that may be the beginning of `tag`."""
        keep = _overlap(self._buffer, tag)
        if at_end and not (self._cut and keep >= _SURELY_TAG):
            keep = 0
        ready = self._buffer[: len(self._buffer) - keep]
        self._buffer = self._buffer[len(ready) :]
        self._emit(kind, ready)

    def _emit(self, kind: type[TextPiece] | type[ReasoningPiece], text: str) -> None:
        text = self._gap + text
        core = text.rstrip()
        self._gap = text[len(core) :]
        if core:
            self._add(kind, core.lstrip() if self._border else core)
            self._border = False

    def _add(self, kind: type[TextPiece] | type[ReasoningPiece], text: str) -> None:
        last = self._found[-1] if self._found else None
        if isinstance(last, kind):
            self._found[-1] = kind(last.text + text)
        else:
            self._found.append(kind(text))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
