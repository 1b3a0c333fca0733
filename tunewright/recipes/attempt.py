"""What a recipe knows of the process it runs in: its spec, its journal, whether to stop, and whether it is still the one."""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tunewright.jobs.spec import Failed, JournalRecord, Note, Rehearsed, Started, Stopped, TrainingSpec
from tunewright.recipes.journal_writer import JournalWriter

UNFINISHED_RESULT = ".prepare-result"
"""The folder in which `result/` is made ready."""


class StopRequested(Exception):
    """SIGTERM came: save and leave."""


class Superseded(Exception):
    """A newer attempt of this job exists: leave without another word."""


class Attempt:
    """One run of a trainer. `inputs_verified` ends when the hashes of data and base are known to be right."""

    def __init__(self, spec: TrainingSpec, journal: JournalWriter, inputs_verified: "Future[None]") -> None:
        self.spec = spec
        self.folder = Path(spec.work_folder)
        self.journal = journal
        self.inputs_verified = inputs_verified
        self.stop = threading.Event()
        self._waiting: list[JournalRecord] | None = []

    def write(self, record: JournalRecord) -> None:
        """Append to the journal. What is told before Started waits for it, because Started is the first record of an attempt
        that gets so far; an attempt that does not, or that only rehearses, ends with its notes and its last record."""
        if self._waiting is not None and not isinstance(record, Started | Rehearsed | Failed | Stopped):
            self._waiting.append(record)
            return
        waiting, self._waiting = self._waiting or [], None
        for one in [record, *waiting] if isinstance(record, Started) else [*waiting, record]:
            self.journal.write(one)

    def note(self, code: str, message: str, *, level: str = "warning", **values: Any) -> None:
        """Tell the user something that is no error. `message` is a marked English template for `values`."""
        self.write(Note(level=level, code=code, message=message, values=values))

    def go_on(self) -> None:
        """Return if work may continue. Raises Superseded or StopRequested."""
        self.check_fence()
        if self.stop.is_set():
            raise StopRequested

    def check_fence(self) -> None:
        """Raises Superseded if the server started a newer attempt; called before anything is published."""
        if newest_attempt(self.folder) > self.spec.attempt:
            raise Superseded


def newest_attempt(folder: Path) -> int:
    """The number in the job's `attempt` file; 0 if there is none yet."""
    try:
        return int((folder / "attempt").read_text("ascii"))
    except FileNotFoundError:
        return 0
