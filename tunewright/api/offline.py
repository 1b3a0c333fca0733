"""Requests of the dialects that are answered while nobody waits: what the batch loop asks of them."""

from collections.abc import Callable
from typing import Any

import msgspec
from pydantic import ValidationError

from tunewright.accounts.records import Caller
from tunewright.api.chat import ChatFields, completion_object
from tunewright.api.errors import ErrorTable, answer_to, from_validation, invalid, unexpected
from tunewright.api.openai import chat as openai_chat
from tunewright.api.openai import errors as openai_errors
from tunewright.api.zhipu import chat as zhipu_chat
from tunewright.api.zhipu import errors as zhipu_errors
from tunewright.batches.ports import CHAT, Speech
from tunewright.completions.vocabulary import ChatRequest
from tunewright.errors import TunewrightError
from tunewright.i18n import mark
from tunewright.wiring import Platform


class ChatSpeech:
    """Chat completions of one dialect (see `Speech`). `extra` are the dialect's own keys of an answer."""

    def __init__(
        self,
        platform: Platform,
        table: ErrorTable,
        fields: type[ChatFields],
        read: Callable[[Any, str], ChatRequest],
        extra: Callable[[str], dict[str, Any]],
    ) -> None:
        self._platform = platform
        self._table = table
        self._fields = fields
        self._read = read
        self._extra = extra

    def check(self, caller: Caller, body: dict[str, Any], request_id: str) -> str:
        """The model that is asked. Raises InvalidRequest, NotFound(`model_not_found`)."""
        model = self._request(body, request_id).model
        self._platform.models.resolve(caller.project_id, model)
        return model

    async def answer(
        self, caller: Caller, body: dict[str, Any], request_id: str, *, priority: int, endpoint: str
    ) -> dict[str, Any]:
        """The body of the answer."""
        asked = msgspec.structs.replace(self._request(body, request_id), priority=priority, endpoint=endpoint)
        completion = await self._platform.completions.complete(caller, asked)
        return completion_object(completion, asked.model, self._extra(request_id))

    def failure(self, error: TunewrightError | None, request_id: str) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer that an error is; None is a bug."""
        path = f"{self._table.prefix}/chat/completions"
        answer = answer_to(
            error or unexpected(request_id), self._table, path, self._platform.settings.language, request_id
        )
        return answer.status, msgspec.json.decode(answer.body)

    def _request(self, body: dict[str, Any], request_id: str) -> ChatRequest:
        try:
            fields = self._fields.model_validate(body)
        except ValidationError as error:
            raise from_validation(error) from None
        if fields.stream:
            raise invalid("stream", mark("{field} is not taken here."))
        return self._read(fields, request_id)


def speeches(platform: Platform) -> dict[tuple[str, str], Speech]:
    """(dialect, kind) -> how such requests are read and answered."""
    openai = ChatSpeech(platform, openai_errors.TABLE, openai_chat.ChatBody, openai_chat.read, lambda _: {})
    zhipu = ChatSpeech(
        platform,
        zhipu_errors.TABLE,
        zhipu_chat.ChatBody,
        zhipu_chat.read,
        lambda request_id: {"request_id": request_id},
    )
    return {("openai", CHAT): openai, ("zhipu", CHAT): zhipu}
