"""What both dialects share of chat completions: reading a request, and writing answers and chunks.

A dialect's own `chat.py` holds its fields, its ranges, and where it puts the usage.
"""

import re
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
    Choice,
    Completion,
    Delta,
    Finish,
    ReasoningDelta,
    Sampling,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from tunewright.errors import InvalidRequest, as_sent, quote
from tunewright.i18n import mark
from tunewright.ids import new_id

MOST_STOPS = 4
LONGEST_STOP = 256
MOST_CHOICES = 8
MOST_BIASED = 1024
MOST_TOP_LOGPROBS = 20
LARGEST_SCHEMA_BYTES = 65536
_TOKEN_ID = re.compile(r"[0-9]{1,9}")
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
    parallel_tool_calls: StrictBool | None = None
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


def chat_request(
    fields: ChatFields, sampling: Sampling, roles: dict[str, str], request_id: str, dialect: str
) -> ChatRequest:
    """The neutral request. Raises InvalidRequest with the place of what is wrong."""
    if not fields.model:
        raise missing("model")
    if len(fields.model) > 512:
        raise invalid("model", mark("{field} is too long."))
    if fields.best_of not in (None, 1):
        raise unsupported("best_of")
    conversation = conversation_of(fields.messages, fields.tools, fields.model, roles)
    tool_choice, function = tool_choice_of(fields.tool_choice, conversation.tools)
    return ChatRequest(
        model=fields.model,
        conversation=conversation,
        sampling=sampling,
        n=_choices(fields.n),
        tool_choice=tool_choice,
        function=function,
        one_call=fields.parallel_tool_calls is False,
        answer_schema=answer_schema(fields.response_format),
        request_id=request_id,
        dialect=dialect,
    )


def _choices(n: int | None) -> int:
    if n is not None and not 1 <= n <= MOST_CHOICES:
        raise invalid("n", mark("{field} must be from {least} to {most}."), least=1, most=MOST_CHOICES)
    return n or 1


def shaping(fields: ChatFields) -> dict[str, Any]:
    """The fields of `Sampling` that both dialects read alike: penalties, bias and log-probabilities. Raises InvalidRequest."""
    return {
        name: within(number(getattr(fields, name), name, 0.0), name, -2.0, 2.0)
        for name in ("presence_penalty", "frequency_penalty")
    } | {"logit_bias": _bias(fields.logit_bias), "top_logprobs": _top_logprobs(fields.logprobs, fields.top_logprobs)}


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MOST_BIASED:
        sentence = mark("{field} must be an object of at most {count} token ids with a number for each.")
        raise invalid("logit_bias", sentence, count=MOST_BIASED)
    found: dict[int, float] = {}
    for token, bias in value.items():
        if not _TOKEN_ID.fullmatch(token):
            sentence = mark("{field} has {name}, which is no token id.")
            raise invalid("logit_bias", sentence, name=quote(token))
        place = f"logit_bias.{token}"
        found[int(token)] = within(number(bias, place, 0.0), place, -100.0, 100.0)
    return found


def _top_logprobs(wanted: Any, top: Any) -> int | None:
    if wanted is not None and not isinstance(wanted, bool):
        raise invalid("logprobs", mark("{field} must be true or false."))
    if top is None:
        return 0 if wanted else None
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MOST_TOP_LOGPROBS:
        sentence = mark("{field} must be a whole number from {least} to {most}.")
        raise invalid("top_logprobs", sentence, least=0, most=MOST_TOP_LOGPROBS)
    if not wanted:
        if top == 0:
            return None  # what clients send that always name it
        raise invalid("top_logprobs", mark("{field} needs logprobs to be true."))
    return top


def answer_schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema of `response_format`; None for null and plain text. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise invalid("response_format", mark("{field} must be an object, not {value}."), value=as_sent(value))
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        sentence = mark("{field} must be text, json_object or json_schema, not {value}.")
        raise invalid("response_format.type", sentence, value=as_sent(kind))
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    place = "response_format.json_schema.schema"
    if not isinstance(schema, dict):
        raise invalid(place, mark("{field} must be an object, not {value}."), value=as_sent(schema))
    if len(msgspec.json.encode(schema)) > LARGEST_SCHEMA_BYTES:
        raise InvalidRequest(
            "invalid_schema",
            mark("The schema is larger than {limit} bytes."),
            param=place,
            limit=LARGEST_SCHEMA_BYTES,
        )
    return schema


