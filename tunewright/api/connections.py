"""A connection before there is a request: how long and how large its head may be, and the answer when it is none.

uvicorn's protocol waits for the end of the headers for ever and keeps all of them; this one does not. What the parser refuses
is answered in the error shape of the path, as far as there is a path yet.
"""

from asyncio import Transport
from asyncio.events import TimerHandle

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tunewright.api.access import ABORT
from tunewright.api.addresses import LONGEST_TARGET_BYTES, url_too_long
from tunewright.api.app import ERROR_TABLES
from tunewright.api.body import headers_too_large
from tunewright.api.errors import answer_to, table_of
from tunewright.errors import InvalidRequest, TunewrightError
from tunewright.i18n import mark
from tunewright.ids import new_id

HEAD_LIMIT_S = 10.0
"""From the connection, or the first byte of a later request, to the end of its headers."""
LINGER_S = 1.0
"""A refused client may still be writing: its bytes are dropped for so long, lest the close destroy the answer."""
MOST_HEAD_BYTES = 128 * 1024
"""Beyond the limits of `addresses.py` and `body.py`, which answer better; here it is only about memory."""

log = structlog.get_logger("tunewright.access")


class BoundedHttp(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    _in_head = True
    _head_bytes = 0
    _head_timer: TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        head = self._head_timer if self._in_head else None
        super().data_received(data)
        if self._in_head and head is self._head_timer:  # all of `data` belongs to one head
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(headers_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()
        self.scope[ABORT] = self.transport.abort  # type: ignore

    def send_400_response(self, msg: str) -> None:
        if len(self._target()) > LONGEST_TARGET_BYTES:
            self._refuse(url_too_long())
        else:
            self._refuse(InvalidRequest("invalid_http", mark("This is not a well-formed HTTP/1.1 request.")))

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(HEAD_LIMIT_S, self._expire)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _expire(self) -> None:
        if self.headers is None:  # not one byte came: nobody asked, nobody is answered
            self.transport.close()
        else:
            sentence = mark("The headers did not arrive within {limit_s} s.")
            self._refuse(InvalidRequest("request_timeout", sentence, retryable=True, limit_s=HEAD_LIMIT_S))

    def _refuse(self, error: TunewrightError) -> None:
        """Read nothing more, answer if that can't be taken for the answer to an earlier request, and close."""
        in_head = self._in_head
        self._refused = True
        self._end_head()
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if answering and (in_head or self.pipeline):
            cycle.keep_alive = False  # uvicorn closes after the answers that are still to come
            return
        if answering and cycle.response_started:
            self.transport.close()
            return
        if answering:
            cycle.disconnected = True
        self._send(error)
        self.loop.call_later(LINGER_S, self.transport.close)

    def _send(self, error: TunewrightError) -> None:
        """In English: the headers that name a language may not have come."""
        path = self._target().partition(b"?")[0].decode("latin-1")
        request_id = new_id("req")
        answer = answer_to(error, table_of(path, ERROR_TABLES), path, "en", request_id)
        log.info("request", request_id=request_id, status=answer.status, code=error.code, path=path[:256])
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(answer.body)).encode()),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
            *answer.headers,
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in head]
        self.transport.write(b"".join([STATUS_LINE[answer.status], *lines, b"\r\n", answer.body]))

    def _target(self) -> bytes:
        return getattr(self, "url", b"")  # uvicorn sets it when a request begins
