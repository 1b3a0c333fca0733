"""Ways to die for a trainer that was forked by the nursery, each at a certain point: SIGKILL from inside is what a kill -9
from outside is, at a moment that a test can choose."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.recipes.die_while_saving import OPERATIONS
from tests.recipes.job_folder import SteppedJournal
from tunewright.recipes import checkpoints, run


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(step: int) -> None:
    """Right after the metrics of `step` are in the journal."""

    def at_step(reached: int) -> None:
        if reached == step:
            _die()

    def journal(path: Path) -> SteppedJournal:
        return SteppedJournal(path, at_step)

    run.JournalWriter = journal  # type: ignore[assignment,misc]


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
