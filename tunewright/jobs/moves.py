"""What the control loop does with one job in each state: one method for each state, one transaction for each move."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import structlog

from tunewright.clock import mono_s, wall_s_after
from tunewright.errors import TunewrightError, Unavailable
from tunewright.i18n import mark
from tunewright.jobs import events, progress, recovery, rehearsals
from tunewright.jobs.errand import Errands
from tunewright.jobs.failing import Failing
from tunewright.jobs.journal_reader import Terminal, read_batch
from tunewright.jobs.last_words import evidence_in, evidence_of, recognise
from tunewright.jobs.line import Line, gigabytes
from tunewright.jobs.ports import OnEnd, Prover
from tunewright.jobs.preparation import Preparation, Prepared
from tunewright.jobs.publication import Proven, Publication
from tunewright.jobs.records import (
    CANCELLED,
    CANCELLING,
    FAILED,
    MOVES,
    PAUSED,
    QUEUED,
    RUNNING,
    VALIDATING,
    Job,
    JobEvent,
)
from tunewright.jobs.rehearsals import Broken, Rehearsals
from tunewright.jobs.signatures import PREEMPTED
from tunewright.jobs.spec import Failed, Finished, Hyperparameters, Stopped
from tunewright.jobs.trainers import Trainers
from tunewright.jobs.turns import Turns
from tunewright.models.records import FULL
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()
T = TypeVar("T")

_LINGER_S = 5.0
"""How long a trainer may take to leave after its last record."""
_PAUSE_PATIENCE_S = 60.0
"""A pause is not urgent: a long step may end and be saved."""
_PROOF_PATIENCE_S = 600.0
"""How long an engine that can't be asked is waited for before a whole training is given up."""
_MOST_BUG_TRIES = 8


