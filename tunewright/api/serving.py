"""The server process from its first connection to its last: how it begins, and how it ends when it is told to."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from tunewright.api.connections import BoundedHttp
from tunewright.clock import mono_s
from tunewright.wiring import Platform

EXIT_HURRIED = 1
"""After a second signal. Streams are cut, trainers and engines go on until the next start finds them."""
_POLL_S = 0.05


class Server(uvicorn.Server):
    """Uvicorn that drains. The first signal fails readiness and ends event streams; requests are still served for
    `drain_delay_s`. Then newcomers are refused while what is under way gets `drain_grace_s`; what is left ends with an error.
    A second signal ends the process at once: the next start recovers from that as from any death.

    A listener that came from a service manager outlives this process: its newcomers are left to the next one instead.
    """

    def __init__(self, platform: Platform, app: ASGIApp, listener: socket.socket, *, inherited: bool) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=BoundedHttp,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,  # what is left then has had its time
        )
        super().__init__(config)
        self.on_started: Callable[[], None] = lambda: None
        self._platform = platform
        self._listener = listener
        self._inherited = inherited

    def serve_until_told(self) -> None:
        """Answer requests until a signal has ended that."""
        self.run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_started()

    def handle_exit(self, sig: int, frame: object) -> None:
        """Uvicorn would raise the signal again in the end, and the exit code would not be 0."""
        platform = self._platform
        if platform.stopping.is_set():
            os._exit(EXIT_HURRIED)
        platform.stopping.set()
        delayed = threading.Timer(platform.settings.drain_delay_s, setattr, (self, "should_exit", True))
        delayed.daemon = True
        delayed.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline_s = mono_s() + self._platform.settings.drain_grace_s
        if self._inherited:
            for server in self.servers:
                server.close()
        self._platform.refusing_until_s = deadline_s
        while self.server_state.tasks and mono_s() < deadline_s:
            await asyncio.sleep(_POLL_S)
        await super().shutdown(sockets)
