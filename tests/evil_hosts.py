"""A small internet for tests: names with addresses, servers behind them on this machine, and a canary at every other address."""

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress

PUBLIC = "93.184.215.14"
OTHER = "1.1.1.1"
REDIRECTS = {
    "/to-loopback": "http://127.0.0.1/x",
    "/to-metadata": "http://169.254.169.254/latest/meta-data/",
    "/to-mapped": "http://[::ffff:127.0.0.1]/x",
    "/to-private-name": "http://inside.example/x",
    "/to-file": "file:///etc/passwd",
    "/to-gopher": "gopher://127.0.0.1:6379/_x",
    "/to-port": "http://good.example:22/x",
    "/to-userinfo": "http://good.example@127.0.0.1/",
    "/to-backslash": "http://good.example\\@127.0.0.1/",
    "/to-number": "http://2130706433/",
    "/to-scheme-relative": "//127.0.0.1/x",
    "/to-nothing": "",
    "/to-long": "http://good.example/" + "x" * 5000,
    "/to-good": "http://good.example/image",
    "/to-relative": "image",
    "/twice": "/to-good",
    "/thrice": "/twice",
    "/four-times": "/thrice",
    "/for-ever": "/for-ever",
    "/chain-to-loopback": "/to-loopback",
}


class SmallInternet:
    """`names` is what the resolver knows: a list of answers for each name, one for each question (the last one stays).

    `hits` counts connections to addresses that no test may reach; `requests` are the heads that the good host got.
    """

    def __init__(self, body: bytes = b"image", trust: ssl.SSLContext | None = None) -> None:
        self.names: dict[str, list[list[str]]] = {
            "good.example": [[PUBLIC]],
            "two.example": [[PUBLIC, OTHER]],
            "xn--bcher-kva.example": [[PUBLIC]],
            "inside.example": [["10.0.0.1"]],
            "mixed.example": [[PUBLIC, "127.0.0.1"]],
            "rebinding.example": [[PUBLIC], ["127.0.0.1"]],
            "late.example": [["127.0.0.1"]],
        }
        self.body = body
        self.hits = 0
        self.dialled: list[tuple[str, int]] = []
        self.asked: list[str] = []
        self.requests: list[bytes] = []
        self.status: dict[str, int] = {}
        self.closed = threading.Event()
        self._tls = trust
        self._good = self._listen(self._serve)
        self._canary = self._listen(self._hit)

    def resolve(self, host: str, port: int) -> list[str]:
        """In place of the system's resolver, which would also turn numerals into addresses."""
        self.asked.append(host)
        with suppress(OSError):
            return [socket.inet_ntoa(socket.inet_aton(host))]
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def connect(self, address: str, port: int, timeout_s: float) -> socket.socket:
        """In place of the network: the public addresses lead to the good host, everything else to the canary."""
        self.dialled.append((address, port))
        target = self._good if address in (PUBLIC, OTHER) else self._canary
        return socket.create_connection(target, timeout_s)

    def close(self) -> None:
        self.closed.set()
        for listener in self._listeners:
            listener.close()

    _listeners: list[socket.socket]

    def _listen(self, serve: Callable[[socket.socket], None]) -> tuple[str, int]:
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listeners = [*getattr(self, "_listeners", []), listener]

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._talk, args=(serve, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()

    @staticmethod
    def _talk(serve: Callable[[socket.socket], None], connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.settimeout(20)
            serve(connection)

    def _hit(self, connection: socket.socket) -> None:
        self.hits += 1

    def _serve(self, connection: socket.socket) -> None:
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True)
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(4096)
            if not piece:
                return
            head += piece
        self.requests.append(head)
        path = head.split(b" ")[1].decode()
        connection.sendall(b"".join(self._head(path)))
        self._send_body(connection, path)
        connection.close()

    def _head(self, path: str) -> list[bytes]:
        if path in REDIRECTS:
            return [b"HTTP/1.1 302 Found\r\nLocation: ", REDIRECTS[path].encode(), b"\r\nSet-Cookie: a=b\r\n\r\n"]
        if path in self.status:
            return [f"HTTP/1.1 {self.status[path]} No\r\nContent-Length: 0\r\n\r\n".encode()]
        if path == "/gzip":
            return [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"]
        if path == "/te-gzip":
            return [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"]
        if path == "/announced":
            return [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"]
        if path == "/short":
            return [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"]
        if path == "/rubbish":
            return [b"SSH-2.0-OpenSSH_9.9\r\n"]
        if path == "/endless-head":
            return [b"HTTP/1.1 200 OK\r\n"]
        if path == "/silent":
            return []
        return [b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"]

    def _send_body(self, connection: socket.socket, path: str) -> None:
        if path in REDIRECTS or path in self.status:
            return
        if path == "/gzip":
            connection.sendall(gzip.compress(bytes(10**6)))
        elif path == "/endless":
            while not self.closed.is_set():
                connection.sendall(bytes(1 << 16))
        elif path == "/slow":
            while not self.closed.is_set():
                connection.sendall(b"x")
                time.sleep(0.05)
        elif path == "/endless-head":
            while not self.closed.is_set():
                connection.sendall(b"X-More: yes\r\n" * 5000)
        elif path == "/silent":
            self.closed.wait(20)
        elif path != "/rubbish":
            connection.sendall(self.body)
