"""Whose turn it is: rules one by one, then whole queues played through with everything drawn at random."""

import random
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.jobs.scheduling import (
    HEAD_START_S,
    MOST_PASSES,
    Room,
    Running,
    Waiting,
    forecast,
    in_turn,
    next_start,
    recent_use,
)

ROOM = Room(places=1, memory_bytes=100, most_memory_bytes=100)


def job(name: str, since: float = 0.0, project: str | None = None, **fields: Any) -> Waiting:
    """`a1` is a job of project a."""
    return Waiting(id=name, project_id=project or name[0], since=since, **fields)


def order(waiting: list[Waiting], running: list[Running] = [], use: Mapping[str, float] = {}) -> list[str]:  # noqa: B006
    return [each.id for each in in_turn(waiting, running, use)]


def test_one_project_first_come_first_served() -> None:
    assert order([job("a2", 2), job("a1", 1), job("a3", 3)]) == ["a1", "a2", "a3"]
    assert order([job("a2", 1), job("a1", 1)]) == ["a1", "a2"], "ids decide where the second is the same"


def test_projects_take_turns_whatever_the_length_of_their_queues() -> None:
    many = [job(f"a{n}", n) for n in range(5)]
    assert order([*many, job("b0", 99)])[:3] == ["a0", "b0", "a1"]


def test_the_one_without_a_trainer_goes_first_then_the_one_that_used_least() -> None:
    waiting = [job("a1", 1), job("b1", 2), job("c1", 3)]
    assert order(waiting, [Running(project_id="a")]) == ["b1", "c1", "a1"]
    assert order(waiting, use={"a": 50.0, "b": 60.0}) == ["c1", "a1", "b1"]


def test_priority_orders_a_projects_own_jobs_only() -> None:
    high = job("a2", 2.0 - HEAD_START_S["high"])
    low = job("a1", 1.0 - HEAD_START_S["low"])
    assert order([job("a0", 0), low, high]) == ["a2", "a0", "a1"]
    assert order([high, job("b1", 9)], use={"a": 1.0}) == ["b1", "a2"]
    late = job("a9", HEAD_START_S["high"] - HEAD_START_S["low"] + 5 - HEAD_START_S["high"])
    assert order([low, late]) == ["a1", "a9"], "who is made two days later passes nobody"


def test_what_was_interrupted_goes_on_first() -> None:
    waiting = [job("a1", 1), job("b1", 2, interrupted=True), job("b2", 3)]
    assert order(waiting, use={"b": 100.0}) == ["b1", "a1", "b2"]


def test_use_fades_by_half_a_day() -> None:
    assert recent_use([("a", 100.0, 0.0), ("a", 100.0, 86400.0), ("b", 8.0, 3 * 86400.0)]) == {"a": 150.0, "b": 1.0}


def test_places_and_memory_are_limits() -> None:
    waiting = [job("a1", memory_bytes=60)]
    assert next_start(waiting, [Running(project_id="b")], {}, ROOM) is None, "one place"
    two = msgspec.structs.replace(ROOM, places=2)
    assert next_start(waiting, [Running(project_id="b", memory_bytes=41)], {}, two) is None
    start = next_start(waiting, [Running(project_id="b", memory_bytes=40)], {}, two)
    assert start is not None and start.job.id == "a1" and start.passed == ()
    served = msgspec.structs.replace(two, memory_bytes=10)
    assert next_start(waiting, [Running(project_id="b")], {}, served) is None
    assert next_start(waiting, [], {}, served) is not None, "engines alone keep nobody out for ever"
    gpu = [job("a1", gpus=1)]
    assert next_start(gpu, [], {}, two) is None
    assert next_start(gpu, [], {}, msgspec.structs.replace(two, gpus=1)) is not None


def test_a_small_job_passes_a_large_one_so_often_and_no_more() -> None:
    room = msgspec.structs.replace(ROOM, places=3)
    running = [Running(project_id="z", memory_bytes=50)]
    for passes in range(MOST_PASSES + 1):
        start = next_start(
            [job("a1", 1, memory_bytes=80, passes=passes), job("a2", 2, memory_bytes=10)], running, {}, room
        )
        if passes < MOST_PASSES:
            assert start is not None and start.job.id == "a2" and [each.id for each in start.passed] == ["a1"]
        else:
            assert start is None


