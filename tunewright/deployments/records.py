"""A private instance as the database has it: a wish, and what became of it."""

from typing import Any

import msgspec

DEPLOYING = "deploying"
READY = "ready"
SCALING = "scaling"
FAILED = "failed"
STOPPED = "stopped"

LIVE = "live"
RETIRED = "retired"


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why something is as it is. `message` is an English template for `values`."""

    code: str
    message: str
    values: dict[str, Any] = {}


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What outlives the process of one replica. `number` names its folder; times are Unix seconds.

    `failures` counts starts in a row that came to nothing and early deaths; `next_try_at` is when it is tried again.
    """

    number: int
    state: str = "starting"
    started_at: int | None = None
    restarts: int = 0
    failures: int = 0
    next_try_at: int | None = None
    reason: Reason | None = None


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is what callers put in `model`, beside `id` and, for a tuned model, the name of that model.

    `phase` is `live` until it is undeployed and `retired` from then on: the row stays, so that a call can be told what became
    of it. `model` is what was asked for and `tuned_model_id` what that stands for (None: a base; of a checkpoint: its own id).
    `asleep`: no replica is wanted until somebody calls. `memory_bytes` is what a replica is known to need, `memory_source` from
    where (`measured`, `estimated`). `proof` is what was measured before the last replica took calls.
    """

    id: str
    project_id: str
    name: str
    model: str
    base_code: str
    tuned_model_id: str | None = None
    replicas: int = 1
    merge: bool = False
    idle_minutes: float | None = None
    phase: str = LIVE
    status: str = DEPLOYING
    asleep: bool = False
    reason: Reason | None = None
    replica_records: tuple[ReplicaRecord, ...] = ()
    memory_bytes: int = 0
    memory_source: str = "estimated"
    proof: dict[str, Any] = {}
    created_at: int
    ready_at: int | None = None
    retired_at: int | None = None

    @property
    def wanted(self) -> int:
        """Replicas that should run now."""
        return 0 if self.asleep or self.phase == RETIRED else self.replicas


class DeploymentEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a deployment. `message` is an English template for `values`."""

    project_id: str
    deployment_id: str
    sequence: int = 0
    """Given by the database, in order."""
    id: str
    level: str = "info"
    code: str
    message: str
    values: dict[str, Any] = {}
    created_at: int
