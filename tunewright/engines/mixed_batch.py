"""Does an engine that others wrote answer each row of a mixed batch by the row's own adapter, and rows of the base by the base?

A widely used engine's processor build answered rows of the base with the adapter of the last slot. Nothing of that is seen in
texts that nobody compares; so an engine that is not ours has to pass this when it starts. No torch: pure comparison.
"""

import math
from collections.abc import Mapping, Sequence

Step = Mapping[int, float]
"""Token -> log-probability, of the likeliest tokens at one place of an answer, with the one that was chosen first."""
TOLERANCE = 0.2
"""In nats. Rounding to 16 bits stays below it for tokens that are likely."""
_LEAST_EFFECT = 5 * TOLERANCE


def faults(solo: Mapping[str, Sequence[Step]], mixed: Mapping[str, Sequence[Sequence[Step]]], base: str) -> list[str]:
    """What is wrong, in words; empty if all is well.

    `solo` has the answer of each row on its own, by the name of its adapter (`base` for none); `mixed` what the same rows got
    side by side, perhaps several times. A check that could see nothing, for the adapters do too little, is a fault as well.
    """
    found = []
    for name, steps in solo.items():
        if name != base and _distance(steps, solo[base]) < _LEAST_EFFECT:
            found.append(f"{name} hardly differs from {base}: nothing could be seen")
        for others in mixed.get(name, []):
            distance = _distance(steps, others)
            if not distance <= TOLERANCE:
                found.append(f"{name} differs by {distance:.2f} nats from its solo run")
    return found + [f"{name} was not answered" for name in solo if not mixed.get(name)]


def _distance(one: Sequence[Step], other: Sequence[Step]) -> float:
    """The largest difference of a chosen token's log-probability, as long as both chose the same tokens before."""
    gaps = [math.inf] if len(one) != len(other) or not one else []
    for left, right in zip(one, other, strict=False):
        chosen, others_choice = next(iter(left)), next(iter(right))
        gap = abs(left[chosen] - right.get(chosen, -math.inf))
        gaps.append(math.inf if math.isnan(gap) else gap)
        if chosen != others_choice:
            break
    return max(gaps)
