"""Who gets an adapter's place: decisions of the shelf, and a simulation in which nobody may starve."""

import random

import pytest

from tunewright.engines.adapter_shelf import AdapterShelf, Key, Want

A, B, C, D = (Key(name, "0") for name in "abcd")


def shelf_with(capacity: int, *keys: Key) -> AdapterShelf[str]:
    shelf: AdapterShelf[str] = AdapterShelf(capacity)
    for key in keys:
        shelf.begin_load(key)
        shelf.end_load(key, key.adapter_id)
    return shelf


def wants(*keys: Key | None) -> list[Want]:
    return [Want(key, True) for key in keys]


def test_the_base_needs_only_a_slot() -> None:
    decision = shelf_with(1).decide(wants(None, None, None), 2)
    assert (decision.admit, decision.evict, decision.load) == ([0, 1], [], [])


def test_an_adapter_loads_once_and_then_runs() -> None:
    shelf = shelf_with(2)
    assert shelf.decide(wants(A, A), 4).load == [A]
    shelf.begin_load(A)
    assert shelf.decide(wants(A, A), 4).load == []
    shelf.end_load(A, "a")
    assert shelf.decide(wants(A, A), 4).admit == [0, 1]


def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    shelf = shelf_with(2, A, B)
    shelf.take(A)
    shelf.give_back(A)
    decision = shelf.decide(wants(C), 1)
    assert (decision.evict, decision.load) == ([B], [C])


def test_an_adapter_in_use_stays_and_drains_for_the_older_request() -> None:
    shelf = shelf_with(1, A)
    shelf.take(A)
    decision = shelf.decide(wants(B, A, None), 3)
    assert (decision.admit, decision.evict, decision.load) == ([2], [], [])
    with pytest.raises(ValueError, match="in use"):
        shelf.evict(A)
    shelf.give_back(A)
    decision = shelf.decide(wants(B, A), 3)
    assert (decision.evict, decision.load) == ([A], [B])


def test_what_an_older_request_waits_for_is_no_victim() -> None:
    decision = shelf_with(1, A).decide(wants(A, B), 0)
    assert (decision.admit, decision.evict, decision.load) == ([], [], [])


def test_another_version_is_another_adapter() -> None:
    assert shelf_with(2, A).decide(wants(Key("a", "1")), 1).load == [Key("a", "1")]


def test_forget_waits_for_users() -> None:
    shelf = shelf_with(2, A, B)
    shelf.take(A)
    assert not shelf.forget("a")
    shelf.give_back(A)
    assert shelf.forget("a")
    assert shelf.ids() == ["b"]
    assert shelf.forget("never seen")


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves(seed: int) -> None:
    """Random traffic over four adapters and two places: capacity holds, and everyone runs within a bounded time."""
    rng = random.Random(seed)
    shelf: AdapterShelf[str] = AdapterShelf(2)
    waiting: list[tuple[int, Key | None]] = []
    running: list[tuple[int, Key | None]] = []
    loading: list[Key] = []
    longest_wait = 0
    for now in range(600):
        if now < 500:
            waiting += [(now, rng.choice([None, A, A, A, B, C, D])) for _ in range(rng.choice([0, 0, 1]))]
        for key in loading:
            shelf.end_load(key, key.adapter_id)
        loading.clear()
        for item in [item for item in running if item[0] <= now]:
            running.remove(item)
            if item[1]:
                shelf.give_back(item[1])
        decision = shelf.decide(wants(*(key for _, key in waiting)), 4 - len(running))
        for index in decision.admit:
            arrived, key = waiting[index]
            longest_wait = max(longest_wait, now - arrived)
            running.append((now + rng.randint(1, 6), key))
            if key:
                shelf.take(key)
        waiting = [item for index, item in enumerate(waiting) if index not in decision.admit]
        for key in decision.evict:
            shelf.evict(key)
        for key in decision.load:
            shelf.begin_load(key)
            loading.append(key)
        assert len(running) <= 4
        assert len(shelf.ids()) + len(loading) <= 2
    assert not waiting
    assert longest_wait < 150


def test_what_stands_in_the_way_is_counted() -> None:
    shelf = shelf_with(2, A, B)
    assert shelf.lacks({A, B}) == 0 and shelf.lacks({C}) == 0, "an idle one goes"
    shelf.take(A)
    assert (shelf.lacks({C}), shelf.lacks({C, D}), shelf.lacks({B, C})) == (0, 1, 1)
    shelf.take(B)
    assert (shelf.lacks(set()), shelf.lacks({C}), shelf.lacks({A, C})) == (0, 1, 1)
    assert shelf_with(3, A).lacks({B, C}) == 0
