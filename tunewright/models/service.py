"""What a project can call: the bases on this machine, their aliases, and the models that its own jobs made."""

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tunewright import clock
from tunewright.accounts.records import Project
from tunewright.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, quote
from tunewright.i18n import mark
from tunewright.ids import random_text
from tunewright.models.catalogue import Catalogue
from tunewright.models.checkpoint_files import CheckpointFiles
from tunewright.models.checkpoint_names import LONGEST_NAME, as_model, find_model, parse
from tunewright.models.manifest import read_manifest
from tunewright.models.records import Base, TunedModel
from tunewright.settings import HomeFolder

if TYPE_CHECKING:
    from tunewright.storage.database import Storage, Transaction

_ALL = 1000
"""More checkpoints than any job keeps."""
_log = structlog.get_logger(__name__)
_OWNER = "tunewright"


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What a name stands for. `base.path` is set; `tuned` is None for a base."""

    base: Base
    tuned: TunedModel | None = None


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the list of models. `created` in Unix seconds; `parent` is the base of an alias or a tuned model."""

    id: str
    created: int
    owned_by: str
    parent: str | None = None


class ModelService:
    """All methods block. A name of another project's model is answered like a name that never existed.

    `on_delete` is called with each deleted model, `on_undeploy` with the id of each deployment that goes with it, after the rows
    are committed; they must neither block nor raise.
    """

    def __init__(self, storage: "Storage", catalogue: Catalogue, home: HomeFolder) -> None:
        self._storage = storage
        self._catalogue = catalogue
        self._home = home
        self._checkpoints = CheckpointFiles(home)
        self.on_delete: Callable[[TunedModel], None] = lambda model: None
        self.on_undeploy: Callable[[str], None] = lambda deployment_id: None

    def resolve(self, project_id: str, name: str) -> Resolved:
        """Raises NotFound(`model_not_found`) unless it is a base, an alias, or a ready model or a checkpoint of this project,
        InvalidRequest(`model_not_pulled`) when the base's weights are not on this machine."""
        if not _is_tuned_name(name):
            base = self._catalogue.find(name)
            if base is None:
                raise _not_found(name)
            return Resolved(base=_pulled(base))
        tuned = self._find(project_id, name)
        if tuned is None or tuned.status != "ready":
            raise _not_found(name)
        return Resolved(base=self._base_of(tuned), tuned=tuned)

    def list(self, project_id: str) -> list[Card]:
        """The bases on this machine, each followed by its aliases, then the project's ready models, newest first."""
        cards: list[Card] = []
        for base in self._catalogue.all():
            if base.path is not None:
                cards += [_base_card(base, name) for name in (base.code, *base.aliases)]
        with self._storage.read() as tx:
            return cards + [_tuned_card(model) for model in tx.models.list(project_id)]

    def card(self, project_id: str, name: str) -> Card:
        """Exactly what `list` shows under that name. Raises NotFound(`model_not_found`) for all else."""
        if _is_tuned_name(name):
            tuned = self._find(project_id, name)
            if tuned is not None and tuned.status == "ready":
                return _tuned_card(tuned)
        else:
            base = self._catalogue.find(name)
            if base is not None and base.path is not None:
                return _base_card(base, name)
        raise _not_found(name)

    def delete(self, project_id: str, name: str) -> TunedModel:
        """The deleted model; the same answer when it was deleted before. Its checkpoints and deployments go with it.

        Its adapter's files go after the row is committed, and a repeated call removes what a crash left of them.
        Raises NotFound(`model_not_found`), PermissionDenied(`base_model`), Conflict(`job_not_finished`).
        """
        if not _is_tuned_name(name):
            if self._catalogue.find(name) is None:
                raise _not_found(name)
            raise PermissionDenied(
                "base_model",
                mark('"{model}" is a base model; only fine-tuned models can be deleted.'),
                param="model",
                model=name,
            )
        if parse(name) is not None:
            return self._delete_checkpoint(project_id, name)
        with self._storage.write() as tx:
            model = tx.models.find(project_id, name) if len(name) <= LONGEST_NAME and name.isprintable() else None
            if model is None or model.status == "training":
                raise _not_found(name)
            checkpoints = tx.jobs.list_checkpoints(project_id, model.job_id, after=None, limit=_ALL)
            tx.jobs.drop_checkpoints(project_id, model.job_id, [each.step for each in checkpoints])
            if model.status != "deleted":
                model = tx.models.change(model, status="deleted", deleted_at=clock.wall_s()) or model
            gone = [model, *(as_model(model, each) for each in checkpoints)]
            undeployed = tx.deployments.retire_of_models(project_id, [each.id for each in gone], clock.wall_s())
        for deployment in undeployed:
            self.on_undeploy(deployment.id)
        for each in gone:
            self.on_delete(each)
        self._remove_adapter(model)
        self._checkpoints.remove_all(model.id)
        return model

    def keep_proof(self, checkpoint: TunedModel, proof: dict[str, Any]) -> None:
        """Remember what the engine measured of a checkpoint, so that it need not be measured again."""
        with self._storage.write() as tx:
            tx.jobs.prove_checkpoint(checkpoint.project_id, checkpoint.job_id, checkpoint.checkpoint_step or 0, proof)

    def sweep(self) -> None:
        """Remove the adapters of models that will never be (again), which a crash or a cancel at the last moment left.

        Only what the database says so of: a folder that it does not know stays, for it may be the wrong database.
        """
        with self._storage.read() as tx:
            gone = tx.models.gone([folder.name for folder in self._home.adapters.iterdir()])
            deleted = tx.models.deleted(self._checkpoints.owners())  # a job that ended early leaves its checkpoints
        for model_id in gone:
            shutil.rmtree(self._home.adapters / model_id, ignore_errors=True)
        for model_id in deleted:
            self._checkpoints.remove_all(model_id)
        if gone:
            _log.info("adapters_swept", count=len(gone))

    def name_for(self, project: Project, base_code: str, suffix: str | None) -> str:
        """A new model name: `{base}:{project number}:{suffix}:{8 random}`."""
        return f"{base_code}:{project.number}:{suffix or ''}:{random_text(8)}"

    def publish(
        self,
        tx: "Transaction",
        model: TunedModel,
        *,
        adapter_path: str,
        adapter_sha256: str,
        renderer_hash: str,
        checkpoint_step: int | None,
        proof: dict[str, Any],
    ) -> TunedModel:
        """Make a reserved model ready, inside the caller's transaction. `adapter_path` is relative to the home's `adapters/`.

        Publishing the same adapter again (a control loop that was killed in between) gives the same answer. Raises
        Conflict(`model_not_reserved`) for a model that was deleted or holds another adapter, ValueError without a proof.
        """
        if not proof:
            raise ValueError("a model without proof of effect can't be ready")
        ready = tx.models.change(
            msgspec.structs.replace(model, status="training"),
            status="ready",
            adapter_path=adapter_path,
            adapter_sha256=adapter_sha256,
            renderer_hash=renderer_hash,
            checkpoint_step=checkpoint_step,
            proof=proof,
        )
        ready = ready or tx.models.get(model.project_id, model.id)
        if ready is None or ready.status != "ready" or ready.adapter_sha256 != adapter_sha256:
            raise Conflict(
                "model_not_reserved", mark('The model "{model}" can\'t be published any more.'), model=model.name
            )
        return ready

    def _find(self, project_id: str, name: str) -> TunedModel | None:
        with self._storage.read() as tx:
            return find_model(tx, project_id, name)

    def _delete_checkpoint(self, project_id: str, name: str) -> TunedModel:
        with self._storage.write() as tx:
            checkpoint = find_model(tx, project_id, name)
            if checkpoint is None:
                raise _not_found(name)
            job = tx.jobs.get(project_id, checkpoint.job_id)
            if job is not None and job.finished_at is None:  # its trainer would bring it back
                raise Conflict(
                    "job_not_finished",
                    mark("Job {job} is {status}; its checkpoints can be deleted once it has ended."),
                    job=job.id,
                    status=job.status,
                )
            tx.jobs.drop_checkpoints(project_id, checkpoint.job_id, [checkpoint.checkpoint_step or 0])
            undeployed = tx.deployments.retire_of_models(project_id, [checkpoint.id], clock.wall_s())
        for deployment in undeployed:
            self.on_undeploy(deployment.id)
        self.on_delete(checkpoint)
        self._remove_adapter(checkpoint)
        return checkpoint

    def _base_of(self, tuned: TunedModel) -> Base:
        base = self._catalogue.find(tuned.base_code)
        if base is None:
            raise _not_pulled(tuned.base_code)
        return _pulled(base)

    def _remove_adapter(self, model: TunedModel) -> None:
        """Only below the home's `adapters/`, whatever the row says. What can't be removed is logged: the model is gone."""
        root = self._home.adapters.resolve()
        folder = (root / (model.adapter_path or model.id)).resolve()
        if folder == root or not folder.is_relative_to(root):
            _log.error("adapter_outside_home", model_id=model.id)
            return
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            _log.error("adapter_not_removed", model_id=model.id)


def _is_tuned_name(name: str) -> bool:
    """Names that we make have colons; codes and aliases can't have any (catalogue.check_name)."""
    return ":" in name


def _base_card(base: Base, name: str) -> Card:
    manifest = None if base.path is None else read_manifest(base.path)
    created = 0 if manifest is None else manifest.created_at
    return Card(id=name, created=created, owned_by=_OWNER, parent=None if name == base.code else base.code)


def _tuned_card(model: TunedModel) -> Card:
    return Card(id=model.name, created=model.created_at, owned_by=model.project_id, parent=model.base_code)


def _pulled(base: Base) -> Base:
    if base.path is None:
        raise _not_pulled(base.code)
    return base


def _not_found(name: str) -> NotFound:
    return NotFound(
        "model_not_found",
        mark('The model "{model}" does not exist or is not yours to use.'),
        param="model",
        model=quote(name),
    )


def _not_pulled(code: str) -> InvalidRequest:
    return InvalidRequest(
        "model_not_pulled",
        mark('The weights of "{base}" are not on this machine; run: tunewright models pull {base}'),
        param="model",
        base=code,
    )
