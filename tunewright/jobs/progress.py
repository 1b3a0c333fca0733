"""Turns a trainer's records into rows: events, checkpoints and the job's own fields, all in the caller's transaction."""

from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.clock import wall_s
from tunewright.i18n import mark
from tunewright.jobs import events
from tunewright.jobs.journal_reader import Batch
from tunewright.jobs.records import Job, JobCheckpoint, JobEvent
from tunewright.jobs.spec import Checkpoint, Metrics, Note, Started
from tunewright.models.checkpoint_names import checkpoint_name

if TYPE_CHECKING:
    from tunewright.storage import Transaction


def store(tx: "Transaction", job: Job, batch: Batch, checkpoints: list[Checkpoint]) -> Job | None:
    """`job` after `batch`, or None if its state or attempt changed meanwhile: then nothing was stored. `checkpoints` are those
    of its checkpoints that are there.

    Events and the journal offset go in together, so every record counts exactly once whatever dies when.
    """
    changes = _changes(job, batch)
    told = [record.step for record in batch.records if isinstance(record, Checkpoint)]
    if told and max(told) > last_checkpoint_step(tx, job):
        changes["failures"] = 0  # real progress: not a crash loop
    changed = tx.jobs.change(job, **changes)
    if changed is None:
        return None
    tx.jobs.add_events(_events(changed, batch))
    for record in checkpoints:
        tx.jobs.add_checkpoint(events.checkpoint(job, record))
    kept = kept_steps(batch)
    if kept is not None:
        _forget_others(tx, job, kept)
    return changed


def kept_steps(batch: Batch) -> set[int] | None:
    """The steps whose checkpoints the trainer had after the last of these records; None if it does not say."""
    kept = [record.kept for record in batch.records if isinstance(record, Checkpoint)]
    return set(kept[-1]) if kept and kept[-1] is not None else None


def _forget_others(tx: "Transaction", job: Job, kept: set[int]) -> None:
    """Checkpoints that had their day go, but for those that a waiting job continues from."""
    there = tx.jobs.list_checkpoints(job.project_id, job.id, after=None, limit=1000)
    gone = {row.step for row in there} - kept
    if gone:
        in_use = set(tx.jobs.models_in_use(job.project_id))
        gone = {step for step in gone if checkpoint_name(job.tuned_model_name, step) not in in_use}
        tx.jobs.drop_checkpoints(job.project_id, job.id, sorted(gone))


def last_checkpoint_step(tx: "Transaction", job: Job) -> int:
    """0 if there is none."""
    found: list[JobCheckpoint] = tx.jobs.list_checkpoints(job.project_id, job.id, after=None, limit=1)
    return found[0].step if found else 0


def tokens_so_far(tx: "Transaction", job: Job) -> int | None:
    """Tokens trained on when the newest metrics were written, None if there are none."""
    for event in tx.jobs.list_events(job.project_id, job.id, after=None, limit=100):
        if event.type == "metrics" and event.data is not None:
            return event.data.get("trained_tokens")
    return None


def all_events(tx: "Transaction", job: Job) -> list[JobEvent]:
    """Oldest first."""
    found: list[JobEvent] = []
    while True:
        page = tx.jobs.events_since(job.project_id, job.id, after_id=found[-1].id if found else None, limit=1000)
        found += page
        if len(page) < 1000:
            return found


def _changes(job: Job, batch: Batch) -> dict[str, Any]:
    changes: dict[str, Any] = {"journal_offset": batch.offset}
    step = job.step
    for record in batch.records:
        if isinstance(record, Started):
            changes["total_steps"] = record.total_steps
            changes["rows"] = record.rows
            changes["choices"] = record.choices
        elif isinstance(record, Metrics):
            step = max(step, record.step)
            changes["total_steps"] = record.total_steps
            changes["elapsed_s"] = max(job.elapsed_s, events.finite(record.elapsed_s) or 0.0)
            remaining_s = events.finite(record.remaining_s)
            if remaining_s is not None:
                changes["estimated_finish"] = wall_s() + round(remaining_s)
    return changes | {"step": step}


def _events(job: Job, batch: Batch) -> list[JobEvent]:
    found: list[JobEvent] = []
    for record in batch.records:
        if isinstance(record, Started):
            found.append(_started(job, record))
        elif isinstance(record, Metrics):
            found.append(events.metrics(job, record))
        elif isinstance(record, Note):
            found.append(events.message(job, record.code, record.message, level=record.level, **_named(record)))
    if batch.damaged:
        text = mark("{count} lines of the trainer's journal could not be read")
        found.append(events.message(job, "journal_damaged", text, level="warn", count=batch.damaged))
    return found


def _started(job: Job, record: Started) -> JobEvent:
    values = msgspec.to_builtins(record)
    del values["type"]
    if record.resumed_step > 0:
        event = events.message(job, "resumed", mark("Resuming from step {step}"), step=record.resumed_step)
    else:
        event = events.message(
            job,
            "started",
            mark("Training started: {used} rows, {steps} steps"),
            used=record.rows.get("used", 0),
            steps=record.total_steps,
        )
    return msgspec.structs.replace(event, data=values)


def _named(record: Note) -> dict[str, Any]:
    """The values of a note, but for the one name that `message` uses itself."""
    return {name: value for name, value in record.values.items() if name != "level"}
