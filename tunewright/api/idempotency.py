"""The headers that mark a create as one that may have been sent before, for a route's signature."""

from typing import Annotated

from fastapi import Depends, Header, Request

from tunewright.accounts.idempotency import IdempotencyKey, from_headers
from tunewright.api.auth import CallerOf

_Key = Annotated[str | None, Header(alias="Idempotency-Key", description="1 to 255 printable ASCII characters")]
_RetryCount = Annotated[str | None, Header(alias="x-stainless-retry-count", include_in_schema=False)]


async def _of_json(
    request: Request, caller: CallerOf, key: _Key = None, retry_count: _RetryCount = None
) -> IdempotencyKey:
    return _built(request, caller.key_id, key, retry_count, await request.body())


async def _of_upload(
    request: Request, caller: CallerOf, key: _Key = None, retry_count: _RetryCount = None
) -> IdempotencyKey:
    """Without the body, which the dataset service replaces by the content's hash: the boundary differs with each try."""
    return _built(request, caller.key_id, key, retry_count, b"")


def _built(request: Request, key_id: str, key: str | None, retry_count: str | None, body: bytes) -> IdempotencyKey:
    route = f"{request.method} {request.scope['path']}"  # a create's path has no parameters
    return from_headers(idempotency_key=key, retry_count=retry_count, key_id=key_id, route=route, body=body)


IdempotencyOf = Annotated[IdempotencyKey, Depends(_of_json)]
UploadIdempotencyOf = Annotated[IdempotencyKey, Depends(_of_upload)]
