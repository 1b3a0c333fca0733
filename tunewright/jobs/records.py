"""A fine-tuning job, its events and its checkpoints, and the one table of legal moves."""

from typing import Any, NamedTuple

import msgspec

VALIDATING = "validating"
QUEUED = "queued"
RUNNING = "running"
CANCELLING = "cancelling"
PAUSED = "paused"
SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELLED = "cancelled"

TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
# A job that may have a process is cancelled by way of `cancelling`: queued or paused that of a trainer, validating that of
# the dress rehearsal.
MOVES: dict[str, frozenset[str]] = {
    VALIDATING: frozenset({QUEUED, FAILED, CANCELLING, CANCELLED}),
    QUEUED: frozenset({RUNNING, CANCELLING, CANCELLED, FAILED, PAUSED}),
    RUNNING: frozenset({SUCCEEDED, FAILED, CANCELLING, QUEUED, PAUSED}),
    CANCELLING: frozenset({CANCELLED, SUCCEEDED}),
    PAUSED: frozenset({QUEUED, CANCELLING, CANCELLED}),
    SUCCEEDED: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
}


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """What to try next. `message` is an English template for `values`.

    `changes` are fields of a create request (`jobs.creation.CreateJob`) that take the place of the job's own; of
    `hyperparameters` only those that are named, and None takes a field back. Empty: the same request may be sent again.
    """

    message: str
    values: dict[str, Any] = {}
    changes: dict[str, Any] = {}


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed: data, not an exception. `message` and `cause` are English templates, `values` fill both.

    `message` says what happened, `cause` why (`jobs.diagnosis`). `evidence` are lines of the trainer's log and of what the
    machine says, without secrets and without texts of rows: for the owner of the job.
    """

    code: str
    message: str
    param: str | None = None
    values: dict[str, Any] = {}
    cause: str = ""
    evidence: str = ""
    suggestion: Suggestion | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the jobs table; only `jobs/service.py` and `jobs/controller.py` ask for changes.

    `requested` is what the caller asked for (numbers or "auto"), `hyperparameters` what it resolved to.
    `attempt` grows by one with each trainer that is started: the fencing token of everything a trainer writes.
    `journal_offset` is how many bytes of the current attempt's journal are in the database.
    """

    id: str
    project_id: str
    base_code: str
    model: str
    """The `model` of the request, echoed: a base's code or alias, or a tuned model to continue from."""
    tuned_model_id: str
    tuned_model_name: str
    training_file: str
    validation_file: str | None = None
    status: str = VALIDATING
    method: str = "supervised"
    training_type: str = "lora"
    requested: dict[str, Any] = {}
    hyperparameters: dict[str, Any] = {}
    suffix: str | None = None
    seed: int = 0
    metadata: dict[str, str] | None = None
    request_id: str | None = None
    created_at: int
    running_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    result_files: tuple[str, ...] = ()
    tolerance: dict[str, Any] = {}
    """`max_bad_rows` and `max_bad_ratio`, if the caller named them."""
    validation_split: float | None = None
    """The part of the training rows that is kept out of training to measure the validation loss with."""
    rows: dict[str, int] = {}
    """`used`, `skipped`, `cut`: what happened to every row."""
    error: JobError | None = None
    attempt: int = 0
    failures: int = 0
    """Trainer deaths since the last checkpoint; reset by progress."""
    journal_offset: int = 0
    total_steps: int | None = None
    step: int = 0
    checkpoint_step: int | None = None
    """The step whose weights were published."""
    options: dict[str, Any] = {}
    """What else the caller chose: `receipts`, `tensorboard`."""
    receipts: dict[str, Any] = {}
    """What became of the rows: the file of their receipts and counts of its flags. Empty if there are none."""
    rehearsal: dict[str, Any] = {}
    """What became of the dress rehearsal (`jobs/rehearsals.py`): `status` and what was measured. Empty before it is decided."""
    choices: dict[str, Any] = {}
    """What the newest trainer chose at its start and why: dtype, threads ..."""
    priority: str = "normal"
    """low, normal or high: its place among the waiting jobs of its project (`scheduling.py`)."""
    interrupted: bool = False
    """In the queue because its trainer ended without its owner's wish: it goes on before others start."""
    passes: int = 0
    """How many jobs behind it have started while memory was too small for it."""
    elapsed_s: float = 0.0
    """Seconds that it has trained."""
    resources: dict[str, Any] = {}
    """What its trainer takes (`needs.py`); empty before it is in the queue."""
    retry_of: str | None = None
    """The job that this one repeats with the same settings, or with those that its failure suggested."""
    cloned_from: str | None = None
    """The job that this one was copied from, with changes."""
    deleted_at: int | None = None


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's history. `type` is `message` or `metrics`; `message` is an English template for `values`.

    `step` is set on metrics only; (job, step) is unique there, so a resumed trainer repeats nothing.
    `sequence` grows within one job and is the order of the list.
    """

    id: str
    job_id: str
    project_id: str
    sequence: int = 0
    type: str
    level: str = "info"
    code: str = "message"
    message: str
    values: dict[str, Any] = {}
    data: dict[str, Any] | None = None
    step: int | None = None
    created_at: int


class JobCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A verified checkpoint that a user may see. `path` is relative to the job's work folder."""

    id: str
    job_id: str
    project_id: str
    step: int
    metrics: dict[str, Any]
    path: str
    adapter_sha256: str | None = None
    """Of the weights of its adapter, which lies with the model; None for a whole model, which stays in the work folder."""
    renderer_hash: str | None = None
    proof: dict[str, Any] = {}
    """What the engine measured when it was first called."""
    created_at: int

    @property
    def validation_loss(self) -> float | None:
        """None where it was not measured at this step."""
        return self.metrics.get("full_valid_loss")


class CheckpointPage(NamedTuple):
    """Newest first. `last_step` and `best_step` (with the lowest validation loss; None without any) are of all of the job's."""

    checkpoints: list[JobCheckpoint]
    has_more: bool
    last_step: int | None
    best_step: int | None
