"""Fine-tuning jobs over HTTP: what both dialects share. Their own `fine_tuning.py` says how they word a job."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.errors import invalid, missing
from tunewright.api.idempotency import IdempotencyOf
from tunewright.api.lists import After, Limit, MetadataFilter, clamped, page
from tunewright.api.refusals import NOT_ON_CREATE, refuse
from tunewright.api.renderings import checkpoint_object, deleted_model, event_object, job_object
from tunewright.api.services import JobsOf, ModelsOf
from tunewright.errors import InvalidRequest, as_sent, quote
from tunewright.i18n import mark
from tunewright.jobs.line import QueuePlace
from tunewright.jobs.records import QUEUED, Job
from tunewright.jobs.scheduling import PRIORITIES
from tunewright.jobs.service import CreateJob, JobService

MOST_JOBS = 100
MOST_EVENTS = 1000
MOST_CHECKPOINTS = 100

_EXTRAS = (
    "lora_rank",
    "lora_alpha",
    "max_length",
    "warmup_ratio",
    "weight_decay",
    "beta",
    "precision",
    "activation_checkpointing",
    "micro_batch_tokens",
    "eval_steps",
    "early_stopping",
)
"""Hyperparameters that are also taken at the top level of the body, where `extra_body` of an SDK puts them."""
_Text = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})]
_Number = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]})]
_NumberOrAuto = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]}
_Hyperparameter = Annotated[Any, WithJsonSchema(_NumberOrAuto)]
_Hyperparameters = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "object",
            "properties": dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier", "beta"), _NumberOrAuto),
        }
    ),
]


class CreateBody(BaseModel):
    """What a create call may hold. The job service checks the values; unknown keys are ignored, dangerous ones refused."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    model: _Text = None
    training_file: _Text = None
    validation_file: _Text = None
    hyperparameters: _Hyperparameters = None
    suffix: _Text = None
    seed: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "null"}]})] = None
    method: Annotated[Any, WithJsonSchema({"type": "object", "properties": {"type": {"type": "string"}}})] = None
    training_type: Annotated[Any, WithJsonSchema({"enum": ["lora", "full", None]})] = None
    metadata: Annotated[Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}})] = None
    request_id: _Text = None
    java_request_id: _Text = Field(default=None, alias="requestId")
    max_bad_rows: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "null"}]})] = None
    max_bad_ratio: _Number = None
    validation_split: _Number = None
    priority: Annotated[Any, WithJsonSchema({"enum": [*PRIORITIES, None]})] = None
    rehearsal: Annotated[Any, WithJsonSchema({"enum": ["auto", "always", "off", None]})] = None
    receipts: Annotated[Any, WithJsonSchema({"enum": ["auto", "on", "off", None]})] = None
    tensorboard: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "null"}]})] = None
    lora_rank: _Hyperparameter = None
    lora_alpha: _Hyperparameter = None
    max_length: _Hyperparameter = None
    warmup_ratio: _Hyperparameter = None
    weight_decay: _Hyperparameter = None
    beta: _Hyperparameter = None
    precision: _Text = None
    activation_checkpointing: _Text = None
    micro_batch_tokens: _Hyperparameter = None
    eval_steps: _Hyperparameter = None
    early_stopping: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "object"}, {"type": "null"}]})
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_names(cls, body: Any) -> Any:
        return refuse(body, NOT_ON_CREATE)


def create_job(body: CreateBody) -> CreateJob:
    """The neutral request. `method` wins over the top-level `hyperparameters`, and both over single ones beside them.
    Raises InvalidRequest for a broken method."""
    method, hyperparameters = _method(body.method)
    if hyperparameters is None:
        hyperparameters = body.hyperparameters
    extras = {name: value for name in _EXTRAS if (value := getattr(body, name)) is not None}
    if extras and (hyperparameters is None or isinstance(hyperparameters, dict)):
        hyperparameters = extras | (hyperparameters or {})
    return CreateJob(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed,
        method=method,
        training_type="lora" if body.training_type is None else body.training_type,
        hyperparameters=hyperparameters,
        metadata=body.metadata,
        request_id=body.request_id if body.request_id is not None else body.java_request_id,
        max_bad_rows=body.max_bad_rows,
        max_bad_ratio=body.max_bad_ratio,
        validation_split=body.validation_split,
        priority=body.priority,
        rehearsal=body.rehearsal,
        receipts=body.receipts,
        tensorboard=body.tensorboard,
    )


def changed_fields(body: CreateBody) -> dict[str, Any]:
    """What of a create request the body names, as fields of CreateJob. Raises InvalidRequest for a broken method."""
    wanted = msgspec.structs.asdict(create_job(body))
    named = body.model_fields_set | ({"hyperparameters"} if wanted["hyperparameters"] is not None else set())
    return {name: value for name, value in wanted.items() if name in named or (name == "request_id" and value)}


def _method(method: Any) -> tuple[Any, Any]:
    if method is None:
        return "supervised", None
    if isinstance(method, str):
        return method, None
    if not isinstance(method, dict):
        raise invalid("method", mark("{field} must be an object, not {value}."), value=as_sent(method))
    kind = method.get("type")
    if kind is None:
        raise missing("method.type")
    if not isinstance(kind, str):
        raise invalid("method.type", mark("{field} must be text, not {value}."), value=as_sent(kind))
    settings = method.get(kind)
    if settings is not None and not isinstance(settings, dict):
        raise InvalidRequest(
            "invalid_value",
            mark("{field} must be an object, not {value}."),
            param=f"method.{quote(kind)}",
            field=f"method.{quote(kind)}",
            value=as_sent(settings),
        )
    return kind, settings.get("hyperparameters") if settings else None


