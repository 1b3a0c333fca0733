"""What the job service asks of the world around it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunewright.jobs.records import Job
from tunewright.models.records import Base, TunedModel

if TYPE_CHECKING:
    from tunewright.storage import Transaction

OnEnd = Callable[["Transaction", Job], None]
"""Called with a job that has just reached its last state, in the transaction that stores it: what else must be written then,
or not at all. It may raise what storage raises, and takes no time."""


def nothing_at_end(tx: "Transaction", job: Job) -> None:
    """For whoever wants nothing to be written."""


class Runner(Protocol):
    """Starts worker processes and finds them again.

    A process gets its own session and process group, a clean environment (no database URL, no keys), its output in a
    file, and its working folder as the only argument. All calls return at once.
    """

    def start(self, module: str, work_folder: Path, log: Path) -> int:
        """Start `python -m module work_folder`; returns the pid."""
        ...

    def alive(self, pid: int, start_ticks: int) -> bool:
        """Whether that very process (not a later one with its number, not a zombie) still runs. Reaps our own children."""
        ...

    def start_ticks(self, pid: int) -> int | None:
        """Start time of a live process in clock ticks since boot, None if there is none."""
        ...

    def find(self, module: str, work_folder: Path) -> list[int]:
        """What `start(module, work_folder, ...)` returned, for all processes that still live: found without any memory of
        the start, so also those of an earlier server."""
        ...

    def exit_code(self, pid: int) -> int | None:
        """How a process that is gone ended, minus the signal if by one; None if it was not our child."""
        ...

    def died_of_memory(self, pid: int) -> bool:
        """Whether a process that is gone was most likely killed by the kernel for want of memory."""
        ...

    def memory_bytes(self, pid: int) -> int:
        """What the live processes of the group that `pid` led hold in memory."""
        ...

    def terminate(self, pid: int) -> None:
        """SIGTERM to the process group; no error if it is gone."""
        ...

    def kill(self, pid: int) -> None:
        """SIGKILL to the process group; no error if it is gone."""
        ...

    def group_empty(self, pid: int) -> bool:
        """Whether no live process (zombies do not count) is left in the group that `pid` led."""
        ...


class Machine(Protocol):
    """What there is for trainers and engines."""

    def memory_bytes(self) -> int:
        """Main memory in all, that of the container if it has less."""
        ...

    def cores(self) -> int:
        """Processors that may be used."""
        ...

    def gpus(self) -> int: ...


class Prover(Protocol):
    """Applies a fresh adapter where it will be served and measures its effect."""

    def warm(self, base: Base) -> None:
        """Begin to make ready whatever serves `base`; returns at once. Called while a job of that base runs."""
        ...

    def memory_bytes(self) -> int:
        """What all engines hold in memory now."""
        ...

    def prove(self, base: Base, model: TunedModel) -> dict[str, Any]:
        """Load the adapter and compare logits with the base's on stored prompts.

        Returns `{"tensors": n, "tensors_applied": n, "max_logit_shift": x, ...}`.
        Raises InvalidRequest (`adapter_invalid`, `no_effect`) or Unavailable (the engine can't start; try later).
        """
        ...
