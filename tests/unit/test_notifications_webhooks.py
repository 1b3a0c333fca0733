"""Webhooks: what the official client makes of them, and what no receiver or address can bring about."""

import base64
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import FineTuningJobSucceededWebhookEvent

from tests.webhook_world import NotificationWorld, Receiver
from tunewright.errors import TunewrightError
from tunewright.jobs.records import CANCELLED, FAILED, JobError
from tunewright.notifications.records import TYPE_OF_STATUS
from tunewright.notifications.service import ROTATION_S, NewChannel
from tunewright.notifications.webhooks import new_secret, signed_headers

A24 = {
    "http://good.example/hook": "url_not_allowed",
    "https://localhost/": "url_not_allowed",
    "https://169.254.169.254/latest/meta-data/": "url_not_allowed",
    "https://[::ffff:7f00:1]/": "url_not_allowed",
    "https://127.0.0.1/": "url_not_allowed",
    "https://10.0.0.1/": "url_not_allowed",
    "https://2130706433/": "invalid_url",
    "https://0x7f.1/": "invalid_url",
    "https://user@good.example/": "invalid_url",
    "https://good.example@127.0.0.1/": "invalid_url",
    "https://good.example\\@127.0.0.1/": "invalid_url",
    "https://good.example:22/": "url_not_allowed",
    "https://good.example:8443/": "url_not_allowed",
    "https://good.example/" + "x" * 5000: "invalid_url",
    "https://gооd.example/": "invalid_url",  # two letters are Cyrillic
    "https://good.example/\r\nX: y": "invalid_url",
    "https://": "invalid_url",
    "good.example/hook": "invalid_url",
    "": "invalid_url",
}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("receiver"))
    yield receiver
    receiver.close()


@pytest.fixture
def world(tmp_path: Path, receiver: Receiver) -> Iterator[NotificationWorld]:
    receiver.got.clear()
    receiver.hits = 0
    world = NotificationWorld(tmp_path / "home", receiver.egress())
    yield world
    world.close()


def client(secret: str) -> OpenAI:
    return OpenAI(api_key="none", webhook_secret=secret)


@pytest.mark.parametrize("status", TYPE_OF_STATUS)
def test_the_official_client_takes_what_arrives(world: NotificationWorld, receiver: Receiver, status: str) -> None:
    _, secret = world.webhook()
    error = JobError(code="crashed", message="x", values={"log": "row text"}) if status == FAILED else None
    job = world.job(status, error=error)
    world.deliver()
    [got] = receiver.got
    event = client(secret).webhooks.unwrap(got.body, got.headers)
    assert (event.type, event.data.id) == (f"fine_tuning.job.{status}", job.id)  # type: ignore[union-attr]
    assert event.id == got.headers["webhook-id"] and event.object == "event"
    if status == "succeeded":
        assert isinstance(event, FineTuningJobSucceededWebhookEvent)
    assert b"row text" not in got.body


def test_forged_old_and_replayed_ones_are_refused_by_it(world: NotificationWorld, receiver: Receiver) -> None:
    _, secret = world.webhook()
    world.job()
    world.deliver()
    [got] = receiver.got
    stamp = int(got.headers["webhook-timestamp"])
    event_id = got.headers["webhook-id"]
    forgeries = [
        (got.body.replace(b"ftjob-", b"ftjob-x"), got.headers),
        (got.body, got.headers | {"webhook-id": "event-other"}),
        (got.body, got.headers | {"webhook-timestamp": str(stamp + 1)}),
        (got.body, got.headers | signed_headers([new_secret()], event_id, stamp, got.body)),
        (got.body, signed_headers([secret], event_id, stamp - 301, got.body)),  # replayed later: its time is signed
        (got.body, signed_headers([secret], event_id, stamp + 302, got.body)),
    ]
    for body, headers in forgeries:
        with pytest.raises(InvalidWebhookSignatureError):
            client(secret).webhooks.unwrap(body, headers)
    client(secret).webhooks.unwrap(got.body, signed_headers([secret], event_id, stamp, got.body))


