"""Queries on jobs, their events and their checkpoints."""

import builtins
from itertools import groupby
from typing import Any

import msgspec
import sqlalchemy as sa

from tunewright.jobs.records import MOVES, TERMINAL, Job, JobCheckpoint, JobEvent
from tunewright.storage.paging import invalid_cursor, page
from tunewright.storage.rows import chunks, every, one, to_columns, to_row
from tunewright.storage.tables import job_checkpoints, job_events, jobs

_UNFINISHED = jobs.c.status.in_(sorted(set(MOVES) - TERMINAL))


class Jobs:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def insert(self, job: Job) -> None:
        self._connection.execute(sa.insert(jobs).values(to_row(job)))

    def get(self, project_id: str, job_id: str) -> Job | None:
        """None also for deleted jobs."""
        return self._one(jobs.c.project_id == project_id, jobs.c.id == job_id, jobs.c.deleted_at.is_(None))

    def list(
        self,
        project_id: str,
        *,
        after: str | None,
        limit: int,
        metadata: dict[str, str] | None = None,
        status: str | None = None,
        model: str | None = None,
    ) -> builtins.list[Job]:
        """Newest first, keyset page, deleted ones left out; `metadata` keeps jobs that hold all those pairs, `model` those
        of a base's code or that asked for exactly this name. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(jobs).where(jobs.c.project_id == project_id, jobs.c.deleted_at.is_(None))
        if status is not None:
            statement = statement.where(jobs.c.status == status)
        if model is not None:
            statement = statement.where(sa.or_(jobs.c.model == model, jobs.c.base_code == model))
        for key, value in (metadata or {}).items():
            statement = statement.where(self._has_metadata(key, value))
        return every(
            self._connection, page(self._connection, jobs, project_id, statement, after=after, limit=limit), Job
        )

    def find_by_request_id(self, project_id: str, request_id: str) -> Job | None:
        """Among those that are not deleted."""
        return self._one(jobs.c.project_id == project_id, jobs.c.request_id == request_id, jobs.c.deleted_at.is_(None))

    def count(self, project_id: str, statuses: frozenset[str]) -> int:
        """Jobs in any of these states."""
        statement = sa.select(sa.func.count()).where(
            jobs.c.project_id == project_id, jobs.c.status.in_(sorted(statuses))
        )
        return self._connection.execute(statement).scalar_one()

    def using_file(self, project_id: str, file_id: str) -> builtins.list[str]:
        """Ids of unfinished jobs that train or validate on this file."""
        statement = sa.select(jobs.c.id).where(
            jobs.c.project_id == project_id,
            _UNFINISHED,
            sa.or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id),
        )
        return builtins.list(self._connection.scalars(statement.order_by(jobs.c.id)))

    def unfinished(self) -> builtins.list[Job]:
        """Of all projects, oldest first: for the control loop only."""
        statement = sa.select(jobs).where(_UNFINISHED).order_by(jobs.c.created_at, jobs.c.id)
        return every(self._connection, statement, Job)

    def ended_since(self, since: int, limit: int) -> builtins.list[Job]:
        """Those that trained and ended after `since`, deleted ones too, newest end first. Of all projects: for the order of
        the queue and its forecast only."""
        statement = sa.select(jobs).where(jobs.c.finished_at > since, jobs.c.elapsed_s > 0)
        return every(self._connection, statement.order_by(jobs.c.finished_at.desc()).limit(limit), Job)

    def deleted(self, job_ids: builtins.list[str]) -> builtins.list[str]:
        """Those of the given ids that were deleted. Of all projects: for the sweep at start only."""
        found: builtins.list[str] = []
        for some in chunks(job_ids):
            found += self._connection.scalars(
                sa.select(jobs.c.id).where(jobs.c.id.in_(some), jobs.c.deleted_at.is_not(None))
            )
        return found

    def change(self, job: Job, **changes: object) -> Job | None:
        """Compare-and-set: applies `changes` if the stored row still has `job`'s status and attempt, else returns None.
        Returns the row as it is then (other fields may be newer than `job`'s).
        A change of status must be legal (`records.MOVES`; otherwise ValueError)."""
        wanted = msgspec.structs.replace(job, **changes)  # refuses names that are no fields
        if (wanted.id, wanted.project_id) != (job.id, job.project_id):
            raise ValueError("a job keeps its id and project")
        if wanted.status != job.status and wanted.status not in MOVES[job.status]:
            raise ValueError(f"a job can't move from {job.status} to {wanted.status}")
        own = (jobs.c.project_id == job.project_id, jobs.c.id == job.id)
        statement = (
            sa.update(jobs)
            .where(*own, jobs.c.status == job.status, jobs.c.attempt == job.attempt)
            .values(to_columns(changes) or {"status": job.status})
        )
        if self._connection.execute(statement).rowcount != 1:
            return None
        return self._one(*own)

    def add_events(self, events: builtins.list[JobEvent]) -> None:
        """Append in order, numbering `sequence` on from the job's last; a second metrics event for one (job, step) is
        dropped in silence (a resumed trainer repeats steps)."""
        by_job = sorted(events, key=lambda event: (event.project_id, event.job_id))  # stable: keeps each job's order
        for (project_id, job_id), group in groupby(by_job, key=lambda event: (event.project_id, event.job_id)):
            self._append(project_id, job_id, builtins.list(group))

    def list_events(self, project_id: str, job_id: str, *, after: str | None, limit: int) -> builtins.list[JobEvent]:
        """Newest first; `after` is an event id, exclusive (continues towards older ones).
        Raises InvalidRequest (`invalid_cursor`) for an id that is no event of this job."""
        statement = sa.select(job_events).where(*_of_job(job_events, project_id, job_id))
        if after is not None:
            place = self._place(job_events, "sequence", project_id, job_id, after)
            if place is None:
                raise invalid_cursor(after)
            statement = statement.where(job_events.c.sequence < place)
        return every(self._connection, statement.order_by(job_events.c.sequence.desc()).limit(limit), JobEvent)

    def events_since(
        self, project_id: str, job_id: str, *, after_id: str | None, limit: int
    ) -> builtins.list[JobEvent]:
        """Oldest first, those younger than the event `after_id` (all if None or unknown)."""
        place = None
        if after_id is not None:
            place = self._place(job_events, "sequence", project_id, job_id, after_id)
        statement = sa.select(job_events).where(
            *_of_job(job_events, project_id, job_id), job_events.c.sequence > (place or 0)
        )
        return every(self._connection, statement.order_by(job_events.c.sequence).limit(limit), JobEvent)

    def has_event(self, project_id: str, job_id: str, code: str) -> bool:
        """Whether an event of that code was ever added."""
        statement = sa.select(job_events.c.id).where(
            *_of_job(job_events, project_id, job_id), job_events.c.code == code
        )
        return self._connection.scalar(statement.limit(1)) is not None

    def add_checkpoint(self, checkpoint: JobCheckpoint) -> None:
        """Insert; a second one for the same (job, step) is dropped in silence."""
        known = self._connection.scalar(
            sa.select(job_checkpoints.c.id).where(
                *_of_job(job_checkpoints, checkpoint.project_id, checkpoint.job_id),
                job_checkpoints.c.step == checkpoint.step,
            )
        )
        if known is None:
            self._connection.execute(sa.insert(job_checkpoints).values(to_row(checkpoint)))

    def find_checkpoint(self, project_id: str, job_id: str, step: int) -> JobCheckpoint | None:
        statement = sa.select(job_checkpoints).where(
            *_of_job(job_checkpoints, project_id, job_id), job_checkpoints.c.step == step
        )
        return one(self._connection, statement, JobCheckpoint)

    def prove_checkpoint(self, project_id: str, job_id: str, step: int, proof: dict[str, Any]) -> None:
        """Keep the proof of a checkpoint's effect; nothing happens if it is gone."""
        statement = sa.update(job_checkpoints).where(
            *_of_job(job_checkpoints, project_id, job_id), job_checkpoints.c.step == step
        )
        self._connection.execute(statement.values(proof=proof))

    def drop_checkpoints(self, project_id: str, job_id: str, steps: builtins.list[int]) -> None:
        """Forget the checkpoints of these steps."""
        for some in chunks(steps):
            self._connection.execute(
                sa.delete(job_checkpoints).where(
                    *_of_job(job_checkpoints, project_id, job_id), job_checkpoints.c.step.in_(some)
                )
            )

    def models_in_use(self, project_id: str) -> builtins.list[str]:
        """The names of models that unfinished jobs start from."""
        statement = sa.select(jobs.c.model).where(jobs.c.project_id == project_id, _UNFINISHED)
        return builtins.list(self._connection.scalars(statement))

    def list_checkpoints(
        self, project_id: str, job_id: str, *, after: str | None, limit: int
    ) -> builtins.list[JobCheckpoint]:
        """Newest (highest step) first, keyset page. Raises InvalidRequest (`invalid_cursor`)."""
        statement = sa.select(job_checkpoints).where(*_of_job(job_checkpoints, project_id, job_id))
        if after is not None:
            place = self._place(job_checkpoints, "step", project_id, job_id, after)
            if place is None:
                raise invalid_cursor(after)
            statement = statement.where(job_checkpoints.c.step < place)
        return every(self._connection, statement.order_by(job_checkpoints.c.step.desc()).limit(limit), JobCheckpoint)

    def _append(self, project_id: str, job_id: str, events: builtins.list[JobEvent]) -> None:
        own = _of_job(job_events, project_id, job_id)
        last = self._connection.scalar(sa.select(sa.func.max(job_events.c.sequence)).where(*own)) or 0
        seen: set[int | None] = set()
        steps = [event.step for event in events if event.type == "metrics"]
        for some in chunks(steps):
            is_metrics = (job_events.c.type == "metrics", job_events.c.step.in_(some))
            seen |= set(self._connection.scalars(sa.select(job_events.c.step).where(*own, *is_metrics)))
        rows: builtins.list[dict[str, Any]] = []
        for event in events:
            if event.type == "metrics":
                if event.step in seen:
                    continue
                seen.add(event.step)
            rows.append(to_row(event) | {"sequence": last + len(rows) + 1})
        if rows:
            self._connection.execute(sa.insert(job_events), rows)

    def _place(self, table: sa.Table, column: str, project_id: str, job_id: str, row_id: str) -> int | None:
        statement = sa.select(table.c[column]).where(*_of_job(table, project_id, job_id), table.c.id == row_id)
        return self._connection.scalar(statement)

    def _has_metadata(self, key: str, value: str) -> sa.ColumnElement[bool]:
        unfold = sa.func.json_each if self._connection.dialect.name == "sqlite" else sa.func.json_each_text
        pair = unfold(jobs.c.metadata).table_valued("key", "value")
        return sa.exists(sa.select(sa.literal(1)).select_from(pair).where(pair.c.key == key, pair.c.value == value))

    def _one(self, *conditions: sa.ColumnElement[bool]) -> Job | None:
        return one(self._connection, sa.select(jobs).where(*conditions), Job)


def _of_job(table: sa.Table, project_id: str, job_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (table.c.project_id == project_id, table.c.job_id == job_id)
