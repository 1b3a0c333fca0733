"""The objects that both dialects show, as supersets; what differs comes in as an argument."""

from collections.abc import Mapping
from typing import Any

from tunewright.datasets.presentation import status_sentence
from tunewright.datasets.records import File
from tunewright.i18n import translate
from tunewright.jobs import rehearsals
from tunewright.jobs.line import QueuePlace
from tunewright.jobs.records import CheckpointPage, Job, JobCheckpoint, JobEvent
from tunewright.jobs.spec import TENSORBOARD
from tunewright.models.checkpoint_names import checkpoint_name
from tunewright.models.service import Card

_PUBLIC_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


def file_object(file: File, language: str = "en") -> dict[str, Any]:
    """`samples` is the number of rows of a training file; `status_details` is a sentence in `language`, or None."""
    shown: dict[str, Any] = {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": status_sentence(file, language),
    }
    if file.rows is not None:
        shown["samples"] = file.rows
    if file.kind is not None:
        shown["kind"] = file.kind
    if file.report.get("text_stats"):
        shown["text_stats"] = file.report["text_stats"]
    return shown


def job_object(
    job: Job,
    words: Mapping[str, str],
    fine_tuned_model: str | None,
    language: str,
    place: QueuePlace | None = None,
) -> dict[str, Any]:
    """`words` are the dialect's names for our states; our own is in `state`. `place` is that of a queued job."""
    hyperparameters = _hyperparameters(job)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "request_id": job.request_id,
        "created_at": job.created_at,
        "running_at": job.running_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "model": job.model,
        "fine_tuned_model": fine_tuned_model,
        "status": words[job.status],
        "state": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "training_type": job.training_type,
        "hyperparameters": hyperparameters,
        "method": {"type": job.method, job.method: {"hyperparameters": hyperparameters}},
        "user_provided_suffix": job.suffix,
        "seed": job.seed,
        "metadata": job.metadata,
        "integrations": [],
        "organization_id": job.project_id,
        "trained_tokens": job.trained_tokens,
        "result_files": list(job.result_files),
        "checkpoint_step": job.checkpoint_step,
        "rows": job.rows or None,
        "max_bad_rows": job.tolerance.get("max_bad_rows"),
        "max_bad_ratio": job.tolerance.get("max_bad_ratio"),
        "validation_split": job.validation_split,
        "rehearsal": rehearsals.shown(job),
        "receipts": job.receipts or None,
        "tensorboard": f"jobs/{job.id}/{TENSORBOARD}" if job.options.get("tensorboard") else None,
        "progress": {"step": job.step, "total_steps": job.total_steps},
        "priority": job.priority,
        "queue": None if place is None else _queue_object(place, language),
        "retry_of": job.retry_of,
        "cloned_from": job.cloned_from,
        "error": _job_error(job, language),
    }


def _queue_object(place: QueuePlace, language: str) -> dict[str, Any]:
    return {
        "position": place.position,
        "ahead": place.position - 1,
        "estimated_start": place.estimated_start,
        "sources": place.sources,
        "waits_for": {"code": place.waits_for, "message": translate(place.message, language, **place.values)},
    }


def event_object(event: JobEvent, language: str) -> dict[str, Any]:
    """One line of a job's history, its sentence in `language`."""
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "type": event.type,
        "created_at": event.created_at,
        "level": event.level,
        "code": event.code,
        "message": translate(event.message, language, **event.values),
        "data": event.data,
    }


def checkpoint_object(checkpoint: JobCheckpoint, job: Job, page: CheckpointPage) -> dict[str, Any]:
    """A checkpoint of `job`; `page` is the one that it stands on."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint_name(job.tuned_model_name, checkpoint.step),
        "fine_tuning_job_id": job.id,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
        "best": checkpoint.step == page.best_step,
        "last": checkpoint.step == page.last_step,
        "proof": checkpoint.proof or None,
    }


def model_object(card: Card) -> dict[str, Any]:
    """A base or tuned model; `parent` is the base of a tuned one."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "parent": card.parent,
    }


def deleted_model(name: str, request_id: str) -> dict[str, Any]:
    """The answers of both dialects in one body."""
    return {
        "id": name,
        "object": "model",
        "deleted": True,
        "request_id": request_id,
        "model_name": name,
        "delete_status": "deleted",
    }


def _hyperparameters(job: Job) -> dict[str, Any]:
    """What was asked for, with the number in the place of each 'auto' once it is known."""
    shown: dict[str, Any] = dict.fromkeys(_PUBLIC_HYPERPARAMETERS, "auto") | job.requested
    if job.method == "dpo":
        shown.setdefault("beta", "auto")
    return {name: job.hyperparameters.get(name, value) for name, value in shown.items()}


def _job_error(job: Job, language: str) -> dict[str, Any] | None:
    if job.error is None:
        return None
    error = job.error
    shown: dict[str, Any] = {
        "code": error.code,
        "message": translate(error.message, language, **error.values),
        "param": error.param,
        "cause": translate(error.cause, language, **error.values) or None,
        "evidence": error.evidence or None,
        "suggestion": None,
    }
    if error.suggestion is not None:
        sentence = translate(error.suggestion.message, language, **error.suggestion.values)
        shown["suggestion"] = {"message": sentence, "changes": error.suggestion.changes}
    return shown
