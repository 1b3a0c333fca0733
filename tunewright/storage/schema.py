"""Bringing a database to this release's tables."""

from pathlib import Path

import sqlalchemy as sa

from tunewright.errors import Misconfigured
from tunewright.i18n import mark
from tunewright.storage.tables import metadata

HISTORY = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010")
"""Revisions in `migrations/versions`, oldest first (a test compares). Known without importing Alembic, which takes longer
than the rest of the start together."""


def at_head(connection: sa.Connection) -> bool:
    """Whether nothing is to be done. Raises Misconfigured if the database is from a later release or another program."""
    tables = set(sa.inspect(connection).get_table_names())
    if "alembic_version" not in tables:
        if tables & set(metadata.tables):
            raise _foreign()
        return False
    revision = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    if revision is not None and revision not in HISTORY:
        raise Misconfigured(
            "database_newer",
            mark(
                "The database was written by a later release (schema {found}, this release knows up to {known}); update"
            ),
            found=revision,
            known=HISTORY[-1],
        )
    return revision == HISTORY[-1]


def upgrade(connection: sa.Connection) -> None:
    """Run the missing migrations inside the caller's transaction: all or none."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _foreign() -> Misconfigured:
    return Misconfigured(
        "database_foreign", mark("The database holds tables of another program; name one that is empty or ours")
    )
