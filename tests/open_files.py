"""What a process has open."""

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

DATABASE_FILES = 3 * 9
"""Most that a server has: eight readers and the writer stay connected, each with the file, its log and the index of that."""


def open_files(pid: int) -> tuple[Counter[str], int]:
    """What each descriptor is open on, without the numbers of sockets; those on SQLite are only counted, for the pool of
    connections fills up as readers happen to meet, and keeps them."""
    found: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[os.readlink(path).partition(":")[0]] += 1
    of_database = [name for name in found if Path(name).name.startswith("tunewright.db")]
    return found, sum(found.pop(name) for name in of_database)
