"""Leases: which server runs a control loop."""

import sqlalchemy as sa

from tunewright.storage.tables import leases


class Leases:
    """One row for each lease that was ever taken; `token` never goes back."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def take(self, name: str, holder: str, *, now_ms: int, ttl_ms: int) -> int | None:
        """The fencing token (grows with each change of holder) if `holder` has or gets the lease, else None."""
        row = self._connection.execute(sa.select(leases).where(leases.c.name == name)).one_or_none()
        expires_ms = now_ms + ttl_ms
        if row is None:
            self._connection.execute(sa.insert(leases).values(name=name, holder=holder, token=1, expires_ms=expires_ms))
            return 1
        if row.holder != holder and row.expires_ms > now_ms:
            return None
        token = row.token if row.holder == holder else row.token + 1
        self._connection.execute(
            sa.update(leases).where(leases.c.name == name).values(holder=holder, token=token, expires_ms=expires_ms)
        )
        return token

    def release(self, name: str, holder: str) -> None:
        """No error if someone else holds it. The row stays, so that the token keeps growing."""
        self._connection.execute(
            sa.update(leases).where(leases.c.name == name, leases.c.holder == holder).values(holder="", expires_ms=0)
        )
