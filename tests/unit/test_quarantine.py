"""Who is blamed for a dead worker, and for how long."""

import asyncio

import pytest

from tunewright.deployments import quarantine
from tunewright.deployments.ports import Generate
from tunewright.deployments.quarantine import Passenger, Quarantine, fingerprint_of
from tunewright.errors import TunewrightError

WORKER = 17


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(quarantine, "mono_s", lambda: now[0])
    return now


@pytest.fixture
def guard(clock: list[float]) -> Quarantine:
    return Quarantine(linger_s=10.0)


async def aboard(guard: Quarantine, fingerprint: str, worker: int = WORKER) -> Passenger:
    passenger = await asyncio.wait_for(guard.board("tiny", fingerprint), 1)
    passenger.worker = worker
    return passenger


async def die_with(guard: Quarantine, *fingerprints: str, worker: int = WORKER) -> None:
    passengers = [await aboard(guard, fingerprint, worker) for fingerprint in fingerprints]
    guard.died(worker)
    for passenger in passengers:
        guard.leave(passenger, answered=False)


async def must_wait(guard: Quarantine, fingerprint: str) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(guard.board("tiny", fingerprint), 0.12)


async def test_two_deaths_and_no_third(guard: Quarantine, clock: list[float]) -> None:
    await die_with(guard, "deadly")
    await die_with(guard, "deadly")
    for _ in range(2):
        with pytest.raises(TunewrightError) as refused:
            await guard.board("tiny", "deadly")
        assert (refused.value.code, refused.value.kind) == ("request_quarantined", "internal")
        assert "10" in refused.value.text("zh")
    await aboard(guard, "other")
    clock[0] += quarantine.QUARANTINE_S
    await aboard(guard, "deadly")


async def test_those_beside_it_wait_for_their_turn_and_are_cleared_by_an_answer(guard: Quarantine) -> None:
    await die_with(guard, "a", "deadly", "b")
    deadly = await aboard(guard, "deadly", 18)
    await must_wait(guard, "a")
    fresh = await aboard(guard, "fresh", 18)
    guard.died(18)
    for passenger in (deadly, fresh):
        guard.leave(passenger, answered=False)
    for name in ("a", "b", "fresh"):
        guard.leave(await aboard(guard, name, 19), answered=True)
    together = [await aboard(guard, name, 19) for name in ("a", "b", "fresh", "a")]
    assert not any(passenger.suspect for passenger in together)
    with pytest.raises(TunewrightError, match="request_quarantined"):
        guard.check("deadly")


async def test_a_suspect_is_cleared_where_it_is_past_the_place_of_the_death(guard: Quarantine) -> None:
    first = await aboard(guard, "long")
    first.n_tokens = 100
    guard.died(WORKER)
    guard.leave(first, answered=False)
    again = await aboard(guard, "long", 18)
    again.n_tokens = 108
    guard.progress(again)
    assert again.suspect
    again.n_tokens = 109
    guard.progress(again)
    assert not again.suspect
    guard.died(18)
    guard.leave(again, answered=False)
    assert (await aboard(guard, "long", 19)).suspect, "that was its first death, not its second"


async def test_one_death_counts_once_for_equal_requests(guard: Quarantine) -> None:
    await die_with(guard, "same", "same", "same")
    guard.leave(await aboard(guard, "same"), answered=True)


async def test_a_caller_who_left_leaves_a_suspect_behind(guard: Quarantine, clock: list[float]) -> None:
    for worker in (1, 2):
        guard.leave(await aboard(guard, "deadly", worker), answered=False)
        clock[0] += 5
        guard.died(worker)
    with pytest.raises(TunewrightError):
        guard.check("deadly")
    guard.leave(await aboard(guard, "gone long ago", 3), answered=False)
    clock[0] += 11
    guard.died(3)
    assert not (await aboard(guard, "gone long ago")).suspect


async def test_a_stuck_worker_says_whom_to_blame(guard: Quarantine) -> None:
    waiting = await aboard(guard, "waiting")
    guard.died(WORKER, running=["hangs"])
    guard.leave(waiting, answered=False)
    assert not (await aboard(guard, "waiting")).suspect
    hangs = await aboard(guard, "hangs")
    hangs.n_tokens = 10**6
    guard.progress(hangs)
    assert hangs.suspect, "nobody knows how far it had come"


async def test_bases_have_turns_of_their_own(guard: Quarantine) -> None:
    await die_with(guard, "a", "b")
    await aboard(guard, "a")
    assert (await guard.board("another base", "b")).suspect


async def test_what_could_not_begin_is_no_suspect(guard: Quarantine) -> None:
    """The worker did not start: nothing ran in it."""
    guard.leave(await guard.board("tiny", "a"), answered=False)
    guard.died(0)
    assert not (await guard.board("tiny", "a")).suspect


def test_fingerprints() -> None:
    request = Generate(secret="s", request_id="r", prompt_ids=[1, 2], max_tokens=3)
    same = Generate(
        secret="t", request_id="q", fingerprint="x", tenant="t", priority=1, prompt_ids=[1, 2], max_tokens=3
    )
    others = [
        Generate(secret="s", request_id="r", prompt_ids=[1, 3], max_tokens=3),
        Generate(secret="s", request_id="r", prompt_ids=[1, 2], max_tokens=3, adapter_id="a"),
        Generate(secret="s", request_id="r", prompt_ids=[1, 2], max_tokens=3, temperature=0.5),
    ]
    assert fingerprint_of("b", request) == fingerprint_of("b", same)
    assert len({fingerprint_of("b", one) for one in (request, *others)} | {fingerprint_of("c", request)}) == 5
