"""Jobs in the Zhipu dialect: its words for states; the tuned model's name is there from the start."""

from tunewright.api.fine_tuning import JobRoutes
from tunewright.api.zhipu.errors import PREFIX
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
    VALIDATING: "created",
    QUEUED: "pending",
    RUNNING: "running",
    CANCELLING: "running",
    PAUSED: "pending",
    SUCCEEDED: "succeeded",
    FAILED: "failed",
    CANCELLED: "cancelled",
}


def name_shown(job: Job) -> str:
    """The name that `model` takes once the job has succeeded."""
    return job.tuned_model_name


router = JobRoutes(STATUS_WORDS, name_shown).router(PREFIX)
