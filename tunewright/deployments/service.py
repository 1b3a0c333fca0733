"""Private instances as their owners see them: made, looked at, changed, undeployed."""

import builtins
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.accounts.idempotency import IdempotencyKey, find_earlier, remember
from tunewright.clock import wall_s
from tunewright.deployments.memory import estimated_bytes
from tunewright.deployments.reconciler import Reconciler, event_of
from tunewright.deployments.records import LIVE, Deployment, DeploymentEvent, ReplicaRecord
from tunewright.deployments.serving import NAME
from tunewright.errors import Conflict, InvalidRequest, NotFound, quote
from tunewright.i18n import mark
from tunewright.ids import new_id, random_text
from tunewright.jobs.line import gigabytes
from tunewright.models.catalogue import Catalogue
from tunewright.models.records import FULL
from tunewright.models.service import Card, ModelService, Resolved
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage, Transaction

MOST_DEPLOYMENTS = 100
LONGEST_IDLE_MINUTES = 7 * 24 * 60
_ROUTE = "deployments"
_NEW_NAME = 8
"""Random characters of a name that nobody chose."""


class NewDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for."""

    model: str
    replicas: int = 1
    name: str | None = None
    merge: bool = False
    idle_minutes: float | None = None


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment with what only the running server knows: the memory that each replica holds now, and what is free for more."""

    deployment: Deployment
    free_bytes: int
    held_bytes: dict[int, int] = {}
    """Replica number -> bytes."""

    def replicas(self) -> list[tuple[ReplicaRecord, int]]:
        """Each with the memory that it holds."""
        return [(each, self.held_bytes.get(each.number, 0)) for each in self.deployment.replica_records]