def number(value: Any, param: str, default: float) -> float:
    """`default` for null. Raises InvalidRequest for anything but a number."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(param, mark("{field} must be a number, not {value}."), value=as_sent(value))
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
        raise invalid("stream_options", mark("{field} must be an object, not {value}."), value=as_sent(options))
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
    return {
        "id": new_id("chatcmpl"),
        **extra,
        "object": "chat.completion",
        "created": wall_s(),
        "model": model,
        "choices": [_choice_object(index, choice) for index, choice in enumerate(completion.choices)],
        "usage": usage_object(completion.usage),
    }


def _choice_object(index: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "index": place,
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for place, call in enumerate(choice.tool_calls)
        ]
    shown: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "message": message}
    if choice.logprobs is not None:
        shown["logprobs"] = {"content": msgspec.to_builtins(choice.logprobs), "refusal": None}
    return shown


class ChunkWriter:
    """Frames of one stream. What never changes is encoded once, so a token costs little more than its own text.

    `usage_with_finish` puts the counts into the chunk with the finish reason; `usage_chunk` sends one more chunk with no
    choices for them. `role_once` says who speaks in the first delta of a choice alone, and nothing in its last: clients that add
    up texts would add up roles.
    """

    def __init__(
        self, model: str, extra: dict[str, Any], *, usage_with_finish: bool, usage_chunk: bool, role_once: bool = False
    ) -> None:
        head = {
            "id": new_id("chatcmpl"),
            **extra,
            "object": "chat.completion.chunk",
            "created": wall_s(),
            "model": model,
        }
        self._head = b"data: " + msgspec.json.encode(head)[:-1]
        choices = [self._head + b',"choices":[{"index":%d,"delta":{' % choice for choice in range(MOST_CHOICES)]
        self._first = [begin + b'"role":"assistant",' for begin in choices]
        self._later = choices if role_once else self._first
        self._delta = self._first.copy()
        self._end = b',"usage":null}\n\n' if usage_chunk and not usage_with_finish else b"}\n\n"
        self._text_end = b'},"finish_reason":null}]' + self._end
        self._scored_end = b',"refusal":null},"finish_reason":null}]' + self._end
        self._usage_with_finish = usage_with_finish
        self._usage_chunk = usage_chunk
        self._encode = msgspec.json.Encoder().encode

    def frames(self, delta: Delta) -> bytes:
        """The frame for one delta; for the last `Finish` frames, `[DONE]` included."""
        begin = self._delta[delta.choice]
        self._delta[delta.choice] = self._later[delta.choice]
        if type(delta) is TextDelta:
            content = begin + b'"content":' + self._encode(delta.text)
            if delta.logprobs is None:
                return content + self._text_end
            return content + b'},"logprobs":{"content":' + self._encode(delta.logprobs) + self._scored_end
        if isinstance(delta, ReasoningDelta):
            return begin + b'"reasoning_content":' + self._encode(delta.text) + self._text_end
        if isinstance(delta, ToolCallDelta):
            return begin + b'"tool_calls":' + self._encode([_call_piece(delta)]) + self._text_end
        if isinstance(delta, Finish):
            return self._finish(begin, delta)
        raise TypeError(type(delta))

    def _finish(self, begin: bytes, finish: Finish) -> bytes:
        says = b'"content":""' if begin is self._first[finish.choice] else b""
        reason = begin + says + b'},"finish_reason":' + self._encode(finish.reason) + b"}]"
        if finish.usage is None:
            return reason + self._end
        usage = self._encode(usage_object(finish.usage))
        last = reason + (b',"usage":' + usage + b"}\n\n" if self._usage_with_finish else self._end)
        if self._usage_chunk:
            last += self._head + b',"choices":[],"usage":' + usage + b"}\n\n"
        return last + DONE


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
