"""Batches over HTTP, the same in both dialects."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr, WithJsonSchema

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.errors import missing
from tunewright.api.idempotency import IdempotencyOf
from tunewright.api.lists import After, Limit, clamped, page
from tunewright.api.services import BatchesOf
from tunewright.batches.records import Batch, BatchError
from tunewright.batches.service import NewBatch
from tunewright.i18n import translate

MOST_BATCHES = 100
_TIMES = (
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchBody(BaseModel):
    """Unknown keys are ignored. Clients that never heard of `auto_delete_input_file` keep their files."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: StrictStr | None = None
    endpoint: StrictStr | None = None
    completion_window: StrictStr | None = None
    metadata: Annotated[Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}})] = None
    auto_delete_input_file: StrictBool | None = None


class BatchRoutes:
    """The routes of one dialect."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect

    def router(self, prefix: str) -> APIRouter:
        """A router with all of them."""
        router = router_at(prefix)
        router.add_api_route("/batches", self.create, methods=["POST"])
        router.add_api_route("/batches", self.list_batches, methods=["GET"])
        router.add_api_route("/batches/{batch_id}", self.retrieve, methods=["GET"])
        router.add_api_route("/batches/{batch_id}/cancel", self.cancel, methods=["POST"])
        return router

    def create(
        self, request: Request, body: BatchBody, caller: CallerOf, batches: BatchesOf, idempotency: IdempotencyOf
    ) -> Json:
        """Have the requests of a file answered within a day, or find the batch that the same request made before."""
        if not body.input_file_id:
            raise missing("input_file_id")
        if not body.endpoint:
            raise missing("endpoint")
        wanted = NewBatch(
            dialect=self._dialect,
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            completion_window=body.completion_window,
            metadata=body.metadata,
            delete_input=bool(body.auto_delete_input_file),
        )
        return Json(_shown(request, batches.create(caller, wanted, idempotency)))

    def list_batches(
        self, request: Request, caller: CallerOf, batches: BatchesOf, after: After, limit: Limit = None
    ) -> Json:
        """Newest first."""
        found, more = batches.list(caller.project_id, after=after, limit=clamped(limit, 20, MOST_BATCHES))
        return Json(page(found, more, lambda batch: _shown(request, batch)))

    def retrieve(self, request: Request, batch_id: str, caller: CallerOf, batches: BatchesOf) -> Json:
        """One batch."""
        return Json(_shown(request, batches.get(caller.project_id, batch_id)))

    def cancel(self, request: Request, batch_id: str, caller: CallerOf, batches: BatchesOf) -> Json:
        """Begin no more of its requests; what was answered by then is kept."""
        return Json(_shown(request, batches.cancel(caller.project_id, batch_id)))


def _shown(request: Request, batch: Batch) -> dict[str, Any]:
    language = exchange_of(request.scope).language
    errors = {"object": "list", "data": [_error(error, language) for error in batch.errors]}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        **{name: getattr(batch, name) for name in _TIMES},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }


def _error(error: BatchError, language: str) -> dict[str, Any]:
    message = translate(error.message, language, **error.values)
    return {"code": error.code, "message": message, "line": error.line, "param": error.param}
