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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told at each place; None tells no probabilities."""


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token's text and bytes (a part of a character may be all it has) with the natural logarithm of its probability."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list["TokenLogprob"] | None = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A chat completion, whichever dialect asked.

    `tool_choice` is auto, none or required; with `function` the call that is required must be of that one. `one_call`: the answer
    ends with its first call.
    """

    model: str
    conversation: Conversation
    sampling: Sampling
    n: int = 1
    """Answers wanted."""
    tool_choice: str = "auto"
    function: str | None = None
    one_call: bool = False
    answer_schema: dict[str, Any] | None = None
    """The JSON schema that the answer has to satisfy; None leaves it free."""
    request_id: str | None = None
    dialect: str = ""
    endpoint: str = "/chat/completions"
    """The route that asked, for the ledger."""
    priority: int = 0
    """That of `Generate`: above 0 nobody waits, and what is answered at once begins anew when it had to make room."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """More of the answer; whole characters only. `logprobs` are of tokens whose text has come by now: text that may be the
    beginning of a call or of a stop string is held back, and its tokens with it."""

    text: str
    choice: int = 0
    logprobs: list[TokenLogprob] | None = None


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """More of the reasoning of a base that thinks."""

    text: str
    choice: int = 0


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, tag="tool_call"):
    """A call, or more of one: `id` and `name` come with the first piece of each `index`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    choice: int = 0


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """The end of a choice. `reason` is stop, length or tool_calls; `usage` is of the whole request and comes with the last."""

    reason: str
    usage: Usage | None
    choice: int = 0


Delta = TextDelta | ReasoningDelta | ToolCallDelta | Finish


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer: its deltas put together."""

    text: str
    reason: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    logprobs: list[TokenLogprob] | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """All answers to a request."""

    choices: tuple[Choice, ...]
    usage: Usage
