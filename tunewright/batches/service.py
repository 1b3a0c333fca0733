"""What callers may do with batches and with requests whose answer is fetched later."""

import builtins
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.accounts.idempotency import IdempotencyKey, find_earlier, remember
from tunewright.accounts.records import Caller
from tunewright.batches.ports import CHAT, ENDPOINTS, Speech
from tunewright.batches.records import (
    CANCELLED,
    CANCELLING,
    FINALIZING,
    IN_PROGRESS,
    INPUT_PURPOSE,
    VALIDATING,
    AsyncTask,
    Batch,
)
from tunewright.clock import wall_s
from tunewright.datasets.intake import not_found as file_not_found
from tunewright.errors import Conflict, IdempotencyMismatch, InvalidRequest, NotFound, RateLimited, TooLarge, quote
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.jobs.creation import check_metadata
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage, Transaction

WINDOW = "24h"
WINDOW_S = 24 * 3600
_ROUTE = "POST /batches"


class NewBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it is asked for."""

    dialect: str
    input_file_id: str
    endpoint: str
    completion_window: str | None = None
    metadata: Any = None
    delete_input: bool = False


class BatchService:
    """Every method blocks."""

    def __init__(self, storage: "Storage", settings: Settings) -> None:
        self._storage = storage
        self._settings = settings
        self.on_change: Callable[[], None] = lambda: None
        """Called when there is something to do for the loop."""

    def create(self, caller: Caller, wanted: NewBatch, idempotency: IdempotencyKey) -> Batch:
        """The new batch, or the one that an earlier try made. Its lines are checked later.

        Raises InvalidRequest, NotFound(`file_not_found`), TooLarge(`file_too_large`), RateLimited(`too_many_batches`),
        IdempotencyMismatch.
        """
        project_id = caller.project_id
        if wanted.endpoint not in ENDPOINTS:
            sentence = mark("{field} must be one of {expected}, not {value}.")
            raise _invalid("endpoint", sentence, expected=", ".join(ENDPOINTS), value=quote(wanted.endpoint))
        if wanted.completion_window not in (None, WINDOW):
            sentence = mark("{field} must be {window}; no other is offered.")
            raise _invalid("completion_window", sentence, window=WINDOW)
        metadata = check_metadata(wanted.metadata)
        now = wall_s()
        batch = Batch(
            id=new_id("batch"),
            project_id=project_id,
            key_id=caller.key_id,
            dialect=wanted.dialect,
            endpoint=wanted.endpoint,
            input_file_id=wanted.input_file_id,
            completion_window=WINDOW,
            metadata=metadata,
            delete_input=wanted.delete_input,
            created_at=now,
            expires_at=now + WINDOW_S,
        )
        with self._storage.write() as tx:
            earlier = find_earlier(tx, project_id, _ROUTE, idempotency)
            if earlier is not None:
                return _found(tx.batches.get(project_id, earlier), earlier)
            self._check_file(tx, project_id, wanted.input_file_id)
            self._check_room(tx, project_id)
            tx.batches.insert(batch)
            remember(tx, project_id, _ROUTE, idempotency, batch.id)
        self.on_change()
        return batch

    def get(self, project_id: str, batch_id: str) -> Batch:
        """One batch. Raises NotFound(`batch_not_found`)."""
        with self._storage.read() as tx:
            return _found(tx.batches.get(project_id, batch_id), batch_id)

    def list(self, project_id: str, *, after: str | None, limit: int) -> tuple[builtins.list[Batch], bool]:
        """A page, newest first, and whether more follow. Raises InvalidRequest(`invalid_cursor`)."""
        with self._storage.read() as tx:
            found = tx.batches.list(project_id, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def cancel(self, project_id: str, batch_id: str) -> Batch:
        """Begin no more of its requests; those under way are finished and what was answered is kept. A second time changes
        nothing. Raises NotFound(`batch_not_found`), Conflict(`invalid_state`) for one that has ended otherwise."""
        with self._storage.write() as tx:
            batch = _found(tx.batches.get(project_id, batch_id), batch_id)
            if batch.status in (VALIDATING, IN_PROGRESS):
                batch = tx.batches.change(batch, status=CANCELLING, cancelling_at=wall_s()) or batch
        if batch.status not in (CANCELLING, CANCELLED, FINALIZING):
            raise Conflict(
                "invalid_state",
                mark("The batch is {status}; it can't be cancelled any more."),
                param="batch_id",
                status=batch.status,
            )
        self.on_change()
        return batch

    def _check_file(self, tx: "Transaction", project_id: str, file_id: str) -> None:
        file = tx.files.get(project_id, file_id)
        if file is None:
            raise file_not_found(file_id, "input_file_id")
        if file.purpose != INPUT_PURPOSE or file.status != "processed":
            raise InvalidRequest(
                "wrong_purpose",
                mark('The file {file} was not uploaded with the purpose "batch", or has errors.'),
                param="input_file_id",
                file=file_id,
            )
        if file.size_bytes > self._settings.max_batch_bytes:
            raise TooLarge(
                "file_too_large",
                mark("The file is larger than {limit} bytes, the most that this server takes."),
                param="input_file_id",
                limit=self._settings.max_batch_bytes,
            )

    def _check_room(self, tx: "Transaction", project_id: str) -> None:
        limit = self._settings.max_open_batches
        if tx.batches.count_unfinished(project_id) >= limit:
            raise RateLimited(
                "too_many_batches",
                mark("{limit} batches of this project have not ended yet. Try again when one has."),
                retry_after_s=60,
                limit=limit,
            )


class AsyncTaskService:
    """Every method blocks."""

    def __init__(self, storage: "Storage", settings: Settings, speeches: dict[tuple[str, str], Speech]) -> None:
        self._storage = storage
        self._settings = settings
        self._speeches = speeches
        self.on_change: Callable[[], None] = lambda: None
        """Called when there is something to do for the loop."""

    def create(self, caller: Caller, dialect: str, body: dict[str, Any], request_id: str) -> AsyncTask:
        """The new task, or the one that an earlier request with this `request_id` made. The request is checked as if it were
        answered at once.

        Raises InvalidRequest, NotFound(`model_not_found`), RateLimited(`too_many_async_requests`),
        IdempotencyMismatch(`idempotency_key_reused`).
        """
        project_id, limit = caller.project_id, self._settings.max_async_requests
        task = AsyncTask(
            id=new_id("task"),
            project_id=project_id,
            key_id=caller.key_id,
            dialect=dialect,
            model=self._speeches[dialect, CHAT].check(caller, body, request_id),
            request_id=request_id,
            body=msgspec.json.encode(body),
            created_at=wall_s(),
        )
        with self._storage.write() as tx:
            earlier = tx.async_tasks.find_by_request_id(project_id, request_id)
            if earlier is not None and earlier.body == task.body:
                return earlier
            if earlier is not None:
                raise IdempotencyMismatch(
                    "idempotency_key_reused", mark("This request_id was used for another request"), param="request_id"
                )
            if tx.async_tasks.count_unfinished(project_id) >= limit:
                raise RateLimited(
                    "too_many_async_requests",
                    mark("{limit} requests of this project wait for an answer already."),
                    retry_after_s=5,
                    limit=limit,
                )
            tx.async_tasks.insert(task)
        self.on_change()
        return task

    def get(self, project_id: str, task_id: str) -> AsyncTask:
        """One task. Raises NotFound(`task_not_found`)."""
        with self._storage.read() as tx:
            task = tx.async_tasks.get(project_id, task_id)
        if task is None:
            raise NotFound("task_not_found", mark("There is no task {task}."), param="id", task=quote(task_id))
        return task


def _found(batch: Batch | None, batch_id: str) -> Batch:
    if batch is None:
        raise NotFound("batch_not_found", mark("There is no batch {batch}."), param="batch_id", batch=quote(batch_id))
    return batch


def _invalid(field: str, sentence: str, **values: Any) -> InvalidRequest:
    return InvalidRequest("invalid_value", sentence, param=field, field=field, **values)
