"""What both dialects share of chat completions: reading a request, and writing answers and chunks.

A dialect's own `chat.py` holds its fields, its ranges, and where it puts the usage.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr, WithJsonSchema, model_validator
from starlette.requests import Request
from starlette.responses import Response

from tunewright.accounts.records import Caller
from tunewright.api.answers import Json
from tunewright.api.conversations import conversation_of, tool_choice_of
from tunewright.api.errors import invalid, missing
from tunewright.api.refusals import NEVER, refuse, unsupported
from tunewright.api.streaming import DONE, EventStream, unless_gone
from tunewright.clock import wall_s
from tunewright.completions.vocabulary import (
    ChatRequest,
    Completion,
    Delta,
    Finish,
    ReasoningDelta,
    Sampling,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark
from tunewright.ids import new_id

MOST_STOPS = 4
LONGEST_STOP = 256
_SEEDS = range(-(2**63), 2**63)

Messages = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"type": "string", "enum": ["system", "user", "assistant", "tool"]},
                    "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
                    "reasoning_content": {"type": "string"},
                    "tool_calls": {"type": "array", "items": {"type": "object"}},
                    "tool_call_id": {"type": "string"},
                },
            },
        }
    ),
]
Tools = Annotated[Any, WithJsonSchema({"type": "array", "maxItems": 128, "items": {"type": "object"}})]
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]
Stop = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 4, "items": {"type": "string", "maxLength": 256}}]}
    ),
]
Number = Annotated[Any, WithJsonSchema({"type": "number"})]
Object = Annotated[Any, WithJsonSchema({"type": "object"})]


class ChatFields(BaseModel):
    """The fields that both dialects have. Every one may be null; unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr | None = None
    messages: Messages = None
    stream: StrictBool | None = None
    stream_options: Object = None
    temperature: Number = None
    top_p: Number = None
    max_tokens: StrictInt | None = None
    stop: Stop = None
    seed: StrictInt | None = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    response_format: Object = None
    n: StrictInt | None = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Object = None
    best_of: Any = None
    frequency_penalty: Number = None
    presence_penalty: Number = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_names(cls, body: Any) -> Any:
        return refuse(body, NEVER)


def chat_request(fields: ChatFields, sampling: Sampling, roles: dict[str, str], request_id: str) -> ChatRequest:
    """The neutral request. Raises InvalidRequest with the place of what is wrong."""
    if not fields.model:
        raise missing("model")
    if len(fields.model) > 512:
        raise invalid("model", mark("{field} is too long."))
    _refuse_unsupported(fields)
    check_response_format(fields.response_format)
    conversation = conversation_of(fields.messages, fields.tools, fields.model, roles)
    return ChatRequest(
        model=fields.model,
        conversation=conversation,
        sampling=sampling,
        tool_choice=tool_choice_of(fields.tool_choice, conversation.tools),
        request_id=request_id,
    )


def _refuse_unsupported(fields: ChatFields) -> None:
    """What would change the answer if it were ignored. Values that ask for the usual are let through: clients send them."""
    if fields.n not in (None, 1):
        raise invalid("n", mark("{field} must be 1."))
    usual = (None, False, 0, {}, [])
    if fields.best_of not in (None, 1):
        raise unsupported("best_of")
    for name in ("logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty"):
        if getattr(fields, name) not in usual:
            raise unsupported(name)


def check_response_format(value: Any) -> None:
    """Null or plain text. Raises InvalidRequest (`response_format_not_supported`, `invalid_value`)."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise invalid("response_format", mark("{field} must be an object, not {value}."), value=quote(value))
    kind = value.get("type")
    if kind == "text":
        return
    if kind in ("json_object", "json_schema"):
        raise InvalidRequest(
            "response_format_not_supported",
            mark("This server can't force answers into JSON; ask for it in the prompt, without response_format."),
            param="response_format.type",
        )
    raise invalid("response_format.type", mark("{field} must be text, not {value}."), value=quote(kind))


def number(value: Any, param: str, default: float) -> float:
    """`default` for null. Raises InvalidRequest for anything but a number."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(param, mark("{field} must be a number, not {value}."), value=quote(value))
    return float(value)


def within(value: float, param: str, least: float, most: float) -> float:
    """`value`. Raises InvalidRequest outside of [least, most]."""
    if not least <= value <= most:
        raise invalid(param, mark("{field} must be from {least} to {most}."), least=least, most=most)
    return value


def stops(value: Any) -> tuple[str, ...]:
    """Up to four texts. Raises InvalidRequest."""
    if value is None:
        return ()
    found = [value] if isinstance(value, str) else value
    right = (
        isinstance(found, list)
        and len(found) <= MOST_STOPS
        and all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in found)
    )
    if not right:
        sentence = mark("{field} must be at most {count} texts of 1 to {length} characters.")
        raise invalid("stop", sentence, count=MOST_STOPS, length=LONGEST_STOP)
    return tuple(found)


def seed(value: int | None) -> int | None:
    """A seed that every engine takes. Raises InvalidRequest beyond 64 bits."""
    if value is None:
        return None
    if value not in _SEEDS:
        raise invalid("seed", mark("{field} must fit into 64 bits."))
    return value & (2**63 - 1)


