"""The only place that asks what time it is.

Wall time goes into records that people read; monotonic time drives every timeout and lease, so that a clock that
jumps can neither expire nor prolong anything.
"""

import time


def wall_s() -> int:
    """Unix time in whole seconds: the unit of every timestamp that leaves the product."""
    return int(time.time())


def wall_s_after(*earlier: int | None) -> int:
    """The same, but never before any of these: a clock that is set back makes no job end before it began."""
    return max(wall_s(), *(moment or 0 for moment in earlier))


def wall_ms() -> int:
    """Unix time in milliseconds (ids, JWT claims of the Zhipu dialect)."""
    return int(time.time() * 1000)


def mono_s() -> float:
    """Monotonic seconds; only differences mean anything, and only within one boot of one machine."""
    return time.monotonic()


def cpu_s() -> float:
    """Processor seconds that this process has used, of all its threads; only differences mean anything."""
    return time.process_time()


def thread_cpu_s() -> float:
    """Processor seconds that the thread which asks has used; only differences mean anything."""
    return time.thread_time()
