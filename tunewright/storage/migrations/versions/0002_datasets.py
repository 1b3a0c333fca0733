"""Versions, statistics and images of datasets; uploads in parts; how many bad rows a job puts up with. Frozen."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ID = sa.String(80).with_variant(sa.String(80, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("files", sa.Column("statistics", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("files", sa.Column("parent_id", ID, nullable=True))
    op.add_column("files", sa.Column("version", sa.BigInteger(), nullable=False, server_default="1"))
    op.add_column("files", sa.Column("origin", sa.JSON(), nullable=False, server_default="{}"))
    op.create_index("files_by_parent", "files", ["project_id", "parent_id"], unique=False)
    op.create_index("files_by_status", "files", ["status", "project_id"], unique=False)
    op.add_column("jobs", sa.Column("tolerance", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("jobs", sa.Column("validation_split", sa.Float(53), nullable=True))
    op.create_table(
        "file_images",
        sa.Column("project_id", ID, nullable=False),
        sa.Column("file_id", ID, nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["project_id", "file_id"], ["files.project_id", "files.id"]),
        sa.PrimaryKeyConstraint("project_id", "file_id", "sha256"),
    )
    op.create_index("file_images_by_hash", "file_images", ["project_id", "sha256"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("project_id", ID, nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("file_id", ID, nullable=True),
        sa.Column("on_problems", sa.Text(), nullable=False),
        sa.Column("completed_with", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("project_id", "id"),
    )
    op.create_index("uploads_page", "uploads", ["project_id", "created_at", "id"], unique=False)
    op.create_index("uploads_by_expiry", "uploads", ["status", "expires_at"], unique=False)
    op.create_table(
        "upload_parts",
        sa.Column("project_id", ID, nullable=False),
        sa.Column("upload_id", ID, nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id", "upload_id"], ["uploads.project_id", "uploads.id"]),
        sa.PrimaryKeyConstraint("project_id", "upload_id", "id"),
    )
