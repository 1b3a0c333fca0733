"""What follows when a trainer is dead without a last record: go on from the last checkpoint, or give up. Pure."""

from typing import Any, NamedTuple

from tunewright.i18n import mark
from tunewright.jobs.signatures import CRASHED, DISK_FULL, OUT_OF_MEMORY, PREEMPTED, STALLED, Signature

MICRO_BATCH_HALVED = "micro_batch_halved"
"""Code of the event after which a job is trained with half the micro-batch, for good."""
PREEMPTED_TEXT = mark(
    "The trainer was ended from outside at step {step}; the job goes on from step {checkpoint} by itself"
)
PREEMPTED_DELAY_S = 1.0
ROOM_DELAY_S = 60.0
"""How long a job waits before it looks again whether the disk has room."""
LONGEST_DELAY_S = 10.0
"""Between the end of a trainer and the start of the next one of its job, which keeps its place meanwhile."""


class Verdict(NamedTuple):
    """If `fatal`, the job fails with `code`; else it goes on after `delay_s` and `code` is that of the event that says so.

    `failures` is the new count of deaths without progress: an end that somebody wanted, or a full disk, is none.
    """

    code: str
    text: str
    values: dict[str, Any]
    failures: int
    delay_s: float = 0.0
    fatal: bool = False


def judge(
    signature: Signature, *, failures: int, step: int, checkpoint_step: int, halved: bool, max_attempts: int
) -> Verdict:
    """`failures` counts the deaths since the last checkpoint, without this one; `halved`: less memory was tried already."""
    places: dict[str, Any] = {"step": step, "checkpoint": checkpoint_step}
    if signature.code == PREEMPTED:
        return Verdict(PREEMPTED, PREEMPTED_TEXT, places, failures, PREEMPTED_DELAY_S)
    if signature.code == DISK_FULL:
        text = mark("The trainer ended at step {step} because the disk is full; the job waits for room")
        return Verdict(DISK_FULL, text, places, failures, ROOM_DELAY_S)
    failures += 1
    places["failures"] = failures
    if signature.code == OUT_OF_MEMORY and not halved:
        text = mark(
            "Memory ran out at step {step}. The job goes on from step {checkpoint} with half the micro-batch; the batch "
            "size stays."
        )
        return Verdict(MICRO_BATCH_HALVED, text, places, failures, _delay_s(failures))
    if signature.code == OUT_OF_MEMORY:
        text = mark("The trainer ran out of memory at step {step}, also with half the micro-batch.")
        return Verdict(OUT_OF_MEMORY, text, places, failures, fatal=True)
    if failures >= max_attempts and signature.code == STALLED:
        text = mark("The trainer gave no sign of life {failures} times in a row, last after step {step}.")
        return Verdict(STALLED, text, places, failures, fatal=True)
    if failures >= max_attempts:
        text = mark("The trainer ended unexpectedly {failures} times in a row, last after step {step}.")
        return Verdict(CRASHED, text, places, failures, fatal=True)
    text = mark("The trainer ended unexpectedly at step {step}; going on from step {checkpoint}")
    return Verdict("trainer_died", text, places, failures, _delay_s(failures))


def _delay_s(failures: int) -> float:
    return min(LONGEST_DELAY_S, 0.1 * 2**failures)
