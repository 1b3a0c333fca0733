"""The server process from its first connection to its last: how it begins, and how it ends when it is told to."""

import asyncio
import os
import resource
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from tunewright.api.connections import BoundedHttp
from tunewright.clock import mono_s
from tunewright.errors import Misconfigured
from tunewright.i18n import mark
from tunewright.settings import Settings, inherited_listener
from tunewright.wiring import Platform

EXIT_HURRIED = 1
"""After a second signal. Streams are cut, trainers and engines go on until the next start finds them."""
_POLL_S = 0.05
_MOST_FILES = 65_536
_CONNECTION_OPTIONS = {
    "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_USER_TIMEOUT": 25_000,
    "TCP_NOTSENT_LOWAT": 64 * 2**10,
}
"""What every connection inherits. A client that vanished without a word is noticed within 25 s, whether it was written to or only
waited; and what a slow one does not take is not piled up in the kernel."""


class Listener:
    """The listening socket: that of the settings, or one that a service manager holds (`inherited`)."""

    def __init__(self, settings: Settings) -> None:
        """Raises Misconfigured (`address_in_use`)."""
        descriptor = inherited_listener()
        self.inherited = descriptor is not None
        self.socket = _bound(settings) if descriptor is None else socket.socket(fileno=descriptor)
        for name, value in _CONNECTION_OPTIONS.items():
            if hasattr(socket, name):  # Linux has all of them
                level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
                self.socket.setsockopt(level, getattr(socket, name), value)
        self.address = f"http://{settings.host}:{self.socket.getsockname()[1]}"


def _bound(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError:
        raise Misconfigured(
            "address_in_use",
            mark("Can't listen on {host}:{port}: it is in use or not an address of this machine."),
            host=settings.host,
            port=settings.port,
        ) from None
    return listener


def _raise_file_limit() -> None:
    """A stream takes two descriptors here and one in its worker, which inherits the limit; 1024 are the custom."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Server(uvicorn.Server):
    """Uvicorn that drains. The first signal fails readiness and ends event streams; requests are still served for
    `drain_delay_s`. Then newcomers are refused while what is under way gets `drain_grace_s`; what is left ends with an error.
    A second signal ends the process at once: the next start recovers from that as from any death.

    A listener that came from a service manager outlives this process: its newcomers are left to the next one instead.
    """

    def __init__(self, platform: Platform, app: ASGIApp, listener: Listener) -> None:
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

    def serve_until_told(self) -> None:
        """Answer requests until a signal has ended that."""
        _raise_file_limit()
        self.run(sockets=[self._listener.socket])

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
        if self._listener.inherited:
            for server in self.servers:
                server.close()
        self._platform.refusing_until_s = deadline_s
        while self.server_state.tasks and mono_s() < deadline_s:
            await asyncio.sleep(_POLL_S)
        await super().shutdown(sockets)
