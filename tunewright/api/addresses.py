"""What a request is addressed to: its Host header and its path, checked before anything acts on them.

The path is decided once, here: the gate and the router both see `scope["path"]` as this layer leaves it. Nothing rebuilds a
URL from headers.
"""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.api.access import exchange_of
from tunewright.errors import InvalidRequest, NotFound, PermissionDenied, TooLarge
from tunewright.i18n import mark

LONGEST_TARGET_BYTES = 8 * 1024
MODEL_NAME_ROUTES = (
    "/api/paas/v4/models/",
    "/api/paas/v4/fine_tuning/fine_tuned_models/",
    "/v1/models/",
    "/v1/fine_tuning/fine_tuned_models/",
)
"""Only the names after these may hold an encoded slash (`org%2Fmodel`)."""

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._\-]{1,253})(:[0-9]{1,5})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class HostCheck:
    """ASGI middleware: one well-formed Host header, and one of `allowed` (None takes any)."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if not hosts and scope.get("http_version") == "1.0":
            return
        match = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
        if match is None:
            raise InvalidRequest("invalid_host", mark("The request needs exactly one well-formed Host header."))
        if self._allowed is not None and match.group(1) not in self._allowed:
            raise PermissionDenied(
                "host_not_allowed", mark("This server does not answer under that host name (see allowed_hosts).")
            )


class PathCheck:
    """ASGI middleware: strips one trailing slash; refuses what two readers of a path could understand differently."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = plain_path(scope["path"], scope.get("raw_path") or b"", scope.get("query_string") or b"")
            scope["path"] = exchange_of(scope).path = path
            scope["raw_path"] = path.encode()
            scope["root_path"] = ""
        await self._app(scope, receive, send)


def plain_path(path: str, raw: bytes, query: bytes = b"") -> str:
    """The path that gate and router use.

    Raises TooLarge (`url_too_long`); NotFound (`unknown_route`) for an empty or dot segment, a control character, a path that
    does not start at the root, or an encoded slash outside a model's name.
    """
    if len(raw) + len(query) > LONGEST_TARGET_BYTES or len(path) > LONGEST_TARGET_BYTES:
        raise url_too_long()
    if len(path) > 1 and path.endswith("/"):
        path = path[:-1]
    segments = path.split("/")
    odd = not path.startswith("/") or "." in segments or ".." in segments or _CONTROL.search(path)
    empty = "" in segments[1:] and path != "/"
    slash = b"%2f" in raw.lower() and not _slash_is_in_a_model_name(path, raw)
    if odd or empty or slash:
        raise NotFound("unknown_route", mark("There is nothing at this path."))
    return path


def url_too_long() -> TooLarge:
    """The error for a target over LONGEST_TARGET_BYTES."""
    return TooLarge("url_too_long", mark("The URL is longer than {limit} bytes."), limit=LONGEST_TARGET_BYTES)


def _slash_is_in_a_model_name(path: str, raw: bytes) -> bool:
    return any(path.startswith(prefix) and raw.startswith(prefix.encode()) for prefix in MODEL_NAME_ROUTES)
