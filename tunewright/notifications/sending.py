"""One try to deliver: claimed in the database first, its outcome stored after."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from tunewright.clock import wall_s
from tunewright.notifications.apprise_sender import AppriseSender
from tunewright.notifications.records import (
    DELIVERED,
    DISABLED,
    ENABLED,
    FAILED_TEST,
    GIVEN_UP,
    PENDING,
    TEST_TYPE,
    WEBHOOK,
    Channel,
    Delivery,
    Outcome,
)
from tunewright.notifications.sealing import Vault
from tunewright.notifications.texts import title_and_body
from tunewright.notifications.webhooks import WebhookSender

if TYPE_CHECKING:
    from tunewright.storage import Storage, Transaction

log = structlog.get_logger()

FIRST_BACK_OFF_S = 5
LONGEST_BACK_OFF_S = 3600
GIVEN_UP_AFTER_S = 24 * 3600
DISABLED_AFTER_S = 3 * 24 * 3600
CLAIM_S = 120
"""When somebody else tries again if whoever claimed a delivery has died. Longer than any try."""
DAY_S = 24 * 3600
_CAP_PAUSE_S = 900


def back_off_s(attempts: int) -> int:
    """The pause after so many tries: 5 s, doubled each time, up to an hour."""
    return min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(attempts - 1, 20))


class Sending:
    """`clock` tells Unix seconds: tries go on over restarts, so their times are wall times."""

    def __init__(
        self,
        storage: "Storage",
        vault: Vault,
        webhooks: WebhookSender,
        services: AppriseSender,
        daily_limit: int,
        clock: Callable[[], int] = wall_s,
    ) -> None:
        self._storage = storage
        self._vault = vault
        self.webhooks = webhooks
        self.services = services
        self._daily_limit = daily_limit
        self.clock = clock

    def try_next(self, project_id: str, channel_id: str) -> bool:
        """Send what has waited longest for a channel; False if nothing is due or somebody else took it."""
        with self._storage.write() as tx:
            channel = tx.channels.get(project_id, channel_id)
            delivery = tx.deliveries.next_due(project_id, channel_id, self.clock())
            if channel is None or delivery is None:
                return False
            claimed = self._claim(tx, channel, delivery)
        if claimed is not None:
            self.send(channel, claimed)
        return True

    def _claim(self, tx: "Transaction", channel: Channel, delivery: Delivery) -> Delivery | None:
        """From here on the try counts, whoever dies. None if it may not be sent (now)."""
        now_s = self.clock()
        if delivery.type == TEST_TYPE:  # whoever asked for it has gone with the server that died
            tx.deliveries.change(delivery, status=FAILED_TEST, error="interrupted")
            return None
        if channel.status != ENABLED or now_s - delivery.created_at >= GIVEN_UP_AFTER_S:
            tx.deliveries.change(delivery, status=GIVEN_UP, error=delivery.error or "channel_disabled")
            return None
        if delivery.metered and self.over_limit(tx, delivery):
            tx.deliveries.change(delivery, next_at=now_s + _CAP_PAUSE_S, error="daily_limit")
            return None
        return tx.deliveries.change(
            delivery, attempts=delivery.attempts + 1, attempted_at=now_s, next_at=now_s + CLAIM_S
        )

    def over_limit(self, tx: "Transaction", delivery: Delivery) -> bool:
        """Whether sending it would exceed what the project may send in 24 hours through services that may cost money."""
        sent = tx.deliveries.metered_since(delivery.project_id, self.clock() - DAY_S)
        return sent + delivery.recipients > self._daily_limit

    def send(self, channel: Channel, claimed: Delivery) -> Delivery:
        """One try of a claimed delivery, which comes back as it is then."""
        try:
            outcome = self._send(channel, claimed)
        except Exception:  # a bug must not stop the others; this one is tried again
            log.exception("notification_failed", channel=channel.id, delivery=claimed.id)
            outcome = Outcome("internal_error")
        with self._storage.write() as tx:
            done = self._store(tx, claimed, outcome)
        log.info("notification_tried", channel=channel.id, delivery=claimed.id, error=outcome.error)
        return done

    def _send(self, channel: Channel, delivery: Delivery) -> Outcome:
        url = self._vault.url(channel)
        if url is None:
            return Outcome("channel_unreadable")
        if channel.kind != WEBHOOK:
            return self.services.send(url, *title_and_body(delivery, channel.language))
        secrets = self._vault.secrets(channel, self.clock())
        if not secrets:
            return Outcome("channel_unreadable")
        return self.webhooks.send(url, [each.secret for each in secrets], delivery)

    def _store(self, tx: "Transaction", claimed: Delivery, outcome: Outcome) -> Delivery:
        now_s = self.clock()
        changes: dict[str, object] = {"error": outcome.error, "http_status": outcome.http_status}
        if outcome.error is None:
            changes |= {"status": DELIVERED, "delivered_at": now_s}
        elif claimed.type == TEST_TYPE:
            changes |= {"status": FAILED_TEST}
        else:
            next_at = now_s + back_off_s(claimed.attempts)
            over = next_at - claimed.created_at > GIVEN_UP_AFTER_S
            changes |= {"next_at": next_at, "status": GIVEN_UP if over else PENDING}
        done = tx.deliveries.change(claimed, **changes)
        if done is not None:  # else its channel was deleted, or another server waited too long for this one
            self._judge(tx, claimed, outcome)
        return done or claimed

    def _judge(self, tx: "Transaction", claimed: Delivery, outcome: Outcome) -> None:
        """Whether the channel is in order, failing, or has failed for so long that it is left in peace."""
        channel = tx.channels.get(claimed.project_id, claimed.channel_id)
        if channel is None or (claimed.type == TEST_TYPE and outcome.error is not None):
            return
        if outcome.error is None:
            if channel.failing_since is not None:
                tx.channels.change(channel, failing_since=None)
            return
        now_s = self.clock()
        if channel.failing_since is None:
            tx.channels.change(channel, failing_since=now_s)
        elif now_s - channel.failing_since >= DISABLED_AFTER_S and channel.status == ENABLED:
            tx.channels.change(channel, status=DISABLED, note="failing_for_days", updated_at=now_s)
            tx.deliveries.give_up(channel.project_id, channel.id, status=GIVEN_UP, error="channel_disabled")
            log.warning("channel_disabled", channel=channel.id, error=outcome.error)
