"""The outermost layer: the id of a request, its line in the log, and the net under everything that raises.

Plain ASGI, so that a client that goes away is seen as such. What lies below may raise any TunewrightError; the answer in the
dialect of the path is made here and nowhere else.
"""

import asyncio
import re
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright.api.errors import ErrorAnswer, ErrorTable, answer_to, server_stopping, table_of, unexpected
from tunewright.api.server_metrics import ServerMetrics
from tunewright.clock import mono_s
from tunewright.errors import Misconfigured, TunewrightError
from tunewright.i18n import preferred_language
from tunewright.ids import new_id

log = structlog.get_logger("tunewright.access")

EXCHANGE = "tunewright.exchange"
"""The scope's key for the `Exchange`."""
ABORT = "tunewright.abort"
"""The scope's key for what ends the connection without waiting for a client that takes nothing any more."""
CLIENT_GONE = 499
"""In the log only: the client went away before the answer."""

_CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.\-]{1,64}")
_LONGEST_LOGGED_PATH = 256


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class Exchange:
    """One request and its answer, as the layers below need it: `scope["tunewright.exchange"]`."""

    __slots__ = (
        "caller",
        "client_request_id",
        "headers",
        "language",
        "log_values",
        "path",
        "request_id",
        "started_at",
        "status",
        "table",
    )

    def __init__(self, scope: Scope, tables: tuple[ErrorTable, ...], language: str) -> None:
        self.request_id = new_id("req")
        self.client_request_id: str | None = None
        self.language = language
        self.path: str = scope["path"]
        self.started_at = mono_s()
        self.status = 0
        self.caller: Any = None
        self.log_values: dict[str, Any] = {}
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        """What layers below add to the answer, whatever it is."""
        self.table = table_of(self.path, tables)
        for name, value in scope["headers"]:
            if name == b"accept-language":
                self.language = preferred_language(value.decode("latin-1"), language)
            elif name == b"x-request-id" and _CLIENT_REQUEST_ID.fullmatch(value):
                self.client_request_id = value.decode("ascii")

    def answer(self, error: TunewrightError) -> ErrorAnswer:
        """The answer to `error` in this request's dialect and language; its code goes into the log line."""
        self.log_values["code"] = error.code
        if isinstance(error, Misconfigured):
            log.error("misconfigured", request_id=self.request_id, code=error.code, text=error.text())
        return answer_to(error, self.table, self.path, self.language, self.request_id)

    def failed(self) -> ErrorAnswer:
        """The answer to a bug. Call it inside the `except`: the traceback goes to the log, the id to the caller."""
        log.exception("unexpected_error", request_id=self.request_id)
        return self.answer(unexpected(self.request_id))


class Access:
    """ASGI middleware; the first one."""

    def __init__(self, app: ASGIApp, tables: tuple[ErrorTable, ...], language: str, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._tables = tables
        self._language = language

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await _refuse_websocket(receive, send)
            return
        exchange = Exchange(scope, self._tables, self._language)
        scope[EXCHANGE] = exchange
        own_headers = _own_headers(exchange)

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *own_headers, *exchange.headers]
            await send(message)

        try:
            await self._answered(exchange, scope, receive, labelled)
        except asyncio.CancelledError:  # the server stops, and the time for what was under way is over
            exchange.log_values["cancelled"] = True
            if not exchange.status:
                await send_answer(exchange.answer(server_stopping()), labelled)
            raise
        finally:
            seconds, route = mono_s() - exchange.started_at, getattr(scope.get("route"), "path", None)
            self._metrics.answered(scope["method"], route or "", exchange.status, seconds)
            _write_line(exchange, scope, route, seconds)

    async def _answered(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
            return
        except (ClientGone, ClientDisconnect):
            exchange.status = exchange.status or CLIENT_GONE
            return
        except TunewrightError as error:
            answer = exchange.answer(error)
        except Exception:
            answer = exchange.failed()
        if exchange.status:
            # The head is out, so the only honest end is a broken body: the server closes the connection.
            raise RuntimeError("failed after the response had begun")
        await send_answer(answer, send)


async def send_answer(answer: ErrorAnswer, send: Send) -> None:
    """Send an error as a whole response."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(answer.body)).encode()),
        (b"cache-control", b"no-store"),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that `Access` put there."""
    return scope[EXCHANGE]


def _own_headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", exchange.request_id.encode()), (b"x-content-type-options", b"nosniff")]
    if exchange.client_request_id:
        headers.append((b"x-client-request-id", exchange.client_request_id.encode()))
    return headers


def _write_line(exchange: Exchange, scope: Scope, route: str | None, seconds: float) -> None:
    """One line per request. Never the query, the headers or the body: they may hold secrets or a tenant's data."""
    caller = exchange.caller
    log.info(
        "request",
        request_id=exchange.request_id,
        client_request_id=exchange.client_request_id,
        method=str(scope["method"])[:16],
        path=exchange.path[:_LONGEST_LOGGED_PATH],
        route=route,
        status=exchange.status,
        ms=round(seconds * 1000, 1),
        project_id=caller and caller.project_id,
        key_id=caller and caller.key_id,
        **exchange.log_values,
    )


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    message = await receive()
    if message["type"] == "websocket.connect":
        await send({"type": "websocket.close", "code": 1008})
