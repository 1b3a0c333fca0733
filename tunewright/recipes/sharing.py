"""What rows have in common at their beginnings, so that a forward pass computes it once. Pure numpy, no torch.

A token's hidden states depend on what stands before it and on nothing else, so rows that begin alike (a system message, the
tools of function rows, the question of two answers) are laid as a tree: a stretch of tokens that some of them share, then one
for each way to go on. Labels may be shared too: each row takes its losses from the places of its own tokens.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

LEAST = 8
"""So many tokens are worth a stretch of their own."""


@dataclass(frozen=True)
class Stretch:
    """Tokens `begin` to `end` of a row. `after` is the stretch that it continues, -1 at the beginning of a row."""

    row: int
    begin: int
    end: int
    after: int = -1


@dataclass(frozen=True)
class Layout:
    """`stretches` are computed end to end; each stands after the one that it continues. `last` is the stretch that each row
    ends with."""

    stretches: list[Stretch]
    last: list[int]

    @property
    def tokens(self) -> int:
        """How many are computed."""
        return sum(stretch.end - stretch.begin for stretch in self.stretches)

    def places(self) -> list[np.ndarray]:
        """Of each row, where its tokens lie: int64 (length,)."""
        found: list[np.ndarray] = []
        laid = 0
        for one in self.stretches:
            own = np.arange(laid, laid + one.end - one.begin)
            found.append(own if one.after < 0 else np.concatenate([found[one.after], own]))
            laid += len(own)
        return [found[stretch] for stretch in self.last]


class Together:
    """Rows that are laid together, added one by one; without `share` each is computed for itself."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._lengths: list[int] = []
        self._sorted: list[int] = []
        self._keys: list[bytes] = []
        self._common: list[int] = []
        """How many tokens each of the sorted rows has in common with the next."""

    def add(self, tokens: np.ndarray) -> None:
        """One more row."""
        self._lengths.append(len(tokens))
        if not self._share:
            return
        key = sort_key(tokens)
        place = bisect_right(self._keys, key)
        self._keys.insert(place, key)
        self._sorted.insert(place, len(self._lengths) - 1)
        neighbours = [one for one in (place - 1, place) if 0 <= one < len(self._keys) - 1]
        common = [_common(self._keys[one], self._keys[one + 1]) for one in neighbours]
        self._common[max(0, place - 1) : place] = common

    def fit(self, token_budget: int) -> bool:
        """Whether no more than so many tokens are to be computed."""
        return sum(self._lengths) <= token_budget or self.layout().tokens <= token_budget

    def layout(self) -> Layout:
        """What is to be computed. The first continuation of a stretch stands right behind it."""
        n_rows = len(self._lengths)
        if not self._share:
            return Layout([Stretch(row, 0, length) for row, length in enumerate(self._lengths)], list(range(n_rows)))
        stretches: list[Stretch] = []
        last = [0] * n_rows
        todo = [(0, n_rows, 0, -1)]  # sorted rows, how many tokens of theirs are laid already, and by which stretch
        while todo:
            first, end, depth, after = todo.pop()
            split = first + 1
            while split < end and self._common[split - 1] >= depth + LEAST:
                split += 1
            if split < end:
                todo.append((split, end, depth, after))
            row = self._sorted[first]
            upto = min(self._common[first : split - 1], default=self._lengths[row])
            if upto > depth:  # else another row begins with the whole of this one
                stretches.append(Stretch(row, depth, upto, after))
                after = len(stretches) - 1
            if split - first > 1:
                todo.append((first, split, upto, after))
            else:
                last[row] = after
        return Layout(stretches, last)


def sort_key(tokens: np.ndarray) -> bytes:
    """Sorted by it, rows that begin alike are neighbours."""
    return tokens.astype(">u4").tobytes()


def _common(one: bytes, other: bytes) -> int:
    """How many first tokens of two rows are the same, by their keys."""
    length = min(len(one), len(other)) // 4
    differs = np.frombuffer(one, np.uint32, length) != np.frombuffer(other, np.uint32, length)
    return int(differs.argmax()) if differs.any() else length
