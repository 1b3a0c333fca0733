"""Apprise: what it may be asked for, and what the process that runs it can do."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.webhook_world import until
from tunewright.errors import InvalidRequest
from tunewright.notifications import apprise_sender
from tunewright.notifications.apprise_process import SCHEMAS, public_service
from tunewright.notifications.apprise_sender import AppriseSender
from tunewright.notifications.records import Outcome

REPOSITORY = Path(__file__).parents[2]
HOST_IS_NO_HOST = {"mailgun", "smtp2go", "sparkpost", "mailto", "mailtos"}
"""Where the address has a host, it is the sender's domain (or the name of a mail server, which must be public)."""

REFUSED = {
    "json://good.example/": "url_not_allowed",
    "jsons://good.example/": "url_not_allowed",
    "xml://good.example/": "url_not_allowed",
    "form://127.0.0.1/": "url_not_allowed",
    "apprise://good.example/token": "url_not_allowed",
    "ntfy://good.example/topic": "url_not_allowed",
    "gotifys://good.example/token": "url_not_allowed",
    "file:///etc/passwd": "url_not_allowed",
    "dbus://": "url_not_allowed",
    "syslog://": "url_not_allowed",
    "windows://": "url_not_allowed",
    "exec://ls": "url_not_allowed",
    "mqtt://good.example/x": "url_not_allowed",
    "fcm://project/x?keyfile=/etc/passwd": "url_not_allowed",
    "mailtos://user:pass@good.example?pgp=yes&pgpkey=/etc/passwd": "url_not_allowed",
    "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ?+attach=/etc/passwd": "url_not_allowed",
    "slack:/x": "invalid_url",
    "slack://": "invalid_url",
    "tgram://x": "invalid_url",
    "mailtos://a@b\nBcc:x": "invalid_url",
    "twilio://x\\y": "invalid_url",
    "tgram://" + "x" * 5000: "invalid_url",
    f"twilio://AC{'a' * 32}:{'b' * 32}@abc": "invalid_url",
    f"twilio://AC{'a' * 32}:{'b' * 32}@15551234567/" + "/".join(f"155512345{n}" for n in range(20, 31)): "too_many_recipients",
}  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AppriseSender().check(url)
    assert (caught.value.code, caught.value.param) == (REFUSED[url], "url")
    assert "passwd" not in caught.value.text()


@pytest.mark.parametrize(
    ("url", "recipients"),
    [
        ("dingtalk://" + "a" * 64, 1),
        ("feishu://" + "a" * 36, 1),
        (f"twilio://AC{'a' * 32}:{'b' * 32}@15551234567/15551234568/15551234569?retry=5", 2),
        ("mailtos://user:geheim@gmail.com", 1),
    ],
)
def test_services_of_others_are_taken_and_masked(url: str, recipients: int) -> None:
    assert AppriseSender().check(url) == (f"{url.partition(':')[0]}://***", recipients)


def test_every_service_on_the_list_exists_and_has_an_address_of_its_own() -> None:
    script = (
        "import apprise, json; print(json.dumps({p: s['details']['templates'] for s in apprise.Apprise().details()"
        "['schemas'] for p in [*(s['protocols'] or []), *(s['secure_protocols'] or [])]}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    templates: dict[str, list[str]] = json.loads(done.stdout)
    assert set(templates) >= SCHEMAS and len(templates) > 150
    assert {name for name in SCHEMAS if any("{host}" in each for each in templates[name])} == HOST_IS_NO_HOST


def test_what_is_being_sent_ends_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    sender = AppriseSender("tests.sleeping_child")
    outcomes: list[Outcome] = []
    sending = threading.Thread(target=lambda: outcomes.append(sender.send("slack://x", "t", "b")))
    sending.start()
    until(lambda: sender._running)
    sender.stop()
    sending.join(10)
    assert outcomes == [Outcome("timeout")]
    assert sender.send("slack://x", "t", "b") == Outcome("timeout"), "nothing is begun any more"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[Any]]]:
    """Port of a server on this machine, and the JSON that it got."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(302 if self.path == "/redirect" else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server.server_address[1], got
    server.shutdown()
    server.server_close()


def test_a_message_goes_through_apprise(service: tuple[int, list[Any]]) -> None:
    port, got = service
    sender = AppriseSender("tests.apprise_child")
    assert sender.send(f"json://127.0.0.1:{port}/", "标题", "two\nlines <b>&amp;") == Outcome()
    assert (got[0]["title"], got[0]["message"]) == ("标题", "two\nlines <b>&amp;")
    assert sender.send(f"json://127.0.0.1:{port}/redirect", "t", "b").error == "not_sent"
    assert len(got) == 2, "redirects are not followed"


def test_it_gets_nowhere_on_this_machine(service: tuple[int, list[Any]]) -> None:
    port, got = service
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert AppriseSender("tests.apprise_inside").send(f"json://{host}:{port}/", "t", "b").error == "not_sent"
    mail = f"mailto://user:pass@good.example?smtp=127.0.0.1&port={port}&from=a@good.example"
    assert AppriseSender().send(mail, "t", "b").error == "not_sent"
    assert not got


@pytest.mark.parametrize(
    ("address", "port", "allowed"),
    [("1.1.1.1", 443, True), ("1.1.1.1", 22, False), ("127.0.0.1", 443, False), ("::ffff:10.0.0.1", 25, False)],
)
def test_where_messages_may_go(address: str, port: int, allowed: bool) -> None:
    assert public_service(address, port) is allowed


@pytest.mark.parametrize(
    "act",
    [
        "open('written', 'w')",
        "open('private')",
        "os.open('written', os.O_CREAT)",
        "subprocess.run(['true'])",
        "os.system('true')",
        "os.fork()",
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket(socket.AF_UNIX).connect('/tmp/x')",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.create_server(('127.0.0.1', 0))",
    ],
)
def test_what_the_process_can_not_do(tmp_path: Path, act: str) -> None:
    (tmp_path / "private").write_text("x")
    script = (
        "import os, socket, subprocess\n"
        "from tunewright.notifications.apprise_process import confine, public_service\n"
        "confine(public_service)\n"
        "import colorsys\n"  # its own code can still be read
        f"try:\n    {act}\nexcept PermissionError:\n    print('refused')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == "refused\n", done.stderr
    assert not (tmp_path / "written").exists()


def test_a_process_that_hangs_or_breaks_is_a_failed_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apprise_sender, "_START_LIMIT_S", 0.01)
    monkeypatch.setattr(apprise_sender, "SEND_LIMIT_S", 0.01)
    assert AppriseSender().send("slack://x", "t", "b").error == "timeout"
    assert AppriseSender("tests.no_such_program").send("slack://x", "t", "b").error == "timeout"
