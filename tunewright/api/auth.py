"""The one gate: everything needs a valid key, except the exact pairs in `PUBLIC`.

It stands before the router and before the body is read, and decides on the same `scope["path"]` that the router uses.
A new route is closed until somebody writes it into `PUBLIC`, where the test's golden list will ask why.
"""

import hmac
from typing import Annotated, Protocol

from fastapi import Depends, Request
from pydantic import SecretStr
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.accounts.records import Caller
from tunewright.api.access import exchange_of
from tunewright.errors import AuthenticationFailed
from tunewright.i18n import mark

METRICS = ("GET", "/metrics")
PUBLIC: frozenset[tuple[str, str]] = frozenset({("GET", "/healthz"), ("GET", "/readyz")})


class Authenticator(Protocol):
    """What the gate asks of the accounts."""

    def authenticate(self, authorization: str | None) -> Caller:
        """Who sent this Authorization header. Raises AuthenticationFailed. Blocks."""
        ...


class Gate:
    """ASGI middleware: lets nothing pass without a caller. The operator's token for metrics opens that path and no other."""

    def __init__(self, app: ASGIApp, accounts: Authenticator, metrics_token: SecretStr) -> None:
        self._app = app
        self._accounts = accounts
        self._metrics_token = metrics_token.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        public = scope["type"] != "http" or (scope["method"], scope["path"]) in PUBLIC
        if not public and not self._is_operator(scope):
            exchange_of(scope).caller = await self._caller(scope)
        await self._app(scope, receive, send)

    def _is_operator(self, scope: Scope) -> bool:
        if not self._metrics_token or (scope["method"], scope["path"]) != METRICS:
            return False
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], b"Bearer " + self._metrics_token)

    async def _caller(self, scope: Scope) -> Caller:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) > 1:
            raise AuthenticationFailed("invalid_api_key", mark("Send exactly one Authorization header."))
        authorization = given[0].decode("latin-1") if given else None
        return await run_in_threadpool(self._accounts.authenticate, authorization)


async def _caller_of(request: Request) -> Caller:
    caller = exchange_of(request.scope).caller
    if caller is None:  # a public route that asks who calls: a mistake in this product, not in the request
        raise AuthenticationFailed("missing_api_key", mark("This path needs an API key."))
    return caller


CallerOf = Annotated[Caller, Depends(_caller_of)]
"""Who is asking, for a route's signature."""