def max_tokens(value: int | None, param: str = "max_tokens") -> int | None:
    """Null or at least 1; the upper end depends on the model. Raises InvalidRequest."""
    if value is not None and value < 1:
        raise invalid(param, mark("{field} must be at least 1."))
    return value


def wants_usage(fields: ChatFields) -> bool:
    """`stream_options.include_usage`. Raises InvalidRequest for options without a stream, or not an object."""
    options = fields.stream_options
    if options is None:
        return False
    if not isinstance(options, dict):
        raise invalid("stream_options", mark("{field} must be an object, not {value}."), value=quote(options))
    if not fields.stream:
        raise invalid("stream_options", mark("{field} needs stream to be true."))
    include = options.get("include_usage")
    if include is not None and not isinstance(include, bool):
        raise invalid("stream_options.include_usage", mark("{field} must be true or false."))
    return bool(include)


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts as both dialects show them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def completion_object(completion: Completion, model: str, extra: dict[str, Any]) -> dict[str, Any]:
    """A whole answer; `extra` are the dialect's own top-level keys."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if completion.reasoning is not None:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["content"] = completion.text or None
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "index": index,
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for index, call in enumerate(completion.tool_calls)
        ]
    return {
        "id": new_id("chatcmpl"),
        **extra,
        "object": "chat.completion",
        "created": wall_s(),
        "model": model,
        "choices": [{"index": 0, "finish_reason": completion.reason, "message": message}],
        "usage": usage_object(completion.usage),
    }


class ChunkWriter:
    """Frames of one stream. What never changes is encoded once, so a token costs little more than its own text.

    `usage_with_finish` puts the counts into the chunk with the finish reason; `usage_chunk` sends one more chunk with no
    choices for them.
    """

    def __init__(self, model: str, extra: dict[str, Any], *, usage_with_finish: bool, usage_chunk: bool) -> None:
        head = {
            "id": new_id("chatcmpl"),
            **extra,
            "object": "chat.completion.chunk",
            "created": wall_s(),
            "model": model,
        }
        self._head = b"data: " + msgspec.json.encode(head)[:-1]
        self._delta = self._head + b',"choices":[{"index":0,"delta":{"role":"assistant",'
        self._end = b',"usage":null}\n\n' if usage_chunk and not usage_with_finish else b"}\n\n"
        self._text_end = b'},"finish_reason":null}]' + self._end
        self._usage_with_finish = usage_with_finish
        self._usage_chunk = usage_chunk
        self._encode = msgspec.json.Encoder().encode

    def frames(self, delta: Delta) -> bytes:
        """The frame (for `Finish`: frames, `[DONE]` included) for one delta."""
        if type(delta) is TextDelta:
            return self._delta + b'"content":' + self._encode(delta.text) + self._text_end
        if isinstance(delta, ReasoningDelta):
            return self._delta + b'"reasoning_content":' + self._encode(delta.text) + self._text_end
        if isinstance(delta, ToolCallDelta):
            return self._delta + b'"tool_calls":' + self._encode([_call_piece(delta)]) + self._text_end
        if isinstance(delta, Finish):
            return self._finish(delta) + DONE
        raise TypeError(type(delta))

    def _finish(self, finish: Finish) -> bytes:
        usage = self._encode(usage_object(finish.usage))
        reason = b'"content":""},"finish_reason":' + self._encode(finish.reason) + b"}]"
        end = b',"usage":' + usage + b"}\n\n" if self._usage_with_finish else self._end
        last = self._delta + reason + end
        if self._usage_chunk:
            last += self._head + b',"choices":[],"usage":' + usage + b"}\n\n"
        return last


def _call_piece(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.index, "function": function}
    return {
        "index": delta.index,
        "id": delta.id,
        "type": "function",
        "function": {"name": delta.name, **function},
    }


async def frames_of(first: Delta, rest: AsyncIterator[Delta], writer: ChunkWriter) -> AsyncGenerator[bytes, None]:
    """All frames of a stream whose first delta was waited for, because errors before it have an ordinary status."""
    yield writer.frames(first)
    last = first
    async for delta in rest:
        last = delta
        yield writer.frames(delta)
    if not isinstance(last, Finish):
        raise RuntimeError("the stream ended without a finish")


class Completions(Protocol):
    """What the routes ask of the completion service."""

    def stream(self, caller: Caller, request: ChatRequest) -> AsyncIterator[Delta]:
        """The deltas of one answer; what the caller did wrong is raised before the first."""
        ...

    async def complete(self, caller: Caller, request: ChatRequest) -> Completion:
        """The whole answer."""
        ...


async def respond(
    request: Request,
    completions: Completions,
    caller: Caller,
    chat: ChatRequest,
    writer: ChunkWriter | None,
    extra: dict[str, Any],
) -> Response:
    """The answer: a stream if there is a `writer`, else one object. A client that leaves ends the work at once."""
    if writer is None:
        completion = await unless_gone(request.receive, completions.complete(caller, chat))
        return Json(completion_object(completion, chat.model, extra))
    deltas = completions.stream(caller, chat)
    close: Callable[[], Awaitable[None]] = deltas.aclose  # type: ignore[attr-defined]  # an async generator
    try:
        first = await unless_gone(request.receive, _first(deltas))
    except BaseException:
        await close()
        raise
    return EventStream(frames_of(first, deltas, writer), close)


async def _first(deltas: AsyncIterator[Delta]) -> Delta:
    return await anext(deltas)
