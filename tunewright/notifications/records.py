"""A channel that is told when jobs end and deployments become ready or fail, what it is told, and how that went."""

from typing import Any

import msgspec

from tunewright.jobs.records import CANCELLED, FAILED, SUCCEEDED

WEBHOOK = "webhook"
APPRISE = "apprise"
ENABLED = "enabled"
DISABLED = "disabled"

PENDING = "pending"
DELIVERED = "delivered"
GIVEN_UP = "given_up"
FAILED_TEST = "failed"

TYPE_OF_STATUS = {
    SUCCEEDED: "fine_tuning.job.succeeded",
    FAILED: "fine_tuning.job.failed",
    CANCELLED: "fine_tuning.job.cancelled",
}
"""The type of the event that a job's end is."""
DEPLOYMENT_READY = "deployment.ready"
DEPLOYMENT_FAILED = "deployment.failed"
EVENT_TYPES = (*TYPE_OF_STATUS.values(), DEPLOYMENT_READY, DEPLOYMENT_FAILED)
TEST_TYPE = "notification.test"


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """Where a project wants to be told. The address is a secret: sealed here, and `shown_url` is all that is ever shown.

    `secrets_sealed` holds the signing secrets of a webhook (None for other kinds). `recipients` is how many are written
    to at once. `failing_since` is the first failure after which nothing arrived any more.
    """

    id: str
    project_id: str
    kind: str
    name: str
    url_sealed: bytes
    shown_url: str
    secrets_sealed: bytes | None = None
    events: tuple[str, ...] = EVENT_TYPES
    language: str = "en"
    recipients: int = 1
    status: str = ENABLED
    note: str | None = None
    failing_since: int | None = None
    created_at: int
    updated_at: int


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One event on its way to one channel: a row of the outbox.

    `event_id` is the same for all channels and all tries: what a receiver tells duplicates by. `subject_id` is the job or the
    deployment, `data` are the facts. `attempts` counts tries that were begun; `attempted_at` is the last one. `error` is the
    code of its failure and `http_status` what the receiver answered, if it did.
    """

    id: str
    project_id: str
    channel_id: str
    event_id: str
    type: str
    subject_id: str
    data: dict[str, Any] = {}
    status: str = PENDING
    recipients: int = 1
    metered: bool = False
    """Whether it counts against the project's daily limit: what goes through a service that may cost money."""
    attempts: int = 0
    attempted_at: int | None = None
    next_at: int
    error: str | None = None
    http_status: int | None = None
    created_at: int
    delivered_at: int | None = None


class Outcome(msgspec.Struct, frozen=True):
    """How one try went. `error` is None if the receiver took it."""

    error: str | None = None
    http_status: int | None = None
