"""Adapters side by side in memory, so that the rows of many of them go through one matrix product.

All factors of an adapter lie in one row, its seat, of a stack. Adapters that change the same layers at the same ranks share
stacks, and for each layer the factors of neighbouring seats are one strided tensor: a batched product needs no copy of them.

Shape legend: S seats, N numbers in a seat, T tokens of the step, I and O features in and out, R rank (of all parts of a merged
projection together), K neighbouring seats, M tokens for each of them.
"""

import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch

from tunewright.engines.adapter_files import Pair
from tunewright.engines.batch import Segment

_SEATS = 16
_STACK_BYTES = 2**29
_PADDED = 1.25
"""Tokens of neighbours are padded to equal numbers if that makes no more than so many times as many ..."""
_FEW = 16
"""... or no more than this for each: then reading the factors costs more than multiplying."""
_MANY = 32
"""From so many tokens for each seat on, adding in place is faster than adding afterwards."""


class Piece(NamedTuple):
    """The up factor of one part of a merged projection: from columns of the low product to columns of the projection."""

    at: int
    low: int
    rank: int
    column: int
    width: int


class Change(NamedTuple):
    """Where in a seat the factors of a projection lie."""

    at: int
    into: int
    rank: int
    pieces: tuple[Piece, ...]


class Factors(NamedTuple):
    """Those of neighbouring seats for one projection."""

    down_KIR: torch.Tensor
    ups: tuple[tuple[Piece, torch.Tensor], ...]


