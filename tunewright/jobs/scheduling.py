"""Whose turn it is, what may start now, and when the others will. Pure: `line.py` brings the facts.

Between projects: a place goes to the project with the fewest trainers at work, of those to the one that has trained least of
late (seconds, halved each day), of those to the one whose next job is first. So while a project waits with no trainer at work, no
other one gets more than what the waiting one had used, plus one job. Asking for priority gains a project nothing from others.

Within a project: in the order of creation, where `high` counts as made a day earlier and `low` as a day later. So a job is passed
only by what is made within two days after it.

A job whose trainer ended without its owner's wish goes on before others start. A job that memory is too small for now may
be passed by `MOST_PASSES` others that fit; after that everybody behind it waits until it has started.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping

import msgspec

PRIORITIES = ("low", "normal", "high")
HEAD_START_S = {"low": -86400, "normal": 0, "high": 86400}
MOST_PASSES = 4
HALF_LIFE_S = 86400.0
_NOMINAL_S = 3600.0
"""How long a job of unknown length is taken to run, for the order of those behind it."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A job in the queue. `since` is its creation less its head start, in seconds."""

    id: str
    project_id: str
    since: float
    interrupted: bool = False
    memory_bytes: int = 0
    gpus: int = 0
    passes: int = 0
    duration_s: float | None = None


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer that takes a place."""

    project_id: str
    memory_bytes: int = 0
    gpus: int = 0
    remaining_s: float | None = None


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What all trainers together may take. `memory_bytes` is what they share now, `most_memory_bytes` what there ever is."""

    places: int
    memory_bytes: int
    most_memory_bytes: int
    gpus: int = 0


class Start(msgspec.Struct, frozen=True):
    """The job that may start now, and those ahead of it that it passes."""

    job: Waiting
    passed: tuple[Waiting, ...] = ()


class Place(msgspec.Struct, frozen=True):
    """Where a job stands, from 1. `starts_in_s` is None where nobody can know."""

    id: str
    position: int
    starts_in_s: float | None


def recent_use(trainings: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Project -> seconds that count, from (project, seconds trained, seconds since it ended)."""
    found: dict[str, float] = {}
    for project_id, trained_s, ago_s in trainings:
        found[project_id] = found.get(project_id, 0.0) + trained_s * 0.5 ** (max(0.0, ago_s) / HALF_LIFE_S)
    return found


def in_turn(waiting: Iterable[Waiting], running: Iterable[Running], use: Mapping[str, float]) -> Iterator[Waiting]:
    """All of `waiting` in the order in which they would start if places came free one by one and nothing ended."""
    by_project: dict[str, list[Waiting]] = {}
    for job in sorted(waiting, key=lambda job: (not job.interrupted, job.since, job.id), reverse=True):
        if job.interrupted:
            continue
        by_project.setdefault(job.project_id, []).append(job)
    at_work: dict[str, int] = {}
    for trainer in running:
        at_work[trainer.project_id] = at_work.get(trainer.project_id, 0) + 1
    for job in sorted((job for job in waiting if job.interrupted), key=lambda job: (job.since, job.id)):
        at_work[job.project_id] = at_work.get(job.project_id, 0) + 1
        yield job
    heap = [_turn(jobs[-1], at_work.get(project, 0), use) for project, jobs in by_project.items()]
    heapq.heapify(heap)
    while heap:
        trainers, *_, project = heapq.heappop(heap)
        jobs = by_project[project]
        yield jobs.pop()
        if jobs:
            heapq.heappush(heap, _turn(jobs[-1], trainers + 1, use))


def _turn(job: Waiting, trainers: int, use: Mapping[str, float]) -> tuple[int, float, float, str, str]:
    return trainers, use.get(job.project_id, 0.0), job.since, job.id, job.project_id


def next_start(waiting: list[Waiting], running: list[Running], use: Mapping[str, float], room: Room) -> Start | None:
    """What may start now. None if nothing may."""
    if len(running) >= room.places:
        return None
    passed: list[Waiting] = []
    for job in in_turn(waiting, running, use):
        if fits(job, running, room):
            return Start(job, tuple(passed))
        if job.passes >= MOST_PASSES:
            return None
        passed.append(job)
    return None


def fits(job: Waiting, running: list[Running], room: Room) -> bool:
    """Whether memory and GPUs are enough beside those at work.

    Engines do not go away, so a job for which they alone leave too little would wait for ever: where no trainer is at work, it
    starts and plans with what they leave.
    """
    memory = room.memory_bytes - sum(trainer.memory_bytes for trainer in running)
    if not running:
        memory = room.most_memory_bytes
    gpus = room.gpus - sum(trainer.gpus for trainer in running)
    return job.memory_bytes <= memory and job.gpus <= gpus


def forecast(waiting: list[Waiting], running: list[Running], use: Mapping[str, float], room: Room) -> list[Place]:
    """Everybody's place in the order in which they will start, by playing it through. Every job is in it.

    A start is known only if the length of everything that runs before it is known.
    """
    left, use, now_s, known = list(waiting), dict(use), 0.0, True
    working = [(trainer, _NOMINAL_S if trainer.remaining_s is None else trainer.remaining_s) for trainer in running]
    unknown = any(trainer.remaining_s is None for trainer in running)
    places: list[Place] = []
    while left:
        start = next_start(left, [trainer for trainer, _ in working], use, room)
        if start is not None:
            job = start.job
            places.append(Place(job.id, len(places) + 1, now_s if known else None))
            left = [_passed(other, start) for other in left if other.id != job.id]
            trainer = Running(
                project_id=job.project_id,
                memory_bytes=job.memory_bytes,
                gpus=job.gpus,
                remaining_s=job.duration_s,
            )
            working.append((trainer, now_s + (_NOMINAL_S if job.duration_s is None else job.duration_s)))
            unknown |= job.duration_s is None
            continue
        if not working:
            break  # it never fits as things are: there is memory that no trainer holds
        known &= not unknown
        then_s = max(now_s, min(end_s for _, end_s in working))
        for trainer, _ in working:
            use[trainer.project_id] = use.get(trainer.project_id, 0.0) + then_s - now_s
        now_s = then_s
        working = [(trainer, end_s) for trainer, end_s in working if end_s > now_s]
    for job in in_turn(left, [], use):
        places.append(Place(job.id, len(places) + 1, None))
    return places


def _passed(job: Waiting, start: Start) -> Waiting:
    if all(job.id != other.id for other in start.passed):
        return job
    return msgspec.structs.replace(job, passes=job.passes + 1)