def test_the_signature_is_that_of_the_specification() -> None:
    """The example of the Standard Webhooks reference libraries."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = signed_headers([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_both_secrets_of_a_rotation_verify_for_a_day(world: NotificationWorld, receiver: Receiver) -> None:
    channel, first = world.webhook()
    _, second = world.service.rotate(world.project.id, channel.id)
    assert first != second and len(base64.b64decode(second.removeprefix("whsec_"))) == 32
    world.job()
    world.deliver()
    world.ahead_s = ROTATION_S + 1
    world.service.test(world.project.id, channel.id)
    during, after = receiver.got
    for secret in (first, second):
        client(secret).webhooks.unwrap(during.body, during.headers)
    client(second).webhooks.unwrap(after.body, after.headers)
    with pytest.raises(InvalidWebhookSignatureError):
        client(first).webhooks.unwrap(after.body, after.headers)


@pytest.mark.parametrize("url", A24)
def test_a24_addresses_that_are_no_webhooks(world: NotificationWorld, receiver: Receiver, url: str) -> None:
    with pytest.raises(TunewrightError) as caught:
        world.service.create(world.project.id, NewChannel(url=url))
    assert (caught.value.code, caught.value.param) == (A24[url], "url")
    assert not world.service.list(world.project.id) and not receiver.hits


@pytest.mark.parametrize(
    ("path", "error", "status"),
    [
        ("/hook", None, 200),
        ("/endless", None, 200),
        ("/500", "status", 500),
        ("/gone", "status", 410),
        ("/redirect", "status", 302),
    ],
)
def test_what_a_receiver_answers(
    world: NotificationWorld, receiver: Receiver, path: str, error: str | None, status: int
) -> None:
    """Nothing but the status counts: a redirect is no success, its target is not dialled, and no body is waited for."""
    channel, secret = world.webhook(path)
    tried = world.service.test(world.project.id, channel.id)
    assert (tried.error, tried.http_status) == (error, status)
    assert tried.status == ("delivered" if error is None else "failed")
    assert len(receiver.got) == 1 and not receiver.hits
    client(secret).webhooks.unwrap(receiver.got[0].body, receiver.got[0].headers)


@pytest.mark.parametrize(("name", "error"), [("inside.example", "url_not_allowed"), ("nowhere.example", "dns")])
def test_names_are_looked_at_when_they_are_dialled(
    world: NotificationWorld, receiver: Receiver, name: str, error: str
) -> None:
    channel, _ = world.service.create(world.project.id, NewChannel(url=f"https://{name}/hook"))
    assert world.service.test(world.project.id, channel.id).error == error
    assert not receiver.got and not receiver.hits


def test_a_receiver_that_is_down_or_says_nothing(tmp_path: Path, receiver: Receiver) -> None:
    world = NotificationWorld(tmp_path / "home", receiver.egress(), timeout_s=0.5)
    channel, _ = world.webhook("/slow")
    assert world.service.test(world.project.id, channel.id).error == "timeout"
    receiver.down = True
    try:
        assert world.service.test(world.project.id, channel.id).error == "connect"
    finally:
        receiver.down = False
        world.close()


def test_address_and_secrets_are_neither_shown_nor_stored_in_the_open(world: NotificationWorld) -> None:
    channel, secret = world.webhook("/T0P/SECRET?token=geheim")
    assert channel.shown_url == "https://good.example/***"
    world.service.rotate(world.project.id, channel.id)
    world.job(CANCELLED)
    with world.storage.read() as tx:
        stored = msgspec.json.encode([tx.channels.list(world.project.id), world.deliveries(channel)])
    world.storage.close()
    content = b"".join(path.read_bytes() for path in world.home.root.glob("tunewright.db*"))
    for text in (b"geheim", b"T0P", secret.encode(), secret.removeprefix("whsec_").encode()):
        assert text not in stored and text not in content


def test_a_sealed_row_does_not_open_in_another_channel(world: NotificationWorld, receiver: Receiver) -> None:
    one, _ = world.webhook("/one")
    other, _ = world.webhook("/other")
    with world.storage.write() as tx:
        tx.channels.change(one, url_sealed=other.url_sealed)
    assert world.service.test(world.project.id, one.id).error == "channel_unreadable"
    assert not receiver.got
