"""Alembic's entry point; `storage/schema.py` hands it an open connection, and nothing else runs it."""

from alembic import context

from tunewright.storage.tables import metadata

# SQLite can roll back changes of tables, though Alembic does not assume so.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
