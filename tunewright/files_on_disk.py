"""Files that are either whole or absent, whatever kills the process."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush one file that somebody else wrote (a library, say)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data` in one step: readers see the old file or the new one, also after a power cut."""
    with writing(path, mode) as stream:
        stream.write(data)


@contextmanager
def writing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A stream whose bytes replace `path` in one step when the block ends; if it ends by an exception, `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb", buffering=1 << 18) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def link_or_copy(path: Path, target: Path) -> None:
    """A second name for a file, or a copy where there can be none. A link that `path` may be is taken as a link."""
    try:
        os.link(path, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or links forbidden there
        shutil.copyfile(path, target, follow_symlinks=False)


def publish_folder(prepared: Path, final: Path) -> None:
    """Make a finished folder visible by one rename, after every file in it is on the disk.

    Raises FileExistsError if `final` is there already and not empty. `prepared` must be on the same file system.
    """
    for path in sorted(prepared.rglob("*")):
        if path.is_file():
            fsync_file(path)
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(prepared)
    os.rename(prepared, final)
    fsync_folder(final.parent)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
