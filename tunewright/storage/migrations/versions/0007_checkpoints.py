"""Checkpoints are models that can be called; what became of the rows of a job. Frozen."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("job_checkpoints", sa.Column("adapter_sha256", sa.Text(), nullable=True))
    op.add_column("job_checkpoints", sa.Column("renderer_hash", sa.Text(), nullable=True))
    op.add_column("job_checkpoints", sa.Column("proof", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("jobs", sa.Column("checkpoint_step", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("options", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("jobs", sa.Column("receipts", sa.JSON(), nullable=False, server_default="{}"))
