"""What befalls a trainer that was forked by the nursery, each at a certain point: SIGKILL from inside is what a kill -9
from outside is, at a moment that a test can choose. So is SIGTERM, or a disk that is full from the start."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.recipes.die_while_saving import OPERATIONS
from tests.recipes.job_folder import SteppedJournal
from tunewright.recipes import checkpoints, run


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: int, act: Callable[[], None]) -> None:
    def at_step(reached: int) -> None:
        if reached == step:
            act()

    def journal(path: Path) -> SteppedJournal:
        return SteppedJournal(path, at_step)

    run.JournalWriter = journal  # type: ignore[assignment,misc]


def after_step(step: int) -> None:
    """Killed right after the metrics of `step` are in the journal."""
    _at_step(step, _die)


def asked_after_step(step: int) -> None:
    """SIGTERM, then."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def small_files(limit: int) -> None:
    """No file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def while_saving(point: int) -> None:
    """Right before the file operation number `point` of the second checkpoint that is saved."""
    real, saves, left = checkpoints.publish, 0, point

    def count(event: str, _: object) -> None:
        nonlocal left
        if saves == 2 and event in OPERATIONS:
            left -= 1
            if left == 0:
                _die()

    def publish(*given: Any, **named: Any) -> None:
        nonlocal saves
        saves += 1
        real(*given, **named)

    checkpoints.publish = publish
    sys.addaudithook(count)
