"""The database: one `Storage` per process, one `Transaction` per unit of work.

    with storage.write() as tx:      # alone among all writers; commits at the end, rolls back on any exception
        tx.jobs.insert(job)
        tx.models.insert(model)
    with storage.read() as tx:
        tx.jobs.get(project_id, job_id)

Every method on tenant rows takes the project's id first and puts it into its WHERE clause; the few that serve control loops
instead of callers say so. All methods block: call them from a thread, never from the event loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy import exc

from tunewright.clock import wall_ms
from tunewright.errors import Misconfigured, TunewrightError
from tunewright.i18n import mark
from tunewright.storage import schema
from tunewright.storage.accounts import Idempotency, Keys, Projects
from tunewright.storage.batches import AsyncTasks, Batches
from tunewright.storage.datasets import Files
from tunewright.storage.deployments import Deployments
from tunewright.storage.failures import database_unavailable, driver_errors_translated
from tunewright.storage.images import FileImages
from tunewright.storage.jobs import Jobs
from tunewright.storage.leases import Leases
from tunewright.storage.models import Models
from tunewright.storage.notifications import Channels, Deliveries
from tunewright.storage.postgres import PostgresConnections
from tunewright.storage.sqlite import SqliteConnections
from tunewright.storage.uploads import Uploads
from tunewright.storage.usage import Usage


class Storage:
    """Owns the connection pool. `url` is a SQLAlchemy URL (`sqlite:////path` or `postgresql+psycopg://...`).

    Opening connects to nothing yet. Raises Misconfigured for a URL that can't work.
    """

    def __init__(self, url: str) -> None:
        self._connections = _connections(url)

    def migrate(self) -> None:
        """Bring the schema to this release's head (Alembic). Raises Misconfigured for a newer or corrupt database."""
        with driver_errors_translated():
            with self._connections.reading() as connection:
                if schema.at_head(connection):
                    self._connections.check()
                    return
            with self._connections.writing() as connection:
                if not schema.at_head(connection):  # another process may have been first
                    schema.upgrade(connection)

    @contextmanager
    def read(self) -> Iterator["Transaction"]:
        """A consistent view; writes inside it are an error. Raises Unavailable(`database_busy`) after 5 s of lock."""
        with driver_errors_translated(), self._connections.reading() as connection:
            yield Transaction(connection)

    @contextmanager
    def write(self) -> Iterator["Transaction"]:
        """One atomic unit, durable when the block has ended. Writes follow one another, so what is read inside stays true.
        Never nest two. Raises Unavailable(`database_busy`) after 5 s of lock, StorageFull."""
        with driver_errors_translated(), self._connections.writing() as connection:
            yield Transaction(connection)

    def probe(self) -> None:
        """One small read and write, for readiness. Raises Unavailable, StorageFull or Misconfigured."""
        try:
            with self.write() as tx:
                tx.leases.take("probe", "probe", now_ms=wall_ms(), ttl_ms=1)
        except TunewrightError:
            raise
        except exc.SQLAlchemyError as error:
            raise database_unavailable() from error

    def close(self) -> None:
        """Release all connections."""
        self._connections.close()


class Transaction:
    """All queries, by stage."""

    def __init__(self, connection: sa.Connection) -> None:
        self.projects = Projects(connection)
        self.keys = Keys(connection)
        self.files = Files(connection)
        self.images = FileImages(connection)
        self.uploads = Uploads(connection)
        self.jobs = Jobs(connection)
        self.models = Models(connection)
        self.deployments = Deployments(connection)
        self.channels = Channels(connection)
        self.deliveries = Deliveries(connection)
        self.idempotency = Idempotency(connection)
        self.usage = Usage(connection)
        self.batches = Batches(connection)
        self.async_tasks = AsyncTasks(connection)
        self.leases = Leases(connection)


def _connections(text: str) -> SqliteConnections | PostgresConnections:
    try:
        url = sa.make_url(text)
    except (exc.ArgumentError, ValueError):
        raise _bad_url() from None  # its text may hold the password
    if url.get_backend_name() == "sqlite":
        return SqliteConnections(url)
    if url.get_backend_name() == "postgresql":
        return PostgresConnections(url.set(drivername="postgresql+psycopg"))
    raise _bad_url()


def _bad_url() -> Misconfigured:
    return Misconfigured(
        "database_url_invalid",
        mark("The database URL must look like sqlite:////absolute/path or postgresql://user@host/name"),
    )
