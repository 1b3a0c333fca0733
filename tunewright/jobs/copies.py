"""The request that would make a job once more, as it was or with changes. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from tunewright.errors import Conflict, InvalidRequest
from tunewright.i18n import mark
from tunewright.jobs.creation import DPO, CreateJob, with_changes
from tunewright.jobs.hyperparameters import ONLY_DPO
from tunewright.jobs.records import TERMINAL, Job


def same_again(job: Job) -> CreateJob:
    """What `job` was asked for: the same files, seed and settings. What was left to 'auto' is so again."""
    return CreateJob(
        model=job.model,
        training_file=job.training_file,
        validation_file=job.validation_file,
        suffix=job.suffix,
        seed=job.seed,
        method=job.method,
        training_type=job.training_type,
        hyperparameters=job.requested,
        metadata=job.metadata,
        max_bad_rows=job.tolerance.get("max_bad_rows"),
        max_bad_ratio=job.tolerance.get("max_bad_ratio"),
        validation_split=job.validation_split,
        priority=job.priority,
        rehearsal=job.rehearsal.get("wanted"),
        receipts=job.options.get("receipts"),
        tensorboard=job.options.get("tensorboard"),
    )


def retry_of(job: Job, *, apply_suggestion: bool) -> CreateJob:
    """The request for a job that has ended, with the changes that its failure suggests if they are wanted.

    Raises Conflict(`job_not_finished`), InvalidRequest(`no_suggestion`).
    """
    if job.status not in TERMINAL:
        raise Conflict(
            "job_not_finished",
            mark("Job {job} is {status}; only a job that has ended can be tried again."),
            job=job.id,
            status=job.status,
        )
    if not apply_suggestion:
        return same_again(job)
    suggestion = None if job.error is None else job.error.suggestion
    if suggestion is None:
        raise InvalidRequest(
            "no_suggestion",
            mark("Nothing is suggested for job {job}; try again without apply_suggestion."),
            param="apply_suggestion",
            job=job.id,
        )
    return clone_of(job, suggestion.changes)


def clone_of(job: Job, changes: Mapping[str, Any]) -> CreateJob:
    """The request for a copy. `changes` are fields of CreateJob; hyperparameters are changed one by one, and None makes all
    of them 'auto'."""
    request = same_again(job)
    if changes.get("method", job.method) != DPO:
        kept = {name: value for name, value in job.requested.items() if name not in ONLY_DPO}
        request = msgspec.structs.replace(request, hyperparameters=kept)
    if isinstance(changes.get("hyperparameters", {}), Mapping):
        return with_changes(request, changes)
    return msgspec.structs.replace(request, **changes)  # None, or what the check of the request refuses
