"""Notification channels: who is told when a job ends and when a deployment is ready or fails."""

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.lists import After, Limit, clamped, page
from tunewright.api.native.jobs import PREFIX
from tunewright.api.refusals import StrictBody
from tunewright.api.services import NotificationsOf, PlatformOf
from tunewright.i18n import mark, translate
from tunewright.notifications.records import (
    DEPLOYMENT_FAILED,
    DEPLOYMENT_READY,
    ENABLED,
    EVENT_TYPES,
    Channel,
    Delivery,
)
from tunewright.notifications.service import NewChannel

MOST_DELIVERIES = 100
_NOTES = {"failing_for_days": mark("Nothing arrived for three days; mend the receiver and enable the channel again")}

router = router_at(PREFIX)

Url = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(max_length=128)]
Events = Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=20)]
Language = Literal["en", "zh"]


class NewChannelBody(StrictBody):
    """An https address is a signed webhook; any other is one of Apprise."""

    url: Url
    name: Name = ""
    events: Events = Field(default_factory=lambda: list(EVENT_TYPES))
    language: Language | None = None


class ChannelChangesBody(StrictBody):
    """What is absent stays."""

    url: Url | None = None
    name: Name | None = None
    events: Events | None = None
    language: Language | None = None
    enabled: bool | None = None


@router.post("/notifications/channels")
def create_channel(
    request: Request, body: NewChannelBody, caller: CallerOf, notifications: NotificationsOf, platform: PlatformOf
) -> Json:
    """Make a channel. The signing secret of a webhook is in this answer and never again."""
    wanted = NewChannel(
        url=body.url,
        name=body.name,
        events=tuple(body.events),
        language=body.language or platform.settings.language,
    )
    channel, secret = notifications.create(caller.project_id, wanted)
    return Json(_shown(request, channel, secret), status_code=201)


@router.get("/notifications/channels")
def list_channels(request: Request, caller: CallerOf, notifications: NotificationsOf) -> Json:
    """All of the project, newest first."""
    found = notifications.list(caller.project_id)
    return Json(page(found, False, lambda channel: _shown(request, channel)))


@router.get("/notifications/channels/{channel_id}")
def retrieve_channel(request: Request, channel_id: str, caller: CallerOf, notifications: NotificationsOf) -> Json:
    """One channel, its address masked."""
    return Json(_shown(request, notifications.get(caller.project_id, channel_id)))


@router.patch("/notifications/channels/{channel_id}")
def update_channel(
    request: Request, channel_id: str, body: ChannelChangesBody, caller: CallerOf, notifications: NotificationsOf
) -> Json:
    """Change what the body names. `enabled: true` forgives earlier failures."""
    changes = body.model_dump(exclude_none=True)
    return Json(_shown(request, notifications.update(caller.project_id, channel_id, changes)))


@router.delete("/notifications/channels/{channel_id}")
def delete_channel(channel_id: str, caller: CallerOf, notifications: NotificationsOf) -> Json:
    """Remove a channel and what waits for it."""
    notifications.delete(caller.project_id, channel_id)
    return Json({"id": channel_id, "object": "notification_channel", "deleted": True})


@router.post("/notifications/channels/{channel_id}/rotate_secret")
def rotate_secret(request: Request, channel_id: str, caller: CallerOf, notifications: NotificationsOf) -> Json:
    """A new signing secret; for a day, messages are signed with the earlier ones too."""
    channel, secret = notifications.rotate(caller.project_id, channel_id)
    return Json(_shown(request, channel, secret))


@router.post("/notifications/channels/{channel_id}/test")
def send_test(channel_id: str, caller: CallerOf, notifications: NotificationsOf) -> Json:
    """Send a message now; the answer says how that went, whatever the receiver did."""
    return Json(_delivery_object(notifications.test(caller.project_id, channel_id)))


@router.get("/notifications/channels/{channel_id}/deliveries")
def list_deliveries(
    channel_id: str, caller: CallerOf, notifications: NotificationsOf, after: After, limit: Limit = None
) -> Json:
    """What was sent and what waits, newest first; ended ones are kept for 30 days."""
    found, more = notifications.deliveries(
        caller.project_id, channel_id, after=after, limit=clamped(limit, 20, MOST_DELIVERIES)
    )
    return Json(page(found, more, _delivery_object))


def _shown(request: Request, channel: Channel, secret: str | None = None) -> dict[str, Any]:
    shown = {
        "id": channel.id,
        "object": "notification_channel",
        "kind": channel.kind,
        "name": channel.name,
        "url": channel.shown_url,
        "events": channel.events,
        "language": channel.language,
        "recipients": channel.recipients,
        "enabled": channel.status == ENABLED,
        "note": channel.note and translate(_NOTES[channel.note], exchange_of(request.scope).language),
        "failing_since": channel.failing_since,
        "created_at": channel.created_at,
        "updated_at": channel.updated_at,
    }
    return shown | ({"signing_secret": secret} if secret else {})


def _delivery_object(delivery: Delivery) -> dict[str, Any]:
    about_deployment = delivery.type in (DEPLOYMENT_FAILED, DEPLOYMENT_READY)
    return {
        "id": delivery.id,
        "object": "notification_delivery",
        "channel_id": delivery.channel_id,
        "event_id": delivery.event_id,
        "type": delivery.type,
        "job_id": None if about_deployment else delivery.subject_id,
        "deployment_id": delivery.subject_id if about_deployment else None,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "attempted_at": delivery.attempted_at,
        "next_at": delivery.next_at if delivery.status == "pending" else None,
        "error": delivery.error,
        "http_status": delivery.http_status,
        "created_at": delivery.created_at,
        "delivered_at": delivery.delivered_at,
    }
