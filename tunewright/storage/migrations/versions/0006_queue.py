"""What the order of the queue depends on. Frozen."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("priority", sa.Text(), nullable=False, server_default="normal"))
    op.add_column("jobs", sa.Column("interrupted", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("passes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("elapsed_s", sa.Float(53), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("resources", sa.JSON(), nullable=False, server_default="{}"))
    op.create_index("jobs_by_end", "jobs", ["finished_at"], unique=False)
