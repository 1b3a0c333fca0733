"""Chat completions as the OpenAI SDK asks for them: values outside a range are refused, counts come in a chunk on request."""

from typing import Any

from fastapi import Request
from pydantic import StrictBool, StrictInt
from starlette.responses import Response

from tunewright.api.access import exchange_of
from tunewright.api.auth import CallerOf
from tunewright.api.body import beside_large, router_at
from tunewright.api.chat import (
    ChatFields,
    ChunkWriter,
    chat_request,
    max_tokens,
    number,
    respond,
    seed,
    shaping,
    stops,
    wants_usage,
    within,
)
from tunewright.api.errors import invalid
from tunewright.api.openai.errors import PREFIX
from tunewright.api.refusals import unsupported
from tunewright.api.services import CompletionsOf
from tunewright.completions.vocabulary import ChatRequest, Sampling
from tunewright.i18n import mark

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}

router = router_at(PREFIX)


class ChatBody(ChatFields):
    """Fields beside the common ones. `user`, `store` and the like are taken and have no effect."""

    max_completion_tokens: StrictInt | None = None
    do_sample: StrictBool | None = None
    """Of the other dialect; its users send it here too, as an extra."""
    modalities: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None


@router.post("/chat/completions")
async def create(request: Request, body: ChatBody, caller: CallerOf, completions: CompletionsOf) -> Response:
    """Answer a conversation, whole or as a stream."""
    usage_chunk = wants_usage(body)
    chat = await beside_large(request, read, body, exchange_of(request.scope).request_id)
    writer = None
    if body.stream:
        writer = ChunkWriter(chat.model, {}, usage_with_finish=False, usage_chunk=usage_chunk, role_once=True)
    return await respond(request, completions, caller, chat, writer, {})


def read(body: ChatBody, request_id: str) -> ChatRequest:
    """The neutral request. Raises InvalidRequest."""
    for name in ("audio", "functions", "function_call"):
        if getattr(body, name) is not None:
            raise unsupported(name)
    if body.modalities not in (None, ["text"]):
        raise unsupported("modalities")
    return chat_request(body, _sampling(body), ROLES, request_id, "openai")


def _sampling(body: ChatBody) -> Sampling:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("max_completion_tokens", mark("Send either max_tokens or max_completion_tokens, not both."))
    temperature = within(number(body.temperature, "temperature", 1.0), "temperature", 0.0, 2.0)
    top_p = number(body.top_p, "top_p", 1.0)
    if not 0.0 < top_p <= 1.0:
        raise invalid("top_p", mark("{field} must be above 0 and at most 1."))
    limit = max_tokens(body.max_tokens) or max_tokens(body.max_completion_tokens, "max_completion_tokens")
    return Sampling(
        temperature=0.0 if body.do_sample is False else temperature,
        top_p=top_p,
        seed=seed(body.seed),
        max_tokens=limit,
        stop=stops(body.stop),
        **shaping(body),
    )
