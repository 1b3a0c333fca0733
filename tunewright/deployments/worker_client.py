"""The gateway's end of the protocol in `ports.py`: one connection per request to a worker on the loopback."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import msgspec

from tunewright.deployments.ports import (
    Done,
    Embed,
    EngineReply,
    EngineRequest,
    Generate,
    Health,
    Proof,
    Prove,
    State,
    TokenText,
    Trouble,
    Unload,
    Vector,
    decode_reply,
    encode_line,
)
from tunewright.errors import TunewrightError

_LINE_LIMIT_BYTES = 1 << 20
_PIECE_LIMIT_BYTES = 32 * 2**10
"""Of one line of an answer, and half of what is read ahead for a client that reads slowly."""
_Reply = TypeVar("_Reply", Proof, State)


class WorkerGone(Exception):
    """The worker closed the connection, or nothing listens there any more."""


class WorkerAbsent(WorkerGone):
    """Nothing listens there any more: the request has not reached a worker."""


class WorkerSlow(Exception):
    """No answer in time, or no connection for want of something on our side. The worker may be well."""


class WorkerClient:
    """Calls to one worker. Cancelling a call (or closing its iterator) closes the connection, which frees the slot.

    All raise WorkerGone, WorkerSlow, or the error that the worker names.
    """

    def __init__(self, port: int, secret: str) -> None:
        self._port = port
        self._secret = secret
        self._answers: dict[object, Callable[[], object]] = {}

    def cut(self) -> None:
        """End all answers under way: whoever waits for one sees the worker as gone. May be called from any thread."""
        for abort in list(self._answers.values()):
            with suppress(RuntimeError):  # its event loop is closed, and the answer with it
                abort()

    async def generate(
        self, request: Generate, first_limit_s: float | None = None
    ) -> AsyncGenerator[TokenText | Done, None]:
        """The pieces of one answer, ending with `Done`. WorkerSlow: the first did not come within `first_limit_s`."""
        ticket, loop = object(), asyncio.get_running_loop()
        request = msgspec.structs.replace(request, secret=self._secret)
        async with self._exchange(request, _PIECE_LIMIT_BYTES) as (reader, writer):
            self._answers[ticket] = lambda: loop.call_soon_threadsafe(writer.transport.abort)
            try:
                try:
                    async with asyncio.timeout(first_limit_s):
                        line = await reader.readline()
                except TimeoutError:
                    raise WorkerSlow from None
                while True:
                    reply = _reply(line)
                    if isinstance(reply, TokenText | Done):
                        yield reply
                        if isinstance(reply, Done):
                            return
                    line = await reader.readline()
            finally:
                del self._answers[ticket]

    async def embed(self, request: Embed) -> AsyncGenerator[Vector | Done, None]:
        """The vectors of all texts, ending with `Done`."""
        async with self._exchange(msgspec.structs.replace(request, secret=self._secret)) as (reader, _):
            while True:
                reply = _reply(await reader.readline())
                if isinstance(reply, Vector | Done):
                    yield reply
                    if isinstance(reply, Done):
                        return

    async def prove(self, request: Prove, timeout_s: float = 300.0) -> Proof:
        """Load an adapter and measure its effect (see `Prove`). Beside many answers that takes a while."""
        return await self._one(msgspec.structs.replace(request, secret=self._secret), Proof, timeout_s)

    async def unload(self, adapter_id: str, timeout_s: float = 10.0) -> None:
        """Make the worker forget an adapter."""
        await self._one(Unload(secret=self._secret, adapter_id=adapter_id), State, timeout_s)

    async def health(self, timeout_s: float = 5.0) -> State:
        """The worker's own account of itself."""
        return await self._one(Health(secret=self._secret), State, timeout_s)

    async def _one(self, request: EngineRequest, kind: type[_Reply], timeout_s: float) -> _Reply:
        try:
            async with asyncio.timeout(timeout_s), self._exchange(request) as (reader, _):
                reply = _reply(await reader.readline())
        except TimeoutError:
            raise WorkerSlow from None
        if not isinstance(reply, kind):
            raise WorkerGone
        return reply

    @asynccontextmanager
    async def _exchange(
        self, request: EngineRequest, limit: int = _LINE_LIMIT_BYTES
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=limit)
        except ConnectionError:
            raise WorkerAbsent from None
        except OSError:  # no descriptor or port left: that says nothing about the worker
            raise WorkerSlow from None
        try:
            writer.write(encode_line(request) + b"\n")
            await writer.drain()
            yield reader, writer
        except (ConnectionError, asyncio.IncompleteReadError):
            raise WorkerGone from None
        finally:
            writer.close()


def _reply(line: bytes) -> EngineReply:
    if not line.endswith(b"\n"):
        raise WorkerGone
    reply = decode_reply(line)
    if isinstance(reply, Trouble):
        raise error_of(reply)
    return reply


def error_of(trouble: Trouble) -> TunewrightError:
    """The exception that a worker's `Trouble` stands for."""
    kinds = {kind.kind: kind for kind in TunewrightError.__subclasses__()}
    kind = kinds.get(trouble.kind, TunewrightError)
    return kind(trouble.code, trouble.message, **trouble.values)