class DeploymentService:
    """All methods block. A deployment of another project is answered like one that never existed."""

    def __init__(
        self,
        storage: "Storage",
        models: ModelService,
        catalogue: Catalogue,
        reconciler: Reconciler,
        home: HomeFolder,
        settings: Settings,
    ) -> None:
        self._storage = storage
        self._models = models
        self._catalogue = catalogue
        self._reconciler = reconciler
        self._home = home
        self._settings = settings

    def create(self, project_id: str, wanted: NewDeployment, idempotency: IdempotencyKey | None = None) -> Shown:
        """The wish, stored; the reconcile loop begins at once. The same request again finds what the first one made.

        Raises NotFound (`model_not_found`), InvalidRequest (`invalid_value`, `model_not_pulled`, `model_not_deployable`),
        Conflict (`already_deployed`, `name_taken`, `too_many_deployments`, `insufficient_memory`).
        """
        with self._storage.read() as tx:  # one that was made before needs nothing of what is checked below
            if (earlier := _earlier(tx, project_id, idempotency)) is not None:
                return self._shown(tx, earlier)
        resolved = self._models.resolve(project_id, wanted.model)
        self._check(wanted, resolved)
        base, tuned = resolved.base, resolved.tuned
        model = base.code if tuned is None else tuned.name
        with self._storage.write() as tx:
            if (earlier := _earlier(tx, project_id, idempotency)) is not None:
                return self._shown(tx, earlier)
            self._check_others(tx, project_id, wanted.name, model, tuned is not None)
            measured = tx.deployments.measured(project_id, model, wanted.merge)
            need = self._estimate(resolved) if measured is None else measured
            self._check_memory(tx, wanted.replicas, need)
            deployment = Deployment(
                id=new_id("dep"),
                project_id=project_id,
                name=wanted.name or f"{base.code}-{random_text(_NEW_NAME)}",
                model=model,
                base_code=base.code,
                tuned_model_id=tuned and tuned.id,
                replicas=wanted.replicas,
                merge=wanted.merge,
                idle_minutes=wanted.idle_minutes,
                memory_bytes=need,
                memory_source="estimated" if measured is None else "measured",
                created_at=wall_s(),
            )
            tx.deployments.insert(deployment)
            text = mark("{model} is to be deployed; replicas wanted: {replicas}.")
            tx.deployments.add_event(
                event_of(deployment, "created", text, model=deployment.model, replicas=deployment.replicas)
            )
            if idempotency is not None:
                remember(tx, project_id, _ROUTE, idempotency, deployment.id)
            shown = self._shown(tx, deployment)
        self._reconciler.expect(deployment)
        return msgspec.structs.replace(shown, free_bytes=shown.free_bytes - deployment.wanted * need)

    def list(self, project_id: str, *, after: str | None, limit: int) -> tuple[builtins.list[Shown], bool]:
        """Newest first, and whether there are more. Raises InvalidRequest (`invalid_cursor`)."""
        with self._storage.read() as tx:
            found = tx.deployments.list(project_id, after=after, limit=limit + 1)
            return self._all_shown(tx, found[:limit]), len(found) > limit

    def cards(self, project_id: str) -> builtins.list[Card]:
        """What a list of models shows of the deployments: under the name of each, its model as the parent."""
        with self._storage.read() as tx:
            found = tx.deployments.list(project_id, after=None, limit=MOST_DEPLOYMENTS)
        return [Card(id=d.name, created=d.created_at, owned_by=d.project_id, parent=d.model) for d in found]

    def get(self, project_id: str, deployment_id: str) -> Shown:
        """Raises NotFound (`deployment_not_found`)."""
        with self._storage.read() as tx:
            return self._shown(tx, _live(tx, project_id, deployment_id))

    def update(self, project_id: str, deployment_id: str, changes: dict[str, Any]) -> Shown:
        """`changes` may hold `replicas` and `idle_minutes` (None: it never sleeps).

        Raises NotFound (`deployment_not_found`), InvalidRequest (`invalid_value`), Conflict (`insufficient_memory`).
        """
        fields = {name: changes[name] for name in ("replicas", "idle_minutes") if name in changes}
        _check_idle(fields.get("idle_minutes"))
        with self._storage.write() as tx:
            deployment = _live(tx, project_id, deployment_id)
            replicas = fields.setdefault("replicas", deployment.replicas)
            self._check_replicas(replicas)
            if fields.get("idle_minutes", deployment.idle_minutes) is None and deployment.asleep:
                fields["asleep"] = False
            awake = not fields.get("asleep", deployment.asleep)
            more = (replicas if awake else 0) - deployment.wanted
            if more > 0:
                self._check_memory(tx, more, deployment.memory_bytes)
            changed = tx.deployments.change(deployment, **fields) or deployment
            if replicas != deployment.replicas:
                text = mark("{replicas} replicas are wanted.")
                tx.deployments.add_event(event_of(deployment, "scaled", text, replicas=replicas))
        self._reconciler.expect(changed)
        return self.get(project_id, deployment_id)

    def undeploy(self, project_id: str, deployment_id: str) -> None:
        """It can't be called from now on, and answers under way end. The same again changes nothing.

        Raises NotFound (`deployment_not_found`).
        """
        with self._storage.write() as tx:
            if tx.deployments.get(project_id, deployment_id) is None:
                raise _not_found(deployment_id)
            tx.deployments.retire(project_id, deployment_id, wall_s())
        self._reconciler.retire(deployment_id)

    def events(
        self, project_id: str, deployment_id: str, *, after: str | None, limit: int
    ) -> tuple[builtins.list[DeploymentEvent], bool]:
        """Newest first, and whether there are more. Raises NotFound, InvalidRequest (`invalid_cursor`)."""
        with self._storage.read() as tx:
            _live(tx, project_id, deployment_id)
            found = tx.deployments.events(project_id, deployment_id, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def _check(self, wanted: NewDeployment, resolved: Resolved) -> None:
        self._check_replicas(wanted.replicas)
        _check_idle(wanted.idle_minutes)
        tuned = resolved.tuned
        if tuned is not None and tuned.kind == FULL and tuned.adapter_sha256 is None:
            raise InvalidRequest(
                "model_not_deployable",
                mark("Checkpoints of full-parameter training can't be deployed; deploy the model of the job."),
                param="model",
            )
        if wanted.merge and (tuned is None or tuned.kind == FULL):
            raise InvalidRequest("invalid_value", mark("Only LoRA models can be merged."), param="merge")
        if wanted.name is not None and not NAME.fullmatch(wanted.name):
            raise InvalidRequest(
                "invalid_value",
                mark("A name has 1 to 80 letters, digits, dots, dashes and underscores; {value} has not."),
                param="name",
                value=quote(wanted.name),
            )
        if wanted.name is not None and self._catalogue.find(wanted.name) is not None:
            raise _name_taken(wanted.name)

    def _check_replicas(self, replicas: int) -> None:
        if not 1 <= replicas <= self._settings.max_replicas:
            raise InvalidRequest(
                "invalid_value",
                mark("replicas must be between 1 and {most}."),
                param="replicas",
                most=self._settings.max_replicas,
            )

    def _check_others(self, tx: "Transaction", project_id: str, name: str | None, model: str, tuned: bool) -> None:
        if len(tx.deployments.list(project_id, after=None, limit=MOST_DEPLOYMENTS)) >= MOST_DEPLOYMENTS:
            sentence = mark("A project has at most {limit} deployments")
            raise Conflict("too_many_deployments", sentence, limit=MOST_DEPLOYMENTS)
        serving = tx.deployments.serving(project_id, model) if tuned else None
        if serving is not None:
            raise Conflict(
                "already_deployed",
                mark('"{model}" is deployed as {id} already; change the number of its replicas.'),
                param="model",
                model=model,
                id=serving.id,
            )
        holder = None if name is None else tx.deployments.named(project_id, name)
        if name is not None and holder is not None and holder.phase == LIVE:
            raise _name_taken(name)

    def _check_memory(self, tx: "Transaction", replicas: int, need: int) -> None:
        left = self._reconciler.left_bytes(tx)
        if replicas * need > left:
            raise Conflict(
                "insufficient_memory",
                mark("{replicas} replicas need {need} GB of memory; {free} GB are free beside jobs and other models."),
                replicas=replicas,
                need=gigabytes(replicas * need),
                free=gigabytes(max(0, left)),
            )

    def _estimate(self, resolved: Resolved) -> int:
        base, tuned = resolved.base, resolved.tuned
        lora = None
        if tuned is not None and tuned.kind != FULL:
            lora = self._home.adapters / (tuned.adapter_path or tuned.id)
        return estimated_bytes(
            Path(base.path or ""),
            lora,
            slots=self._settings.engine_slots,
            context_tokens=min(base.context_tokens, self._settings.engine_context_tokens),
        )

    def _shown(self, tx: "Transaction", deployment: Deployment) -> Shown:
        return self._all_shown(tx, [deployment])[0]

    def _all_shown(self, tx: "Transaction", deployments: builtins.list[Deployment]) -> builtins.list[Shown]:
        free_bytes = max(0, self._reconciler.left_bytes(tx)) if deployments else 0
        shown = []
        for deployment in deployments:
            running = self._reconciler.running(deployment.id)
            replicas = [] if running is None else list(running.replicas)
            held = {each.record.number: each.memory_bytes for each in replicas}
            shown.append(Shown(deployment=deployment, free_bytes=free_bytes, held_bytes=held))
        return shown


def _earlier(tx: "Transaction", project_id: str, idempotency: IdempotencyKey | None) -> Deployment | None:
    if idempotency is None:
        return None
    earlier_id = find_earlier(tx, project_id, _ROUTE, idempotency)
    return None if earlier_id is None else tx.deployments.get(project_id, earlier_id)


def _live(tx: "Transaction", project_id: str, deployment_id: str) -> Deployment:
    deployment = tx.deployments.get(project_id, deployment_id)
    if deployment is None or deployment.phase != LIVE:
        raise _not_found(deployment_id)
    return deployment


def _check_idle(minutes: float | None) -> None:
    if minutes is not None and not 0 < minutes <= LONGEST_IDLE_MINUTES:
        raise InvalidRequest(
            "invalid_value",
            mark("idle_minutes must be above 0 and at most {most}."),
            param="idle_minutes",
            most=LONGEST_IDLE_MINUTES,
        )


def _not_found(deployment_id: str) -> NotFound:
    return NotFound(
        "deployment_not_found", mark("There is no deployment {id}."), param="deployment_id", id=quote(deployment_id)
    )


def _name_taken(name: str) -> Conflict:
    return Conflict("name_taken", mark("The name {name} is taken."), param="name", name=name)