def test_a_forecast_is_known_where_all_lengths_before_it_are() -> None:
    waiting = [job("a1", 1, duration_s=30.0), job("a2", 2), job("a3", 3, duration_s=5.0)]
    places = forecast(waiting, [Running(project_id="a", remaining_s=10.0)], {}, ROOM)
    assert [(each.id, each.position, each.starts_in_s) for each in places] == [
        ("a1", 1, 10.0),
        ("a2", 2, 40.0),
        ("a3", 3, None),
    ]
    assert forecast(waiting[:1], [Running(project_id="a")], {}, ROOM)[0].starts_in_s is None
    assert forecast(waiting[:1], [], {}, ROOM)[0].starts_in_s == 0.0


def test_a_forecast_counts_memory_and_turns() -> None:
    two = msgspec.structs.replace(ROOM, places=2)
    running = [Running(project_id="a", memory_bytes=50, remaining_s=100.0), Running(project_id="b", remaining_s=20.0)]
    waiting = [job("a1", 1, memory_bytes=80, duration_s=10.0), job("c1", 2, memory_bytes=20, duration_s=200.0)]
    places = {each.id: (each.position, each.starts_in_s) for each in forecast(waiting, running, {}, two)}
    assert places == {"c1": (1, 20.0), "a1": (2, 100.0)}
    never = forecast([job("a1", memory_bytes=101)], [], {}, ROOM)
    assert [(each.position, each.starts_in_s) for each in never] == [(1, None)]


class Played:
    """A queue lived through: jobs arrive, start by `next_start`, run and end. Times in seconds."""

    def __init__(self, room: Room, arrivals: list[tuple[float, Waiting]]) -> None:
        self.room = room
        self.lengths = {each.id: each.duration_s or 1.0 for _, each in arrivals}
        self.arrivals = sorted(arrivals, key=lambda pair: (pair[0], pair[1].id))
        self.now_s = 0.0
        self.waiting: list[Waiting] = []
        self.working: list[tuple[float, Waiting]] = []
        self.past: list[tuple[str, float, float]] = []
        """(project, seconds, when it ended)"""
        self.starts: list[tuple[float, Waiting]] = []
        self.passed: dict[str, int] = {}

    def use(self) -> dict[str, float]:
        ended = [(project, seconds, self.now_s - at) for project, seconds, at in self.past]
        under_way = [(each.project_id, self.lengths[each.id] - (end - self.now_s), 0.0) for end, each in self.working]
        return recent_use([*ended, *under_way])

    def running(self) -> list[Running]:
        return [Running(project_id=each.project_id, memory_bytes=each.memory_bytes) for _, each in self.working]

    def start_all(self) -> None:
        while (start := next_start(self.waiting, self.running(), self.use(), self.room)) is not None:
            assert sum(each.memory_bytes for each in self.running()) + start.job.memory_bytes <= self.room.memory_bytes
            for other in start.passed:
                self.passed[other.id] = self.passed.get(other.id, 0) + 1
            ids = {other.id for other in start.passed}
            self.waiting = [
                msgspec.structs.replace(each, passes=each.passes + 1) if each.id in ids else each
                for each in self.waiting
                if each.id != start.job.id
            ]
            self.working.append((self.now_s + self.lengths[start.job.id], start.job))
            self.starts.append((self.now_s, start.job))

    def play(self) -> "Played":
        arrivals = list(self.arrivals)
        while arrivals or self.working or self.waiting:
            times = [arrivals[0][0]] if arrivals else []
            times += [end for end, _ in self.working]
            assert times, "somebody waits and nothing will ever happen"
            self.now_s = max(self.now_s, min(times))
            while arrivals and arrivals[0][0] <= self.now_s:
                self.waiting.append(arrivals.pop(0)[1])
            for pair in [pair for pair in self.working if pair[0] <= self.now_s]:
                self.working.remove(pair)
                self.past.append((pair[1].project_id, self.lengths[pair[1].id], pair[0]))
            self.start_all()
        return self


