"""Server-sent events over plain ASGI.

One task writes, one watches for the client's leaving, and nothing is made per frame: the gateway may spend 0.2 ms on
a token. A stream ends in one of three ways that nobody can mistake: its own last frame, an error frame, or a broken body.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunewright.api.access import ABORT, ClientGone, Exchange, exchange_of
from tunewright.api.errors import server_stopping
from tunewright.clock import mono_s
from tunewright.errors import TunewrightError

KEEP_ALIVE_S = 15.0
STALL_LIMIT_S = 30.0
"""A client that takes nothing for so long is given up."""
DONE = b"data: [DONE]\n\n"

_PING = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_TICK_S = 1.0

log = structlog.get_logger("tunewright.access")
_Result = TypeVar("_Result")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client leaves first. Raises ClientGone then.

    The request's body must have been read: what `receive` still has to say is that the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Sends `frames` (whole frames, each ending with an empty line) and then calls `close`, whatever happened.

    An error that `frames` raises becomes a last `data: {"error": ...}` frame in the dialect of the path, as does the server's
    stop if `stop_is_error`. A comment is sent when nothing else was for KEEP_ALIVE_S.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]] | None = None,
        stop_is_error: bool = True,
    ) -> None:
        super().__init__()
        self._frames = frames
        self._close = close
        self._stop_is_error = stop_is_error
        self._written_at = mono_s()
        self._writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        pump = keeper = gone = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            pump = asyncio.ensure_future(self._pump(exchange, send))
            keeper = asyncio.ensure_future(self._keep_alive(send))
            gone = asyncio.ensure_future(_disconnected(receive))
            await asyncio.wait({pump, keeper, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
                await send({"type": "http.response.body", "body": b""})
            else:
                exchange.log_values["ended_by"] = "stall" if keeper.done() else "client_gone"
                if ABORT in scope:
                    scope[ABORT]()  # a polite close would wait until the client has taken the rest
                raise ClientGone
        except asyncio.CancelledError:
            exchange.log_values["ended_by"] = "shutdown"
            await _end(pump, keeper, gone)
            await self._say_goodbye(exchange, send)
            raise
        finally:
            await _end(pump, keeper, gone)
            await self._frames.aclose()
            if self._close is not None:
                await self._close()

    async def _pump(self, exchange: Exchange, send: Send) -> None:
        try:
            async for frame in self._frames:
                self._writing = True
                self._written_at = mono_s()
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                self._writing = False
        except TunewrightError as error:
            answer = exchange.answer(error)
        except Exception:
            answer = exchange.failed()
        else:
            return
        exchange.log_values["ended_by"] = "error"
        await send({"type": "http.response.body", "body": error_frame(answer.body), "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Returns when the client has taken nothing for STALL_LIMIT_S."""
        while True:
            await asyncio.sleep(_TICK_S)
            silent_s = mono_s() - self._written_at
            if self._writing:
                if silent_s >= STALL_LIMIT_S:
                    return
            elif silent_s >= KEEP_ALIVE_S:
                self._written_at = mono_s()
                try:
                    async with asyncio.timeout(STALL_LIMIT_S):
                        await send({"type": "http.response.body", "body": _PING, "more_body": True})
                except TimeoutError:
                    return

    async def _say_goodbye(self, exchange: Exchange, send: Send) -> None:
        """The server stops before the stream's own end (it was given `drain_grace_s`): say so, then end the body."""
        if self._stop_is_error:
            body = error_frame(exchange.answer(server_stopping()).body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def error_frame(body: bytes) -> bytes:
    """The frame for an error after the first one: both SDK families raise on it."""
    return b"data: " + body + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel and wait, so that every `finally` below has run before we go on."""
    for task in tasks:
        if task is not None and not task.done():
            task.cancel()
    await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
