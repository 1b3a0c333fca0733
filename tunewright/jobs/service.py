"""What callers may do with jobs: decide, store, answer. The control loop (`controller.py`) does the work."""

import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from tunewright.accounts.idempotency import IdempotencyKey, find_earlier, remember
from tunewright.clock import wall_s, wall_s_after
from tunewright.datasets.records import File
from tunewright.errors import Conflict, InvalidRequest, NotFound, RateLimited, quote
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.jobs import copies, creation, events, rehearsals
from tunewright.jobs.creation import CreateJob
from tunewright.jobs.hyperparameters import parse
from tunewright.jobs.line import Line, QueuePlace
from tunewright.jobs.ports import OnEnd, nothing_at_end
from tunewright.jobs.records import (
    CANCELLED,
    CANCELLING,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TERMINAL,
    VALIDATING,
    CheckpointPage,
    Job,
    JobEvent,
)
from tunewright.models.checkpoint_files import CheckpointFiles
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.models.catalogue import Catalogue
    from tunewright.models.service import ModelService
    from tunewright.storage import Storage, Transaction

__all__ = ["CreateJob", "JobService"]

_ROUTE = "fine_tuning.jobs"
_MOST_CHECKPOINTS = 1000
_WAITING = frozenset({VALIDATING, QUEUED, PAUSED})


