"""Jobs with all that the product knows of them, their copies, and their events as they happen."""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import BaseModel, ConfigDict, WithJsonSchema, model_validator
from starlette.concurrency import run_in_threadpool

from tunewright import strict_json
from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import check_json_type, router_at
from tunewright.api.errors import invalid
from tunewright.api.fine_tuning import MOST_JOBS, CreateBody, JobRoutes, changed_fields, create_job
from tunewright.api.idempotency import IdempotencyOf
from tunewright.api.job_watch import JobWatch, JobWatches, Look
from tunewright.api.lists import After, Limit, MetadataFilter, clamped
from tunewright.api.openai.fine_tuning import STATUS_WORDS, name_shown
from tunewright.api.refusals import NOT_ON_CREATE, refuse, refuse_others
from tunewright.api.renderings import event_object, job_object
from tunewright.api.services import JobsOf, PlatformOf
from tunewright.api.streaming import EventStream
from tunewright.errors import InvalidRequest, as_sent
from tunewright.i18n import mark
from tunewright.jobs.line import QueuePlace
from tunewright.jobs.records import MOVES, TERMINAL, Job, JobEvent
from tunewright.jobs.scheduling import PRIORITIES

PREFIX = "/api/v1"
BATCH = 500

router = router_at(PREFIX)

Status = Literal["validating", "queued", "running", "cancelling", "paused", "succeeded", "failed", "cancelled"]
ModelFilter = Annotated[str | None, Query(max_length=256, description="A base's code, or the model that was asked for")]
_OWN_WORDS = {status: status for status in MOVES}
_RETRY_FIELDS = ("apply_suggestion", "request_id")
_RETRY_SCHEMA = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"apply_suggestion": {"type": "boolean"}, "request_id": {"type": "string"}},
                }
            }
        }
    }
}


class NativeCreateBody(CreateBody):
    """As in the dialects, only that names which mean nothing are refused."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, body: Any) -> Any:
        return refuse_others(refuse(body, NOT_ON_CREATE), {*cls.model_fields, "requestId"})


class ChangesBody(BaseModel):
    """What is absent stays."""

    model_config = ConfigDict(extra="forbid")

    metadata: Annotated[Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}})] = None
    priority: Annotated[Any, WithJsonSchema({"enum": [*PRIORITIES, None]})] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, body: Any) -> Any:
        return refuse_others(body, cls.model_fields)


async def _retry_body(request: Request) -> dict[str, Any]:
    """The fields of a body that may be absent. Raises InvalidRequest."""
    data = await request.body()
    if not data.strip():
        return {}
    check_json_type(request.headers.get("content-type"))
    body = strict_json.loads(data)
    if not isinstance(body, dict):
        raise InvalidRequest("invalid_body", mark("The body must be a JSON object."))
    refuse_others(body, _RETRY_FIELDS)
    wish = body.get("apply_suggestion")
    if wish is not None and not isinstance(wish, bool):
        raise invalid("apply_suggestion", mark("{field} must be true or false, not {value}."), value=as_sent(wish))
    return body


RetryFields = Annotated[dict[str, Any], Depends(_retry_body)]


class NativeJobRoutes(JobRoutes):
    """Jobs in the product's own words."""

    def __init__(self) -> None:
        super().__init__(_OWN_WORDS, lambda job: job.tuned_model_name)

    def jobs_router(self, prefix: str, jobs: str) -> APIRouter:
        """Those that the dialects have, and ours."""
        router = super().jobs_router(prefix, jobs)
        router.add_api_route(jobs + "/{job_id}", self.update, methods=["PATCH"])
        router.add_api_route(jobs + "/{job_id}/retry", self.retry, methods=["POST"], openapi_extra=_RETRY_SCHEMA)
        router.add_api_route(jobs + "/{job_id}/clone", self.clone, methods=["POST"])
        return router

    def shown(self, request: Request, job: Job, places: Mapping[str, QueuePlace]) -> dict[str, Any]:
        """Everything that is known of the job; `fine_tuned_model` is there from the start."""
        return super().shown(request, job, places) | {
            "object": "job",
            "base": job.base_code,
            "resolved": job.hyperparameters or None,
            "choices": job.choices or None,
            "resources": job.resources or None,
            "elapsed_s": job.elapsed_s,
            "attempt": job.attempt,
            "failures": job.failures,
        }

    def create(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Request, body: NativeCreateBody, caller: CallerOf, jobs: JobsOf, idempotency: IdempotencyOf
    ) -> Json:
        """Create a job, or find the one that the same request made before."""
        job = jobs.create(caller.project_id, create_job(body), idempotency)
        return Json(self.one(request, jobs, job), status_code=201)

    def list_jobs(
        self,
        request: Request,
        caller: CallerOf,
        jobs: JobsOf,
        after: After,
        metadata: MetadataFilter,
        limit: Limit = None,
        status: Status | None = None,
        model: ModelFilter = None,
    ) -> Json:
        """Newest first; with filters, those that all of them hold for."""
        found, more = jobs.list(
            caller.project_id,
            after=after,
            limit=clamped(limit, 20, MOST_JOBS),
            metadata=metadata,
            status=status,
            model=model,
        )
        return Json(self.many(request, jobs, found, more))

    def update(self, request: Request, job_id: str, body: ChangesBody, caller: CallerOf, jobs: JobsOf) -> Json:
        """Change what the body names."""
        changes = {name: getattr(body, name) for name in body.model_fields_set}
        return Json(self.one(request, jobs, jobs.update(caller.project_id, job_id, changes)))

    def retry(
        self,
        request: Request,
        job_id: str,
        caller: CallerOf,
        jobs: JobsOf,
        idempotency: IdempotencyOf,
        fields: RetryFields,
    ) -> Json:
        """A new job with the settings of one that has ended; with `apply_suggestion`, changed as its failure suggests."""
        job = jobs.retry(
            caller.project_id,
            job_id,
            apply_suggestion=bool(fields.get("apply_suggestion")),
            request_id=fields.get("request_id"),
            idempotency=idempotency,
        )
        return Json(self.one(request, jobs, job), status_code=201)

    def clone(
        self,
        request: Request,
        job_id: str,
        body: NativeCreateBody,
        caller: CallerOf,
        jobs: JobsOf,
        idempotency: IdempotencyOf,
    ) -> Json:
        """A new job with the settings of another one, but for what the body names."""
        job = jobs.clone(caller.project_id, job_id, changed_fields(body), idempotency)
        return Json(self.one(request, jobs, job), status_code=201)


