"""Queries on the ledger of requests."""

import builtins
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from tunewright.accounts.usage import ERROR, INTERRUPTED, RUNNING, UsageRow, UsageSum
from tunewright.storage.paging import page
from tunewright.storage.rows import chunks, every, to_row
from tunewright.storage.tables import usage

_DAY_S = 24 * 3600
_CHANGING = (
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "status",
    "error_code",
    "ttft_ms",
    "duration_ms",
)


class Usage:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, rows: Sequence[UsageRow]) -> None:
        for some in chunks(rows):
            self._connection.execute(sa.insert(usage), [to_row(row) for row in some])

    def change(self, rows: Sequence[UsageRow]) -> None:
        """Store what of these rows can change."""
        statement = (
            sa.update(usage)
            .where(usage.c.project_id == sa.bindparam("of_project"), usage.c.id == sa.bindparam("of_id"))
            .values({name: sa.bindparam(f"new_{name}") for name in _CHANGING})
        )
        for some in chunks(rows):
            values = [
                {"of_project": row.project_id, "of_id": row.id}
                | {f"new_{name}": getattr(row, name) for name in _CHANGING}
                for row in some
            ]
            self._connection.execute(statement, values)

    def remove(self, rows: Sequence[UsageRow]) -> None:
        """These may be there or not."""
        for row in rows:
            self._connection.execute(sa.delete(usage).where(usage.c.project_id == row.project_id, usage.c.id == row.id))

    def list(
        self, project_id: str, *, status: str | None, model: str | None, after: str | None, limit: int
    ) -> builtins.list[UsageRow]:
        """Newest first. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(usage).where(usage.c.project_id == project_id)
        if status is not None:
            statement = statement.where(usage.c.status == status)
        if model is not None:
            statement = statement.where(usage.c.model == model)
        cut = page(self._connection, usage, project_id, statement, after=after, limit=limit)
        return every(self._connection, cut, UsageRow)

    def sums(
        self, project_id: str, *, since: int, until: int, by: frozenset[str], skip: int, limit: int
    ) -> builtins.list[UsageSum]:
        """Rows made in [since, until), summed by `day`, `model` and `key_id` as `by` names them; newest day first."""
        columns = {
            "day": usage.c.created_at - usage.c.created_at % _DAY_S,
            "model": usage.c.model,
            "key_id": usage.c.key_id,
        }
        groups = {name: column for name, column in columns.items() if name in by}

        def count(status: str) -> sa.ColumnElement[int]:
            return sa.func.sum(sa.case((usage.c.status == status, 1), else_=0))

        statement = (
            sa.select(
                *(column.label(name) for name, column in groups.items()),
                sa.func.count().label("requests"),
                count(INTERRUPTED).label("interrupted"),
                count(ERROR).label("errors"),
                sa.func.sum(usage.c.prompt_tokens).label("prompt_tokens"),
                sa.func.sum(usage.c.completion_tokens).label("completion_tokens"),
                sa.func.sum(usage.c.cached_tokens).label("cached_tokens"),
            )
            .where(usage.c.project_id == project_id, usage.c.created_at >= since, usage.c.created_at < until)
            .group_by(*groups.values())
            .having(sa.func.count() > 0)
            .order_by(*(column.desc() if name == "day" else column for name, column in groups.items()))
            .offset(skip)
            .limit(limit)
        )
        return [
            msgspec.convert({name: row[name] if name in groups else int(row[name]) for name in row}, UsageSum)
            for row in self._connection.execute(statement).mappings()
        ]

    def interrupt(self, server: str) -> int:
        """End what a server that died left running; how many. Of all projects: for that server's next start only."""
        statement = sa.update(usage).where(usage.c.server == server, usage.c.status == RUNNING)
        return self._connection.execute(statement.values(status=INTERRUPTED)).rowcount

    def forget_before(self, then_s: int) -> int:
        """Drop rows made before then. Of all projects: for the ledger only."""
        return self._connection.execute(sa.delete(usage).where(usage.c.created_at < then_s)).rowcount