class JobService:
    """Every method is one transaction; none waits for a trainer. All block on the database: call them from a thread.

    `on_change` is called after a change that the control loop should see at once (it looks by itself too, only later).
    """

    def __init__(
        self,
        storage: "Storage",
        catalogue: "Catalogue",
        models: "ModelService",
        home: HomeFolder,
        settings: Settings,
        line: Line,
    ) -> None:
        self._storage = storage
        self._catalogue = catalogue
        self._models = models
        self._home = home
        self._checkpoints = CheckpointFiles(home)
        self._settings = settings
        self._line = line
        self.on_change: Callable[[], None] = lambda: None
        self.on_end: OnEnd = nothing_at_end

    def create(self, project_id: str, request: CreateJob, idempotency: IdempotencyKey | None = None) -> Job:
        """The new job, or the one that an earlier request with the same idempotency key or `request_id` made.

        Raises NotFound(`base_not_found`, `file_not_found`), InvalidRequest (many codes, `param` names the field),
        RateLimited(`too_many_jobs`), IdempotencyMismatch.
        """
        return self._earlier(project_id, request.request_id, idempotency) or self._create(
            project_id, request, idempotency
        )

    def retry(
        self,
        project_id: str,
        job_id: str,
        *,
        apply_suggestion: bool = False,
        request_id: Any = None,
        idempotency: IdempotencyKey | None = None,
    ) -> Job:
        """A new job with the settings of one that has ended, changed as its failure suggests if that is wanted.

        Can be repeated as `create` can. Raises what `create` raises, NotFound(`job_not_found`),
        Conflict(`job_not_finished`), InvalidRequest(`no_suggestion`).
        """
        earlier = self._earlier(project_id, request_id, idempotency)
        if earlier is not None:
            return earlier
        job = self.get(project_id, job_id)
        request = copies.retry_of(job, apply_suggestion=apply_suggestion)
        request = msgspec.structs.replace(request, request_id=request_id)
        return self._create(project_id, request, idempotency, retry_of=job.id)

    def clone(
        self, project_id: str, job_id: str, changes: Mapping[str, Any], idempotency: IdempotencyKey | None = None
    ) -> Job:
        """A new job with the settings of another one in whatever state, but for `changes`: fields of CreateJob.

        Can be repeated as `create` can. Raises what `create` raises, NotFound(`job_not_found`).
        """
        earlier = self._earlier(project_id, changes.get("request_id"), idempotency)
        if earlier is not None:
            return earlier
        job = self.get(project_id, job_id)
        return self._create(project_id, copies.clone_of(job, changes), idempotency, cloned_from=job.id)

    def _earlier(self, project_id: str, request_id: Any, idempotency: IdempotencyKey | None) -> Job | None:
        """What the same request made before. Looked up first, so that a repeat meets no check that the first one passed."""
        request_id = creation.check_request_id(request_id)
        with self._storage.read() as tx:
            return _earlier(tx, project_id, request_id, idempotency)

    def _create(
        self, project_id: str, request: CreateJob, idempotency: IdempotencyKey | None, **lineage: str | None
    ) -> Job:
        request_id = creation.check_request_id(request.request_id)
        base, tuned = self._tunable(project_id, creation.check_text(request.model, "model"))
        creation.check_method(base, request.method, request.training_type, tuned)
        with self._storage.write() as tx:
            earlier = _earlier(tx, project_id, request_id, idempotency)
            if earlier is not None:  # a twin of this request came first
                return earlier
            job = self._checked(tx, project_id, request, request_id, base)
            job = msgspec.structs.replace(job, **lineage)
            self._insert(tx, job, idempotency)
        self.on_change()
        return job

    def get(self, project_id: str, job_id: str) -> Job:
        """Raises NotFound(`job_not_found`), also for deleted jobs."""
        with self._storage.read() as tx:
            return _known(tx, project_id, job_id)

    def update(self, project_id: str, job_id: str, changes: Mapping[str, Any]) -> Job:
        """Change `metadata`, or `priority` of a job that has not started. A change of priority is an event of the job.

        Raises NotFound, InvalidRequest(`invalid_value`), Conflict(`invalid_state`).
        """
        checks = {"metadata": creation.check_metadata, "priority": creation.check_priority}
        wanted = {name: checks[name](value) for name, value in changes.items()}
        with self._storage.write() as tx:
            job = _known(tx, project_id, job_id)
            priority = wanted.get("priority", job.priority)
            if priority != job.priority:
                if job.status not in _WAITING:
                    _refuse(job, "prioritise")
                text = mark("The priority was changed from {earlier} to {priority}")
                tx.jobs.add_events(
                    [events.message(job, "priority_changed", text, earlier=job.priority, priority=priority)]
                )
            if wanted:
                job = _change(tx, job, **wanted)
        self.on_change()
        return job

    def places(self) -> dict[str, QueuePlace]:
        """Where every queued job stands, by its id."""
        with self._storage.read() as tx:
            return self._line.places(tx)

    def cancel(self, project_id: str, job_id: str) -> Job:
        """`cancelled` at once where no trainer can be, else `cancelling`; the control loop ends the trainer.

        Cancelling twice changes nothing. Raises NotFound, Conflict(`invalid_state`) for succeeded and failed jobs.
        """
        with self._storage.write() as tx:
            job = _known(tx, project_id, job_id)
            if job.status in (CANCELLED, CANCELLING):
                return job
            if job.status in (SUCCEEDED, FAILED):
                _refuse(job, "cancel")
            if job.status == RUNNING or job.attempt > 0 or rehearsals.is_under_way(job):
                changed = _change(tx, job, status=CANCELLING)
                event = events.message(changed, "cancelling", mark("Cancelling: waiting for the trainer to end"))
            else:
                changed = _change(tx, job, status=CANCELLED, finished_at=wall_s_after(job.created_at, job.running_at))
                event = events.message(changed, "cancelled", mark("The job was cancelled"))
                self.on_end(tx, changed)
            tx.jobs.add_events([event])
        self.on_change()
        return changed

    def pause(self, project_id: str, job_id: str) -> Job:
        """The trainer saves a checkpoint and ends; the job waits for `resume`. Pausing twice changes nothing.

        Raises NotFound, Conflict(`invalid_state`) unless the job is queued or running.
        """
        return self._switch(project_id, job_id, "pause", (QUEUED, RUNNING), PAUSED, mark("The job was paused"))

    def resume(self, project_id: str, job_id: str) -> Job:
        """Back into the queue, to go on from the last checkpoint. Raises NotFound, Conflict(`invalid_state`) unless paused."""
        return self._switch(
            project_id, job_id, "resume", (PAUSED,), QUEUED, mark("The job was put back into the queue")
        )

    def delete(self, project_id: str, job_id: str) -> Job:
        """The job's last state. Its events and work folder go; a model it made stays, and with it its checkpoints.

        Raises NotFound, Conflict(`job_not_finished`).
        """
        with self._storage.write() as tx:
            job = _known(tx, project_id, job_id)
            if job.status not in TERMINAL:
                raise Conflict(
                    "job_not_finished",
                    mark("Job {job} is {status}; cancel it before you delete it."),
                    job=job.id,
                    status=job.status,
                )
            deleted = _change(tx, job, deleted_at=wall_s())
            model = tx.models.get(project_id, job.tuned_model_id)
            unfinished = model is not None and model.status == "training"
            if model is not None and unfinished:
                tx.models.change(model, status="deleted", deleted_at=wall_s())
            rows = tx.jobs.list_checkpoints(project_id, job.id, after=None, limit=_MOST_CHECKPOINTS)
            gone = [row.step for row in rows if unfinished or row.adapter_sha256 is None]
            tx.jobs.drop_checkpoints(project_id, job.id, gone)
        shutil.rmtree(self._home.jobs / job.id, ignore_errors=True)
        if unfinished:
            self._checkpoints.remove_all(job.tuned_model_id)
        return deleted

    def sweep(self) -> None:
        """Remove the work folders of deleted jobs that a crash left; folders that the database does not know stay."""
        with self._storage.read() as tx:
            gone = tx.jobs.deleted([folder.name for folder in self._home.jobs.iterdir()])
        for job_id in gone:
            shutil.rmtree(self._home.jobs / job_id, ignore_errors=True)

    def events(
        self, project_id: str, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[list[JobEvent], bool]:
        """Newest first, and whether there are older ones. Raises NotFound."""
        with self._storage.read() as tx:
            _known(tx, project_id, job_id)
            found = tx.jobs.list_events(project_id, job_id, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def events_since(self, project_id: str, job_id: str, after_id: str | None, limit: int = 100) -> list[JobEvent]:
        """Oldest first, those younger than the event `after_id` (all if None). Raises NotFound."""
        with self._storage.read() as tx:
            _known(tx, project_id, job_id)
            return tx.jobs.events_since(project_id, job_id, after_id=after_id, limit=limit)

    def checkpoints(self, project_id: str, job_id: str, *, after: str | None = None, limit: int = 10) -> CheckpointPage:
        """Raises NotFound."""
        with self._storage.read() as tx:
            _known(tx, project_id, job_id)
            found = tx.jobs.list_checkpoints(project_id, job_id, after=after, limit=limit + 1)
            every = tx.jobs.list_checkpoints(project_id, job_id, after=None, limit=_MOST_CHECKPOINTS)
        measured = [(row.validation_loss, row.step) for row in every if row.validation_loss is not None]
        return CheckpointPage(
            checkpoints=found[:limit],
            has_more=len(found) > limit,
            last_step=every[0].step if every else None,
            best_step=min(measured)[1] if measured else None,
        )

    def list(
        self,
        project_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
        status: str | None = None,
        model: str | None = None,
    ) -> tuple[list[Job], bool]:
        """Newest first, and whether there are more. `model` is a base's code or what jobs were asked to train."""
        with self._storage.read() as tx:
            found = tx.jobs.list(
                project_id, after=after, limit=limit + 1, metadata=metadata, status=status, model=model
            )
        return found[:limit], len(found) > limit

    def trainings(self, project_id: str, model: str) -> tuple[Base, tuple[tuple[str, str], ...]]:
        """The base of `model`, and (method, training type) of what can be trained from it.

        Raises NotFound(`base_not_found`), InvalidRequest(`model_not_tunable`, `model_not_pulled`).
        """
        base, tuned = self._tunable(project_id, model)
        return base, tuple(creation.offered(base, tuned))

    def _tunable(self, project_id: str, model: str) -> tuple[Base, TunedModel | None]:
        """The base, and the tuned model to continue from."""
        try:
            found = self._models.resolve(project_id, model)
        except NotFound:
            raise NotFound(
                "base_not_found",
                mark("There is no model {model} to fine-tune."),
                param="model",
                model=quote(model),
            ) from None
        base, tuned = found.base, found.tuned
        if not base.methods or (tuned is not None and tuned.kind == FULL):
            raise InvalidRequest(
                "model_not_tunable",
                mark("The model {model} can't be fine-tuned. These can: {tunable}."),
                param="model",
                model=quote(model),
                tunable=", ".join(other.code for other in self._catalogue.all() if other.methods),
            )
        return base, tuned

    def _checked(
        self, tx: "Transaction", project_id: str, request: CreateJob, request_id: str | None, base: Base
    ) -> Job:
        """The row to insert. Reads files in the transaction that inserts it, so that none is deleted in between."""
        tolerance = creation.check_tolerance(request.max_bad_rows, request.max_bad_ratio)
        validation_split = creation.check_split(request.validation_split, request.validation_file)
        training = _file(tx, project_id, request, "training_file", base, tolerance)
        validation_file = None
        if request.validation_file not in (None, ""):
            validation = _file(tx, project_id, request, "validation_file", base, tolerance)
            if validation.sha256 == training.sha256:
                raise InvalidRequest(
                    "same_file",
                    mark("validation_file holds the same rows as training_file."),
                    param="validation_file",
                )
            validation_file = validation.id
        requested = parse(request.hyperparameters, method=request.method, context_tokens=base.context_tokens)
        creation.check_measured(requested, validation_file, validation_split)
        suffix = creation.check_suffix(request.suffix)
        rehearsal = creation.check_rehearsal(request.rehearsal)
        seed = creation.check_seed(request.seed)
        metadata = creation.check_metadata(request.metadata)
        priority = creation.check_priority(request.priority)
        if tx.jobs.count(project_id, _WAITING) >= self._settings.max_queued_jobs:
            raise RateLimited(
                "too_many_jobs",
                mark("{limit} jobs of this project are waiting already. Try again when one has started."),
                retry_after_s=60,
                limit=self._settings.max_queued_jobs,
            )
        project = tx.projects.get(project_id)
        if project is None:
            raise NotFound("project_not_found", mark("This project is gone."))
        return Job(
            id=new_id("ftjob"),
            project_id=project_id,
            base_code=base.code,
            model=request.model,
            tuned_model_id=new_id("model"),
            tuned_model_name=self._models.name_for(project, base.code, suffix),
            training_file=training.id,
            validation_file=validation_file,
            method=request.method,
            training_type=request.training_type,
            requested=requested,
            suffix=suffix,
            seed=seed,
            metadata=metadata,
            priority=priority,
            request_id=request_id,
            tolerance=msgspec.to_builtins(tolerance),
            validation_split=validation_split,
            rehearsal={} if rehearsal is None else {"wanted": rehearsal},
            options={
                "receipts": creation.check_receipts(request.receipts),
                "tensorboard": creation.check_tensorboard(request.tensorboard),
            },
            created_at=wall_s(),
        )

    def _insert(self, tx: "Transaction", job: Job, idempotency: IdempotencyKey | None) -> None:
        tx.models.insert(
            TunedModel(
                id=job.tuned_model_id,
                project_id=job.project_id,
                name=job.tuned_model_name,
                base_code=job.base_code,
                job_id=job.id,
                created_at=job.created_at,
            )
        )
        tx.jobs.insert(job)
        tx.jobs.add_events([events.created(job)])
        if idempotency is not None:
            remember(tx, job.project_id, _ROUTE, idempotency, job.id)

    def _switch(self, project_id: str, job_id: str, verb: str, sources: tuple[str, ...], target: str, text: str) -> Job:
        with self._storage.write() as tx:
            job = _known(tx, project_id, job_id)
            if job.status == target and target == PAUSED:
                return job
            if job.status not in sources:
                _refuse(job, verb)
            changed = _change(tx, job, status=target, interrupted=False)
            tx.jobs.add_events([events.message(changed, target, text)])
        self.on_change()
        return changed


def _earlier(
    tx: "Transaction", project_id: str, request_id: str | None, idempotency: IdempotencyKey | None
) -> Job | None:
    if idempotency is not None:
        earlier_id = find_earlier(tx, project_id, _ROUTE, idempotency)
        if earlier_id is not None:
            job = tx.jobs.get(project_id, earlier_id)
            if job is not None:
                return job
    return None if request_id is None else tx.jobs.find_by_request_id(project_id, request_id)


def _file(
    tx: "Transaction", project_id: str, request: CreateJob, param: str, base: Base, tolerance: creation.Tolerance
) -> File:
    file_id = creation.check_text(getattr(request, param), param)
    return creation.check_file(tx.files.get(project_id, file_id), param, file_id, base, request.method, tolerance)


def _known(tx: "Transaction", project_id: str, job_id: str) -> Job:
    job = tx.jobs.get(project_id, job_id)
    if job is None:
        raise NotFound("job_not_found", mark("There is no fine-tuning job {job}."), job=quote(job_id))
    return job


def _change(tx: "Transaction", job: Job, **changes: object) -> Job:
    changed = tx.jobs.change(job, **changes)
    if changed is None:  # only without a real write lock
        raise Conflict("invalid_state", mark("Job {job} changed at the same moment; try again."), job=job.id)
    return changed


def _refuse(job: Job, verb: str) -> NoReturn:
    raise Conflict(
        "invalid_state",
        mark("Can't {verb} job {job}: it is {status}."),
        job=job.id,
        verb=verb,
        status=job.status,
    )
