"""Work that nobody waits for: batches of requests in a file, and single requests whose answer is fetched later."""

from typing import Any

import msgspec

VALIDATING = "validating"
FAILED = "failed"
IN_PROGRESS = "in_progress"
FINALIZING = "finalizing"
COMPLETED = "completed"
EXPIRED = "expired"
CANCELLING = "cancelling"
CANCELLED = "cancelled"
UNFINISHED = (VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING)

INPUT_PURPOSE = "batch"
OUTPUT_PURPOSE = "batch_output"

PROCESSING = "PROCESSING"
SUCCESS = "SUCCESS"
FAIL = "FAIL"


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch could not begin. `line` counts from 1; None if it is about the file."""

    code: str
    message: str
    values: dict[str, Any] = {}
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one file. `total`, `completed` and `failed` count its lines.

    `delete_input`: the input file is still to be deleted, once the batch has run.
    """

    id: str
    project_id: str
    key_id: str
    dialect: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str = VALIDATING
    metadata: dict[str, str] | None = None
    delete_input: bool = False
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None


class AsyncTask(msgspec.Struct, frozen=True, kw_only=True):
    """One request whose answer is fetched later. `body` is its JSON; `answer` is there after SUCCESS, `error` after FAIL (the
    error object of the dialect)."""

    id: str
    project_id: str
    key_id: str
    dialect: str
    model: str
    request_id: str
    body: bytes
    status: str = PROCESSING
    answer: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    created_at: int
    ended_at: int | None = None
