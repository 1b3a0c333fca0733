"""The process of one training attempt: `python -m tunewright.recipes.run WORK_FOLDER`.

Takes the job's lock, tells who it is, beats once a second, runs the recipe, and writes the last record. Exit codes:
0 the journal holds the last record (finished, failed or stopped); 75 another trainer has this job; anything else is a crash
without a last record, whose traceback is in the log and which the server may retry.
"""

import faulthandler
import fcntl
import gc
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from tunewright.errors import InvalidRequest, StorageFull, TunewrightError
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.spec import Failed, JournalRecord, Stopped, TrainerProcess, TrainingSpec
from tunewright.recipes import checkpoints
from tunewright.recipes.attempt import UNFINISHED_RESULT, Attempt, StopRequested, Superseded, newest_attempt
from tunewright.recipes.integrity import verify_inputs
from tunewright.recipes.journal_writer import JournalWriter

EXIT_NOT_OURS = 75
HEARTBEAT_S = 1.0


def main(arguments: list[str]) -> int:
    """Run one attempt to its end; returns the exit code."""
    faulthandler.enable()
    os.umask(0o077)
    folder = Path(arguments[0]).resolve()
    with _locked(folder) as ours:
        if not ours:
            return EXIT_NOT_OURS
        spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=TrainingSpec)
        if newest_attempt(folder) > spec.attempt:
            return EXIT_NOT_OURS
        _announce(folder, spec)
        threading.Thread(target=_beat, args=(folder / "heartbeat",), daemon=True).start()
        journal = JournalWriter(folder / f"journal-{spec.attempt}.jsonl")
        with closing(journal), ThreadPoolExecutor(1) as hashing:
            # Hashing needs no interpreter lock, so it runs beside the import of the libraries.
            attempt = Attempt(spec, journal, inputs_verified=hashing.submit(verify_inputs, spec))
            signal.signal(signal.SIGTERM, lambda *_: attempt.stop.set())
            try:
                attempt.write(run(attempt))
            except Superseded:
                return EXIT_NOT_OURS
    return 0


def run(attempt: Attempt) -> JournalRecord:
    """The last record of this attempt. Unexpected exceptions pass through: they are crashes."""
    try:
        with _no_collection():
            recipe = _recipe(attempt.spec)
        return recipe(attempt)
    except StopRequested:
        return Stopped(step=checkpoints.newest_step(attempt.folder))
    except TunewrightError as error:
        if error.retryable:
            raise
        traceback.print_exc()
        return Failed(code=error.code, message=error.message, param=error.param, values=error.values)
    except Exception as error:
        if not checkpoints.is_disk_full(error):
            raise
        traceback.print_exc()
        shutil.rmtree(attempt.folder / UNFINISHED_RESULT, ignore_errors=True)  # the room it takes may help others
        full = StorageFull("insufficient_storage", mark("There was no room on the disk to save the trained model."))
        return Failed(code=full.code, message=full.message)


def _recipe(spec: TrainingSpec):
    """The function that trains or rehearses `spec`; imports its libraries. Raises InvalidRequest(`unsupported_method`)."""
    if spec.rehearsal:
        from tunewright.recipes.rehearsal import rehearse

        return rehearse
    if spec.method == "supervised" and spec.training_type in ("lora", "full"):
        from tunewright.recipes.text import train

        return train
    if (spec.method, spec.training_type) == ("dpo", "lora"):
        from tunewright.recipes.preference import train

        return train
    raise InvalidRequest(
        "unsupported_method",
        mark("This release can't train with the method {method} and the type {training_type}."),
        param="method",
        method=spec.method,
        training_type=spec.training_type,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection waits, and then leaves alone what was imported: it took a fifth of the import of torch and
    transformers, whose objects all stay."""
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once in a process: a later model may be garbage that is to be found
            gc.freeze()
        gc.enable()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process got the job's lock; held until the process ends, however it ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _announce(folder: Path, spec: TrainingSpec) -> None:
    # The name in field 2 may hold spaces and brackets, so count from the last bracket.
    fields = Path("/proc/self/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    process = TrainerProcess(pid=os.getpid(), start_ticks=int(fields[22 - 3]), attempt=spec.attempt)
    (folder / "heartbeat").touch()
    write_atomically(folder / "trainer.json", msgspec.json.encode(process))


def _beat(path: Path) -> None:
    wait = threading.Event()
    while not wait.wait(HEARTBEAT_S):
        try:
            path.touch()
        except OSError:
            pass  # a full or vanished disk: the silence itself tells the server


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
