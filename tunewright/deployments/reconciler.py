"""The loop that makes deployments true: it compares what is wished with what runs, and acts.

Crash-only, like the loop of the jobs: the wish is in the database, the processes are in folders `workers/{deployment}/{number}`,
and start-up is finding them again. What is decided is in `decision.py`, how a process comes up in `replicas.py`.
"""

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tunewright.clock import mono_s, wall_s, wall_s_after
from tunewright.deployments import decision
from tunewright.deployments.decision import BACKING_OFF, DRAINING, READY, SILENT, STARTING, Drain, Start
from tunewright.deployments.probes import Probes
from tunewright.deployments.quarantine import Quarantine
from tunewright.deployments.records import DEPLOYING, FAILED, LIVE, Deployment, Reason, ReplicaRecord
from tunewright.deployments.records import READY as ALL_READY
from tunewright.deployments.replicas import BringUp, Replica, Up
from tunewright.deployments.running import Follower, Running, called_note, event_of
from tunewright.deployments.workers import Worker, Workers
from tunewright.errors import TunewrightError
from tunewright.i18n import mark
from tunewright.jobs.lease import Lease, holder_of
from tunewright.jobs.line import Line, gigabytes
from tunewright.jobs.ports import Runner
from tunewright.notifications.outbox import record_deployment, said_safely
from tunewright.notifications.records import DEPLOYMENT_FAILED, DEPLOYMENT_READY
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.models.service import ModelService
    from tunewright.storage import Storage, Transaction

log = structlog.get_logger()

_BUSY_PAUSE_S = 0.1
_IDLE_PAUSE_S = 0.5
_LOOK_LIMIT_S = 1.0
_MEASURE_EVERY_S = 5.0
_MEMORY_PAUSE_S = 5.0
_YOUNG_S = 30.0
"""A replica that dies sooner after it was ready has failed to start, in effect."""
_GROWN = 1.05
_TOLD_S = 2.0
"""After this long the other servers of the home know what has become of a replica."""


