"""What is to be done so that the replicas of one deployment become what is wished. Pure: facts in, actions out.

A replica is `current` if it was started with what would be asked for now. Others are replaced one after another: a new one is
ready before an old one goes. What is surplus takes no new calls and ends when its answers have ended.
"""

from collections.abc import Sequence

import msgspec

from tunewright.deployments.records import DEPLOYING, FAILED, SCALING, STOPPED
from tunewright.deployments.records import READY as ALL_READY

STARTING = "starting"
"""Its process loads, or is being proven."""
READY = "ready"
"""It takes calls."""
SILENT = "silent"
"""It lives, and has not said for too long how it is; no calls until it has answered twice."""
BACKING_OFF = "backing_off"
"""It has no process; it is tried again at a certain time, or when there is memory."""
DRAINING = "draining"
"""It takes no new calls and ends with the last of its answers."""

FAILURES_OF_FAILED = 3
LONGEST_PAUSE_S = 60.0


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as it is now. `due`: one that is backing off may be tried again."""

    number: int
    state: str
    current: bool = True
    in_flight: int = 0
    due: bool = False
    overdue: bool = False
    """It has been draining for as long as it may."""


class Start(msgspec.Struct, frozen=True):
    """Bring a process up in the place `number`, which is new or is backing off."""

    number: int


class Drain(msgspec.Struct, frozen=True):
    number: int


class End(msgspec.Struct, frozen=True):
    """End its process, whatever it is doing, and give its place up."""

    number: int


Action = Start | Drain | End


def decide(wanted: int, facts: Sequence[Fact], next_number: int) -> list[Action]:
    """The actions for now, at most one for each replica; new ones are numbered from `next_number`. None means that all is as
    wished, or that there is something to wait for."""
    actions: list[Action] = [End(fact.number) for fact in facts if fact.state == DRAINING and _drained(fact)]
    current = [fact for fact in facts if fact.current and fact.state != DRAINING]
    old = [fact for fact in facts if not fact.current and fact.state != DRAINING]
    kept = sorted(current, key=_worth, reverse=True)[:wanted]
    surplus = [fact for fact in current if fact not in kept]
    # An old one that does not serve now is no loss; one that does goes when a new one serves in its place.
    spare = sum(fact.state == READY for fact in (*kept, *old)) - wanted
    for fact in sorted(old, key=_worth):
        if fact.state != READY:
            surplus.append(fact)
        elif spare > 0:
            spare -= 1
            surplus.append(fact)
    actions += [_remove(fact) for fact in surplus]
    # Beside old ones that serve there is one new one more at a time, for all of them have to find room in memory.
    old_left = sum(fact.state == READY for fact in old if fact not in surplus)
    places = min(wanted, max(wanted + 1 - old_left, 0))
    actions += [Start(fact.number) for fact in kept if fact.state == BACKING_OFF and fact.due]
    return actions + [Start(next_number + i) for i in range(places - len(kept))]


def status_of(wanted: int, facts: Sequence[Fact], *, failures: int, was_ready: bool) -> str:
    """The word for it. `failures`: of the replica that failed most often in a row; `was_ready`: it ever was as wished."""
    serving = [fact for fact in facts if fact.state == READY]
    if not wanted:
        return STOPPED
    if len(facts) == wanted == sum(fact.current for fact in serving):
        return ALL_READY
    if not serving and failures >= FAILURES_OF_FAILED:
        return FAILED
    return SCALING if was_ready else DEPLOYING


def pause_s(failures: int) -> float:
    """How long to wait after so many failures in a row: not at all after the first, then 1 s, doubled up to a minute."""
    return 0.0 if failures <= 1 else min(LONGEST_PAUSE_S, 2.0 ** min(failures - 2, 10))


def _remove(fact: Fact) -> Action:
    return Drain(fact.number) if fact.state == READY and fact.in_flight else End(fact.number)


def _drained(fact: Fact) -> bool:
    return fact.overdue or not fact.in_flight


def _worth(fact: Fact) -> tuple[int, int, int]:
    """Those worth keeping last: what serves before what is about to, the busy before the idle, the old before the new."""
    order = (BACKING_OFF, SILENT, STARTING, READY)
    return order.index(fact.state), fact.in_flight, -fact.number