class Stack:
    """Seats for adapters of one shape. Memory that no seat has used yet is not taken from the machine."""

    def __init__(self, changes: dict[str, Change], numbers: int, like: torch.Tensor) -> None:
        self._changes = changes
        seats = max(1, min(_SEATS, _STACK_BYTES // (numbers * like.element_size())))
        self._memory_SN = like.new_empty(seats, numbers)
        self._seats: list[weakref.ref[Seat] | None] = [None] * seats
        self._views: dict[tuple[int, int], dict[str, Factors]] = {}
        self._lock = threading.Lock()

    def take(self) -> "Seat | None":
        """A free seat, None if all are taken. It is free again when nobody holds it any more."""
        with self._lock:
            for number in range(len(self._seats)):
                if self._occupant(number) is None:
                    seat = Seat(self, number)
                    self._seats[number] = weakref.ref(seat)
                    return seat
        return None

    @property
    def empty(self) -> bool:
        """Whether nobody holds a seat."""
        return all(self._occupant(number) is None for number in range(len(self._seats)))

    def _occupant(self, number: int) -> "Seat | None":
        held = self._seats[number]
        return None if held is None else held()

    def fill(self, seat: "Seat", pairs: Mapping[str, Mapping[int, Pair]]) -> None:
        """Write an adapter's factors: for each projection the pairs of its parts, by their first column."""
        row_N = self._memory_SN[seat.number]
        for name, change in self._changes.items():
            down_RI = row_N[change.at : change.at + change.rank * change.into].view(change.rank, change.into)
            for piece in change.pieces:
                pair = pairs[name][piece.column]
                down_RI[piece.low : piece.low + piece.rank] = pair.down
                up_RO = row_N[piece.at : piece.at + piece.rank * piece.width].view(piece.rank, piece.width)
                up_RO.copy_(pair.up.t() * pair.scale)
        seat.filled = True

    def factors(self, first: int, count: int) -> dict[str, Factors]:
        """Factors of `count` seats from `first` on, by projection."""
        views = self._views.get((first, count))
        if views is None:
            views = self._views[first, count] = {
                name: self._factors(change, first, count) for name, change in self._changes.items()
            }
        return views

    def _factors(self, change: Change, first: int, count: int) -> Factors:
        numbers = self._memory_SN.shape[1]
        base = first * numbers
        down_KIR = self._memory_SN.as_strided(
            (count, change.into, change.rank), (numbers, 1, change.into), base + change.at
        )
        ups = tuple(
            (
                piece,
                self._memory_SN.as_strided(
                    (count, piece.rank, piece.width), (numbers, piece.width, 1), base + piece.at
                ),
            )
            for piece in change.pieces
        )
        return Factors(down_KIR, ups)

    def tensors(self, names: set[str]) -> int:
        """How many tensors of the adapter's file are in these projections."""
        return sum(2 * len(self._changes[name].pieces) for name in names)

    def draw_together(self, numbers: set[int]) -> None:
        """Bring these seats one exchange nearer to being neighbours."""
        places = range(len(self._seats) - len(numbers) + 1)
        windows = [range(first, first + len(numbers)) for first in places]
        best = max(windows, key=lambda window: len(numbers.intersection(window)))
        outside = numbers.difference(best)
        with self._lock:
            for target in sorted(set(best) - numbers):
                occupant = self._occupant(target)
                if outside and (occupant is None or occupant.filled):
                    return self._exchange(min(outside), target)
        return None

    def _exchange(self, source: int, target: int) -> None:
        mover, other = self._occupant(source), self._occupant(target)
        memory_SN = self._memory_SN
        kept_N = None if other is None else memory_SN[target].clone()
        memory_SN[target] = memory_SN[source]
        if kept_N is not None:
            memory_SN[source] = kept_N
        self._seats[source], self._seats[target] = self._seats[target], self._seats[source]
        for seat, number in ((mover, target), (other, source)):
            if seat is not None:
                seat.number = number


class Seat:
    """An adapter's place in a stack. `number` changes when seats are exchanged, on the thread that computes."""

    def __init__(self, stack: Stack, number: int) -> None:
        self.stack = stack
        self.number = number
        self.filled = False

    @property
    def order(self) -> tuple[int, int]:
        """Sorts seats so that neighbours come one after the other."""
        return id(self.stack), self.number


class Stacks:
    """All adapters of a decoder. `merged` maps each projection to the linear layers whose outputs it has side by side."""

    def __init__(
        self, merged: Mapping[str, tuple[str, ...]], linears: Mapping[str, tuple[int, int]], like: torch.Tensor
    ) -> None:
        self._merged = merged
        self._linears = linears
        self._like = like
        self._stacks: dict[tuple[tuple[str, int], ...], list[Stack]] = {}

    def seat(self, pairs: Mapping[str, Pair]) -> Seat:
        """Put an adapter into memory. For one thread at a time, which need not be the one that computes."""
        with torch.inference_mode():
            return self._seat(pairs)

    def _seat(self, pairs: Mapping[str, Pair]) -> Seat:
        shape = tuple(sorted((name, pair.down.shape[0]) for name, pair in pairs.items()))
        self._stacks = {  # of other shapes only those that somebody uses
            key: kept
            for key, stacks in self._stacks.items()
            if (kept := [stack for stack in stacks if key == shape or not stack.empty])
        }
        stacks = self._stacks.setdefault(shape, [])
        seat = next((seat for stack in stacks if (seat := stack.take())), None)
        if seat is None:
            stack = Stack(*self._changes(pairs), self._like)
            stacks.append(stack)
            seat = stack.take()
        if seat is None:
            raise RuntimeError("a new stack has no seat")
        parts = {name: dict(self._columns(parts)) for name, parts in self._merged.items()}
        seat.stack.fill(seat, {n: {c: pairs[p] for c, p in of.items() if p in pairs} for n, of in parts.items()})
        return seat

    def _columns(self, parts: tuple[str, ...]) -> list[tuple[int, str]]:
        """(first column, layer) for each part of a projection."""
        found, column = [], 0
        for part in parts:
            found.append((column, part))
            column += self._linears[part][1]
        return found

    def _changes(self, pairs: Mapping[str, Pair]) -> tuple[dict[str, Change], int]:
        changes: dict[str, Change] = {}
        at = 0
        for name, parts in self._merged.items():
            present = [(column, part) for column, part in self._columns(parts) if part in pairs]
            if not present:
                continue
            into = self._linears[parts[0]][0]
            rank = sum(pairs[part].down.shape[0] for _, part in present)
            start, at = at, at + rank * into
            pieces, low = [], 0
            for column, part in present:
                own, width = pairs[part].down.shape[0], self._linears[part][1]
                pieces.append(Piece(at, low, own, column, width))
                at, low = at + own * width, low + own
            changes[name] = Change(start, into, rank, tuple(pieces))
        return changes, at


class Joint(NamedTuple):
    """Tokens [start, end) of the step go through neighbouring seats, the same number through each.

    Where the numbers differ, `gather` [K * M] says which tokens to take, some twice, and `valid` which results count.
    """

    factors: dict[str, Factors]
    seats: int
    start: int
    end: int
    gather: torch.Tensor | None
    valid: torch.Tensor | None
    used: tuple[set[str], ...]


def draw_together(segments: list[Segment]) -> None:
    """Bring the seats of a step's adapters a little nearer to each other. Joints made before are of no use afterwards."""
    active: dict[Stack, set[int]] = {}
    for segment in segments:
        active.setdefault(segment.adapter.seat.stack, set()).add(segment.adapter.seat.number)
    for stack, numbers in active.items():
        if max(numbers) - min(numbers) >= len(numbers):
            stack.draw_together(numbers)


def joints_of(segments: list[Segment], device: str) -> list[Joint]:
    """The fewest products for these segments."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if runs and _joins(runs[-1], segment):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return [_joint(run, device) for run in runs]


def _joins(run: list[Segment], segment: Segment) -> bool:
    last = run[-1]
    seat, before = segment.adapter.seat, last.adapter.seat
    if seat.stack is not before.stack or seat.number != before.number + 1 or segment.start != last.end:
        return False
    lengths = [one.end - one.start for one in (*run, segment)]
    return max(lengths) <= _FEW or max(lengths) * len(lengths) <= _PADDED * sum(lengths)


def _joint(run: list[Segment], device: str) -> Joint:
    lengths = [end - start for start, end, _ in run]
    longest = max(lengths)
    gather = valid = None
    if min(lengths) < longest:
        tokens = [start + min(i, end - start - 1) for start, end, _ in run for i in range(longest)]
        places = [k * longest + i for k, length in enumerate(lengths) for i in range(length)]
        gather, valid = torch.tensor(tokens, device=device), torch.tensor(places, device=device)
    seat = run[0].adapter.seat
    used = tuple(segment.adapter.used for segment in run if segment.adapter.used is not None)
    return Joint(seat.stack.factors(seat.number, len(run)), len(run), run[0].start, run[-1].end, gather, valid, used)


def add_changes(name: str, x_TI: torch.Tensor, y_TO: torch.Tensor, joints: list[Joint]) -> None:
    """Add, in place, what each token's adapter says for projection `name`. Tokens outside the joints are not touched."""
    for joint in joints:
        factors = joint.factors.get(name)
        if factors is None:
            continue
        for used in joint.used:
            used.add(name)
        length = joint.end - joint.start
        taken_TI = x_TI.narrow(0, joint.start, length) if joint.gather is None else x_TI.index_select(0, joint.gather)
        taken_KMI = taken_TI.view(joint.seats, -1, x_TI.shape[1])
        low_KMR = torch.bmm(taken_KMI, factors.down_KIR)
        into_TO = y_TO.narrow(0, joint.start, length)
        for piece, up_KRO in factors.ups:
            own_KMR = low_KMR.narrow(2, piece.low, piece.rank)
            target_TO = into_TO.narrow(1, piece.column, piece.width)
            if joint.valid is None and taken_KMI.shape[1] >= _MANY:
                target_TO.view(joint.seats, -1, piece.width).baddbmm_(own_KMR, up_KRO)
                continue
            change_TO = torch.bmm(own_KMR, up_KRO).view(-1, piece.width)
            target_TO.add_(change_TO if joint.valid is None else change_TO.index_select(0, joint.valid))
