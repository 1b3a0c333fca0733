"""One neutral request and a stream of neutral deltas; the two dialects are renderings of these."""

from typing import Any

import msgspec

from tunewright.rendering.conversation import Conversation


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next token. `temperature` 0 is greedy. `top_k` 0 means no limit."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A chat completion, whichever dialect asked. `tool_choice` is auto, none, required or a function's name."""

    model: str
    conversation: Conversation
    sampling: Sampling
    tool_choice: str = "auto"
    request_id: str | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """More of the answer; whole characters only."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """More of the reasoning of a base that thinks."""

    text: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, tag="tool_call"):
    """A call, or more of one: `id` and `name` come with the first piece of each `index`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """The end, exactly once per stream. `reason` is stop, length or tool_calls."""

    reason: str
    usage: Usage


Delta = TextDelta | ReasoningDelta | ToolCallDelta | Finish


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer: the deltas put together."""

    text: str
    reasoning: str | None
    tool_calls: tuple[dict[str, Any], ...]
    reason: str
    usage: Usage
