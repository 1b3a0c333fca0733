"""All tables. Column names are the field names of the records, one to one (a contract test compares).

Tenant tables lead their keys and indexes with `project_id`, in the order of the page that they serve, so that a list reads
its rows in order and stops. A change here needs a new file in `migrations/versions`.
"""

import sqlalchemy as sa

metadata = sa.MetaData()

ID = sa.String(80).with_variant(sa.String(80, collation="C"), "postgresql")
"""Compared byte by byte everywhere: ids sort by time."""
JSON = sa.JSON(none_as_null=True)

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("id", ID, primary_key=True),
    sa.Column("number", sa.String(10), nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", ID, primary_key=True),
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("secret_mac", sa.LargeBinary, nullable=False),
    sa.Column("secret_sealed", sa.LargeBinary),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Index("api_keys_page", "project_id", "created_at", "id"),
)

files = sa.Table(
    "files",
    metadata,
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("kind", sa.Text),
    sa.Column("rows", sa.BigInteger),
    sa.Column("report", JSON, nullable=False),
    sa.Column("statistics", JSON, nullable=False),
    sa.Column("parent_id", ID),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("origin", JSON, nullable=False),
    sa.Index("files_page", "project_id", "created_at", "id"),
    sa.Index("files_page_of_purpose", "project_id", "purpose", "created_at", "id"),
    sa.Index("files_by_parent", "project_id", "parent_id"),
    sa.Index("files_by_status", "status", "project_id"),
)

file_images = sa.Table(
    "file_images",
    metadata,
    sa.Column("project_id", ID, primary_key=True),
    sa.Column("file_id", ID, primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.ForeignKeyConstraint(["project_id", "file_id"], ["files.project_id", "files.id"]),
    sa.Index("file_images_by_hash", "project_id", "sha256"),
)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("mime_type", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
    sa.Column("file_id", ID),
    sa.Column("on_problems", sa.Text, nullable=False),
    sa.Column("completed_with", sa.String(64)),
    sa.Index("uploads_page", "project_id", "created_at", "id"),
    sa.Index("uploads_by_expiry", "status", "expires_at"),
)

upload_parts = sa.Table(
    "upload_parts",
    metadata,
    sa.Column("project_id", ID, primary_key=True),
    sa.Column("upload_id", ID, primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["project_id", "upload_id"], ["uploads.project_id", "uploads.id"]),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("base_code", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("tuned_model_id", sa.Text, nullable=False),
    sa.Column("tuned_model_name", sa.Text, nullable=False),
    sa.Column("training_file", sa.Text, nullable=False),
    sa.Column("validation_file", sa.Text),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("training_type", sa.Text, nullable=False),
    sa.Column("requested", JSON, nullable=False),
    sa.Column("hyperparameters", JSON, nullable=False),
    sa.Column("suffix", sa.Text),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("metadata", JSON),
    sa.Column("request_id", sa.Text),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("running_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("estimated_finish", sa.BigInteger),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("result_files", JSON, nullable=False),
    sa.Column("rows", JSON, nullable=False),
    sa.Column("tolerance", JSON, nullable=False),
    sa.Column("validation_split", sa.Float(53)),
    sa.Column("error", JSON),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("failures", sa.BigInteger, nullable=False),
    sa.Column("journal_offset", sa.BigInteger, nullable=False),
    sa.Column("total_steps", sa.BigInteger),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("rehearsal", JSON, nullable=False),
    sa.Column("choices", JSON, nullable=False),
    sa.Column("priority", sa.Text, nullable=False),
    sa.Column("interrupted", sa.Boolean, nullable=False),
    sa.Column("passes", sa.BigInteger, nullable=False),
    sa.Column("elapsed_s", sa.Float(53), nullable=False),
    sa.Column("resources", JSON, nullable=False),
    sa.Column("retry_of", ID),
    sa.Column("cloned_from", ID),
    sa.Column("deleted_at", sa.BigInteger),
    sa.Index("jobs_page", "project_id", "created_at", "id"),
    sa.Index("jobs_by_status", "status", "project_id"),
    sa.Index("jobs_by_end", "finished_at"),
    sa.Index(
        "jobs_by_request",
        "project_id",
        "request_id",
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    ),
)

job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("project_id", ID, primary_key=True),
    sa.Column("job_id", ID, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", ID, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("values", JSON, nullable=False, quote=True),
    sa.Column("data", JSON),
    sa.Column("step", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["project_id", "job_id"], ["jobs.project_id", "jobs.id"]),
    sa.Index("job_events_by_id", "project_id", "job_id", "id", unique=True),
    sa.Index(
        "job_events_metrics",
        "project_id",
        "job_id",
        "step",
        unique=True,
        sqlite_where=sa.text("type = 'metrics'"),
        postgresql_where=sa.text("type = 'metrics'"),
    ),
)

job_checkpoints = sa.Table(
    "job_checkpoints",
    metadata,
    sa.Column("project_id", ID, primary_key=True),
    sa.Column("job_id", ID, primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", ID, nullable=False),
    sa.Column("metrics", JSON, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["project_id", "job_id"], ["jobs.project_id", "jobs.id"]),
    sa.Index("job_checkpoints_by_id", "project_id", "job_id", "id", unique=True),
)

tuned_models = sa.Table(
    "tuned_models",
    metadata,
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("base_code", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("adapter_path", sa.Text),
    sa.Column("adapter_sha256", sa.Text),
    sa.Column("renderer_hash", sa.Text),
    sa.Column("checkpoint_step", sa.BigInteger),
    sa.Column("proof", JSON, nullable=False),
    sa.Column("deleted_at", sa.BigInteger),
    sa.Index("tuned_models_by_name", "project_id", "name", unique=True),
    sa.Index("tuned_models_page", "project_id", "status", "created_at", "id"),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("route", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("resource_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Index("idempotency_by_age", "created_at"),
)

channels = sa.Table(
    "channels",
    metadata,
    sa.Column("project_id", ID, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("url_sealed", sa.LargeBinary, nullable=False),
    sa.Column("shown_url", sa.Text, nullable=False),
    sa.Column("secrets_sealed", sa.LargeBinary),
    sa.Column("events", JSON, nullable=False),
    sa.Column("language", sa.Text, nullable=False),
    sa.Column("recipients", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("note", sa.Text),
    sa.Column("failing_since", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Index("channels_page", "project_id", "created_at", "id"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("project_id", ID, primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("channel_id", ID, nullable=False),
    sa.Column("event_id", ID, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("data", JSON, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("recipients", sa.BigInteger, nullable=False),
    sa.Column("metered", sa.Boolean, nullable=False),
    sa.Column("attempts", sa.BigInteger, nullable=False),
    sa.Column("attempted_at", sa.BigInteger),
    sa.Column("next_at", sa.BigInteger, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("http_status", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("delivered_at", sa.BigInteger),
    sa.ForeignKeyConstraint(["project_id", "channel_id"], ["channels.project_id", "channels.id"]),
    sa.Index("deliveries_page", "project_id", "channel_id", "created_at", "id"),
    sa.Index("deliveries_due", "status", "next_at"),
    sa.Index("deliveries_due_of_channel", "project_id", "channel_id", "status", "next_at", "id"),
    sa.Index("deliveries_metered", "project_id", "metered", "attempted_at"),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
)