router.routes.extend(NativeJobRoutes().jobs_router(PREFIX, "/jobs").routes)


@router.get("/jobs/{job_id}/events/stream")
async def stream_events(
    request: Request,
    job_id: str,
    caller: CallerOf,
    jobs: JobsOf,
    platform: PlatformOf,
    after: After,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=128)] = None,
) -> EventStream:
    """A job's events, oldest first, as they happen; a last frame `event: end` with the job when it has ended.

    A client that lost the connection goes on with `Last-Event-ID`. When the server stops, the stream ends without that
    frame.
    """
    await run_in_threadpool(jobs.get, caller.project_id, job_id)  # 404 has a status, not a frame
    language = exchange_of(request.scope).language

    def look(cursor: str | None) -> tuple[Job, list[JobEvent]]:
        job = jobs.get(caller.project_id, job_id)  # first: events that came with its last state are then seen below
        return job, jobs.events_since(caller.project_id, job_id, cursor, BATCH)

    watches: JobWatches = request.app.state.job_watches
    watch = watches.of(caller.project_id, job_id, look, platform.stopping.is_set)
    frames = _frames(look, watch, last_event_id or after, language, platform.stopping.is_set)
    return EventStream(frames, stop_is_error=False)


async def _frames(
    look: Look, watch: JobWatch, cursor: str | None, language: str, stopping: Callable[[], bool]
) -> AsyncGenerator[bytes, None]:
    """What the stream has not seen yet it looks up by itself; from then on it goes with all others of its job."""
    ticket = None
    while not stopping():
        ticket = watch.ticket(cursor) if ticket is None else ticket
        job, events = await run_in_threadpool(look, cursor)
        if events:
            cursor = events[-1].id
            yield _event_frames(events, language)
            continue
        if job.status in TERMINAL:
            yield b"event: end\n" + _frame(cursor, job_object(job, STATUS_WORDS, name_shown(job), language))
            return
        while (news := await ticket) is not None and news.after == cursor and news.events:
            cursor = news.events[-1].id
            ticket = watch.ticket(cursor, news.number)
            if language not in news.frames:
                news.frames[language] = _event_frames(news.events, language)
            yield news.frames[language]
        ticket = None


def _event_frames(events: list[JobEvent], language: str) -> bytes:
    return b"".join(_frame(event.id, event_object(event, language)) for event in events)


def _frame(event_id: str | None, data: dict[str, Any]) -> bytes:
    head = f"id: {event_id}\n".encode() if event_id else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"
