"""Adapters side by side: products for the rows of many equal each adapter's own, wherever their seats are."""

import random

import pytest
import torch

from tunewright.engines.adapter_files import Adapter, Pair
from tunewright.engines.batch import Segment
from tunewright.engines.stacks import Joint, Stack, Stacks, add_changes, draw_together, joints_of

MERGED = {"a.qkv": ("a.q", "a.k", "a.v"), "a.o": ("a.o",)}
LINEARS = {"a.q": (6, 8), "a.k": (6, 4), "a.v": (6, 4), "a.o": (8, 6)}


@pytest.fixture
def stacks() -> Stacks:
    return Stacks(MERGED, LINEARS, torch.empty(0))


def pairs_of(seed: int, rank: int = 2, names: tuple[str, ...] = tuple(LINEARS)) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Pair(
            torch.randn(rank, LINEARS[name][0], generator=generator),
            torch.randn(LINEARS[name][1], rank, generator=generator),
            0.5 + seed / 10,
        )
        for name in names
    }


def expected(name: str, x_TI: torch.Tensor, pairs: dict[str, Pair]) -> torch.Tensor:
    """The change of a projection by plain products."""
    parts = [
        pairs[part].scale * x_TI @ pairs[part].down.t() @ pairs[part].up.t()
        if part in pairs
        else torch.zeros(len(x_TI), LINEARS[part][1])
        for part in MERGED[name]
    ]
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def check(worn: list[tuple[Adapter, dict[str, Pair], int]], rng: random.Random) -> list[Joint]:
    """Run a step of so many tokens for each adapter, with tokens of the base between; returns its products."""
    segments, start = [], 2
    for adapter, _, length in sorted(worn, key=lambda one: one[0].seat.order):
        segments.append(Segment(start, start + length, adapter))
        start += length
    draw_together(segments)
    joints = joints_of(segments, "cpu")
    pairs = {id(adapter): own for adapter, own, _ in worn}
    for name, parts in MERGED.items():
        x_TI = torch.randn(start + 3, LINEARS[parts[0]][0])
        y_TO = torch.full((start + 3, sum(LINEARS[part][1] for part in parts)), rng.random())
        wanted_TO = y_TO.clone()
        for one in segments:
            wanted_TO[one.start : one.end] += expected(name, x_TI[one.start : one.end], pairs[id(one.adapter)])
        add_changes(name, x_TI, y_TO, joints)
        torch.testing.assert_close(y_TO, wanted_TO, rtol=1e-5, atol=1e-4)
        assert torch.equal(y_TO[:2], wanted_TO[:2]) and torch.equal(y_TO[start:], wanted_TO[start:])
    return joints


@pytest.mark.parametrize("lengths", [[1] * 5, [3, 1, 2, 2, 9], [40, 40, 40, 40, 40], [1, 50, 2, 60, 1]])
def test_products_of_neighbours_equal_each_ones_own(stacks: Stacks, lengths: list[int]) -> None:
    rng = random.Random(0)
    own = [pairs_of(i) for i in range(5)]
    worn = [(Adapter(str(i), 8, stacks.seat(own[i])), own[i], length) for i, length in enumerate(lengths)]
    joints = check(worn, rng)
    assert len(joints) == (1 if max(lengths) - min(lengths) < 40 else 5)


def test_other_ranks_and_layers_have_stacks_of_their_own(stacks: Stacks) -> None:
    rng = random.Random(1)
    kinds = [
        pairs_of(0),
        pairs_of(1, rank=5),
        pairs_of(2, names=("a.k", "a.o")),
        pairs_of(3),
        pairs_of(4, names=("a.v",)),
    ]
    worn = [(Adapter(str(i), 0, stacks.seat(own)), own, 2) for i, own in enumerate(kinds)]
    assert len(check(worn, rng)) == 4
    assert len({adapter.seat.stack for adapter, _, _ in worn}) == 4


def test_seats_in_use_come_together(stacks: Stacks, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody's numbers are lost on the way; one exchange a step."""
    rng = random.Random(2)
    own = [pairs_of(i) for i in range(16)]
    adapters = [Adapter(str(i), 8, stacks.seat(own[i])) for i in range(16)]
    everybody = [(adapter, own[i], 1) for i, adapter in enumerate(adapters)]
    few = [everybody[i] for i in (1, 7, 12, 15)]
    exchanges = []
    exchange = Stack._exchange
    monkeypatch.setattr(Stack, "_exchange", lambda *args: (exchanges.append(args), exchange(*args)))
    counts = [len(check(few, rng)) for _ in range(4)]
    assert counts[-1] == 1
    assert len(exchanges) == 2  # 12 and 15 were near already
    check(everybody, rng)
    assert sorted(adapter.seat.number for adapter in adapters) == list(range(16))


def test_a_seat_is_free_when_nobody_holds_it(stacks: Stacks) -> None:
    adapters = [Adapter(str(i), 8, stacks.seat(pairs_of(i))) for i in range(17)]
    first, second = adapters[0].seat.stack, adapters[16].seat.stack
    assert first is not second
    number = adapters[3].seat.number
    del adapters[3]
    seat = stacks.seat(pairs_of(20))
    assert (seat.stack, seat.number) == (first, number)
    check([(Adapter("new", 8, seat), pairs_of(20), 2)], random.Random(3))


def test_tensors_in_use_are_counted(stacks: Stacks) -> None:
    own = pairs_of(0, names=("a.q", "a.v", "a.o"))
    adapter = Adapter("a", 6, stacks.seat(own), used=set())
    joints = joints_of([Segment(0, 1, adapter)], "cpu")
    add_changes("a.qkv", torch.ones(1, 6), torch.zeros(1, 16), joints)
    assert adapter.used == {"a.qkv"}
    assert adapter.seat.stack.tensors({"a.qkv"}) == 4
    add_changes("a.o", torch.ones(1, 8), torch.zeros(1, 6), joints)
    assert adapter.seat.stack.tensors({"a.qkv", "a.o"}) == 6
