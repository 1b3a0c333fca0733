"""Bodies: how much of them is taken, and JSON read strictly."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi.routing import APIRoute, APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright import strict_json
from tunewright.errors import InvalidRequest, TooLarge, UnsupportedMedia
from tunewright.i18n import mark
from tunewright.settings import Settings

MOST_HEADERS = 100
MOST_HEADER_BYTES = 32 * 1024
BODY_SILENCE_LIMIT_S = 30.0
"""A client that has begun a body and says nothing for so long is given up."""
MULTIPART_SLACK_BYTES = 1 << 20
"""What the other parts of an upload may add to the file's own limit."""

_PARSED_IN_PLACE_BYTES = 256 * 1024
"""Longer JSON is parsed in a thread, so that it does not hold up everybody's streams."""
_Result = TypeVar("_Result")


class BodyLimits:
    """ASGI middleware: size of headers and body, encodings. The body is counted as it arrives."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code, limit = self._limit(scope)
        declared = _check_headers(scope)
        if declared is not None and declared > limit:
            raise _too_large(code, limit)
        await self._app(scope, _counted(receive, code, limit), send)

    def _limit(self, scope: Scope) -> tuple[str, int]:
        settings, path = self._settings, scope["path"]
        if scope["method"] == "POST" and path.endswith(("/files", "/v1/datasets")):
            return "file_too_large", settings.max_file_bytes + MULTIPART_SLACK_BYTES
        if scope["method"] == "POST" and path.endswith("/parts"):
            return "part_too_large", settings.max_part_bytes + MULTIPART_SLACK_BYTES
        if path.endswith(("/chat/completions", "/embeddings")):
            return "body_too_large", settings.max_chat_bytes
        return "body_too_large", settings.max_json_bytes


def _check_headers(scope: Scope) -> int | None:
    """The declared length of the body, None if there is none."""
    headers = scope["headers"]
    if len(headers) > MOST_HEADERS or sum(len(name) + len(value) + 4 for name, value in headers) > MOST_HEADER_BYTES:
        raise headers_too_large()
    declared = None
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedMedia("unsupported_encoding", mark("Send the body as it is; encodings are not taken."))
        if name == b"content-length":
            if not value.isdigit() or declared is not None:
                raise InvalidRequest("invalid_body", mark("The Content-Length header is not right."))
            declared = int(value)
    return declared


def headers_too_large() -> TooLarge:
    """The error for headers over MOST_HEADERS or MOST_HEADER_BYTES."""
    return TooLarge(
        "headers_too_large",
        mark("The headers are over the limit of {count} or {size_bytes} bytes."),
        count=MOST_HEADERS,
        size_bytes=MOST_HEADER_BYTES,
    )


def _counted(receive: Receive, code: str, limit: int) -> Receive:
    seen = 0
    whole = False

    async def counted() -> Message:
        nonlocal seen, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(BODY_SILENCE_LIMIT_S):
                message = await receive()
        except TimeoutError:
            raise InvalidRequest(
                "request_timeout", mark("The body stopped arriving before its end."), retryable=True
            ) from None
        if message["type"] != "http.request":
            whole = True
            return message
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(code, limit)
        whole = not message.get("more_body", False)
        return message

    return counted


def _too_large(code: str, limit: int) -> TooLarge:
    return TooLarge(code, mark("The body is over the limit of {limit} bytes."), limit=limit)


class StrictRequest(Request):
    """A request whose `json()` refuses what Python's parser would let through, and anything but an object."""

    _object: dict[str, Any] | None = None

    async def json(self) -> dict[str, Any]:
        """The body. Raises UnsupportedMedia and InvalidRequest (`invalid_json`, `invalid_body`, those of strict_json)."""
        if self._object is None:
            check_json_type(self.headers.get("content-type"))
            body = await self.body()
            if not body.strip():
                raise InvalidRequest("invalid_json", mark("The request needs a JSON body."))
            if len(body) <= _PARSED_IN_PLACE_BYTES:
                value = strict_json.loads(body)
            else:
                value = await run_in_threadpool(strict_json.loads, body)
            if not isinstance(value, dict):
                raise InvalidRequest("invalid_body", mark("The body must be a JSON object."))
            self._object = value
        return self._object


async def beside_large(request: Request, function: Callable[..., _Result], *args: Any) -> _Result:
    """`function(*args)`; in a thread if the request's body, whose parts it goes through, is large."""
    if len(await request.body()) <= _PARSED_IN_PLACE_BYTES:
        return function(*args)
    return await run_in_threadpool(function, *args)


class StrictRoute(APIRoute):
    """A route that reads its JSON body by `StrictRequest`; a route without a body never looks at one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is None:
                return await handle(request)
            stricter = StrictRequest(request.scope, request.receive)
            await stricter.json()  # here, because FastAPI turns whatever is raised inside it into a plain 400
            return await handle(stricter)

        return strict


def router_at(prefix: str) -> APIRouter:
    """An empty router whose routes have full paths and read JSON strictly."""
    return APIRouter(prefix=prefix, route_class=StrictRoute, strict_content_type=False)


def check_json_type(content_type: str | None) -> None:
    """Accepts JSON in UTF-8, and no type at all. Raises UnsupportedMedia (`unsupported_media_type`)."""
    if content_type is None:
        return
    kind, *options = (part.strip().lower() for part in content_type.split(";"))
    charset = next((part.partition("=")[2].strip("\"' ") for part in options if part.startswith("charset")), "utf-8")
    if not (kind == "application/json" or kind.endswith("+json")) or charset not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMedia("unsupported_media_type", mark("This path takes application/json in UTF-8."))
