"""Which adapters are in memory, who waits for one, and who goes when room is needed. No torch: pure decisions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Held = TypeVar("Held")


class Key(NamedTuple):
    """An adapter's identity: the same id with other bytes is another adapter."""

    adapter_id: str
    sha256: str


class Want(NamedTuple):
    """What a waiting request needs: an adapter (None: the base) and perhaps a slot."""

    key: Key | None
    needs_slot: bool


@dataclass
class Decision:
    """`admit`: indices of waiting requests that can run now. `evict` first, then begin to `load`."""

    admit: list[int] = field(default_factory=list)
    evict: list[Key] = field(default_factory=list)
    load: list[Key] = field(default_factory=list)


@dataclass
class _Place(Generic[Held]):
    adapter: Held
    users: int = 0
    last_used: int = 0


class AdapterShelf(Generic[Held]):
    """At most `capacity` adapters loaded or loading; the least recently used idle one makes room; one in use never goes.

    Nobody starves: the oldest request that lacks room names a victim, and newer requests for the victim wait
    until it has drained and gone. An adapter that an older request waits for is never a victim.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._places: dict[Key, _Place[Held]] = {}
        self._loading: set[Key] = set()
        self._clock = 0

    def ids(self) -> list[str]:
        """Ids of the adapters in memory, sorted."""
        return sorted(key.adapter_id for key in list(self._places))

    def lacks(self, keys: Collection[Key]) -> int:
        """How many adapters in use have to be let go before all of `keys` can be held."""
        missing = sum(key not in self._places and key not in self._loading for key in keys)
        idle = sum(not place.users and key not in keys for key, place in self._places.items())
        return max(0, missing - idle - (self._capacity - len(self._places) - len(self._loading)))

    def decide(self, wants: Sequence[Want], free_slots: int) -> Decision:
        """What to do for the waiting requests, oldest first. Changes nothing by itself."""
        decision = Decision()
        room = self._capacity - len(self._places) - len(self._loading)
        needed: set[Key] = set()  # resident adapters that a request seen so far wants
        victims: set[Key] = set()
        asked: set[Key] = set()
        for index, (key, needs_slot) in enumerate(wants):
            if key is None or (key in self._places and key not in victims):
                if key is not None:
                    needed.add(key)
                if not needs_slot or free_slots:
                    free_slots -= needs_slot
                    decision.admit.append(index)
            elif key in victims or key in self._loading or key in asked:
                continue
            elif room > 0:
                room -= 1
                asked.add(key)
                decision.load.append(key)
            else:
                victim = self._victim(needed | victims)
                if victim is None:
                    continue
                victims.add(victim)
                asked.add(key)
                if not self._places[victim].users:
                    decision.evict.append(victim)
                    decision.load.append(key)
        return decision

    def _victim(self, spared: set[Key]) -> Key | None:
        candidates = [
            (place.users > 0, place.last_used, key) for key, place in self._places.items() if key not in spared
        ]
        return min(candidates)[2] if candidates else None

    def begin_load(self, key: Key) -> None:
        """Count `key` as taking room from now on."""
        self._loading.add(key)

    def end_load(self, key: Key, adapter: Held | None) -> None:
        """Loading is over; None if it failed."""
        self._loading.discard(key)
        if adapter is not None:
            self._clock += 1
            self._places[key] = _Place(adapter, last_used=self._clock)

    def take(self, key: Key) -> Held:
        """The adapter, now with one user more."""
        place = self._places[key]
        self._clock += 1
        place.users += 1
        place.last_used = self._clock
        return place.adapter

    def give_back(self, key: Key) -> None:
        """One user less."""
        self._places[key].users -= 1

    def evict(self, key: Key) -> None:
        """Drop an idle adapter."""
        if self._places[key].users:
            raise ValueError("an adapter in use cannot go")
        del self._places[key]

    def forget(self, adapter_id: str) -> bool:
        """Drop every idle version of an adapter. False while one is in use or loading: ask again later."""
        keys = [key for key in self._places if key.adapter_id == adapter_id]
        for key in keys:
            if not self._places[key].users:
                del self._places[key]
        in_use = any(key in self._places for key in keys)
        return not in_use and not any(key.adapter_id == adapter_id for key in self._loading)
