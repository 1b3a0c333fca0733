"""The queue as the database and the machine have it now: facts for `scheduling.py`, and what it makes of them for one job."""

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.clock import wall_s
from tunewright.i18n import mark
from tunewright.jobs import scheduling
from tunewright.jobs.ports import Machine
from tunewright.jobs.records import CANCELLING, QUEUED, RUNNING, SUCCEEDED, Job
from tunewright.jobs.rehearsals import is_under_way
from tunewright.jobs.scheduling import Room, Running, Waiting
from tunewright.jobs.spec import TrainingSpec
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.storage import Transaction

_REMEMBERED_S = 7 * 24 * 3600
"""How far back use counts and lengths are learned from; use has faded to less than a hundredth by then."""
_MOST_REMEMBERED = 500
_MOST_LIKE = 20
_REHEARSAL_S = 60.0
"""A dress rehearsal takes about so long, and a place meanwhile."""
_ENOUGH_SHARE = 0.1
"""Of a job's steps: before that its speed says little."""


class QueuePlace(msgspec.Struct, frozen=True, kw_only=True):
    """What a waiting job is told. `estimated_start` in Unix seconds, None where nobody can know.

    `sources` say what the lengths of the jobs before it are known from: `progress` of running ones, `rehearsal`, `history`
    of like jobs. `waits_for` is what keeps it now; its sentence is an English template for `values`.
    """

    position: int
    estimated_start: int | None
    sources: tuple[str, ...]
    waits_for: str
    message: str
    values: dict[str, Any] = {}


