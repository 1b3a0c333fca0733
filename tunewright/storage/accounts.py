"""Queries on projects, API keys and idempotency keys."""

import builtins

import sqlalchemy as sa

from tunewright.accounts.records import ApiKey, Project
from tunewright.storage.rows import every, one, to_row
from tunewright.storage.tables import api_keys, idempotency, projects


class Projects:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, project: Project) -> None:
        self._connection.execute(sa.insert(projects).values(to_row(project)))

    def get(self, project_id: str) -> Project | None:
        return one(self._connection, sa.select(projects).where(projects.c.id == project_id), Project)

    def all(self) -> list[Project]:
        """Oldest first (operator's command line)."""
        return every(self._connection, sa.select(projects).order_by(projects.c.created_at, projects.c.id), Project)


class Keys:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, key: ApiKey) -> None:
        self._connection.execute(sa.insert(api_keys).values(to_row(key)))

    def find(self, key_id: str) -> ApiKey | None:
        """By id alone: only the authentication gate, which does not know the project yet, may ask this."""
        return one(self._connection, sa.select(api_keys).where(api_keys.c.id == key_id), ApiKey)

    def list(self, project_id: str) -> builtins.list[ApiKey]:
        """All keys of a project, revoked ones too, oldest first."""
        statement = sa.select(api_keys).where(api_keys.c.project_id == project_id)
        return every(self._connection, statement.order_by(api_keys.c.created_at, api_keys.c.id), ApiKey)

    def revoke(self, project_id: str, key_id: str, at: int) -> bool:
        """False if there is no such live key."""
        statement = (
            sa.update(api_keys)
            .where(api_keys.c.project_id == project_id, api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=at)
        )
        return self._connection.execute(statement).rowcount == 1


class Idempotency:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def find(self, project_id: str, route: str, key: str, *, since: int) -> tuple[str, str] | None:
        """(fingerprint, resource id) of an earlier create with this key made at or after Unix second `since`."""
        row = self._connection.execute(
            sa.select(idempotency.c.fingerprint, idempotency.c.resource_id).where(
                *_is_key(project_id, route, key), idempotency.c.created_at >= since
            )
        ).one_or_none()
        return None if row is None else (row.fingerprint, row.resource_id)

    def insert(self, project_id: str, route: str, key: str, fingerprint: str, resource_id: str, at: int) -> None:
        """Remember, in place of an earlier row with the same key."""
        self._connection.execute(sa.delete(idempotency).where(*_is_key(project_id, route, key)))
        self._connection.execute(
            sa.insert(idempotency).values(
                project_id=project_id,
                route=route,
                key=key,
                fingerprint=fingerprint,
                resource_id=resource_id,
                created_at=at,
            )
        )

    def forget_before(self, at: int) -> int:
        """Drop rows older than `at` of all projects (control loop); returns how many."""
        return self._connection.execute(sa.delete(idempotency).where(idempotency.c.created_at < at)).rowcount


def _is_key(project_id: str, route: str, key: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (idempotency.c.project_id == project_id, idempotency.c.route == route, idempotency.c.key == key)
