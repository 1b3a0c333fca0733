"""Not a test: run by one, as its own process. Takes a home whose trainer has just finished, and publishes its model again and
again, each time in a child on a copy of the home that dies at its 1st, 2nd, 3rd ... file operation or transaction, until one
gets through. A second child is the next server. Prints a line for each pair: both exit codes and what the second found.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from tests.job_bench import PROJECT, Bench
from tunewright.storage import Storage

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.scandir", "os.listdir", "shutil.rmtree")
DIED = 9


class Death:
    """Ends the process right before operation number `point`."""

    def __init__(self, point: int) -> None:
        self._left = point

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            os._exit(DIED)

    def arm(self, home: Path) -> None:
        """From now on, count what is done to files below `home` and to the database."""

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            if event in OPERATIONS and arguments and str(arguments[0]).startswith(str(home)):
                self.step()

        write = Storage.write

        @contextmanager
        def counted(storage: Storage) -> Iterator[object]:
            self.step()
            with write(storage) as tx:
                yield tx
                self.step()  # all is said, but not committed
            self.step()

        Storage.write = counted  # type: ignore[assignment,method-assign]
        sys.addaudithook(audit)


def serve(home: Path, job_id: str, point: int) -> None:
    """Move the job to its end; die at `point` (0: never)."""
    bench = Bench(home)
    if point:
        Death(point).arm(home)
    bench.models.sweep()
    bench.jobs.sweep()
    done = bench.until_over(job_id)
    with bench.storage.read() as tx:
        ready = [model.id for model in tx.models.list(PROJECT)]
        files = tx.files.list(PROJECT, purpose="fine-tune-results", after=None, limit=9)
    blobs = sorted(path.name for path in (home / "blobs").rglob("*") if path.is_file())
    adapters = [path.name for path in (home / "adapters").iterdir()]
    whole = (
        ready == adapters == [done.tuned_model_id]
        and [file.id for file in files] == list(done.result_files)
        and blobs == sorted([done.training_file, *done.result_files])
        and (home / "adapters" / ready[0] / "adapter_model.safetensors").is_file()
    )
    codes = bench.codes(job_id)
    once = codes.count("succeeded") == codes.count("model_ready") == 1
    print(done.status, done.attempt, whole, once, end=" ", flush=True)
    os._exit(0)


def child(home: Path, job_id: str, point: int) -> int:
    """Exit code of a server on `home`."""
    pid = os.fork()
    if pid == 0:
        try:
            serve(home, job_id, point)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(home: Path, job_id: str) -> None:
    """Go through all points."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    code, point = -1, 0
    while code != 0:
        point += 1
        copy = home.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(home, copy)
        code = child(copy, job_id, point)
        print(code, child(copy, job_id, 0), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
