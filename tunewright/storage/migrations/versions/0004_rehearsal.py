"""What the dress rehearsal of a job measured. Frozen."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("rehearsal", sa.JSON(), nullable=False, server_default="{}"))
