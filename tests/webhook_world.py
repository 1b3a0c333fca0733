"""A project with channels, an outbox on a temporary home, and a receiver of webhooks behind a public name."""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from tests.evil_hosts import PUBLIC
from tests.unit.test_egress import certificate
from tunewright.accounts.records import Project
from tunewright.accounts.service import AccountService
from tunewright.clock import wall_s
from tunewright.egress import Egress
from tunewright.ids import new_id
from tunewright.jobs.records import SUCCEEDED, Job
from tunewright.notifications.apprise_sender import AppriseSender
from tunewright.notifications.deliverer import Deliverer
from tunewright.notifications.outbox import record_end
from tunewright.notifications.records import Channel, Delivery
from tunewright.notifications.sealing import Vault
from tunewright.notifications.sending import Sending
from tunewright.notifications.service import NewChannel, NotificationService
from tunewright.notifications.webhooks import WebhookSender
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Storage

NAME = "good.example"


class Got(msgspec.Struct):
    """One request that arrived."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answers https requests to `good.example` by the path: `/500`, `/redirect`, `/slow` (until `release` is set),
    `/endless` (a body without end); anything else is 200. `hits` counts connections to any other address."""

    def __init__(self, folder: Path) -> None:
        pem = certificate(folder, NAME)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.trust = ssl.create_default_context(cafile=str(pem))
        self.got: list[Got] = []
        self.release = threading.Event()
        self.waiting = 0
        self.hits = 0
        self.down = False
        self.names = {NAME: PUBLIC, "inside.example": "10.0.0.1"}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                with self.connection:
                    super().finish()

            def do_POST(self) -> None:
                receiver._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that leaves early

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        self.got.append(Got(request.path, dict(request.headers.items()), body))
        status = {"/500": 500, "/redirect": 302, "/gone": 410}.get(request.path, 200)
        if request.path.startswith("/slow"):
            self.waiting += 1
            self.release.wait(20)
        request.send_response(status)
        if status == 302:
            request.send_header("Location", "https://inside.example/")
        request.end_headers()
        if request.path == "/endless":
            with suppress(OSError):
                while not self.release.is_set():
                    request.wfile.write(bytes(1 << 16))

    def egress(self) -> Egress:
        return Egress(resolve=self._resolve, connect=self._connect, trust=self.trust)

    def _resolve(self, host: str, port: int) -> list[str]:
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [self.names[host]]

    def _connect(self, address: str, port: int, timeout_s: float) -> socket.socket:
        if (address, port) != (PUBLIC, 443):
            self.hits += 1
        if self.down:
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", self._server.server_port), timeout_s)

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class NotificationWorld:
    """`ahead_s` moves the clock of everything that is sent."""

    def __init__(self, home: Path, egress: Egress, *, daily_limit: int = 100, timeout_s: float = 10.0) -> None:
        folder = HomeFolder(home)
        folder.create()
        self.home = folder
        self.storage = Storage(f"sqlite:///{folder.database}")
        self.storage.migrate()
        self.accounts = AccountService(self.storage, folder, Settings(home=home))
        self.accounts.first_start()
        with self.storage.read() as tx:
            self.project: Project = tx.projects.all()[0]
        self.ahead_s = 0
        vault = Vault(self.accounts)
        self.sending = Sending(
            self.storage, vault, WebhookSender(egress, timeout_s), AppriseSender(), daily_limit, clock=self.now
        )
        self.service = NotificationService(self.storage, vault, self.sending)
        self.deliverer = Deliverer(self.storage, self.sending)

    def now(self) -> int:
        return wall_s() + self.ahead_s

    def webhook(self, path: str = "/hook", **wanted: Any) -> tuple[Channel, str]:
        channel, secret = self.service.create(self.project.id, NewChannel(url=f"https://{NAME}{path}", **wanted))
        assert secret is not None
        return channel, secret

    def job(self, status: str = SUCCEEDED, project: Project | None = None, **fields: Any) -> Job:
        """One that has just ended, with its events in the outbox."""
        values: dict[str, Any] = {"model": "tiny", "base_code": "tiny", "tuned_model_id": "model-1"}
        values |= {"tuned_model_name": "tiny:1::abc", "training_file": "file-1", "created_at": wall_s()}
        job = Job(id=new_id("ftjob"), project_id=(project or self.project).id, status=status, **(values | fields))
        with self.storage.write() as tx:
            tx.jobs.insert(job)
            record_end(tx, job)
        return job

    def deliveries(self, channel: Channel) -> list[Delivery]:
        return self.service.deliveries(self.project.id, channel.id, after=None, limit=100)[0]

    def deliver(self) -> None:
        """Everything that is due now, to the end of each try."""
        while self.deliverer.run_once():
            until(self.deliverer.idle)

    def close(self) -> None:
        self.deliverer.stop()
        self.storage.close()


def until(condition: Callable[[], Any], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("did not happen")
        time.sleep(0.005)
