"""The words of a conversation: what a training row, a chat request and the renderer share."""

from typing import Any

import msgspec


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call that the assistant makes. `arguments` is JSON text, as both dialects send it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. `role` is system, user, assistant or tool; `content` is None only beside `tool_calls`.

    `trained` is False for assistant turns that a row excludes (`weight: 0`).
    """

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    trained: bool = True


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A whole row or prompt. `tools` are the function schemas in the OpenAI shape (`{"type": "function", ...}`)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
