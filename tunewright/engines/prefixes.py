"""What has been computed is not computed again: keys and values of a prompt's beginning, from rows that ran or still run. Of
prompts that begin alike and come together one is read first (`rows.py`).

A row that has ended leaves its tokens in the slots behind the running rows until the room is needed, the longest unused first.
Only the owner of a row may go on with it: the same tenant (else the time of an answer would tell one what another has asked)
with the same adapter, byte for byte. Copies within the cache cost a hundredth of computing anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tunewright.engines.adapter_shelf import Key
from tunewright.engines.kv_cache import KEEP_IDLE_BYTES, SlotCache

MIN_TOKENS = 16
"""Fewer are not worth a copy."""


class Owner(NamedTuple):
    """Whose tokens they are. `key` None is the base."""

    tenant: str
    key: Key | None


class Source(NamedTuple):
    """A slot and the first tokens in it, which are known to be sound."""

    slot: int
    owner: Owner
    tokens: list[int]


@dataclass
class _Kept:
    owner: Owner
    tokens: list[int]
    last_used: int


class Prefixes:
    """Rows that have ended, by slot; all of these are behind the slots of running rows. Moves the cache's contents itself."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._kept: dict[int, _Kept] = {}
        self._clock = 0
        self.hits = 0
        self.tokens_reused = 0
        self.tokens_total = 0
        """Of all prompts."""

    def begin(self, slot: int, owner: Owner | None, prompt: list[int], running: Iterable[Source]) -> int:
        """Free the slot behind the running rows for a new one and bring there what is known of its prompt.

        Returns how many tokens that is: not all of the prompt, for the last one's logits are wanted.
        """
        self.tokens_total += len(prompt)
        source, length = self._longest(owner, prompt[:-1], running)
        if length:
            self.hits += 1
            self.tokens_reused += length
        if source in self._kept and len(self._kept[source].tokens) - length < MIN_TOKENS:
            self._take_over(source, slot, length)
            return length
        if slot in self._kept:
            moved_to = self._make_way(slot, spared=source)
            if source == slot and moved_to is not None:
                source = moved_to
        if length and source != slot:
            self._cache.reserve(slot + 1, length)
            self._cache.move(source, slot, length)
        if source in self._kept:
            self._kept[source].last_used = self._now()
        return length

    def go_on(self, slot: int, owner: Owner | None, prompt: list[int], known: int, running: Iterable[Source]) -> int:
        """Bring more of its prompt to a running row that has read none of it itself: others may have got further since it began.

        Returns how many tokens it has then, of which it had `known`.
        """
        source, length = self._longest(owner, prompt[:-1], running)
        if length < known + MIN_TOKENS:
            return known
        self.hits += not known
        self.tokens_reused += length - known
        self._cache.reserve(slot + 1, length)
        self._cache.move(source, slot, length)
        if source in self._kept:
            self._kept[source].last_used = self._now()
        return length

    def keep(self, slot: int, owner: Owner, tokens: list[int]) -> None:
        """The row that has just left the running ones had these tokens, which lie in `slot` now."""
        if len(tokens) < MIN_TOKENS:
            return
        for place, other in list(self._kept.items()):
            if other.owner == owner and other.tokens == tokens[: len(other.tokens)]:
                del self._kept[place]  # says nothing that the new one does not say
        self._kept[slot] = _Kept(owner, tokens, self._now())

    def forget(self, adapter_id: str | None = None) -> None:
        """Never use again what an adapter has computed; None: whatever there is."""
        for slot, kept in list(self._kept.items()):
            if adapter_id is None or (kept.owner.key is not None and kept.owner.key.adapter_id == adapter_id):
                del self._kept[slot]

    def release_memory(self) -> None:
        """Give memory back, if there is much; to be called when no row is running. The rows used last stay as far as they fit."""
        allocated = self._cache.size_bytes(self._cache.slots, self._cache.tokens)
        if allocated <= KEEP_IDLE_BYTES:
            return
        newest = sorted(self._kept, key=lambda slot: self._kept[slot].last_used, reverse=True)
        chosen: list[int] = []
        for slot in newest:
            longest = max(len(self._kept[other].tokens) for other in (*chosen, slot))
            if self._cache.size_bytes(len(chosen) + 1, self._cache.rounded(longest)) > KEEP_IDLE_BYTES:
                break
            chosen.append(slot)
        self._cache.shrink([(slot, len(self._kept[slot].tokens)) for slot in chosen])
        self._kept = {place: self._kept[slot] for place, slot in enumerate(chosen)}

    def _longest(self, owner: Owner | None, prompt: list[int], running: Iterable[Source]) -> tuple[int, int]:
        """(slot, tokens) of what has the longest beginning in common with `prompt`; (-1, 0) if none is long enough."""
        best = -1, 0
        kept = (Source(slot, entry.owner, entry.tokens) for slot, entry in self._kept.items())
        for source in (*kept, *running) if owner is not None else ():
            if source.owner == owner:
                length = common(source.tokens, prompt)
                if length > best[1]:
                    best = source.slot, length
        return best if best[1] >= MIN_TOKENS else (-1, 0)

    def _take_over(self, source: int, slot: int, length: int) -> None:
        """The new row goes on with a kept one, of which nothing is left that would be worth a place of its own."""
        del self._kept[source]
        if source == slot:
            return
        if slot in self._kept:
            self._cache.cycle([slot, source], [len(self._kept[slot].tokens), length])
            self._kept[source] = self._kept.pop(slot)
        else:
            self._cache.move(source, slot, length)

    def _make_way(self, slot: int, spared: int) -> int | None:
        """Move a kept row elsewhere, or forget it if it is the one that was used longest ago. Returns where it is."""
        kept = self._kept.pop(slot)
        target = self._place_behind(slot, kept.last_used, spared)
        if target is not None:
            self._cache.move(slot, target, len(kept.tokens))
            self._kept[target] = kept
        return target

    def _place_behind(self, slot: int, last_used: int, spared: int) -> int | None:
        empty = [place for place in range(slot + 1, self._cache.slots) if place not in self._kept]
        if empty:
            return empty[-1]
        grown = min(self._cache.max_slots, 2 * self._cache.slots)
        if grown > self._cache.slots and self._cache.size_bytes(grown, self._cache.tokens) <= KEEP_IDLE_BYTES:
            self._cache.reserve(grown, self._cache.tokens)
            return grown - 1
        older = [(kept.last_used, place) for place, kept in self._kept.items() if place != spared]
        return min(older)[1] if older and min(older)[0] < last_used else None

    def _now(self) -> int:
        self._clock += 1
        return self._clock


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two rows have in common at their beginning. Slices are compared at the speed of C."""
    low, high = 0, min(len(one), len(other))
    if one[:MIN_TOKENS] != other[:MIN_TOKENS]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