class Moves:
    """Remembers only what may be forgotten: slow calls under way, attempts known to have ended, delays."""

    def __init__(
        self,
        storage: "Storage",
        settings: Settings,
        trainers: Trainers,
        preparation: Preparation,
        publication: Publication,
        rehearsals: Rehearsals,
        prover: Prover,
        wake: Callable[[], None],
        on_end: OnEnd,
        line: Line,
    ) -> None:
        self._storage = storage
        self._settings = settings
        self._trainers = trainers
        self._preparation = preparation
        self._publication = publication
        self._rehearsals = rehearsals
        self._prover = prover
        self._wake = wake
        self._on_end = on_end
        self._line = line
        self._failing = Failing(storage, preparation, publication, on_end)
        self._turns = Turns(storage, line, trainers, rehearsals, prover)
        self._settled: dict[str, int] = {}
        """Job id -> the attempt of which no process is left and whose whole journal is stored."""
        self._errands = Errands(wake)
        self._warmed: set[str] = set()
        self._proof_since_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}
        self._states: dict[str, Callable[[Job], bool]] = {
            VALIDATING: self._validating,
            QUEUED: self._queued,
            RUNNING: self._running,
            CANCELLING: self._cancelling,
            PAUSED: self._paused,
        }

    def begin_pass(self, jobs: list[Job]) -> None:
        """Forget jobs that have ended."""
        ids = {job.id for job in jobs}
        for memory in (self._settled, self._proof_since_s, self._not_before_s):
            for job_id in set(memory) - ids:
                del memory[job_id]
        self._warmed &= ids
        self._trainers.forget_others(ids)
        self._rehearsals.forget_others(ids)
        self._errands.forget_others(ids)

    def choose_next(self, jobs: list[Job], resting: Collection[str]) -> None:
        """Decide whose turn it is. Jobs that are `resting` after a trouble are passed over in this pass."""
        busy = [job for job in jobs if self._takes_place(job)]
        waiting = [job for job in jobs if job.status == QUEUED and job not in busy and job.id not in resting]
        waiting = [job for job in waiting if job.resources and mono_s() >= self._not_before_s.get(job.id, 0.0)]
        self._turns.choose(jobs, busy, waiting)

    def move(self, job: Job) -> bool:
        """At most one step for `job`; whether there is reason to look again soon. Anything raised may be tried again."""
        return self._states[job.status](job)

    def park(self, job: Job) -> bool:
        """The server is about to end: bring the trainer to its end too. True once nothing is left to do for `job`."""
        if job.status == CANCELLING:
            return not self._cancelling(job)
        if job.status == PAUSED:
            return not self._paused(job)
        if job.status == VALIDATING:
            return self._rehearsals.park(job, self._settings.cancel_grace_s)
        if job.status != RUNNING:
            return True
        ended = self._trainers.end(job, self._settings.cancel_grace_s)
        followed = self._follow(job)
        if followed is None or not ended:
            return False
        job, terminal = followed
        if isinstance(terminal, Finished | Failed):
            return True  # the next server reads the record again and acts on it
        text = mark("The server is shutting down; the job goes on when it is back")
        return self._requeue(job, events.message(job, "parked", text))

    def give_up(self, job: Job, tries: int, error: Exception) -> None:
        """Fail a job whose move has a bug, after enough tries. A full disk or a busy database is waited for instead."""
        if tries < _MOST_BUG_TRIES or isinstance(error, OSError | TunewrightError) or FAILED not in MOVES[job.status]:
            return
        self._trainers.kill(job)
        self._rehearsals.kill(job)
        text = mark("An internal error stopped this job. The server's log has the details.")
        self._failing.fail(job, "internal_error", text, None, {})

    # --- validating -------------------------------------------------------------------------------------------------

    def _validating(self, job: Job) -> bool:
        if rehearsals.is_under_way(job):
            self._follow_rehearsal(job)
            return True
        if rehearsals.is_waiting(job):
            if not job.resources:
                self._note_needs(job)
            elif not self._fails_for_size(job) and self._turns.rehearsal == job.id:
                self._start_rehearsal(job)
            return True
        errand = self._errands.result_of(job, "prepare", lambda: self._prepared(job))
        if errand is None:
            return True
        try:
            prepared, reason = errand.result()
        except TunewrightError as error:
            self._failing.fail_unless_temporary(job, error)
            return True
        changes: dict[str, Any] = {"hyperparameters": _as_dict(prepared.hyperparameters)}
        if reason is None:
            changes["rehearsal"] = job.rehearsal | {"status": rehearsals.WAITING}
        else:
            changes["rehearsal"] = job.rehearsal | {"status": rehearsals.SKIPPED, "reason": reason}
            changes["status"] = QUEUED
        with self._storage.write() as tx:
            changed = tx.jobs.change(job, **changes)
            if changed is not None:
                tx.jobs.add_events(events.prepared(changed, prepared.choice, prepared.leaked))
        self._wake()
        return True

    def _prepared(self, job: Job) -> tuple[Prepared, str | None]:
        """What is known of the job, and why it needs no rehearsal, if it needs none. Slow."""
        prepared = self._preparation.prepare(job)
        return prepared, self._rehearsals.reason_to_skip(job, self._preparation.base(job), prepared)

    # --- rehearsing (a validating job, too) ---------------------------------------------------------------------------

    def _start_rehearsal(self, job: Job) -> None:
        try:
            spec = self._line.within_limits(job, self._preparation.spec(msgspec.structs.replace(job, attempt=1)))
        except TunewrightError as error:
            self._failing.fail_unless_temporary(job, error)
            return
        self._rehearsals.start(job, spec)

    def _follow_rehearsal(self, job: Job) -> None:
        outcome = self._rehearsals.follow(job)
        if outcome is None:
            return
        if isinstance(outcome, Broken):
            failed = outcome.failed
            self._failing.fail(
                job,
                failed.code,
                failed.message,
                failed.param,
                failed.values,
                signature=outcome.signature,
                evidence=outcome.evidence,
                rehearsal=job.rehearsal | {"status": rehearsals.FAILED},
            )
        else:
            self._rehearsals.store(job, outcome, self._preparation.price_per_million_tokens(job))
        self._rehearsals.clean(job)
        self._wake()

    # --- queued -----------------------------------------------------------------------------------------------------

    def _queued(self, job: Job) -> bool:
        if self._unsettled(job):  # paused and resumed before its trainer was gone, or a new server
            followed = self._settle(job, self._settings.cancel_grace_s)
            if followed is None:
                return True
            if isinstance(followed[1], Finished | Failed):  # it had come to its end after all
                with self._storage.write() as tx:
                    tx.jobs.change(job, status=RUNNING)
                return True
        elif not job.resources:
            self._note_needs(job)
        elif self._fails_for_size(job):
            pass
        elif self._turns.start == job.id:
            self._start(job, self._turns.passed)
        return True

    def _takes_place(self, job: Job) -> bool:
        """Whether a trainer of the job is there, or its place is kept for the moment until it is started again."""
        if job.status in (RUNNING, CANCELLING) or self._unsettled(job) or rehearsals.is_under_way(job):
            return True
        left_s = self._not_before_s.get(job.id, 0.0) - mono_s()
        return job.status == QUEUED and job.interrupted and 0 < left_s <= recovery.LONGEST_DELAY_S

    def _note_needs(self, job: Job) -> None:
        room = self._line.room()
        try:
            resources = self._preparation.needs(job, room.most_memory_bytes, room.gpus)
        except TunewrightError as error:
            self._failing.fail_unless_temporary(job, error)
            return
        with self._storage.write() as tx:
            tx.jobs.change(job, resources=resources)
        self._wake()

    def _fails_for_size(self, job: Job) -> bool:
        """A job that can never have the memory it needs is told so at once, not left waiting."""
        most = self._line.room().most_memory_bytes
        if job.resources["memory_bytes"] <= most:
            return False
        text = mark("This job needs {need} GB of memory, and this machine has {most} GB for training.")
        values = {"need": gigabytes(job.resources["memory_bytes"]), "most": gigabytes(most)}
        self._failing.fail(job, "not_enough_memory", text, None, values)
        return True

    def _start(self, job: Job, passed: list[Job]) -> None:
        try:
            spec = self._preparation.spec(msgspec.structs.replace(job, attempt=job.attempt + 1))
            spec = self._line.within_limits(job, spec)
        except TunewrightError as error:
            self._failing.fail_unless_temporary(job, error)
            return
        with self._storage.write() as tx:
            started = tx.jobs.change(
                job,
                status=RUNNING,
                attempt=job.attempt + 1,
                journal_offset=0,
                running_at=job.running_at or wall_s_after(job.created_at),
                interrupted=False,
            )
            for other in passed if started is not None else ():
                tx.jobs.change(other, passes=other.passes + 1)
        if started is None:
            return
        try:
            self._trainers.launch(started, spec)
        except OSError:
            self._requeue(started, None)
            raise
        log.info("trainer_started", job=job.id, attempt=started.attempt)
        self._warm(started)

    # --- running ----------------------------------------------------------------------------------------------------

    def _running(self, job: Job) -> bool:
        self._warm(job)
        alive = self._trainers.alive(job)  # before reading: what a dead trainer wrote is all there
        followed = self._follow(job)
        if followed is None:
            return True
        job, terminal = followed
        if terminal is None:
            if not alive:
                self._died(job)
            elif self._trainers.silent(job) and self._trainers.kill(job):
                self._say_silent(job)
        elif self._trainers.end(job, _LINGER_S, ask=False):
            if isinstance(terminal, Finished):
                self._finish(job, terminal)
            elif isinstance(terminal, Failed) and terminal.code == "insufficient_storage":
                self._wait_for_room(job, terminal)
            elif isinstance(terminal, Failed):
                evidence = evidence_in(self._trainers.death(job).log)  # how it ended after its last word is none
                self._failing.fail(
                    job, terminal.code, terminal.message, terminal.param, terminal.values, evidence=evidence
                )
            elif isinstance(terminal, Stopped):
                self._preempted(job, terminal)
        return True

    def _died(self, job: Job) -> None:
        """No last record, no process: start again from the last checkpoint, unless that is of no use."""
        if not self._trainers.end(job, 0.0):
            return
        if not self._trainers.known(job):  # the earlier server died before it could start one
            self._requeue(job, None)
            return
        death = self._trainers.death(job)
        signature, evidence = recognise(death), evidence_of(death)
        with self._storage.read() as tx:
            step = progress.last_checkpoint_step(tx, job)
            halved = tx.jobs.has_event(job.project_id, job.id, recovery.MICRO_BATCH_HALVED)
        verdict = recovery.judge(
            signature,
            failures=job.failures,
            step=job.step,
            checkpoint_step=step,
            halved=halved,
            max_attempts=self._settings.max_attempts,
        )
        log.warning("trainer_died", job=job.id, attempt=job.attempt, cause=signature.name, evidence=evidence)
        if verdict.fatal:
            self._failing.fail(
                job, verdict.code, verdict.text, None, verdict.values, signature=signature, evidence=evidence
            )
            return
        self._not_before_s[job.id] = mono_s() + verdict.delay_s
        event = events.message(job, verdict.code, verdict.text, level="warn", **verdict.values)
        self._requeue(job, event, failures=verdict.failures)

    def _preempted(self, job: Job, stopped: Stopped) -> None:
        """Somebody asked the trainer to end, but not we: a node that shuts down, a person, a server that then died."""
        self._not_before_s[job.id] = mono_s() + recovery.PREEMPTED_DELAY_S
        places = {"step": job.step, "checkpoint": stopped.step}
        self._requeue(job, events.message(job, PREEMPTED, recovery.PREEMPTED_TEXT, level="warn", **places))

    def _wait_for_room(self, job: Job, failed: Failed) -> None:
        """A full disk says nothing about the job: it goes on from its last checkpoint when there is room again."""
        log.error("job_waits_for_room", job=job.id, code=failed.code, step=job.step)
        self._not_before_s[job.id] = mono_s() + recovery.ROOM_DELAY_S
        values = {name: value for name, value in failed.values.items() if name != "level"}
        self._requeue(job, events.message(job, failed.code, failed.message, level="warn", **values))

    def _finish(self, job: Job, finished: Finished) -> None:
        errand = self._errands.result_of(
            job, "prove", lambda: self._publication.prove(job, self._preparation.base(job), finished)
        )
        if errand is None:
            return
        try:
            proven: Proven = errand.result()
            changed = self._publication.commit(job, finished, proven)
        except Unavailable as error:
            if mono_s() - self._proof_since_s.setdefault(job.id, mono_s()) < _PROOF_PATIENCE_S:
                raise
            self._failing.fail(job, error.code, error.message, error.param, error.values)
            return
        except TunewrightError as error:
            self._failing.fail_unless_temporary(job, error)
            return
        if changed is not None:
            log.info("job_succeeded", job=job.id, model=job.tuned_model_name)

    # --- cancelling, paused -----------------------------------------------------------------------------------------

    def _cancelling(self, job: Job) -> bool:
        if not self._rehearsals.end(job, self._settings.cancel_grace_s):
            return True
        followed = self._settle(job, self._settings.cancel_grace_s)
        if followed is None:
            return True
        job, _ = followed  # also after `finished`: who cancelled in time gets no model
        with self._storage.write() as tx:
            changed = tx.jobs.change(
                job,
                status=CANCELLED,
                finished_at=wall_s_after(job.created_at, job.running_at),
                estimated_finish=None,
                trained_tokens=progress.tokens_so_far(tx, job),
            )
            if changed is not None:
                tx.jobs.add_events([events.message(changed, "cancelled", mark("The job was cancelled"))])
                self._on_end(tx, changed)
        if changed is not None:
            self._publication.withdraw(job)
        return False

    def _paused(self, job: Job) -> bool:
        return self._unsettled(job) and self._settle(job, _PAUSE_PATIENCE_S) is None

    # --- shared -----------------------------------------------------------------------------------------------------

    def _unsettled(self, job: Job) -> bool:
        """Whether a job without a trainer of its own right may still have one that is ending."""
        return job.status in (QUEUED, PAUSED) and job.attempt > 0 and self._settled.get(job.id) != job.attempt

    def _settle(self, job: Job, grace_s: float) -> tuple[Job, Terminal | None] | None:
        """Bring the attempt to its end: no process left, its whole journal stored. None until that is so."""
        ended = job.attempt == 0 or self._trainers.end(job, grace_s)
        followed = self._follow(job)
        if followed is None or not ended:
            return None
        self._settled[job.id] = job.attempt
        return followed

    def _follow(self, job: Job) -> tuple[Job, Terminal | None] | None:
        """Store all that the journal has, and return the record that ended the attempt if it is there. None if the job
        was changed by somebody else meanwhile: the next pass sees the change."""
        while True:
            batch = read_batch(self._trainers.journal(job), job.journal_offset)
            if batch.offset > job.journal_offset:
                checkpoints = self._publication.take_checkpoints(job, batch)
                with self._storage.write() as tx:
                    changed = progress.store(tx, job, batch, checkpoints)
                if changed is None:
                    return None
                job = changed
                if checkpoints:
                    self._publication.drop_checkpoints(job)
            if batch.terminal is not None or not batch.more:
                return job, batch.terminal

    def _requeue(self, job: Job, event: JobEvent | None, **changes: object) -> bool:
        """Back into the queue: `job` has no process any more and its journal is stored. False if it was changed."""
        with self._storage.write() as tx:
            changed = tx.jobs.change(job, status=QUEUED, estimated_finish=None, interrupted=True, **changes)
            if changed is None:
                return False
            if event is not None:
                tx.jobs.add_events([event])
        self._settled[job.id] = job.attempt
        return True

    def _say_silent(self, job: Job) -> None:
        text = mark("The trainer gave no sign of life for {seconds} s and was ended")
        seconds = self._settings.heartbeat_limit_s
        with self._storage.write() as tx:
            tx.jobs.add_events([events.message(job, "trainer_silent", text, level="warn", seconds=round(seconds))])

    def _warm(self, job: Job) -> None:
        """Once for each job and server. Nothing depends on it but the time to the first answer, and the pool gives none from
        a whole model."""
        if job.id in self._warmed or job.training_type == FULL:
            return
        self._warmed.add(job.id)
        try:
            self._prover.warm(self._preparation.base(job))
        except Exception:
            log.exception("warming_failed", job=job.id)


def _as_dict(hyperparameters: Hyperparameters) -> dict[str, Any]:
    return msgspec.to_builtins(hyperparameters)
