"""One replica as this server knows it, and how a process for it comes up.

`number`, its folder and its record outlive the server; the rest is found out again. Only the reconcile loop changes `state`. The
thread that brings a process up leaves its `outcome`; the probes and the calls say only whether it is `out` of traffic.
"""

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.deployments.decision import BACKING_OFF, DRAINING, READY, Fact
from tunewright.deployments.merging import Merged, MergeOrder, merge_lora
from tunewright.deployments.ports import Prove, WorkerSpec
from tunewright.deployments.records import Deployment, Reason, ReplicaRecord
from tunewright.deployments.worker_client import WorkerGone, WorkerSlow
from tunewright.deployments.workers import MISCONFIGURED, StartFailed, Trouble, Worker, Workers, asks_for, base_spec
from tunewright.errors import TunewrightError
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.ports import Runner
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.rendering.canary import canaries
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.models.service import ModelService

log = structlog.get_logger()

_MERGED = "merged"
"""Beside the folders of the replicas, which share it."""
GOOD_PROBES = 2
"""So often it must answer before it gets calls (again)."""


class Up(msgspec.Struct, frozen=True):
    """A process that answers and whose effect is proven. `current`: it was started with what is asked for now."""

    worker: Worker
    current: bool
    proof: dict[str, Any]


class Replica:
    """`in_flight` counts the calls that were sent to it and have not ended."""

    def __init__(self, folder: Path, record: ReplicaRecord) -> None:
        self.folder = folder
        self.record = record
        self.state = record.state
        self.worker: Worker | None = None
        self.current = True
        self.outcome: Up | Reason | None = None
        self.in_flight = 0
        self.others_calls = 0
        """Those that other servers may have sent to it."""
        self.memory_bytes = 0
        self.ended = False
        """Nobody wants it any more, whatever comes of a start under way."""
        self.out = False
        self.hopeless = False
        """Silent for a second time, or stuck in a step: it is ended."""
        self.stuck_at: list[str] | None = None
        """What it was at then, as far as it could still say."""
        self._silences = 0
        self._good = 0
        self.since_s = mono_s()
        """When it came into its state."""
        self.due_s = mono_s()

    def enter(self, state: str, **changes: Any) -> None:
        """Its new state, and what else of its record changes with that."""
        self.state, self.since_s = state, mono_s()
        self.record = msgspec.structs.replace(self.record, state=state, **changes)

    def suspect(self) -> None:
        """No calls until it has answered twice."""
        self.out, self._good = True, 0

    def cleared(self) -> None:
        """A new process: nothing is held against it."""
        self.out, self.hopeless, self.stuck_at, self._silences = False, False, None, 0

    def heard(self, trouble: Trouble | None) -> None:
        """What a probe found. What one that is silent had begun is ended: nobody waits for it any longer."""
        if trouble is None:
            self._good, self._silences = self._good + 1, 0
            self.out = self.out and self._good < GOOD_PROBES
            return
        self.suspect()
        if trouble.reason == "silent":
            self._silences += 1
        self.stuck_at = trouble.running
        self.hopeless = trouble.reason == "stuck" or self._silences > 1
        if trouble.reason != "died" and self.worker is not None:
            self.worker.client.cut()

    def takes_calls(self) -> bool:
        """Whether a call may be sent to it."""
        return self.state == READY and not self.out and self.worker is not None

    def fact(self, drain_limit_s: float) -> Fact:
        """What the decision needs of it."""
        return Fact(
            number=self.record.number,
            state=self.state,
            current=self.current,
            in_flight=self.in_flight + self.others_calls,
            due=self.state == BACKING_OFF and mono_s() >= self.due_s,
            overdue=self.state == DRAINING and mono_s() - self.since_s >= drain_limit_s,
        )


