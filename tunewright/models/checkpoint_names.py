"""Checkpoints as models: `{model}:ckpt-step-{n}` stands for the weights that a job had after step n."""

import re
from typing import TYPE_CHECKING, NamedTuple

from tunewright.models.checkpoint_files import relative_path
from tunewright.models.records import FULL, TunedModel

if TYPE_CHECKING:
    from tunewright.jobs.records import JobCheckpoint
    from tunewright.storage.database import Transaction

LONGEST_NAME = 256
_NAME = re.compile(r"(.+):ckpt-step-([1-9][0-9]{0,9})")


class CheckpointName(NamedTuple):
    """`model` is the name of the model that the job makes."""

    model: str
    step: int


def checkpoint_name(model: str, step: int) -> str:
    """What callers put in `model`."""
    return f"{model}:ckpt-step-{step}"


def parse(name: str) -> CheckpointName | None:
    """None if it is not the name of a checkpoint."""
    found = _NAME.fullmatch(name)
    return None if found is None else CheckpointName(found[1], int(found[2]))


def find_model(tx: "Transaction", project_id: str, name: str) -> TunedModel | None:
    """The tuned model of that name, whatever its state, or a checkpoint as one that is ready. None if there is none."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        return None
    wanted = parse(name)
    if wanted is None:
        return tx.models.find(project_id, name)
    owner = tx.models.find(project_id, wanted.model)
    if owner is None or owner.status == "deleted":
        return None
    row = tx.jobs.find_checkpoint(project_id, owner.job_id, wanted.step)
    return None if row is None else as_model(owner, row)


def as_model(owner: TunedModel, row: "JobCheckpoint") -> TunedModel:
    """A checkpoint of the job that makes `owner`. Without a proof its effect has not been measured yet."""
    return TunedModel(
        id=f"{owner.id}-step-{row.step}",
        project_id=owner.project_id,
        name=checkpoint_name(owner.name, row.step),
        base_code=owner.base_code,
        job_id=owner.job_id,
        created_at=row.created_at,
        status="ready",
        adapter_path=relative_path(owner.id, row.step),
        adapter_sha256=row.adapter_sha256,
        renderer_hash=row.renderer_hash,
        checkpoint_step=row.step,
        proof={"kind": FULL} if row.adapter_sha256 is None else row.proof,
    )
