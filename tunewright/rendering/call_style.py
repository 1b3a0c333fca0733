"""How a base writes calls of functions: found by letting its template write a few and reading them back."""

import json
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from tunewright.errors import TunewrightError
from tunewright.rendering.conversation import Conversation, Message, ToolCall
from tunewright.rendering.tools import AnswerParser, CallPiece, TextPiece

_NAME = "look_up_9"
_ARGUMENTS = {"place": "Oslo", "days": [1, 2]}
_RESULT = "Seventeen."
_TEXT = "Let me see."
_DESCRIPTION = "Looks a place up."
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _DESCRIPTION,
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
            "required": ["place"],
        },
    },
}


class CallStyle(msgspec.Struct, frozen=True, kw_only=True):
    """`lead` is what the model writes from the beginning of an answer that is a call to the name of the function.

    `bare`: the call stands without tags. `several` and `beside_text`: whether a message may hold more than one call, or text too;
    `any_arguments`: whether arguments may be something else than an object.
    """

    lead: str = ""
    bare: bool = False
    several: bool = True
    beside_text: bool = True
    any_arguments: bool = True

    @property
    def in_json(self) -> bool:
        """Whether a call is an object in tags, as in our own format."""
        return self.lead == OURS


OURS = '<tool_call>\n{"name": "'


class Writer(Protocol):
    """What is asked of a renderer."""

    def answer(self, conversation: Conversation) -> list[int]:
        """Ids of the answer that ends the conversation, as the model is taught to write it."""
        ...

    def prompt(self, conversation: Conversation) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def pieces(self, ids: Iterable[int]) -> list[str | None]: ...


def find_style(writer: Writer) -> CallStyle | None:
    """None if what the template writes for a call can't be read back, or if it leaves tools or results out."""
    try:
        ids = writer.answer(call_of(_NAME))
        asked = call_of(_NAME).messages
        result = Message(role="tool", content=_RESULT, tool_call_id=asked[1].tool_calls[0].id)
        prompt = writer.decode(writer.prompt(Conversation(messages=(*asked, result), tools=(_TOOL,))))
    except TunewrightError:
        return None
    lead, name, _ = spelled(writer, ids).partition(_NAME)
    bare = _read(writer.decode(ids), bare=False) != ("", 1)
    if (bare and _read(writer.decode(ids), bare=True) != ("", 1)) or not name:
        return None
    if _DESCRIPTION not in prompt or _RESULT not in prompt:
        return None
    return CallStyle(
        lead=lead,
        bare=bare,
        several=_reads(writer, call_of(_NAME, _NAME), bare, ("", 2)),
        beside_text=_reads(writer, call_of(_NAME, text=_TEXT), bare, (_TEXT, 1)),
        any_arguments=_renders(writer, call_of(_NAME, arguments="[1]")),
    )


def call_of(*names: str, text: str | None = None, arguments: str = json.dumps(_ARGUMENTS)) -> Conversation:
    """A question and the calls that answer it."""
    calls = tuple(ToolCall(id=f"call0000{n}", name=name, arguments=arguments) for n, name in enumerate(names))
    messages = (
        Message(role="user", content="How is it there?"),
        Message(role="assistant", content=text, tool_calls=calls),
    )
    return Conversation(messages=messages, tools=(_TOOL,))


def opening_ids(writer: Writer, style: CallStyle, name: str | None) -> tuple[list[int], str]:
    """The tokens that begin a call, and the text that they don't cover: up to the name of the function `name`, which is part of
    it, or up to where a name has to follow."""
    wanted = style.lead + (name or "")
    ids = writer.answer(call_of(name or _NAME))
    covered = ""
    for n, piece in enumerate(writer.pieces(ids)):
        covered += piece or ""
        if not wanted.startswith(covered):
            covered = covered[: len(covered) - len(piece or "")]
            return ids[:n], wanted[len(covered) :]
    return ids, ""


def spelled(writer: Writer, ids: Iterable[int]) -> str:
    """The text of ids, special tokens as they are written."""
    return "".join(piece or "" for piece in writer.pieces(ids))


def _reads(writer: Writer, conversation: Conversation, bare: bool, expected: tuple[str, int]) -> bool:
    try:
        return _read(writer.decode(writer.answer(conversation)), bare=bare) == expected
    except TunewrightError:
        return False


def _renders(writer: Writer, conversation: Conversation) -> bool:
    try:
        writer.answer(conversation)
    except TunewrightError:
        return False
    return True


def _read(answer: str, *, bare: bool) -> tuple[str, int]:
    """The answer's text and how many calls it holds; -1 if any of them is not the one that was written."""
    parser = AnswerParser((_TOOL,), bare_calls=bare)
    pieces = parser.push(answer) + parser.finish()
    calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
    same = all(call.name == _NAME and json.loads(call.arguments) == _ARGUMENTS for call in calls)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    return text.strip(), len(calls) if same else -1
