"""A server that is about to end sends newcomers away while what is under way goes on (`serving.py` says when)."""

from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.api.access import exchange_of
from tunewright.api.errors import server_stopping
from tunewright.clock import mono_s
from tunewright.wiring import Platform

RESTART_S = 3
"""What a refused client is told to wait beyond the drain: about the time that the next server takes to start."""
_PROBES = ("/healthz", "/readyz")


class Draining:
    """ASGI middleware below `Access`, which makes the answer."""

    def __init__(self, app: ASGIApp, platform: Platform) -> None:
        self._app = app
        self._platform = platform

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        until_s = self._platform.refusing_until_s
        if until_s is not None and scope["type"] == "http" and scope["path"] not in _PROBES:
            exchange_of(scope).headers = ((b"connection", b"close"),)
            raise server_stopping(RESTART_S + max(0, round(until_s - mono_s())))
        await self._app(scope, receive, send)
