"""Requests of the dialects that are answered while nobody waits: what the batch loop asks of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from tunewright.accounts.records import Caller
from tunewright.api.chat import ChatFields, completion_object
from tunewright.api.embeddings import EmbeddingBody, embedding_object, embedding_request
from tunewright.api.errors import ErrorTable, answer_to, from_validation, invalid, unexpected
from tunewright.api.openai import chat as openai_chat
from tunewright.api.openai import errors as openai_errors
from tunewright.api.zhipu import chat as zhipu_chat
from tunewright.api.zhipu import errors as zhipu_errors
from tunewright.batches.ports import CHAT, EMBEDDINGS, Speech
from tunewright.completions.vocabulary import ChatRequest
from tunewright.errors import TunewrightError
from tunewright.i18n import mark
from tunewright.wiring import Platform

_Fields = TypeVar("_Fields", bound=BaseModel)


class _Failures:
    """How one dialect words what went wrong on `path`."""

    def __init__(self, platform: Platform, table: ErrorTable, path: str) -> None:
        self._platform = platform
        self._table = table
        self._path = table.prefix + path

    def failure(self, error: TunewrightError | None, request_id: str) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer that an error is; None is a bug."""
        language = self._platform.settings.language
        answer = answer_to(error or unexpected(request_id), self._table, self._path, language, request_id)
        return answer.status, msgspec.json.decode(answer.body)


class ChatSpeech(_Failures):
    """Chat completions of one dialect (see `Speech`). `extra` are the dialect's own keys of an answer."""

    def __init__(
        self,
        platform: Platform,
        table: ErrorTable,
        fields: type[ChatFields],
        read: Callable[[Any, str], ChatRequest],
        extra: Callable[[str], dict[str, Any]],
    ) -> None:
        super().__init__(platform, table, "/chat/completions")
        self._fields = fields
        self._read = read
        self._extra = extra

    def check(self, caller: Caller, body: dict[str, Any], request_id: str) -> str:
        """The model that is asked. Raises InvalidRequest, NotFound(`model_not_found`)."""
        model = self._request(body, request_id).model
        self._platform.serving.resolve(caller.project_id, model)
        return model

    async def answer(
        self, caller: Caller, body: dict[str, Any], request_id: str, *, priority: int, endpoint: str
    ) -> dict[str, Any]:
        """The body of the answer."""
        asked = msgspec.structs.replace(self._request(body, request_id), priority=priority, endpoint=endpoint)
        completion = await self._platform.completions.complete(caller, asked)
        return completion_object(completion, asked.model, self._extra(request_id))

    def _request(self, body: dict[str, Any], request_id: str) -> ChatRequest:
        fields = _validated(self._fields, body)
        if fields.stream:
            raise invalid("stream", mark("{field} is not taken here."))
        return self._read(fields, request_id)


class EmbeddingSpeech(_Failures):
    """Embeddings of one dialect (see `Speech`)."""

    def __init__(self, platform: Platform, table: ErrorTable, dialect: str) -> None:
        super().__init__(platform, table, "/embeddings")
        self._dialect = dialect

    def check(self, caller: Caller, body: dict[str, Any], request_id: str) -> str:
        """The model that is asked. Raises InvalidRequest, NotFound(`model_not_found`)."""
        asked = embedding_request(_validated(EmbeddingBody, body), request_id, self._dialect)
        self._platform.models.resolve(caller.project_id, asked.model)
        return asked.model

    async def answer(
        self, caller: Caller, body: dict[str, Any], request_id: str, *, priority: int, endpoint: str
    ) -> dict[str, Any]:
        """The body of the answer."""
        fields = _validated(EmbeddingBody, body)
        asked = embedding_request(fields, request_id, self._dialect)
        asked = msgspec.structs.replace(asked, priority=priority, endpoint=endpoint)
        answer = await self._platform.completions.embed(caller, asked)
        return embedding_object(answer, asked.model, fields.encoding_format)


def _validated(fields: type[_Fields], body: dict[str, Any]) -> _Fields:
    try:
        return fields.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None


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
    return {
        ("openai", CHAT): openai,
        ("zhipu", CHAT): zhipu,
        ("openai", EMBEDDINGS): EmbeddingSpeech(platform, openai_errors.TABLE, "openai"),
        ("zhipu", EMBEDDINGS): EmbeddingSpeech(platform, zhipu_errors.TABLE, "zhipu"),
    }
