"""A process that sends one message through Apprise and ends: `python -m tunewright.notifications.apprise_process`.

Apprise parses what strangers wrote and dials by itself, so it works where that can do little: without the server's
environment and memory, for a few seconds, connecting to public addresses only, writing no file, starting no program.
An order comes as JSON on stdin, an answer goes as JSON to stdout; neither is ever logged, for an address is a secret.
"""

import errno
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from tunewright.egress import is_public

SCHEMAS = frozenset({
    # text messages
    "46elks", "atalk", "bulksms", "bulkvs", "burstsms", "clickatell", "clicksend", "d7sms", "exotel", "freemobile",
    "httpsms", "kaleyra", "kavenegar", "msg91",
    "msgbird", "nexmo", "octopush", "plivo", "serwersms", "seven", "sfr", "sinch", "smsc", "smsmgr", "sns",
    "telesign", "telnyx", "threema", "twilio", "voipms", "vonage",
    # rooms and people
    "cliq", "dingtalk", "discord", "feishu", "flock", "gchat", "groupme", "guilded", "kook", "lark", "line", "pushme",
    "pushplus", "qq", "revolt", "ryver", "schan", "slack",
    "spugpush", "stackfield", "tgram", "twist", "viber", "webex", "wecombot", "whatsapp", "wxpusher", "wxteams",
    "zalo", "zoom", "zulip",
    # devices, people on call
    "chanify", "firehydrant", "ifttt", "ilert", "incidentio", "join", "onesignal", "opsgenie", "pagerduty",
    "pagertree", "pbul", "pover", "prowl", "pushy", "signl4",
    "spike", "splunk", "spush", "squadcast",
    # mail
    "brevo", "mailersend", "mailgun", "mailto", "mailtos", "postmark", "resend", "sendgrid", "ses", "smtp2go",
    "sparkpost",
})  # fmt: skip
"""What may be used: services of others with addresses of their own, and mail. Whatever would send to a host that the caller
names, to this machine or by its programs stays out; a list of what is forbidden would grow holes with each release."""
PORTS = frozenset({25, 80, 443, 465, 587, 2525})
SEND_LIMIT_S = 10.0
_CPU_LIMIT_S = 30
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STARTING = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pty.", "ctypes.")
_READABLE = (sys.prefix, sys.base_prefix, "/etc/", "/usr/", "/lib/")

MayDial = Callable[[str, int], bool]


class Order(msgspec.Struct, frozen=True):
    """`title` None asks only whether the address is one."""

    url: str
    title: str | None = None
    body: str = ""


class Answer(msgspec.Struct, frozen=True):
    """`error` is None if all went well; `recipients` is how many the address names."""

    error: str | None = None
    recipients: int = 1


def public_service(address: str, port: int) -> bool:
    """Whether a message may go there."""
    return is_public(address) and port in PORTS


def confine(may_dial: MayDial) -> None:
    """From now on this process writes no file, reads none but its own code, starts nothing, and dials only what it may."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto"):
            address = args[1]
            if not isinstance(address, tuple) or not may_dial(str(address[0]), int(address[1])):
                raise PermissionError(errno.EACCES, "not a public address")
        elif event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITING:
                raise PermissionError(errno.EACCES, "nothing is written here")
            if isinstance(path, str | bytes) and not os.path.realpath(os.fsdecode(path)).startswith(_READABLE):
                raise PermissionError(errno.EACCES, "nothing is read here")
        elif event == "socket.bind" or event.startswith(_STARTING):
            raise PermissionError(errno.EACCES, "nothing is started here")

    sys.addaudithook(watch)


def carry_out(order: Order, schemas: Collection[str], may_dial: MayDial) -> Answer:
    """Send, or only look at the address."""
    schema, separator, _ = order.url.partition("://")
    if not separator or schema.lower() not in schemas:
        return Answer("url_not_allowed")
    import apprise

    asset = apprise.AppriseAsset(async_mode=False, secure_logging=True)
    asset.http_redirects = False  # type: ignore[attr-defined]
    apprise.Apprise.instantiate("pover://x", asset=asset)  # loads every plugin while files may still be read
    confine(may_dial)
    service = apprise.Apprise.instantiate(order.url, asset=asset)
    if service is None:
        return Answer("invalid_url")
    service.retry = 0  # type: ignore[attr-defined]
    recipients = max(1, len(service))
    if order.title is None:
        return Answer(None, recipients)
    signal.setitimer(signal.ITIMER_REAL, SEND_LIMIT_S)
    carrier = apprise.Apprise(asset=asset)
    carrier.add(service)
    sent = carrier.notify(body=order.body, title=order.title, body_format=apprise.NotifyFormat.TEXT)
    return Answer(None if sent else "not_sent", recipients)


def main(schemas: Collection[str] = SCHEMAS, may_dial: MayDial = public_service) -> None:
    """One order, one answer."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT_S, _CPU_LIMIT_S))
    logging.disable(logging.CRITICAL)  # its lines may hold addresses
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    try:
        answer = carry_out(order, schemas, may_dial)
    except Exception:  # a bug of a plugin says nothing that anybody may read
        answer = Answer("not_sent")
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
