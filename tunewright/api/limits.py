"""How often: requests of one key, and refused keys from one address.

Counted in this process, of which there is one for each home. Addresses are those of the connections: forwarding headers say
whatever a client wants. So behind a proxy all callers share an address, and a valid key is never held up by others' wrong ones.
"""

import math

from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.accounts.rates import Buckets
from tunewright.api.access import exchange_of
from tunewright.errors import AuthenticationFailed, RateLimited
from tunewright.i18n import mark
from tunewright.settings import Settings


class RefusedKeys:
    """ASGI middleware around the gate: who sends too many wrong keys is told to wait, without a word about the key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        limit = settings.max_refused_keys_per_minute
        self._buckets = Buckets(limit, limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except AuthenticationFailed:
            address = (scope.get("client") or ("",))[0]
            wait_s = self._buckets.take(address)[1]
            if wait_s:
                sentence = mark("Too many requests without a valid key came from this address; wait {seconds} s.")
                raise _limited(sentence, wait_s) from None
            raise


class RequestRate:
    """ASGI middleware below the gate: the requests of one key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._buckets = Buckets(settings.max_requests_per_minute, settings.request_burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._buckets.per_minute and (caller := exchange_of(scope).caller):
            left, wait_s = self._buckets.take(caller.key_id)
            exchange_of(scope).headers = (
                (b"x-ratelimit-limit-requests", str(self._buckets.per_minute).encode()),
                (b"x-ratelimit-remaining-requests", str(left).encode()),
            )
            if wait_s:
                raise _limited(mark("This key sends too many requests; wait {seconds} s."), wait_s)
        await self._app(scope, receive, send)


def _limited(sentence: str, wait_s: float) -> RateLimited:
    seconds = math.ceil(wait_s)
    return RateLimited("rate_limit_exceeded", sentence, retry_after_s=seconds, seconds=seconds)
