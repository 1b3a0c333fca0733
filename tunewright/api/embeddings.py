"""Embeddings over HTTP, the same in both dialects."""

import base64
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import numpy
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, WithJsonSchema, model_validator

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import beside_large, router_at
from tunewright.api.chat import usage_object
from tunewright.api.errors import invalid, missing
from tunewright.api.refusals import NEVER, refuse
from tunewright.api.services import CompletionsOf
from tunewright.api.streaming import unless_gone
from tunewright.completions.embeddings import EmbeddingAnswer, EmbeddingRequest
from tunewright.errors import as_sent
from tunewright.i18n import mark

MOST_INPUTS = 2048
_ENCODINGS = ("float", "base64")

Input = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class EmbeddingBody(BaseModel):
    """Unknown keys are ignored; `user` and the like are taken and have no effect."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr | None = None
    input: Input = None
    dimensions: StrictInt | None = None
    encoding_format: StrictStr | None = None
    request_id: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_names(cls, body: Any) -> Any:
        return refuse(body, NEVER)


def embedding_router(prefix: str, dialect: str) -> APIRouter:
    """A router with the one route."""
    router = router_at(prefix)

    async def create(request: Request, body: EmbeddingBody, caller: CallerOf, completions: CompletionsOf) -> Json:
        """Make a vector of each text."""
        request_id = exchange_of(request.scope).request_id
        asked = await beside_large(request, embedding_request, body, request_id, dialect)
        answer = await unless_gone(request.receive, completions.embed(caller, asked))
        return Json(embedding_object(answer, asked.model, body.encoding_format))

    router.add_api_route("/embeddings", create, methods=["POST"])
    return router


def embedding_request(body: EmbeddingBody, request_id: str, dialect: str) -> EmbeddingRequest:
    """The neutral request. Raises InvalidRequest."""
    if not body.model:
        raise missing("model")
    if len(body.model) > 512:
        raise invalid("model", mark("{field} is too long."))
    if body.encoding_format not in (None, *_ENCODINGS):
        sentence = mark("{field} must be one of {expected}, not {value}.")
        raise invalid("encoding_format", sentence, expected=", ".join(_ENCODINGS), value=as_sent(body.encoding_format))
    return EmbeddingRequest(
        model=body.model,
        inputs=_inputs(body.input),
        dimensions=body.dimensions,
        request_id=body.request_id or request_id,
        dialect=dialect,
    )


def embedding_object(answer: EmbeddingAnswer, model: str, encoding_format: str | None) -> dict[str, Any]:
    """The answer; vectors are numbers unless base64 of little-endian float32 is asked for."""
    written: Callable[[bytes], Any] = _base64 if encoding_format == "base64" else _numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(answer.vectors)
        ],
        "model": model,
        "usage": usage_object(answer.usage),
    }


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _numbers(vector: bytes) -> msgspec.Raw:
    """As few digits as tell one float32 from another: half of what the same numbers take as float64."""
    values = numpy.frombuffer(vector, "<f4")
    return msgspec.Raw(b"[" + b",".join(str(value).encode() for value in values) + b"]")


def _inputs(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text or several, one list of token ids or several. Raises InvalidRequest."""
    if value is None:
        raise missing("input")
    several = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not 1 <= len(several) <= MOST_INPUTS:
        raise invalid("input", mark("{field} must be 1 to {most} texts or lists of token ids."), most=MOST_INPUTS)
    for index, each in enumerate(several):
        if not (isinstance(each, str) and each) and not _is_ids(each):
            place = f"input[{index}]" if isinstance(value, list) else "input"
            raise invalid(place, mark("{field} must be a text or a list of token ids, and not empty."))
    return tuple(each if isinstance(each, str) else tuple(each) for each in several)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    )
