"""The worker's socket: one connection per request, newline-delimited JSON (see `deployments/ports.py`)."""

import asyncio
import hmac
import logging

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.ports import (
    Embed,
    EngineReply,
    Generate,
    Health,
    Prove,
    TokenText,
    Trouble,
    Unload,
    Vector,
    decode_request,
    encode_line,
)
from tunewright.engines.serving import ServingEngine
from tunewright.engines.tickets import trouble_of
from tunewright.errors import InvalidRequest, TunewrightError
from tunewright.i18n import mark

LINE_LIMIT_BYTES = 16 * 2**20
FIRST_LINE_LIMIT_S = 10.0
STALL_LIMIT_S = 30.0
_BUFFER_BYTES = 64 * 2**10
_MOST_JOINED_CHARACTERS = 4096
_MOST_JOINED_SCORES = 16

_log = logging.getLogger(__name__)


class _Sealed(msgspec.Struct):
    """The part of any request that is read before anything else is believed."""

    secret: str


_decode_sealed = msgspec.json.Decoder(_Sealed).decode


class Connections:
    """Speaks the protocol for one engine."""

    def __init__(self, engine: ServingEngine, secret: str) -> None:
        self._engine = engine
        self._secret = secret.encode()
        self.n_open = 0
        self.last_open_s = mono_s()
        """When the last connection with the right secret was last seen open."""

    async def listen(self) -> asyncio.Server:
        """Listen on a free port of the loopback."""
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=LINE_LIMIT_BYTES, backlog=1024)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        try:
            line = await self._first_line(reader)
            if line is not None:
                self.n_open += 1
                try:
                    await self._answer(line, reader, writer)
                finally:
                    self.n_open -= 1
                    self.last_open_s = mono_s()
        except (ConnectionError, TimeoutError):
            pass
        except Exception:
            _log.exception("a connection failed")
        finally:
            if writer.transport.get_write_buffer_size() > _BUFFER_BYTES:
                writer.transport.abort()  # a reader that stalls would keep a polite close waiting for ever
            else:
                writer.close()

    async def _first_line(self, reader: asyncio.StreamReader) -> bytes | None:
        """The request, if it carries the secret; whoever does not know it learns nothing."""
        try:
            async with asyncio.timeout(FIRST_LINE_LIMIT_S):
                line = await reader.readline()
            given = _decode_sealed(line).secret.encode() if line.endswith(b"\n") else b""
        except (ValueError, TimeoutError):  # a line over the limit, bytes that are no JSON, no secret
            return None
        return line if hmac.compare_digest(given, self._secret) else None

    async def _answer(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = decode_request(line)
        except (ValueError, RecursionError):
            return await _send(writer, trouble_of(_invalid_line()))
        if isinstance(request, Health):
            return await _send(writer, self._engine.state())
        replies = _Replies(asyncio.get_running_loop())
        try:
            # A thread of its own: a grammar takes a moment, and other requests go on meanwhile.
            constraint = await asyncio.to_thread(self._engine.constraint, request) if _has_grammar(request) else None
            ticket = self._engine.submit(request, replies.put, constraint)
        except TunewrightError as error:
            return await _send(writer, trouble_of(error))
        # The client says nothing more, so the next thing to read is its leaving.
        leaving = asyncio.ensure_future(reader.read(1))
        leaving.add_done_callback(replies.end)
        try:
            while (reply := await replies.next()) is not None:
                await _send(writer, reply)
                if not isinstance(reply, TokenText | Vector):
                    return None
        finally:
            self._engine.cancel(ticket)
            leaving.cancel()
        return None


class _Replies:
    """From the engine's thread to the event loop. Pieces of text that pile up behind a slow reader are joined."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: list[EngineReply] = []
        self._ended = False
        self._news = asyncio.Event()

    def put(self, reply: EngineReply) -> None:
        """Called on the engine's thread; never raises."""
        try:
            self._loop.call_soon_threadsafe(self._add, reply)
        except RuntimeError:
            pass  # the loop is closed: the worker is on its way out

    def end(self, leaving: "asyncio.Future[bytes]") -> None:
        """Nobody listens any more."""
        if not leaving.cancelled():
            leaving.exception()  # how the client left does not matter, but asyncio wants to be asked
        self._ended = True
        self._news.set()

    def _add(self, reply: EngineReply) -> None:
        last = self._pending[-1] if self._pending else None
        if isinstance(reply, TokenText) and isinstance(last, TokenText) and _short(last):
            scores = last.scores + reply.scores
            self._pending[-1] = TokenText(text=last.text + reply.text, n_tokens=reply.n_tokens, scores=scores)
        else:
            self._pending.append(reply)
        self._news.set()

    async def next(self) -> EngineReply | None:
        """The next reply; None once the client has left."""
        while not self._ended:
            if self._pending:
                return self._pending.pop(0)
            self._news.clear()
            await self._news.wait()
        return None


def _short(reply: TokenText) -> bool:
    """Whether more may be joined to it: the gateway reads no line of more than 32 KiB."""
    return len(reply.text) < _MOST_JOINED_CHARACTERS and len(reply.scores) < _MOST_JOINED_SCORES


def _has_grammar(request: Generate | Prove | Embed | Unload) -> bool:
    return isinstance(request, Generate) and request.grammar is not None


async def _send(writer: asyncio.StreamWriter, reply: EngineReply | Trouble) -> None:
    """Raises TimeoutError when the reader takes nothing for too long."""
    writer.write(encode_line(reply) + b"\n")
    async with asyncio.timeout(STALL_LIMIT_S):
        await writer.drain()


def _invalid_line() -> InvalidRequest:
    return InvalidRequest("invalid_engine_request", mark("The engine does not understand this request."))
