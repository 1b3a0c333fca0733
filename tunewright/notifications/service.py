"""Channels of a project: made, looked at, changed, tested, removed."""

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.clock import wall_s
from tunewright.errors import Conflict, InvalidRequest, NotFound, RateLimited, TunewrightError, quote
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.notifications.records import (
    APPRISE,
    DISABLED,
    ENABLED,
    EVENT_TYPES,
    GIVEN_UP,
    TEST_TYPE,
    WEBHOOK,
    Channel,
    Delivery,
)
from tunewright.notifications.sealing import Signing, Vault
from tunewright.notifications.sending import CLAIM_S, Sending
from tunewright.notifications.webhooks import check_address, new_secret

if TYPE_CHECKING:
    from tunewright.storage import Storage, Transaction

MOST_CHANNELS = 20
ROTATION_S = 24 * 3600
"""How long an old signing secret goes on being used beside the new one."""
_TESTS_AT_ONCE = 4
_TESTS_A_MINUTE = 10
"""Of one channel: nobody needs more, and the receiver may be somebody else's."""


class NewChannel(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for. `language` is `en` or `zh`."""

    url: str
    name: str = ""
    events: tuple[str, ...] = EVENT_TYPES
    language: str = "en"


class NotificationService:
    """All methods block; all may be called from any thread."""

    def __init__(self, storage: "Storage", vault: Vault, sending: Sending) -> None:
        self._storage = storage
        self._vault = vault
        self._sending = sending
        self._tests = threading.BoundedSemaphore(_TESTS_AT_ONCE)

    def create(self, project_id: str, wanted: NewChannel) -> tuple[Channel, str | None]:
        """The channel and, for a webhook, its signing secret, which is never shown again.

        Raises InvalidRequest (`invalid_url`, `url_not_allowed`, `too_many_recipients`, `invalid_value`),
        Conflict (`too_many_channels`), RateLimited (`notification_busy`).
        """
        events = _known_events(wanted.events)
        kind, shown, recipients = self._looked_at(wanted.url)
        channel_id, now_s = new_id("channel"), wall_s()
        secret = new_secret() if kind == WEBHOOK else None
        sealed = None if secret is None else self._vault.seal_secrets(project_id, channel_id, [Signing(secret)])
        channel = Channel(
            id=channel_id,
            project_id=project_id,
            kind=kind,
            name=wanted.name,
            url_sealed=self._vault.seal_url(project_id, channel_id, wanted.url),
            shown_url=shown,
            secrets_sealed=sealed,
            events=events,
            language=wanted.language,
            recipients=recipients,
            created_at=now_s,
            updated_at=now_s,
        )
        with self._storage.write() as tx:
            if len(tx.channels.list(project_id)) >= MOST_CHANNELS:
                sentence = mark("A project has at most {limit} notification channels")
                raise Conflict("too_many_channels", sentence, limit=MOST_CHANNELS)
            tx.channels.insert(channel)
        return channel, secret

    def list(self, project_id: str) -> list[Channel]:
        """Newest first."""
        with self._storage.read() as tx:
            return tx.channels.list(project_id)

    def get(self, project_id: str, channel_id: str) -> Channel:
        """Raises NotFound (`channel_not_found`)."""
        with self._storage.read() as tx:
            return _known(tx, project_id, channel_id)

    def update(self, project_id: str, channel_id: str, changes: dict[str, Any]) -> Channel:
        """`changes` may hold `url`, `name`, `events`, `language` and `enabled`. Enabling forgives earlier failures.

        An address stays of its kind. Raises as `create` does, and NotFound.
        """
        channel = self.get(project_id, channel_id)
        fields: dict[str, Any] = {name: changes[name] for name in ("name", "language") if name in changes}
        if "events" in changes:
            fields["events"] = _known_events(changes["events"])
        if "url" in changes:
            kind, shown, recipients = self._looked_at(changes["url"])
            if kind != channel.kind:
                sentence = mark("A channel keeps its kind: make a new one for this address")
                raise InvalidRequest("url_not_allowed", sentence, param="url")
            sealed = self._vault.seal_url(project_id, channel_id, changes["url"])
            fields |= {"url_sealed": sealed, "shown_url": shown, "recipients": recipients}
        if "enabled" in changes:
            status = ENABLED if changes["enabled"] else DISABLED
            fields |= {"status": status, "note": None, "failing_since": None}
        with self._storage.write() as tx:
            changed = tx.channels.change(_known(tx, project_id, channel_id), updated_at=wall_s(), **fields)
            if changed is None:
                raise _not_found()
            if changed.status == DISABLED:
                tx.deliveries.give_up(project_id, channel_id, status=GIVEN_UP, error="channel_disabled")
        return changed

    def rotate(self, project_id: str, channel_id: str) -> tuple[Channel, str]:
        """A new signing secret, shown once; for a day the earlier ones sign too.

        Raises NotFound, Conflict (`not_a_webhook`).
        """
        secret, now_s = new_secret(), wall_s()
        with self._storage.write() as tx:
            channel = _known(tx, project_id, channel_id)
            if channel.kind != WEBHOOK:
                raise Conflict("not_a_webhook", mark("Only webhooks have signing secrets"))
            earlier = [
                each if each.until_s is not None else Signing(each.secret, now_s + ROTATION_S)
                for each in self._vault.secrets(channel, now_s) or []
            ]
            sealed = self._vault.seal_secrets(project_id, channel_id, [Signing(secret), *earlier])
            changed = tx.channels.change(channel, secrets_sealed=sealed, updated_at=now_s)
        return changed or channel, secret

    def delete(self, project_id: str, channel_id: str) -> None:
        """With all that waits for it. Raises NotFound."""
        with self._storage.write() as tx:
            if not tx.channels.delete(project_id, channel_id):
                raise _not_found()

    def test(self, project_id: str, channel_id: str) -> Delivery:
        """Send a test message now and say how that went; a channel that is disabled is tried too.

        Takes as long as the receiver does. Raises NotFound, RateLimited (`daily_limit`, `too_many_tests`, `notification_busy`).
        """
        with self._place():
            with self._storage.write() as tx:
                channel = _known(tx, project_id, channel_id)
                _refuse_too_many_tests(tx.deliveries.list(project_id, channel_id, after=None, limit=_TESTS_A_MINUTE))
                delivery = _test_delivery(channel)
                if delivery.metered and self._sending.over_limit(tx, delivery):
                    sentence = mark("The project has used up what it may send in a day")
                    raise RateLimited("daily_limit", sentence, retry_after_s=3600)
                tx.deliveries.insert(delivery)
            return self._sending.send(channel, delivery)

    def deliveries(
        self, project_id: str, channel_id: str, *, after: str | None, limit: int
    ) -> tuple[builtins.list[Delivery], bool]:
        """Newest first, and whether there are more. Raises NotFound, InvalidRequest (`invalid_cursor`)."""
        with self._storage.read() as tx:
            _known(tx, project_id, channel_id)
            found = tx.deliveries.list(project_id, channel_id, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def _looked_at(self, url: str) -> tuple[str, str, int]:
        """Kind, what may be shown, and number of recipients of an address."""
        if url.partition("://")[0].lower() in ("http", "https") or "://" not in url:
            return WEBHOOK, check_address(self._sending.webhooks.egress, url), 1
        with self._place():
            return (APPRISE, *self._sending.services.check(url))

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the few places for requests that wait for others."""
        if not self._tests.acquire(blocking=False):
            raise RateLimited("notification_busy", mark("Too many addresses are looked at or tested now; try again"))
        try:
            yield
        finally:
            self._tests.release()


def _known(tx: "Transaction", project_id: str, channel_id: str) -> Channel:
    channel = tx.channels.get(project_id, channel_id)
    if channel is None:
        raise _not_found()
    return channel


def _not_found() -> TunewrightError:
    return NotFound("channel_not_found", mark("There is no such notification channel"), param="channel_id")


def _refuse_too_many_tests(newest: list[Delivery]) -> None:
    lately = [each for each in newest if each.type == TEST_TYPE and each.created_at > wall_s() - 60]
    if len(lately) >= _TESTS_A_MINUTE:
        sentence = mark("The channel was tested {count} times in a minute; wait a little")
        raise RateLimited("too_many_tests", sentence, retry_after_s=60, count=len(lately))


def _known_events(events: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    for name in events:
        if name not in EVENT_TYPES:
            sentence = mark("There is no event {value}; there are {known}")
            raise InvalidRequest(
                "invalid_value", sentence, param="events", value=quote(name), known=", ".join(EVENT_TYPES)
            )
    return tuple(dict.fromkeys(events))


def _test_delivery(channel: Channel) -> Delivery:
    """Claimed already, so the deliverer leaves it alone for as long as a test takes."""
    now_s = wall_s()
    return Delivery(
        id=new_id("delivery"),
        project_id=channel.project_id,
        channel_id=channel.id,
        event_id=new_id("event"),
        type=TEST_TYPE,
        subject_id="ftjob-test",
        recipients=channel.recipients,
        metered=channel.kind == APPRISE,
        attempts=1,
        attempted_at=now_s,
        next_at=now_s + CLAIM_S,
        created_at=now_s,
    )
