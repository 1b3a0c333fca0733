"""How often: requests of one key, and refused keys from one address.

Counted in this process, of which there is one for each home. Addresses are those of the connections: forwarding headers say
whatever a client wants. So behind a proxy all callers share an address, and a valid key is never held up by others' wrong ones.
"""

import math

from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.api.access import exchange_of
from tunewright.clock import mono_s
from tunewright.errors import AuthenticationFailed, RateLimited
from tunewright.i18n import mark
from tunewright.settings import Settings

_MOST_NAMES = 10_000


class Buckets:
    """For each name `burst` at once and `per_minute` in the long run; 0 per minute means no limit."""

    def __init__(self, per_minute: int, burst: int) -> None:
        self.per_minute = per_minute
        self._burst = burst
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> tuple[int, float]:
        """How many are left, and how many seconds until there is one if there was none (else 0)."""
        if not self.per_minute:
            return self._burst, 0.0
        level, now = self._level(name), mono_s()
        if len(self._levels) >= _MOST_NAMES:
            self._levels = {other: kept for other, kept in self._levels.items() if self._level(other) < self._burst}
        if level < 1:
            return 0, (1 - level) * 60 / self.per_minute
        self._levels[name] = (level - 1, now)
        return int(level - 1), 0.0

    def _level(self, name: str) -> float:
        level, at = self._levels.get(name, (float(self._burst), 0.0))
        return min(self._burst, level + (mono_s() - at) * self.per_minute / 60)


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
