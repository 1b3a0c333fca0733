"""Jobs in the OpenAI dialect: its words for states; the tuned model's name is null until the job succeeds."""

from tunewright.api.fine_tuning import JobRoutes
from tunewright.api.openai.errors import PREFIX
from tunewright.jobs.records import (
    CANCELLED,
    CANCELLING,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    VALIDATING,
    Job,
)

STATUS_WORDS = {
    VALIDATING: "validating_files",
    QUEUED: "queued",
    RUNNING: "running",
    CANCELLING: "running",
    PAUSED: "queued",
    SUCCEEDED: "succeeded",
    FAILED: "failed",
    CANCELLED: "cancelled",
}


def name_shown(job: Job) -> str | None:
    """The name only when a call with it can work."""
    return job.tuned_model_name if job.status == SUCCEEDED else None


router = JobRoutes(STATUS_WORDS, name_shown).router(PREFIX)
