"""One holder at a time for work on the home folder, between processes and between threads."""

import fcntl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for the lock file `path`, hold it inside the block. A killed holder's lock is free at once.

    The file stays: removing it would let two holders lock two different files of one name.
    """
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class ReentrantLock:
    """`held` for a path, which its holder may enter again: with a `with` statement."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.RLock()
        self._depth = 0  # guarded by _threads
        self._file = ExitStack()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            if self._depth == 0:
                self._file.enter_context(held(self._path))
            self._depth += 1
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._file.close()
        self._threads.release()