def _places(jobs: JobService, found: list[Job]) -> dict[str, QueuePlace]:
    return jobs.places() if any(job.status == QUEUED for job in found) else {}


class JobRoutes:
    """The routes. `words` are the dialect's names for our states, `name_shown` when it shows the name of the tuned model.

    Handlers are plain functions: the services block, and the framework runs them in threads.
    """

    def __init__(self, words: Mapping[str, str], name_shown: Callable[[Job], str | None]) -> None:
        self._words = words
        self._name_shown = name_shown

    def router(self, prefix: str) -> APIRouter:
        """A router with all of them."""
        router = self.jobs_router(prefix, "/fine_tuning/jobs")
        router.add_api_route("/fine_tuning/fine_tuned_models/{name:path}", self.delete_model, methods=["DELETE"])
        return router

    def jobs_router(self, prefix: str, jobs: str) -> APIRouter:
        """A router with those of jobs, below the path `jobs`."""
        router = router_at(prefix)
        router.add_api_route(jobs, self.create, methods=["POST"])
        router.add_api_route(jobs, self.list_jobs, methods=["GET"])
        router.add_api_route(jobs + "/{job_id}", self.retrieve, methods=["GET"])
        router.add_api_route(jobs + "/{job_id}", self.delete, methods=["DELETE"])
        router.add_api_route(jobs + "/{job_id}/cancel", self.cancel, methods=["POST"])
        router.add_api_route(jobs + "/{job_id}/pause", self.pause, methods=["POST"])
        router.add_api_route(jobs + "/{job_id}/resume", self.resume, methods=["POST"])
        router.add_api_route(jobs + "/{job_id}/events", self.events, methods=["GET"])
        router.add_api_route(jobs + "/{job_id}/checkpoints", self.checkpoints, methods=["GET"])
        return router

    def shown(self, request: Request, job: Job, places: Mapping[str, QueuePlace]) -> dict[str, Any]:
        """The job in this dialect's words and the request's language."""
        language = exchange_of(request.scope).language
        return job_object(job, self._words, self._name_shown(job), language, places.get(job.id))

    def one(self, request: Request, jobs: JobService, job: Job) -> dict[str, Any]:
        """The job with its place in the queue, if it has one."""
        return self.shown(request, job, _places(jobs, [job]))

    def many(self, request: Request, jobs: JobService, found: list[Job], more: bool) -> dict[str, Any]:
        """A page of them."""
        places = _places(jobs, found)
        return page(found, more, lambda job: self.shown(request, job, places))

    def create(
        self, request: Request, body: CreateBody, caller: CallerOf, jobs: JobsOf, idempotency: IdempotencyOf
    ) -> Json:
        """Create a job, or find the one that the same request made before."""
        return Json(self.one(request, jobs, jobs.create(caller.project_id, create_job(body), idempotency)))

    def list_jobs(
        self,
        request: Request,
        caller: CallerOf,
        jobs: JobsOf,
        after: After,
        metadata: MetadataFilter,
        limit: Limit = None,
    ) -> Json:
        """Newest first."""
        found, more = jobs.list(caller.project_id, after=after, limit=clamped(limit, 20, MOST_JOBS), metadata=metadata)
        return Json(self.many(request, jobs, found, more))

    def retrieve(self, request: Request, job_id: str, caller: CallerOf, jobs: JobsOf) -> Json:
        """One job."""
        return Json(self.one(request, jobs, jobs.get(caller.project_id, job_id)))

    def delete(self, request: Request, job_id: str, caller: CallerOf, jobs: JobsOf) -> Json:
        """Remove an ended job; the answer is its last state."""
        return Json(self.one(request, jobs, jobs.delete(caller.project_id, job_id)) | {"deleted": True})

    def cancel(self, request: Request, job_id: str, caller: CallerOf, jobs: JobsOf) -> Json:
        """Cancel; a second time changes nothing."""
        return Json(self.one(request, jobs, jobs.cancel(caller.project_id, job_id)))

    def pause(self, request: Request, job_id: str, caller: CallerOf, jobs: JobsOf) -> Json:
        """Save a checkpoint and wait."""
        return Json(self.one(request, jobs, jobs.pause(caller.project_id, job_id)))

    def resume(self, request: Request, job_id: str, caller: CallerOf, jobs: JobsOf) -> Json:
        """Go on from the last checkpoint."""
        return Json(self.one(request, jobs, jobs.resume(caller.project_id, job_id)))

    def events(
        self, request: Request, job_id: str, caller: CallerOf, jobs: JobsOf, after: After, limit: Limit = None
    ) -> Json:
        """Newest first."""
        language = exchange_of(request.scope).language
        found, more = jobs.events(caller.project_id, job_id, after=after, limit=clamped(limit, 20, MOST_EVENTS))
        return Json(page(found, more, lambda event: event_object(event, language)))

    def checkpoints(self, job_id: str, caller: CallerOf, jobs: JobsOf, after: After, limit: Limit = None) -> Json:
        """Newest first."""
        job = jobs.get(caller.project_id, job_id)
        found = jobs.checkpoints(caller.project_id, job_id, after=after, limit=clamped(limit, 10, MOST_CHECKPOINTS))
        return Json(page(found.checkpoints, found.has_more, lambda each: checkpoint_object(each, job, found)))

    def delete_model(self, request: Request, name: str, caller: CallerOf, models: ModelsOf) -> Json:
        """Remove a tuned model; a second time gives the same answer."""
        models.delete(caller.project_id, name)
        return Json(deleted_model(name, exchange_of(request.scope).request_id))
