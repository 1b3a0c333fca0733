"""Whose turn it is in one pass of the control loop: to train, and to be rehearsed."""

from typing import TYPE_CHECKING

from tunewright.clock import mono_s
from tunewright.jobs.line import Line
from tunewright.jobs.ports import Prover
from tunewright.jobs.records import Job
from tunewright.jobs.rehearsals import Rehearsals, is_under_way
from tunewright.jobs.trainers import Trainers

if TYPE_CHECKING:
    from tunewright.storage import Storage

_MEASURE_EVERY_S = 2.0


class Turns:
    """At most one start of each kind in a pass; the next pass sees what it changed."""

    def __init__(
        self, storage: "Storage", line: Line, trainers: Trainers, rehearsals: Rehearsals, prover: Prover
    ) -> None:
        self._storage = storage
        self._line = line
        self._trainers = trainers
        self._rehearsals = rehearsals
        self._prover = prover
        self._measured_s = -_MEASURE_EVERY_S
        self.start: str | None = None
        """Id of the queued job that may start now."""
        self.passed: list[Job] = []
        """Those ahead of it for which memory is too small now."""
        self.rehearsal: str | None = None
        """Id of the validating job that may be rehearsed now."""

    def choose(self, jobs: list[Job], busy: list[Job], waiting: list[Job]) -> None:
        """`busy` take places, `waiting` are queued and may start."""
        self.start, self.passed = None, []
        if waiting and len(busy) < self._line.room().places:
            self._measure(busy)
            with self._storage.read() as tx:
                found = self._line.next_start(tx, waiting, busy)
            if found is not None:
                self.start, self.passed = found[0].id, found[1]
        self.rehearsal = self._next_rehearsal(jobs, busy)

    def _next_rehearsal(self, jobs: list[Job], busy: list[Job]) -> str | None:
        """One at a time, also beside as many trainers as may run: it is short, and a failure should be known soon. But never
        beyond the memory, and it takes no place from a queued job that is about to start."""
        if self.start is not None or any(is_under_way(job) for job in jobs):
            return None
        due = [job for job in jobs if self._rehearsals.is_due(job) and job.resources]
        if due:
            self._measure(busy)
        return next((job.id for job in due if self._line.has_memory(job, busy)), None)

    def _measure(self, busy: list[Job]) -> None:
        if mono_s() - self._measured_s >= _MEASURE_EVERY_S:
            self._measured_s = mono_s()
            self._line.measured_bytes = {job.id: self._trainers.memory_bytes(job) for job in busy}
            self._line.engines_bytes = self._prover.memory_bytes()
