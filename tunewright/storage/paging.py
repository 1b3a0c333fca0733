"""Keyset pages: a page starts after an id, not at an offset, so rows that come or go meanwhile shift nothing."""

import re
from datetime import UTC, datetime

import sqlalchemy as sa

from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

_STAMP = re.compile(r"[a-z]+-([0-9]{14})[0-9]{3}-[0-9a-z]{20}")


def invalid_cursor(after: str) -> InvalidRequest:
    """The error for an `after` that no page can start from."""
    return InvalidRequest(
        "invalid_cursor", mark("'{value}' is not an id of this list"), param="after", value=quote(after)
    )


def page(
    connection: sa.Connection,
    table: sa.Table,
    project_id: str,
    statement: sa.Select[tuple[object, ...]],
    *,
    after: str | None,
    limit: int,
    ascending: bool = False,
) -> sa.Select[tuple[object, ...]]:
    """`statement`, cut to the page of `limit` rows after the row `after`, ordered by (created_at, id).

    An id whose row is gone still marks its place: ids carry the time when they were made. Raises InvalidRequest
    (`invalid_cursor`) for a text that is no id at all.
    """
    columns = table.c
    if after is not None:
        place = (_created_at(connection, table, project_id, after), after)
        row = sa.tuple_(columns.created_at, columns.id)
        cursor = sa.tuple_(sa.literal(place[0], sa.BigInteger), sa.literal(place[1], sa.Text))
        statement = statement.where(row > cursor if ascending else row < cursor)
    order = (columns.created_at, columns.id) if ascending else (columns.created_at.desc(), columns.id.desc())
    return statement.order_by(*order).limit(limit)


def _created_at(connection: sa.Connection, table: sa.Table, project_id: str, after: str) -> int:
    stored = connection.scalar(
        sa.select(table.c.created_at).where(table.c.project_id == project_id, table.c.id == after)
    )
    if stored is not None:
        return stored
    stamp = _STAMP.fullmatch(after)
    if stamp is None:
        raise invalid_cursor(after)
    try:
        return int(datetime.strptime(stamp[1], "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise invalid_cursor(after) from None