class Reconciler:
    """`start()` runs it in a thread of its own. Only the holder of the lease acts, which is the server of the home."""

    def __init__(
        self,
        storage: "Storage",
        models: "ModelService",
        home: HomeFolder,
        settings: Settings,
        runner: Runner,
        line: Line,
        pool_bytes: Callable[[], int],
        *,
        shared: bool = False,
    ) -> None:
        """`shared`: other servers of the home may send calls to the same replicas, and keep them when this one does not."""
        self._storage = storage
        self._home = home
        self._settings = settings
        self._line = line
        self._pool_bytes = pool_bytes
        self._shared = shared
        self._lease = Lease(storage, "deployments", lambda: holder_of(home))
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._workers = Workers(runner, settings, self._stopping)
        self._bring_up = BringUp(home, settings, runner, self._workers, models, self._stopping)
        self._probes = Probes(self._workers, settings, self._all_replicas, self._stopping, self.wake)
        self.quarantine = Quarantine(settings.engine_silence_limit_s + 1.0)
        self._follower = Follower(home, self._workers, self.quarantine)
        self._running: dict[str, Running] = {}
        self._leads = True
        """Whether the last pass acted, or only followed the server that does."""
        self._followed: set[str] = set()
        """Deployments that are known from following, and not taken over yet."""
        self._expected: dict[str, Deployment] = {}
        """Those that were made or changed since the last pass."""
        self._begun = self._ended = 0
        """Passes."""
        self._swept = False
        self._measured_s = mono_s()
        self._thread: threading.Thread | None = None

    # -- what others call ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find what an earlier server left, then keep every deployment as it is wished."""
        with self._storage.read() as tx:
            self._expected = {deployment.id: deployment for deployment in tx.deployments.live()}
        self._probes.start()
        self._thread = threading.Thread(target=self._run, name="deployments", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look now: something has changed. May be called from any thread."""
        self._woken.set()

    @property
    def leads(self) -> bool:
        """Whether this server keeps the deployments of the home, so that all that is ready was ready here first."""
        return self._leads

    async def look_again(self) -> None:
        """Wait for a pass that begins from now on, a second at most."""
        wanted, deadline_s = self._begun + 1, mono_s() + _LOOK_LIMIT_S
        self.wake()
        while self._ended < wanted and mono_s() < deadline_s:
            await asyncio.sleep(0.01)

    def stop(self, *, others_stay: bool = False) -> None:
        """End the loop and all replicas of this home, which are left to other servers if some stay. Takes no more than a few
        seconds. Safe to call twice."""
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
            self._lease.release()
        if not others_stay:
            self._workers.end_in(path for path in self._home.workers.glob("dep-*/*") if path.is_dir())

    def running(self, deployment_id: str) -> Running | None:
        """What is known of a deployment now; None before the loop has seen it."""
        return self._running.get(deployment_id)

    def workers(self) -> list[Worker]:
        """Of all replicas that have one now."""
        return [replica.worker for replica in self._all_replicas() if replica.worker is not None]

    def retire(self, deployment_id: str) -> None:
        """End all replicas of a deployment that is undeployed (its row says so already), and the answers they give."""
        self._expected.pop(deployment_id, None)
        running = self._running.get(deployment_id)
        if running is not None:
            running.retired = True
            for replica in list(running.replicas):
                self._end(replica)
        self.wake()

    def promised_bytes(self) -> int:
        """What replicas hold, or will need to become as many as wished. Jobs leave so much alone."""
        wishes = {running.deployment.id: running.deployment for running in list(self._running.values())}
        wishes |= self._expected
        held = {running.deployment.id: running.held_bytes() for running in list(self._running.values())}
        return sum(max(each.wanted * each.memory_bytes, held.get(each.id, 0)) for each in wishes.values())

    def expect(self, deployment: Deployment) -> None:
        """A deployment that was just made or changed counts for `promised_bytes` from now on, not from the next pass."""
        self._expected[deployment.id] = deployment
        self.wake()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            self._begun += 1
            try:
                active = self.run_once()
            except TunewrightError as error:
                log.warning("deployments_pass_failed", code=error.code)
                active = False
            except Exception:
                log.exception("deployments_pass_failed")
                active = False
            self._ended = self._begun
            self._woken.wait(_BUSY_PAUSE_S if active else _IDLE_PAUSE_S)

    def run_once(self) -> bool:
        """One pass; whether there is reason for another one soon. Raises Unavailable if the database does not answer."""
        with self._storage.read() as tx:
            wishes = tx.deployments.live()
        for deployment in wishes:
            self._expected.pop(deployment.id, None)
        if not wishes and not self._running and (self._swept or not self._leads):
            return False
        if not self._lease.held():
            self._leads = False
            self._follower.follow(self._running, wishes)
            self._followed = set(self._running)
            return any(each.status != ALL_READY for each in wishes)
        self._leads = True
        self._drop_others({deployment.id for deployment in wishes})
        self._measure()
        active = False
        for deployment in wishes:
            try:
                active |= self._reconcile(deployment)
            except Exception:  # one's trouble holds up no other
                log.exception("deployment_failed", deployment=deployment.id)
        return active

    def _drop_others(self, ids: set[str]) -> None:
        for deployment_id in set(self._running) - ids:
            running = self._running.pop(deployment_id)
            running.retired = True
            for replica in running.replicas:
                self._end(replica)
            shutil.rmtree(self._home.workers / deployment_id, ignore_errors=True)
        if not self._swept:
            for folder in self._home.workers.glob("dep-*"):
                if folder.name not in ids:
                    self._kill_in(folder)
                    shutil.rmtree(folder, ignore_errors=True)
            self._swept = True

    def _kill_in(self, folder: Path) -> None:
        for path in folder.glob("*"):
            self._workers.kill_in(path)

    def _reconcile(self, deployment: Deployment) -> bool:
        running = self._running.get(deployment.id)
        if running is None or deployment.id in self._followed:
            self._followed.discard(deployment.id)
            running = self._running[deployment.id] = self._found(deployment, running)
        running.deployment = deployment
        for replica in list(running.replicas):
            self._look_at(running, replica)
        if self._falls_asleep(running):
            running.tell("asleep", mark("Nobody called for {minutes} minutes; it starts again with the next call."),
                         minutes=deployment.idle_minutes)  # fmt: skip
            deployment = self._store(running, asleep=True)
        limit_s = self._settings.replica_drain_s
        facts = [replica.fact(limit_s) for replica in running.replicas]
        for action in decision.decide(deployment.wanted, facts, running.next_number):
            self._act(running, action)
        self._settle(running)
        return running.deployment.status != ALL_READY and running.deployment.wanted > 0

    def _found(self, deployment: Deployment, followed: Running | None = None) -> Running:
        """The replicas that the row and the folders tell of. Those that wait for another try go on waiting, and those that are
        known from having `followed` another server go on taking calls."""
        running = followed or Running(deployment)
        known = {replica.record.number: replica for replica in running.replicas if replica.worker is not None}
        replicas: list[Replica] = []
        records = {record.number: record for record in deployment.replica_records}
        folder = self._home.workers / deployment.id
        if not deployment.wanted and followed is None:
            self._kill_in(folder)
            return running
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.isdecimal():
                records.setdefault(int(path.name), ReplicaRecord(number=int(path.name)))
        for number, record in sorted(records.items()):
            replica = known.get(number) or Replica(folder / str(number), record)
            replicas.append(replica)
            running.next_number = max(running.next_number, number + 1)
            if replica.worker is not None:
                replica.current = self._bring_up.is_current(replica, deployment)
            elif record.state == BACKING_OFF:
                wait_s = (record.next_try_at or 0) - wall_s()
                replica.due_s = mono_s() + min(max(wait_s, 0), decision.LONGEST_PAUSE_S)
            else:
                replica.enter(STARTING)
                self._start(running, replica, adopt=True)
        running.replicas = replicas
        return running

    def _look_at(self, running: Running, replica: Replica) -> None:
        """Bring the replica's state up to what became of its process."""
        replica.others_calls = self._calls_of_others(replica) if self._shared else 0
        number = replica.record.number
        if replica.state == STARTING and replica.outcome is not None:
            outcome, replica.outcome = replica.outcome, None
            if isinstance(outcome, Reason):
                self._failed(running, replica, outcome)
                return
            self._takes_calls(running, replica, outcome)
        elif replica.state in (READY, SILENT, DRAINING) and replica.worker is not None:
            if not self._workers.alive(replica.worker):
                self._died(running, replica, Reason(code="replica_died", message=mark("Its process died.")))
            elif replica.hopeless:
                self._workers.kill(replica.worker)
                text = mark("It did not say how it is, or stayed in one step for too long; it was ended.")
                self._died(running, replica, Reason(code="replica_silent", message=text))
            elif replica.state == READY and replica.out:
                replica.enter(SILENT)
                text = mark("Replica {number} does not say how it is; it gets no calls.")
                running.tell("replica_silent", text, "warning", number=number)
            elif replica.state == SILENT and not replica.out:
                replica.enter(READY)
                running.tell("replica_ready", mark("Replica {number} takes calls."), number=number)
            elif replica.state == READY and replica.record.failures and mono_s() - replica.since_s > _YOUNG_S:
                replica.enter(READY, failures=0, reason=None)

    def _calls_of_others(self, replica: Replica) -> int:
        """How many calls of other servers it may have."""
        if replica.worker is None or replica.state not in (READY, DRAINING):
            return 0
        if replica.state == READY or mono_s() - replica.since_s < _TOLD_S:
            return 1  # none that we know of, but one may be on its way
        return max(0, self._workers.calls(replica.worker) - replica.in_flight)

    def _takes_calls(self, running: Running, replica: Replica, up: Up) -> None:
        replica.worker, replica.current = up.worker, up.current
        replica.cleared()
        running.called_s = mono_s()
        replica.enter(READY, started_at=wall_s(), next_try_at=None)
        running.tell("replica_ready", mark("Replica {number} takes calls."), number=replica.record.number)
        replica.memory_bytes = self._workers.memory_bytes(up.worker)
        if up.current:
            self._store(running, proof=up.proof)
        self._keep_memory(running, replica.memory_bytes)

    def _died(self, running: Running, replica: Replica, reason: Reason) -> None:
        if replica.worker is not None:
            self.quarantine.died(replica.worker.process.pid, replica.stuck_at)
        if replica.state == DRAINING:
            replica.since_s = float("-inf")  # as if it had drained for as long as it may
            return
        young = mono_s() - replica.since_s < _YOUNG_S
        replica.record = msgspec.structs.replace(replica.record, restarts=replica.record.restarts + 1)
        self._failed(running, replica, reason, counts=young or replica.record.failures > 0)

    def _failed(self, running: Running, replica: Replica, reason: Reason, *, counts: bool = True) -> None:
        replica.worker, replica.memory_bytes = None, 0
        failures = replica.record.failures + counts
        pause_s = decision.pause_s(failures)
        replica.due_s = mono_s() + pause_s
        replica.enter(BACKING_OFF, failures=failures, next_try_at=wall_s() + round(pause_s), reason=reason)
        log.error("replica_lost", deployment=running.deployment.id, number=replica.record.number, reason=reason.code)
        text = mark("Replica {number} is not there ({reason}); it is started again after {seconds} s.")
        running.tell(reason.code, text, "warning", number=replica.record.number, reason=reason.code, seconds=pause_s)

    # -- acting -------------------------------------------------------------------------------------------------------

    def _act(self, running: Running, action: decision.Action) -> None:
        replica = next((each for each in running.replicas if each.record.number == action.number), None)
        if isinstance(action, Start):
            if replica is None:
                folder = self._home.workers / running.deployment.id / str(action.number)
                replica = Replica(folder, ReplicaRecord(number=action.number, state=BACKING_OFF))
                running.replicas.append(replica)
                running.next_number = max(running.next_number, action.number + 1)
            if self._has_memory(running, replica):
                replica.enter(STARTING, next_try_at=None)
                self._start(running, replica, adopt=False)
        elif replica is not None and isinstance(action, Drain):
            replica.enter(DRAINING)
        elif replica is not None:
            self._end(replica)
            running.replicas.remove(replica)
            shutil.rmtree(replica.folder, ignore_errors=True)
            running.tell("replica_ended", mark("Replica {number} has ended."), number=replica.record.number)

    def _start(self, running: Running, replica: Replica, *, adopt: bool) -> None:
        deployment = running.deployment

        def bring_up() -> None:
            outcome = self._bring_up.run(replica, deployment, adopt=adopt)
            replica.outcome = outcome
            if replica.ended:  # while it started; what it made meanwhile goes too
                self._end(replica)
                shutil.rmtree(replica.folder.parent if running.retired else replica.folder, ignore_errors=True)
            self.wake()

        threading.Thread(target=bring_up, name=f"start-{deployment.id}", daemon=True).start()

    def _end(self, replica: Replica) -> None:
        replica.ended = True
        replica.suspect()
        self._workers.kill_in(replica.folder)

    def _has_memory(self, running: Running, replica: Replica) -> bool:
        need, free = running.deployment.memory_bytes, self._free_bytes()
        if need <= free:
            return True
        replica.due_s = mono_s() + _MEMORY_PAUSE_S
        reason = Reason(
            code="insufficient_memory",
            message=mark("It needs {need} GB of memory; {free} GB are free."),
            values={"need": gigabytes(need), "free": gigabytes(free)},
        )
        if replica.record.reason is None or replica.record.reason.code != reason.code:
            running.tell(reason.code, reason.message, "warning", **reason.values)
        replica.enter(BACKING_OFF, reason=reason, next_try_at=wall_s() + round(_MEMORY_PAUSE_S))
        return False

    def left_bytes(self, tx: "Transaction") -> int:
        """What is left for more wishes beside the pool, running jobs and all that replicas were promised."""
        return self._line.left_bytes(tx.jobs.unfinished(), self._pool_bytes()) - self.promised_bytes()

    def _free_bytes(self) -> int:
        """What is left beside the pool, running jobs and the replicas that run or start now."""
        with self._storage.read() as tx:
            left = self._line.left_bytes(tx.jobs.unfinished(), self._pool_bytes())
        return left - sum(
            max(running.deployment.memory_bytes, replica.memory_bytes)
            for running in list(self._running.values())
            for replica in list(running.replicas)
            if replica.state != BACKING_OFF
        )

    def _falls_asleep(self, running: Running) -> bool:
        deployment = running.deployment
        return (
            deployment.idle_minutes is not None
            and deployment.status == ALL_READY
            and not running.in_flight()
            and mono_s() - running.called_s >= deployment.idle_minutes * 60
            and not (self._shared and self._called_elsewhere(deployment, deployment.idle_minutes * 60))
        )

    def _called_elsewhere(self, deployment: Deployment, within_s: float) -> bool:
        try:
            return wall_s() - called_note(self._home, deployment).stat().st_mtime < within_s
        except FileNotFoundError:
            return False

    # -- what is stored -----------------------------------------------------------------------------------------------

    def _settle(self, running: Running) -> None:
        """Store what has changed; the message that a deployment is ready or has failed goes with that."""
        deployment = running.deployment
        facts = [replica.fact(self._settings.replica_drain_s) for replica in running.replicas]
        records = tuple(replica.record for replica in running.replicas)
        status = decision.status_of(
            deployment.wanted,
            facts,
            failures=max((record.failures for record in records), default=0),
            was_ready=deployment.ready_at is not None,
        )
        reason = next((record.reason for record in records if record.state == BACKING_OFF), None)
        wanted: dict[str, Any] = {"status": status, "replica_records": records, "reason": reason}
        if status == ALL_READY and deployment.ready_at is None:
            wanted["ready_at"] = wall_s_after(deployment.created_at)
        changes = {name: value for name, value in wanted.items() if getattr(deployment, name) != value}
        if changes or running.news:
            self._store(running, **changes)

    def _store(self, running: Running, **changes: Any) -> Deployment:
        before, news = running.deployment, list(running.news)
        with self._storage.write() as tx:
            after = tx.deployments.change(before, **changes) if changes else before
            if after is not None:
                for event in news:
                    tx.deployments.add_event(event)
                self._announce(tx, before, after)
        running.news = running.news[len(news) :]
        running.deployment = after or before  # undeployed meanwhile: the next pass sees that
        return running.deployment

    def _announce(self, tx: "Transaction", before: Deployment, after: Deployment) -> None:
        facts: dict[str, Any] = {"model": after.name, "base": after.base_code, "status": after.status}
        if after.status == ALL_READY and before.status in (DEPLOYING, FAILED):
            tx.deployments.add_event(event_of(after, "ready", mark("All replicas take calls.")))
            record_deployment(tx, after.project_id, DEPLOYMENT_READY, after.id, facts)
        if after.status == FAILED and before.status != FAILED:
            text = mark("No replica takes calls; starting one has failed several times.")
            tx.deployments.add_event(event_of(after, "failed", text, "error"))
            if after.reason is not None:
                facts["error"] = said_safely(after.reason.code, after.reason.message, after.reason.values)
            record_deployment(tx, after.project_id, DEPLOYMENT_FAILED, after.id, facts)

    def _measure(self) -> None:
        if mono_s() - self._measured_s < _MEASURE_EVERY_S:
            return
        self._measured_s = mono_s()
        for running in self._running.values():
            for replica in running.replicas:
                if replica.worker is not None and replica.state in (READY, DRAINING):
                    replica.memory_bytes = self._workers.memory_bytes(replica.worker)
                    self._keep_memory(running, replica.memory_bytes)

    def _keep_memory(self, running: Running, size_bytes: int) -> None:
        """Remember the most that a replica was found to hold: the next one of this model is placed by it."""
        deployment = running.deployment
        measured = deployment.memory_source == "measured"
        if size_bytes and deployment.phase == LIVE and (not measured or size_bytes > _GROWN * deployment.memory_bytes):
            self._store(running, memory_bytes=size_bytes, memory_source="measured")

    def _all_replicas(self) -> list[Replica]:
        return [replica for running in list(self._running.values()) for replica in list(running.replicas)]