class BringUp:
    """Starts or finds the process of a replica and proves what it serves. Blocks: call it on a thread of its own."""

    def __init__(
        self,
        home: HomeFolder,
        settings: Settings,
        runner: Runner,
        workers: Workers,
        models: "ModelService",
        stopping: threading.Event,
    ) -> None:
        self._runner = runner
        self._merging = threading.Lock()
        self._home = home
        self._settings = settings
        self._workers = workers
        self._models = models
        self._stopping = stopping

    def run(self, replica: Replica, deployment: Deployment, *, adopt: bool) -> Up | Reason:
        """With `adopt`, a process that an earlier server started is kept if it answers, also an outdated one."""
        try:
            return self._up(replica, deployment, adopt)
        except StartFailed as failure:
            return self._why(replica, failure)
        except TunewrightError as error:
            return Reason(code=error.code, message=error.message, values=_plain(error.values))
        except (WorkerGone, WorkerSlow):
            return Reason(code="replica_died", message=mark("Its process ended while it was being proven."))
        except OSError as error:
            text = mark("The machine can't start a process now: {reason}")
            return Reason(code="replica_start_failed", message=text, values={"reason": error.strerror or "?"})
        except Exception:
            log.exception("replica_start_failed", worker=replica.folder.name)
            return Reason(code="internal_error", message=mark("A bug; the server's log has it."))

    def is_current(self, replica: Replica, deployment: Deployment) -> bool:
        """Whether the process of a replica was started with what is asked for now; if that can't be found out, too."""
        try:
            spec = msgspec.json.decode((replica.folder / "spec.json").read_bytes(), type=WorkerSpec)
            resolved = self._models.resolve(deployment.project_id, deployment.model)
            wanted, _ = self._wanted(deployment, replica.record.number, resolved.base, resolved.tuned)
        except (OSError, msgspec.MsgspecError, TunewrightError, StartFailed):
            return True
        return asks_for(spec, wanted)

    def _up(self, replica: Replica, deployment: Deployment, adopt: bool) -> Up:
        resolved = self._models.resolve(deployment.project_id, deployment.model)
        base, tuned = resolved.base, resolved.tuned
        spec, proof = self._wanted(deployment, replica.record.number, base, tuned)
        if replica.ended:
            raise StartFailed(slow=False, exit_code=None)
        found = self._workers.find(replica.folder) if adopt else None
        worker = self._workers.start(replica.folder, spec) if found is None else found[0]
        replica.worker = worker
        for _ in range(GOOD_PROBES):
            asyncio.run(worker.client.health(self._settings.engine_silence_limit_s))
        if tuned is not None and spec.weights_path is None:
            proof = {"kind": "lora", **self._measured(worker, base, tuned)}
        checked = {"files": len(base.files), "renderer_hash": spec.renderer_hash}
        return Up(worker, found is None or asks_for(found[1], spec), {**proof, **checked})

    def _wanted(
        self, deployment: Deployment, number: int, base: Base, tuned: TunedModel | None
    ) -> tuple[WorkerSpec, dict[str, Any]]:
        """What its process is started with, and what is known of its weights before. The worker itself checks all hashes, that
        it renders as the server does, and that its decoder gives the logits of the model's own code."""
        spec = base_spec(base, self._settings, f"{deployment.id}/{number}")
        if tuned is None:
            return spec, {"kind": "base"}
        if tuned.kind == FULL:
            path, sha256 = self._home.adapters / (tuned.adapter_path or tuned.id), tuned.adapter_sha256
            proof = tuned.proof
        elif deployment.merge:
            path = self._home.workers / deployment.id / _MERGED
            merged = self._merge(path, base, tuned)
            sha256, proof = merged.manifest_sha256, {"kind": "merged", **msgspec.structs.asdict(merged)}
        else:
            return spec, {}
        return msgspec.structs.replace(spec, weights_path=str(path), weights_sha256=sha256), proof

    def _merge(self, target: Path, base: Base, tuned: TunedModel) -> Merged:
        """Base and adapter as one set of weights in `target`; made once for a deployment, one at a time."""
        note = target.with_name(f"{_MERGED}.json")
        with self._merging:
            try:
                if target.is_dir():
                    return msgspec.json.decode(note.read_bytes(), type=Merged)
            except (OSError, msgspec.MsgspecError):
                pass
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            order = MergeOrder(
                base_code=base.code,
                base_path=str(base.path or ""),
                base_files=base.files,
                adapter_path=str(self._home.adapters / (tuned.adapter_path or tuned.id)),
                adapter_sha256=tuned.adapter_sha256 or "",
                prompts=canaries(renderer_of(Path(base.path or ""))),
                target=str(target),
                threads=self._settings.engine_threads,
            )
            folder = self._home.temporary / f"merge-{target.parent.name}"
            limit_s = 2 * self._settings.engine_start_limit_s  # two models are loaded
            merged = merge_lora(self._runner, folder, order, limit_s, self._stopping)
            write_atomically(note, msgspec.json.encode(merged))
            return merged

    def _measured(self, worker: Worker, base: Base, tuned: TunedModel) -> dict[str, Any]:
        """The effect of the adapter in this very process."""
        order = Prove(
            secret="",
            adapter_id=tuned.id,
            adapter_path=str(self._home.adapters / (tuned.adapter_path or tuned.id)),
            adapter_sha256=tuned.adapter_sha256 or "",
            prompts=canaries(renderer_of(Path(base.path or ""))),
        )
        return msgspec.structs.asdict(asyncio.run(worker.client.prove(order)))

    def _why(self, replica: Replica, failure: StartFailed) -> Reason:
        place = {"log": f"{replica.folder.parent.name}/{replica.folder.name}/log.txt"}
        if failure.exit_code == MISCONFIGURED:
            text = mark("It can't be served as it is; the operator finds the cause in workers/{log}.")
            return Reason(code="replica_misconfigured", message=text, values=place)
        if not failure.slow:
            text = mark("Its process ended with code {exit_code} before it was ready; see workers/{log}.")
            return Reason(code="replica_start_failed", message=text, values={"exit_code": failure.exit_code, **place})
        text = mark("Its process was not ready in time; see workers/{log}.")
        return Reason(code="replica_start_slow", message=text, values=place)


def _plain(values: dict[str, object]) -> dict[str, Any]:
    """Values as JSON can keep them."""
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in values.items()
    }
