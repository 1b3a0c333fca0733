"""One holder at a time for work on the home folder, between processes and between threads."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for the lock file `path`, hold it inside the block. A killed holder's lock is free at once.

    The file stays: removing it would let two holders lock two different files of one name.
    """
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
