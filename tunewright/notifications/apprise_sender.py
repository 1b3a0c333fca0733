"""Messages to people through Apprise, each sent by a process of its own."""

import subprocess
import sys
import threading
import unicodedata
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from tunewright.errors import InvalidRequest, Unavailable
from tunewright.i18n import mark
from tunewright.notifications.apprise_process import SCHEMAS, SEND_LIMIT_S, Answer, Order
from tunewright.notifications.records import Outcome
from tunewright.worker_environment import worker_environment

MAX_URL_LENGTH = 2048
MOST_RECIPIENTS = 10
_START_LIMIT_S = 20.0
_PROCESSES = 12
"""At work at the same time; each takes some 60 MB."""
_FILE_OPTIONS = ("pgp", "keyfile", "subfile", "template", "attach", "file")
"""Options of addresses whose values name files of this machine begin like these."""


class AppriseSender:
    """Blocks while it sends; safe to use from several threads. `module` is the program that does it (tests have another)."""

    def __init__(self, module: str = "tunewright.notifications.apprise_process") -> None:
        self._module = module
        self._places = threading.BoundedSemaphore(_PROCESSES)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def stop(self) -> None:
        """End what is being sent, and send nothing more: the tries count as failed."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def check(self, url: str) -> tuple[str, int]:
        """What may be shown of an address, and how many people it names. Nothing is sent.

        Raises InvalidRequest (`invalid_url`, `url_not_allowed`, `too_many_recipients`), Unavailable.
        """
        schema = _check_text(url)
        answer = self._run(Order(url))
        if answer is None or answer.error == "not_sent":
            raise Unavailable("notification_busy", mark("The address could not be looked at now; try again"))
        if answer.error == "url_not_allowed":
            raise _not_allowed(schema)
        if answer.error is not None:
            raise _invalid(mark("This is no address that {schema} takes"), schema=schema)
        if answer.recipients > MOST_RECIPIENTS:
            raise InvalidRequest(
                "too_many_recipients",
                mark("The address names {count} recipients; a channel has at most {limit}"),
                param="url",
                count=answer.recipients,
                limit=MOST_RECIPIENTS,
            )
        return f"{schema}://***", answer.recipients

    def send(self, url: str, title: str, body: str) -> Outcome:
        """One try. Raises nothing that a service could cause."""
        answer = self._run(Order(url, title, body))
        return Outcome("timeout" if answer is None else answer.error)

    def _run(self, order: Order) -> Answer | None:
        """None if it did not end in time, or not by itself."""
        try:
            with self._places, self._started() as process:
                try:
                    out, _ = process.communicate(msgspec.json.encode(order), _START_LIMIT_S + SEND_LIMIT_S)
                finally:
                    process.kill()
                    with self._lock:
                        self._running.discard(process)
            return msgspec.json.decode(out, type=Answer)
        except (subprocess.TimeoutExpired, OSError, msgspec.DecodeError):
            return None

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise InterruptedError
            process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=worker_environment(),
                start_new_session=True,
            )
            self._running.add(process)
            return process


def _check_text(url: str) -> str:
    """The schema. Raises InvalidRequest."""
    if len(url) > MAX_URL_LENGTH:
        raise _invalid(mark("The address is longer than {limit} characters"), limit=MAX_URL_LENGTH)
    schema, separator, _ = url.partition("://")
    if not separator or any(unicodedata.category(c)[0] in "CZ" or c == "\\" for c in url):
        raise _invalid(mark("The address must look like service://..., without blanks"))
    schema = schema.lower()
    if schema not in SCHEMAS:
        raise _not_allowed(schema)
    try:
        options = [name.lower() for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)]
    except ValueError:
        raise _invalid(mark("The address must look like service://..., without blanks")) from None
    if any(name.lstrip("+-: ").startswith(_FILE_OPTIONS) for name in options):
        raise InvalidRequest("url_not_allowed", mark("The address names a file of the server"), param="url")
    return schema


def _not_allowed(schema: str) -> InvalidRequest:
    sentence = mark("Messages are not sent by {schema}; a service that you run yourself is told by an https webhook")
    return InvalidRequest("url_not_allowed", sentence, param="url", schema=schema[:20])


def _invalid(sentence: str, **values: Any) -> InvalidRequest:
    return InvalidRequest("invalid_url", sentence, param="url", **values)
