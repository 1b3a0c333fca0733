"""Chat completions as the Zhipu SDKs ask for them: values outside a range are moved into it, counts come with the finish."""

from typing import Any

from fastapi import Request
from pydantic import StrictBool, StrictInt, StrictStr
from starlette.responses import Response

from tunewright.api.access import exchange_of
from tunewright.api.auth import CallerOf
from tunewright.api.body import beside_large, router_at
from tunewright.api.chat import (
    ChatFields,
    ChunkWriter,
    Object,
    chat_request,
    max_tokens,
    number,
    respond,
    seed,
    shaping,
    stops,
    wants_usage,
)
from tunewright.api.errors import invalid
from tunewright.api.services import CompletionsOf
from tunewright.api.zhipu.errors import PREFIX
from tunewright.completions.vocabulary import ChatRequest, Sampling
from tunewright.i18n import mark

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
DEFAULT_TEMPERATURE = 0.75
DEFAULT_TOP_P = 0.9
"""What the platform documents for the models that can be tuned."""

router = router_at(PREFIX)


class ChatBody(ChatFields):
    """Fields beside the common ones. `thinking`, `user_id` and the like are taken and have no effect."""

    do_sample: StrictBool | None = None
    max_completion_tokens: StrictInt | None = None
    request_id: StrictStr | None = None
    thinking: Object = None


@router.post("/chat/completions")
async def create(request: Request, body: ChatBody, caller: CallerOf, completions: CompletionsOf) -> Response:
    """Answer a conversation, whole or as a stream."""
    usage_chunk = wants_usage(body)
    chat = await beside_large(request, read, body, body.request_id or exchange_of(request.scope).request_id)
    extra: dict[str, Any] = {"request_id": chat.request_id}
    writer = None
    if body.stream:
        writer = ChunkWriter(chat.model, extra, usage_with_finish=True, usage_chunk=usage_chunk)
    return await respond(request, completions, caller, chat, writer, extra)


def read(body: ChatBody, request_id: str) -> ChatRequest:
    """The neutral request. Raises InvalidRequest."""
    if len(request_id) > 256:
        raise invalid("request_id", mark("{field} is too long."))
    return chat_request(body, _sampling(body), ROLES, request_id, "zhipu")


def _sampling(body: ChatBody) -> Sampling:
    temperature = min(1.0, max(0.0, number(body.temperature, "temperature", DEFAULT_TEMPERATURE)))
    top_p = min(1.0, max(0.01, number(body.top_p, "top_p", DEFAULT_TOP_P)))
    greedy = body.do_sample is False
    return Sampling(
        temperature=0.0 if greedy else temperature,
        top_p=1.0 if greedy else top_p,
        seed=seed(body.seed),
        max_tokens=max_tokens(body.max_tokens if body.max_tokens is not None else body.max_completion_tokens),
        stop=stops(body.stop),
        **shaping(body),
    )