class Line:
    """Shared by the control loop, which also fills in what it measures, and by whoever shows the queue."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        self._settings = settings
        self._machine = machine
        self.measured_bytes: dict[str, int] = {}
        """Job id -> what its trainer holds now, where that is known."""
        self.engines_bytes = 0
        """What the engines of the pool hold now."""
        self.instances_bytes: Callable[[], int] = lambda: 0
        """What private instances hold or were promised."""

    def room(self) -> Room:
        """What trainers may take in all."""
        most = self._most_bytes()
        return Room(
            places=self._settings.max_running_jobs,
            memory_bytes=max(0, most - self.engines_bytes - self.instances_bytes()),
            most_memory_bytes=most,
            gpus=min(1, self._machine.gpus()),  # all trainers use the first that they see
        )

    def left_bytes(self, jobs: list[Job], engines_bytes: int) -> int:
        """What the pool (`engines_bytes`) and those of the unfinished `jobs` that run leave to private instances. May be
        negative."""
        held = sum(self._running(job, None).memory_bytes for job in jobs if _takes_memory(job))
        return self._most_bytes() - engines_bytes - held

    def _most_bytes(self) -> int:
        whole = self._settings.memory_bytes or self._machine.memory_bytes()
        return max(0, whole - self._settings.reserved_memory_bytes)

    def threads(self) -> int:
        """Of one trainer: an equal share of the cores where several may run; 0 lets the only one measure what is best."""
        if self._settings.trainer_threads or self._settings.max_running_jobs == 1:
            return self._settings.trainer_threads
        return max(1, self._machine.cores() // self._settings.max_running_jobs)

    def within_limits(self, job: Job, spec: TrainingSpec) -> TrainingSpec:
        """The spec with the job's share of processors and memory. A trainer that is the only one on a machine that the
        operator has not divided looks itself at what is free, and so does one that has a GPU for itself."""
        room = self.room()
        alone = room.gpus > 0 or (room.places == 1 and not self._settings.memory_bytes)
        limit = 0 if alone else min(job.resources.get("limit_bytes", 0), room.memory_bytes)
        return msgspec.structs.replace(spec, threads=self.threads(), memory_limit_bytes=limit)

    def next_start(self, tx: "Transaction", waiting: list[Job], busy: list[Job]) -> tuple[Job, list[Job]] | None:
        """The job that may start now, and those that it passes. `busy` take places."""
        room = self.room()
        if not waiting or len(busy) >= room.places:
            return None
        several = len({job.project_id for job in waiting}) > 1
        use = _recent_use(self._past(tx), busy, waiting) if several else {}
        found = scheduling.next_start(
            [_waiting(job, None) for job in waiting], [self._running(job, None) for job in busy], use, room
        )
        if found is None:
            return None
        by_id = {job.id: job for job in waiting}
        return by_id[found.job.id], [by_id[job.id] for job in found.passed]

    def has_memory(self, job: Job, busy: list[Job]) -> bool:
        """Whether memory and GPUs are enough for the job beside the `busy` ones."""
        return scheduling.fits(_waiting(job, None), [self._running(other, None) for other in busy], self.room())

    def places(self, tx: "Transaction") -> dict[str, QueuePlace]:
        """Where every queued job of all projects stands."""
        jobs = tx.jobs.unfinished()
        queued = [job for job in jobs if job.status == QUEUED]
        if not queued:
            return {}
        past, room, now = self._past(tx), self.room(), wall_s()
        busy = [job for job in jobs if _takes_memory(job)]
        tell = past + [job for job in busy if job.status == RUNNING and job.elapsed_s > 0]
        lengths = {job.id: _length(job, tell, now) for job in (*queued, *busy)}
        waiting = [_waiting(job, lengths[job.id][0]) for job in queued]
        running = [self._running(job, lengths[job.id][0]) for job in busy]
        use = _recent_use(past, busy, queued)
        sources = {source for job in busy if (source := lengths[job.id][1]) is not None}
        found: dict[str, QueuePlace] = {}
        by_id = {job.id: job for job in waiting}
        may_start = scheduling.next_start(waiting, running, use, room)
        for place in scheduling.forecast(waiting, running, use, room):
            code, message, values = _waits_for(by_id[place.id], place.position, running, room, may_start)
            known = place.starts_in_s is not None
            found[place.id] = QueuePlace(
                position=place.position,
                estimated_start=now + round(place.starts_in_s) if place.starts_in_s is not None else None,
                sources=tuple(sorted(sources)) if known and place.starts_in_s else (),
                waits_for=code,
                message=message,
                values=values,
            )
            source = lengths[place.id][1]
            sources |= set() if source is None else {source}
        return found

    def _running(self, job: Job, remaining_s: float | None) -> Running:
        return Running(
            project_id=job.project_id,
            memory_bytes=max(job.resources.get("memory_bytes", 0), self.measured_bytes.get(job.id, 0)),
            gpus=job.resources.get("gpus", 0),
            remaining_s=remaining_s,
        )

    def _past(self, tx: "Transaction") -> list[Job]:
        return tx.jobs.ended_since(wall_s() - _REMEMBERED_S, _MOST_REMEMBERED)


def _takes_memory(job: Job) -> bool:
    return job.status in (RUNNING, CANCELLING) or is_under_way(job)


def _waiting(job: Job, duration_s: float | None) -> Waiting:
    return Waiting(
        id=job.id,
        project_id=job.project_id,
        since=job.created_at - scheduling.HEAD_START_S[job.priority],
        interrupted=job.interrupted,
        memory_bytes=job.resources.get("memory_bytes", 0),
        gpus=job.resources.get("gpus", 0),
        passes=job.passes,
        duration_s=duration_s,
    )


def _recent_use(past: list[Job], *unfinished: list[Job]) -> dict[str, float]:
    now = wall_s()
    ended = ((job.project_id, job.elapsed_s, now - (job.finished_at or now)) for job in past)
    others = ((job.project_id, job.elapsed_s, 0.0) for jobs in unfinished for job in jobs)
    return scheduling.recent_use((*ended, *others))


def _length(job: Job, known: list[Job], now: int) -> tuple[float | None, str | None]:
    """Seconds that the job has still to run, and what they are known from."""
    if job.status == RUNNING and job.estimated_finish is not None:
        return max(0.0, job.estimated_finish - now), "progress"
    left = 1.0 - job.step / job.total_steps if job.total_steps else 1.0
    if job.status == CANCELLING:
        return 0.0, None
    if is_under_way(job):
        return _REHEARSAL_S, None
    rehearsed = job.rehearsal.get("estimated_seconds")
    if isinstance(rehearsed, dict):
        return left * (rehearsed["least"] + rehearsed["most"]) / 2, "rehearsal"
    passes_of_a_row = _row_passes(job)
    speeds = _speeds(job, known)
    if passes_of_a_row and speeds:
        return left * passes_of_a_row * median(speeds), "history"
    return None, None


def _speeds(job: Job, known: list[Job]) -> list[float]:
    """Seconds for one row once, of jobs like this one that run or have succeeded: of the project if there are any, else of
    all."""
    kind = (job.base_code, job.method, job.training_type)
    like = [
        each
        for each in known
        if each.status in (SUCCEEDED, RUNNING) and (each.base_code, each.method, each.training_type) == kind
    ]
    own = [each for each in like if each.project_id == job.project_id]
    speeds = [_seconds_for_a_row(each) for each in (own or like)[:_MOST_LIKE]]
    return [speed for speed in speeds if speed is not None]


def _seconds_for_a_row(job: Job) -> float | None:
    rows = _row_passes(job)
    if not rows or not job.total_steps or job.step < _ENOUGH_SHARE * job.total_steps:
        return None
    return job.elapsed_s / (rows * job.step / job.total_steps)  # it may run still, or have stopped early


def _row_passes(job: Job) -> int:
    rows = job.rows.get("used") or job.resources.get("rows", 0)
    return rows * job.hyperparameters.get("n_epochs", 0)


def _waits_for(
    job: Waiting, position: int, running: list[Running], room: Room, may_start: scheduling.Start | None
) -> tuple[str, str, dict[str, Any]]:
    """Code, English template, values."""
    if may_start is not None and may_start.job.id == job.id:
        return "start", mark("It is about to start."), {}
    if len(running) >= room.places:
        text = mark("{running} trainings and rehearsals are under way; {most} may be at the same time.")
        return "place", text, {"running": len(running), "most": room.places}
    if not scheduling.fits(job, running, room):
        held = sum(trainer.memory_bytes for trainer in running)
        if job.memory_bytes <= room.memory_bytes - held:
            return "gpu", mark("All GPUs are taken."), {}
        text = mark(
            "It needs {need} GB of memory. Of {most} GB, {held} GB are held by running jobs, {engines} GB by models served."
        )
        sizes = {
            "need": job.memory_bytes,
            "most": room.most_memory_bytes,
            "held": held,
            "engines": room.most_memory_bytes - room.memory_bytes,
        }
        return "memory", text, {name: gigabytes(size) for name, size in sizes.items()}
    text = mark("{ahead} jobs are ahead of it.")
    return "turn", text, {"ahead": position - 1}


def gigabytes(size_bytes: int) -> str:
    """For sentences: one decimal."""
    return f"{size_bytes / 1e9:.1f}"
