"""Rows as the trainer takes them: the same parsing as the check, then one neutral shape."""

from typing import Any

from tunewright.datasets.rules.messages import ROLES
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.rendering.conversation import Conversation, Message, ToolCall


def conversation_of(value: Any, line: int = 1) -> Conversation:
    """The conversation of a parsed chat or function row, which has passed the check.

    Messages after the last assistant message are left out: they teach nothing. Assistant messages of `weight` 0 come with
    `trained=False`. Raises InvalidRequest(`wrong_format`) for any other row.
    """
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
