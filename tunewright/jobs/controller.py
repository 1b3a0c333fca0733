"""The loop that moves jobs. Crash-only: it may be killed between any two lines, and start-up is recovery.

One pass looks at every unfinished job, compares what the database says with what the work folder and the processes say, and
makes at most one move for each. A move is one compare-and-set transaction. What happens outside the database (a process
started, an adapter moved) is done so that doing it again, or finding it half done, is harmless. The moves themselves
are in `moves.py`.
"""

import threading
from typing import TYPE_CHECKING

import structlog

from tunewright.accounts.idempotency import forget_expired
from tunewright.clock import mono_s
from tunewright.errors import TunewrightError
from tunewright.jobs.lease import Lease, holder_of
from tunewright.jobs.line import Line
from tunewright.jobs.moves import Moves
from tunewright.jobs.ports import OnEnd, Prover, Runner, nothing_at_end
from tunewright.jobs.preparation import Preparation
from tunewright.jobs.publication import Publication
from tunewright.jobs.rehearsals import Rehearsals
from tunewright.jobs.trainers import Trainers
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.models.catalogue import Catalogue
    from tunewright.models.service import ModelService
    from tunewright.storage import Blobs, Storage

log = structlog.get_logger()

_BUSY_PAUSE_S = 0.2
_IDLE_PAUSE_S = 0.5
_CLEAN_EVERY_S = 3600.0
_LONGEST_BACK_OFF_S = 10.0


class JobController:
    """`start()` runs it in a thread of its own; tests may call `run_once()` instead.

    Only the holder of the lease acts: one for each home unless `lease_holder` names it otherwise.
    """

    def __init__(
        self,
        storage: "Storage",
        blobs: "Blobs",
        catalogue: "Catalogue",
        models: "ModelService",
        home: HomeFolder,
        settings: Settings,
        runner: Runner,
        prover: Prover,
        line: Line,
        *,
        trainer_module: str = "tunewright.recipes.run",
        lease_holder: str | None = None,
        on_end: OnEnd = nothing_at_end,
    ) -> None:
        self._storage = storage
        self._settings = settings
        self._lease = Lease(storage, "jobs", lease_holder or (lambda: holder_of(home)))
        self._trainers = Trainers(home.jobs, runner, trainer_module, settings.heartbeat_limit_s)
        self._moves = Moves(
            storage,
            settings,
            self._trainers,
            Preparation(storage, blobs, catalogue, home, settings),
            Publication(storage, blobs, models, home, prover, on_end),
            Rehearsals(storage, settings, home.jobs, runner, trainer_module),
            prover,
            self.wake,
            on_end,
            line,
        )
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._others_stay = False
        self._thread: threading.Thread | None = None
        self._cleaned_s = mono_s()
        self._troubles: dict[str, tuple[int, float]] = {}
        """Job id -> (moves in a row that raised, monotonic time of the next try)."""

    def start(self) -> None:
        """Recover what an earlier server left, then keep moving jobs."""
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look now: something has changed. May be called from any thread."""
        self._woken.set()

    def stop(self, *, others_stay: bool = False) -> None:
        """End the loop, and treat running trainers as `settings.on_shutdown` says: with `checkpoint` they save and end
        (killed after `cancel_grace_s`) and their jobs wait in the queue, with `continue` they go on alone. If other servers
        stay, one of them has them from now on.

        Takes at most about `cancel_grace_s`. Safe to call twice.
        """
        self._others_stay = others_stay
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(self._settings.cancel_grace_s + 10.0)
            self._thread = None

    def run_once(self) -> bool:
        """One pass; whether there is reason for another one soon. Raises Unavailable if the database does not answer."""
        with self._storage.read() as tx:
            jobs = tx.jobs.unfinished()
        self._moves.begin_pass(jobs)
        if not jobs:
            self._troubles.clear()
            return False
        if not self._lease.held():
            return False
        self._forget_old_keys()
        self._moves.choose_next(jobs, {job_id for job_id, (_, due_s) in self._troubles.items() if mono_s() < due_s})
        active = False
        for job in jobs:
            tries, due_s = self._troubles.get(job.id, (0, 0.0))
            if mono_s() < due_s:
                active = True
                continue
            try:
                active |= self._moves.move(job)
            except Exception as error:
                self._note_trouble(job.id, tries + 1, error)
                self._moves.give_up(job, tries + 1, error)
                active = True
            else:
                self._troubles.pop(job.id, None)
        return active

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                active = self.run_once()
            except TunewrightError as error:
                log.warning("jobs_pass_failed", code=error.code)
                active = False
            except Exception:
                log.exception("jobs_pass_failed")
                active = False
            self._woken.wait(_BUSY_PAUSE_S if active else _IDLE_PAUSE_S)
        try:
            self._shut_down()
        except Exception:  # recovery at the next start does what is missing
            log.exception("jobs_shutdown_failed")

    def _shut_down(self) -> None:
        if not self._lease.held():
            return
        deadline_s = mono_s() + self._settings.cancel_grace_s + 5.0
        parks = self._settings.on_shutdown == "checkpoint" and not self._others_stay
        while parks and mono_s() < deadline_s:
            with self._storage.read() as tx:
                jobs = tx.jobs.unfinished()
            parked = [self._moves.park(job) for job in jobs]  # all at once, not one after another
            if all(parked):
                break
            self._woken.clear()
            self._woken.wait(0.05)
        self._lease.release()

    def _forget_old_keys(self) -> None:
        if mono_s() - self._cleaned_s > _CLEAN_EVERY_S:
            self._cleaned_s = mono_s()
            with self._storage.write() as tx:
                forget_expired(tx)

    def _note_trouble(self, job_id: str, tries: int, error: Exception) -> None:
        """One job's trouble (a full disk, a bug) is tried again later and holds up no other job."""
        pause_s = min(_LONGEST_BACK_OFF_S, 0.25 * 2**tries)
        self._troubles[job_id] = (tries, mono_s() + pause_s)
        if isinstance(error, TunewrightError):
            log.warning("job_move_failed", job=job_id, code=error.code, tries=tries)
        else:
            log.error("job_move_failed", job=job_id, tries=tries, exc_info=error)
