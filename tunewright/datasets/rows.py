"""Rows as the trainer takes them: the same parsing as the check, then one neutral shape."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunewright import strict_json
from tunewright.datasets.lines import read_lines
from tunewright.datasets.rules.messages import ROLES
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.rendering.conversation import Conversation, Message, ToolCall

_BOM = b"\xef\xbb\xbf"


def read_conversations(
    path: Path, max_line_bytes: int, skip_lines: frozenset[int] = frozenset()
) -> Iterator[tuple[int, Conversation]]:
    """(line number from 1, conversation) of every chat or function row that is not blank, in order, in bounded memory.

    Messages after the last assistant message are left out: they teach nothing. Assistant messages of `weight` 0 come with
    `trained=False`. The lines of `skip_lines` are not looked at. The file has passed the check; raises InvalidRequest for a line
    that is no such row all the same.
    """
    with path.open("rb", buffering=1 << 18) as stream:
        if stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        for line in read_lines(stream, max_line_bytes):
            if line.number in skip_lines:
                continue
            if line.data is None:
                sentence = mark("line {line} is longer than {limit} bytes")
                raise InvalidRequest("line_too_long", sentence, line=line.number, limit=max_line_bytes)
            if line.data and not line.data.isspace():
                yield line.number, conversation_of(strict_json.loads(line.data), line.number)


def conversation_of(value: Any, line: int = 1) -> Conversation:
    """The conversation of a parsed chat or function row. Raises InvalidRequest(`wrong_format`) for any other row."""
    try:
        messages = [_message(message) for message in value["messages"]]
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        return Conversation(messages=tuple(messages[: last + 1]), tools=tuple(value.get("tools") or ()))
    except (KeyError, TypeError, ValueError, AttributeError):
        sentence = mark("line {line} is not a chat or function row")
        raise InvalidRequest("wrong_format", sentence, line=line) from None


def _message(message: dict[str, Any]) -> Message:
    role = message["role"]
    if role not in ROLES:
        raise ValueError(role)
    calls = (message.get("tool_calls") or ()) if role == "assistant" else ()
    return Message(
        role=role,
        content=_content(message.get("content")),
        reasoning_content=message.get("reasoning_content") if role == "assistant" else None,
        tool_calls=tuple(
            ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
            for call in calls
        ),
        tool_call_id=message.get("tool_call_id") if role == "tool" else None,
        trained=message.get("weight") != 0,
    )


def _content(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "".join(_text(part) for part in content)


def _text(part: dict[str, Any]) -> str:
    if part["type"] != "text":
        raise ValueError(part["type"])
    return part["text"]
