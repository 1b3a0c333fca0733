"""The database: one `Storage` per process, one `Transaction` per unit of work.

    with storage.write() as tx:      # BEGIN IMMEDIATE on SQLite; commits at the end, rolls back on any exception
        tx.jobs.insert(job)
        tx.models.insert(model)
    with storage.read() as tx:
        tx.jobs.get(project_id, job_id)

Every method on tenant rows takes the project's id first and puts it into its WHERE clause; the few that serve control loops
instead of callers say so. All methods block: call them from a thread, never from the event loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tunewright.accounts.records import ApiKey, Project
from tunewright.datasets.records import File
from tunewright.jobs.records import Job, JobCheckpoint, JobEvent
from tunewright.models.records import TunedModel


class Storage:
    """Owns the connection pool. `url` is a SQLAlchemy URL (`sqlite:////path` or `postgresql+psycopg://...`)."""

    def __init__(self, url: str) -> None:
        raise NotImplementedError

    def migrate(self) -> None:
        """Bring the schema to this release's head (Alembic). Raises Misconfigured for a newer or corrupt database."""
        raise NotImplementedError

    @contextmanager
    def read(self) -> Iterator["Transaction"]:
        """A consistent view; writes inside it are an error. Raises Unavailable(`database_busy`) after 5 s of lock."""
        raise NotImplementedError
        yield

    @contextmanager
    def write(self) -> Iterator["Transaction"]:
        """One atomic unit. Raises Unavailable(`database_busy`) after 5 s of lock."""
        raise NotImplementedError
        yield

    def probe(self) -> None:
        """One small read and write, for readiness. Raises Unavailable."""
        raise NotImplementedError

    def close(self) -> None:
        """Release all connections."""
        raise NotImplementedError


class Transaction:
    """All queries, by stage."""

    projects: "Projects"
    keys: "Keys"
    files: "Files"
    jobs: "Jobs"
    models: "Models"
    idempotency: "Idempotency"
    leases: "Leases"


class Projects:
    def insert(self, project: Project) -> None: ...
    def get(self, project_id: str) -> Project | None: ...
    def all(self) -> list[Project]:
        """Oldest first (operator's command line)."""
        ...


class Keys:
    def insert(self, key: ApiKey) -> None: ...
    def find(self, key_id: str) -> ApiKey | None:
        """By id alone: only the authentication gate, which does not know the project yet, may ask this."""
        ...

    def list(self, project_id: str) -> list[ApiKey]: ...
    def revoke(self, project_id: str, key_id: str, at: int) -> bool:
        """False if there is no such live key."""
        ...


class Files:
    def insert(self, file: File) -> None: ...
    def get(self, project_id: str, file_id: str) -> File | None: ...
    def list(
        self, project_id: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool = False
    ) -> list[File]:
        """Keyset page ordered by (created_at, id); `after` is exclusive and works for ids whose row is gone
        (ids sort by time). Descending unless `ascending`."""
        ...

    def delete(self, project_id: str, file_id: str) -> bool: ...


class Jobs:
    def insert(self, job: Job) -> None: ...
    def get(self, project_id: str, job_id: str) -> Job | None:
        """None also for deleted jobs."""
        ...

    def list(
        self, project_id: str, *, after: str | None, limit: int, metadata: dict[str, str] | None = None
    ) -> list[Job]:
        """Newest first, keyset page, deleted ones left out; `metadata` keeps jobs that hold all those pairs."""
        ...

    def find_by_request_id(self, project_id: str, request_id: str) -> Job | None: ...
    def count(self, project_id: str, statuses: frozenset[str]) -> int: ...
    def using_file(self, project_id: str, file_id: str) -> list[str]:
        """Ids of unfinished jobs that train or validate on this file."""
        ...

    def unfinished(self) -> list[Job]:
        """Of all projects, oldest first: for the control loop only."""
        ...

    def change(self, job: Job, **changes: object) -> Job | None:
        """Compare-and-set: applies `changes` if the stored row still has `job`'s status and attempt, else returns None.
        A change of status must be legal (`records.MOVES`; otherwise ValueError)."""
        ...

    def add_events(self, events: list[JobEvent]) -> None:
        """Append in order, numbering `sequence` on from the job's last; a second metrics event for one (job, step) is
        dropped in silence (a resumed trainer repeats steps)."""
        ...

    def list_events(self, project_id: str, job_id: str, *, after: str | None, limit: int) -> list[JobEvent]:
        """Newest first; `after` is an event id, exclusive (continues towards older ones)."""
        ...

    def events_since(self, project_id: str, job_id: str, *, after_id: str | None, limit: int) -> list[JobEvent]:
        """Oldest first, those younger than the event `after_id` (all if None or unknown)."""
        ...

    def add_checkpoint(self, checkpoint: JobCheckpoint) -> None:
        """Insert; a second one for the same (job, step) is dropped in silence."""
        ...

    def list_checkpoints(self, project_id: str, job_id: str, *, after: str | None, limit: int) -> list[JobCheckpoint]:
        """Newest first, keyset page."""
        ...


class Models:
    def insert(self, model: TunedModel) -> None: ...
    def find(self, project_id: str, name: str) -> TunedModel | None:
        """By the name that callers use; deleted ones are found too (their status says so)."""
        ...

    def get(self, project_id: str, model_id: str) -> TunedModel | None: ...
    def list(self, project_id: str) -> list[TunedModel]:
        """Those with status `ready`, newest first."""
        ...

    def change(self, model: TunedModel, **changes: object) -> TunedModel | None:
        """Compare-and-set on the stored status being `model.status`; None if it is not."""
        ...


class Idempotency:
    def find(self, project_id: str, route: str, key: str, *, since: int) -> tuple[str, str] | None:
        """(fingerprint, resource id) of an earlier create with this key made at or after Unix second `since`."""
        ...

    def insert(self, project_id: str, route: str, key: str, fingerprint: str, resource_id: str, at: int) -> None:
        """Remember (replacing an expired row with the same key)."""
        ...

    def forget_before(self, at: int) -> int: ...


class Leases:
    def take(self, name: str, holder: str, *, now_ms: int, ttl_ms: int) -> int | None:
        """The fencing token (grows with each change of holder) if `holder` has or gets the lease, else None."""
        ...

    def release(self, name: str, holder: str) -> None: ...
