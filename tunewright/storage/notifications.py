"""Queries on notification channels and the outbox."""

import builtins

import msgspec
import sqlalchemy as sa

from tunewright.notifications.records import ENABLED, PENDING, Channel, Delivery
from tunewright.storage.paging import page
from tunewright.storage.rows import every, one, to_columns, to_row
from tunewright.storage.tables import channels, deliveries


class Channels:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, channel: Channel) -> None:
        self._connection.execute(sa.insert(channels).values(to_row(channel)))

    def get(self, project_id: str, channel_id: str) -> Channel | None:
        statement = sa.select(channels).where(*_is_channel(project_id, channel_id))
        return one(self._connection, statement, Channel)

    def list(self, project_id: str) -> builtins.list[Channel]:
        """All of a project, newest first; there are few."""
        statement = sa.select(channels).where(channels.c.project_id == project_id)
        return every(self._connection, statement.order_by(channels.c.created_at.desc(), channels.c.id.desc()), Channel)

    def enabled(self, project_id: str) -> builtins.list[Channel]:
        """Those that are told."""
        statement = sa.select(channels).where(channels.c.project_id == project_id, channels.c.status == ENABLED)
        return every(self._connection, statement.order_by(channels.c.id), Channel)

    def change(self, channel: Channel, **changes: object) -> Channel | None:
        """`channel` with the changes, or None if it is gone."""
        wanted = msgspec.structs.replace(channel, **changes)  # refuses names that are no fields
        statement = sa.update(channels).where(*_is_channel(channel.project_id, channel.id))
        found = self._connection.execute(statement.values(to_columns(changes))).rowcount
        return wanted if found == 1 else None

    def delete(self, project_id: str, channel_id: str) -> bool:
        """With everything in its outbox. False if there is no such channel."""
        own = (deliveries.c.project_id == project_id, deliveries.c.channel_id == channel_id)
        self._connection.execute(sa.delete(deliveries).where(*own))
        statement = sa.delete(channels).where(*_is_channel(project_id, channel_id))
        return self._connection.execute(statement).rowcount == 1


class Deliveries:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, delivery: Delivery) -> None:
        self._connection.execute(sa.insert(deliveries).values(to_row(delivery)))

    def list(self, project_id: str, channel_id: str, *, after: str | None, limit: int) -> builtins.list[Delivery]:
        """Of one channel, newest first. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(deliveries).where(
            deliveries.c.project_id == project_id, deliveries.c.channel_id == channel_id
        )
        paged = page(self._connection, deliveries, project_id, statement, after=after, limit=limit)
        return every(self._connection, paged, Delivery)

    def due_channels(self, now_s: int) -> builtins.list[tuple[str, str]]:
        """(project, channel) of every channel for which something is due. Of all projects: for the deliverer only."""
        statement = (
            sa.select(deliveries.c.project_id, deliveries.c.channel_id)
            .where(deliveries.c.status == PENDING, deliveries.c.next_at <= now_s)
            .group_by(deliveries.c.project_id, deliveries.c.channel_id)
            .order_by(sa.func.min(deliveries.c.next_at))
        )
        return [(row.project_id, row.channel_id) for row in self._connection.execute(statement)]

    def next_due(self, project_id: str, channel_id: str, now_s: int) -> Delivery | None:
        """What has waited longest for this channel."""
        statement = (
            sa.select(deliveries)
            .where(
                deliveries.c.project_id == project_id,
                deliveries.c.channel_id == channel_id,
                deliveries.c.status == PENDING,
                deliveries.c.next_at <= now_s,
            )
            .order_by(deliveries.c.next_at, deliveries.c.id)
            .limit(1)
        )
        return one(self._connection, statement, Delivery)

    def change(self, delivery: Delivery, **changes: object) -> Delivery | None:
        """Compare-and-set: applies `changes` if the stored row still has `delivery`'s status and number of attempts."""
        wanted = msgspec.structs.replace(delivery, **changes)
        statement = sa.update(deliveries).where(
            deliveries.c.project_id == delivery.project_id,
            deliveries.c.id == delivery.id,
            deliveries.c.status == delivery.status,
            deliveries.c.attempts == delivery.attempts,
        )
        found = self._connection.execute(statement.values(to_columns(changes))).rowcount
        return wanted if found == 1 else None

    def give_up(self, project_id: str, channel_id: str, *, status: str, error: str) -> int:
        """End all that waits for a channel; how many there were."""
        statement = sa.update(deliveries).where(
            deliveries.c.project_id == project_id,
            deliveries.c.channel_id == channel_id,
            deliveries.c.status == PENDING,
        )
        return self._connection.execute(statement.values(status=status, error=error)).rowcount

    def metered_since(self, project_id: str, then_s: int) -> int:
        """Messages that the project has had sent through metered channels since then, each recipient and try counted."""
        statement = sa.select(sa.func.sum(deliveries.c.attempts * deliveries.c.recipients)).where(
            deliveries.c.project_id == project_id,
            deliveries.c.metered.is_(True),
            deliveries.c.attempted_at >= then_s,
        )
        return int(self._connection.execute(statement).scalar_one() or 0)

    def forget_before(self, then_s: int) -> int:
        """Drop what ended and was made before then. Of all projects: for the deliverer only."""
        statement = sa.delete(deliveries).where(deliveries.c.status != PENDING, deliveries.c.created_at < then_s)
        return self._connection.execute(statement).rowcount


def _is_channel(project_id: str, channel_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return channels.c.project_id == project_id, channels.c.id == channel_id
