"""Which job a job was copied from, and what its trainer chose. Frozen."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

ID = sa.String(80).with_variant(sa.String(80, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("choices", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("jobs", sa.Column("retry_of", ID, nullable=True))
    op.add_column("jobs", sa.Column("cloned_from", ID, nullable=True))