def drawn(seed: int, *, projects: int, jobs: int, memory: bool) -> list[tuple[float, Waiting]]:
    dice = random.Random(seed)
    found = []
    for number in range(jobs):
        project = dice.choice("abcdefgh"[:projects])
        at_s = dice.choice((0.0, dice.uniform(0, 5 * 86400)))
        found.append(
            (
                at_s,
                job(
                    f"{project}{number:03d}",
                    since=at_s - dice.choice(list(HEAD_START_S.values())),
                    memory_bytes=dice.choice((5, 20, 50, 90, 100)) if memory else 0,
                    duration_s=dice.choice((60.0, 3600.0, dice.uniform(1, 2 * 86400))),
                ),
            )
        )
    return found


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), projects=st.integers(2, 6), places=st.integers(1, 3))
def test_no_project_is_starved(seed: int, projects: int, places: int) -> None:
    """While a project waits with no trainer at work, each other one starts no more than the waiting one had used, plus a job."""
    arrivals = drawn(seed, projects=projects, jobs=40, memory=False)
    at_s = random.Random(seed).uniform(0, 5 * 86400)
    lone = job("x", since=at_s, project="lone", duration_s=100.0)
    earlier = job("w", since=0.0, project="lone", duration_s=float(seed % 20_000 + 1))
    room = Room(places=places, memory_bytes=100, most_memory_bytes=100)
    played = Played(room, [*arrivals, (0.0, earlier), (at_s, lone)]).play()
    assert len(played.starts) == len(arrivals) + 2, "everybody starts in the end"
    ended_s = next(at for project, _, at in played.past if project == "lone")  # `earlier`
    began_s = max(at_s, ended_s)
    started_s = next(at for at, each in played.starts if each.id == "x")
    used_s = recent_use([("lone", played.lengths["w"], began_s - ended_s)])["lone"]
    for other in {each.project_id for _, each in played.starts} - {"lone"}:
        since = [each for at, each in played.starts if began_s < at < started_s and each.project_id == other]
        assert sum(played.lengths[each.id] for each in since[:-1]) <= used_s + 1e-6


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), projects=st.integers(1, 4), places=st.integers(1, 5))
def test_memory_is_never_exceeded_and_nobody_is_passed_for_ever(seed: int, projects: int, places: int) -> None:
    room = Room(places=places, memory_bytes=100, most_memory_bytes=100)
    arrivals = drawn(seed, projects=projects, jobs=40, memory=True)
    played = Played(room, arrivals).play()
    assert len(played.starts) == len(arrivals)
    assert max(played.passed.values(), default=0) <= MOST_PASSES


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), projects=st.integers(1, 4), places=st.integers(1, 3))
def test_a_forecast_comes_true(seed: int, projects: int, places: int) -> None:
    """Where all lengths are known, nothing arrives later and use does not fade, the order and times are those that happen."""
    room = Room(places=places, memory_bytes=100, most_memory_bytes=100)
    waiting = [each for _, each in drawn(seed, projects=projects, jobs=15, memory=True)]
    waiting = [msgspec.structs.replace(each, duration_s=(each.duration_s or 1) / 1e5) for each in waiting]
    told = forecast(waiting, [], {}, room)
    assert sorted(place.id for place in told) == sorted(each.id for each in waiting)
    assert [place.position for place in told] == list(range(1, len(told) + 1))
    played = Played(room, [(0.0, each) for each in waiting]).play()
    if projects == 1:
        assert [place.id for place in told] == [each.id for _, each in played.starts]
        for place, (at_s, _) in zip(told, played.starts, strict=True):
            assert place.starts_in_s == pytest.approx(at_s)


def test_fifty_jobs_do_not_hold_up_one() -> None:
    crowd = [(0.0, job(f"a{n:02d}", float(n), duration_s=3600.0)) for n in range(50)]
    played = Played(ROOM, [*crowd, (1.0, job("b", 1.0, duration_s=60.0))]).play()
    assert [each.id for _, each in played.starts][:3] == ["a00", "b", "a01"]
