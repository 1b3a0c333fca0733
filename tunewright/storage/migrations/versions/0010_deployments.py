"""Private instances with their events; notifications about other things than jobs. Frozen."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

ID = sa.String(80).with_variant(sa.String(80, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "deployments",
        sa.Column("project_id", ID, nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("base_code", sa.Text(), nullable=False),
        sa.Column("tuned_model_id", sa.Text(), nullable=True),
        sa.Column("replicas", sa.BigInteger(), nullable=False),
        sa.Column("merge", sa.Boolean(), nullable=False),
        sa.Column("idle_minutes", sa.Float(53), nullable=True),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("asleep", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.JSON(), nullable=True),
        sa.Column("replica_records", sa.JSON(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("memory_source", sa.Text(), nullable=False),
        sa.Column("proof", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ready_at", sa.BigInteger(), nullable=True),
        sa.Column("retired_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("project_id", "id"),
    )
    op.create_index("deployments_page", "deployments", ["project_id", "phase", "created_at", "id"], unique=False)
    op.create_index("deployments_by_name", "deployments", ["project_id", "name", "created_at", "id"], unique=False)
    op.create_index("deployments_by_model", "deployments", ["project_id", "model", "created_at", "id"], unique=False)
    op.create_index("deployments_live", "deployments", ["phase", "created_at", "id"], unique=False)
    op.create_table(
        "deployment_events",
        sa.Column("project_id", ID, nullable=False),
        sa.Column("deployment_id", ID, nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("values", sa.JSON(), nullable=False, quote=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id", "deployment_id"], ["deployments.project_id", "deployments.id"]),
        sa.PrimaryKeyConstraint("project_id", "deployment_id", "sequence"),
    )
    op.create_index("deployment_events_by_id", "deployment_events", ["project_id", "deployment_id", "id"], unique=True)
    op.execute("ALTER TABLE deliveries RENAME COLUMN job_id TO subject_id")
