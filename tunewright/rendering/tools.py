"""Reads a model's answer as it streams: text, reasoning, and calls of tools (docs/tool-format.md)."""

import json
import re
from typing import Any

import msgspec

from tunewright.ids import random_text


class TextPiece(msgspec.Struct, frozen=True):
    """More of the answer's text."""

    text: str


class ReasoningPiece(msgspec.Struct, frozen=True):
    """More of the reasoning before the answer."""

    text: str


class CallPiece(msgspec.Struct, frozen=True):
    """A call, complete: `index` counts from 0, `arguments` is JSON text (or what the model wrote in its place)."""

    index: int
    id: str | None
    name: str | None
    arguments: str


Piece = TextPiece | ReasoningPiece | CallPiece

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_THINK, _THINK_END = "<think>", "</think>"


class AnswerParser:
    """Feed it text in any portions: the pieces put together don't depend on where the portions end.

    `<think>…</think>` at the very start is reasoning; `reasoning_open` says that the prompt opened it already. Calls are
    looked for only if `tools_offered`. A block that is no call comes out as text: nothing is lost but white space that
    borders on a call or on reasoning.
    """

    def __init__(self, tools_offered: bool, *, reasoning_open: bool = False) -> None:
        self._tools_offered = tools_offered
        self._step = self._think if reasoning_open else self._start
        self._buffer = ""
        self._searched = 0
        self._calls = 0
        self._gap = ""
        # White space waits in `_gap` until it is known whether text follows; at a border it is dropped.
        self._border = reasoning_open
        self._found: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text` makes certain."""
        self._buffer += text
        return self._advance(at_end=False)

    def finish(self) -> list[Piece]:
        """The rest, after the last `push`."""
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
            self._step = self._text
        return True

    def _think(self, at_end: bool) -> bool:
        thought, end, after = self._buffer.partition(_THINK_END)
        if end:
            self._emit(ReasoningPiece, thought)
            self._buffer, self._gap, self._border = after, "", True
            self._step = self._text
            return True
        self._emit_but_tag(ReasoningPiece, _THINK_END, at_end)
        return False

    def _text(self, at_end: bool) -> bool:
        before, tag, after = self._buffer.partition(_CALL) if self._tools_offered else (self._buffer, "", "")
        if tag:
            self._emit(TextPiece, before)
            self._buffer, self._searched = after, 0
            self._step = self._call
            return True
        self._emit_but_tag(TextPiece, _CALL if self._tools_offered else "", at_end)
        if self._gap and not self._border and (at_end or not self._tools_offered):
            self._add(TextPiece, self._gap)
            self._gap = ""
        return False

    def _call(self, at_end: bool) -> bool:
        # Search only what is new, so that a long call costs its length and not its square.
        end = self._buffer.find(_CALL_END, max(0, self._searched - len(_CALL_END)))
        if end < 0 and not at_end:
            self._searched = len(self._buffer)
            return False
        body = self._buffer if end < 0 else self._buffer[:end]
        call = _read_call(body)
        if call is None:
            self._emit(TextPiece, _CALL)
        else:
            self._found.append(CallPiece(self._calls, f"call_{random_text(24)}", *call))
            self._calls += 1
            self._buffer = "" if end < 0 else self._buffer[end + len(_CALL_END) :]
            self._gap, self._border = "", True
        self._step = self._text
        return True

    def _emit_but_tag(self, kind: type[TextPiece] | type[ReasoningPiece], tag: str, at_end: bool) -> None:
        """Emit the buffer, but keep an end that may be the beginning of `tag`."""
        keep = 0 if at_end else _overlap(self._buffer, tag)
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


def _read_call(body: str) -> tuple[str, str] | None:
    """Name and arguments of what stands between the tags; None if it is no call."""
    text = body.strip()
    return _from_json(text) if text.startswith("{") else _from_pairs(text)


def _from_json(text: str) -> tuple[str, str] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or not name or not isinstance(arguments, (dict, str)):
        return None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _from_pairs(text: str) -> tuple[str, str] | None:
    """The form that GLM bases write: the name, then keys and values in tags of their own."""
    name, begin, rest = text.partition("<arg_key>")
    pairs = _PAIR.findall(begin + rest)
    if not pairs or _PAIR.sub("", begin + rest).strip() or not _NAME.fullmatch(name.strip()):
        return None
    return name.strip(), json.dumps({key.strip(): _value(value) for key, value in pairs}, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_NAME = re.compile(r"[\w.-]{1,64}")
