"""Vectors of texts: what a request may ask of a base, and what is made of the engine's vectors."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy

from tunewright.completions.vocabulary import Usage
from tunewright.deployments.ports import Embed
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.models.records import Base, Embeddings, TunedModel
from tunewright.rendering.renderer import renderer_of


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts, or their token ids, to be made vectors of. `dimensions` None: as many as the base has."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    request_id: str | None = None
    dialect: str = ""
    endpoint: str = "/embeddings"
    priority: int = 0


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A vector for each input, as little-endian float32."""

    vectors: tuple[bytes, ...]
    usage: Usage


def embed_order(base: Base, tuned: TunedModel | None, request: EmbeddingRequest, context: int) -> Embed:
    """What to ask of the engine. Raises InvalidRequest (`embeddings_not_supported`, `context_length_exceeded`,
    `invalid_value`)."""
    way = base.embeddings
    if way is None or tuned is not None:
        raise InvalidRequest(
            "embeddings_not_supported", mark('"{model}" makes no embeddings.'), param="model", model=request.model
        )
    if request.dimensions is not None and request.dimensions not in way.dimensions:
        raise _wrong_dimensions(way, request)
    renderer = renderer_of(Path(base.path or ""))
    end = renderer.token_ids(way.end)
    texts = []
    for index, given in enumerate(request.inputs):
        if isinstance(given, str) and len(given) // renderer.longest_token >= context:
            raise _too_long(index, len(given) // renderer.longest_token, context)
        ids = (renderer.plain(given) if isinstance(given, str) else list(given)) + end
        if len(ids) > context:
            raise _too_long(index, len(ids), context)
        if not all(0 <= token < renderer.vocabulary_size for token in ids):
            raise InvalidRequest(
                "invalid_value",
                mark("input[{index}] names a token that this model does not have; it has the tokens 0 to {last}."),
                param="input",
                index=index,
                last=renderer.vocabulary_size - 1,
            )
        texts.append(ids)
    return Embed(secret="", request_id=new_id("embed"), texts=texts, pooling=way.pooling, priority=request.priority)


def shortened(vector: bytes, dimensions: int | None) -> bytes:
    """The first `dimensions` numbers of a vector, made one long again."""
    if dimensions is None:
        return vector
    cut = numpy.frombuffer(vector, "<f4")[:dimensions]
    return (cut / numpy.linalg.norm(cut)).astype("<f4").tobytes()


def in_order(vectors: dict[int, bytes], dimensions: int | None) -> tuple[bytes, ...]:
    """The vectors by the place of their text."""
    return tuple(shortened(vectors[index], dimensions) for index in range(len(vectors)))


def _wrong_dimensions(way: Embeddings, request: EmbeddingRequest) -> InvalidRequest:
    if not way.dimensions:
        sentence = mark('"{model}" makes vectors of one length only; leave out {field}.')
        return InvalidRequest(
            "unsupported_parameter", sentence, param="dimensions", field="dimensions", model=request.model
        )
    return InvalidRequest(
        "invalid_value",
        mark("{field} must be one of {expected}, not {value}."),
        param="dimensions",
        field="dimensions",
        expected=_listed(way.dimensions),
        value=request.dimensions,
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _too_long(index: int, tokens: int, context: int) -> InvalidRequest:
    return InvalidRequest(
        "context_length_exceeded",
        mark("input[{index}] has at least {tokens} tokens; this model reads {context}."),
        param="input",
        index=index,
        tokens=tokens,
        context=context,
    )
