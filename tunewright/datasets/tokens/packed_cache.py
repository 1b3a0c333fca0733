"""Tokenised datasets kept on the disk: made once for each data file and renderer, whoever asks, and checked before use.

    <home>/cache/tokens/
      {data}-{renderer}/      an entry: files as `make` left them, and MANIFEST.json with the sha256 of each
      {data}-{renderer}.lock  held by the process that makes, checks or removes the entry
      .{data}-{renderer}/     an entry that is being made; of a dead process when its lock is free

Any number of processes may use one folder. An entry is published by one rename; a damaged one is made anew.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import tokenizers

from tunewright.datasets.tokens import examples
from tunewright.files_on_disk import publish_folder, sha256_of

FORMAT = 1
"""Raise it with any change of what an entry holds."""
MANIFEST = "MANIFEST.json"
_WAIT_S = 0.1
_Loaded = TypeVar("_Loaded")


class _Entry(NamedTuple):
    """What eviction looks at."""

    used_at: float
    size_bytes: int
    folder: Path


class PackedCache:
    """`limit_bytes` bounds what is kept once an entry was made; what is used now stays readable all the same."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def use(
        self,
        key: str,
        make: Callable[[Path], None],
        load: Callable[[Path], _Loaded],
        waiting: Callable[[], None] = lambda: None,
    ) -> tuple[_Loaded, bool]:
        """(what `load` reads from the entry, whether it was there already).

        `make` fills an empty folder if it was not; `load` must open (map) all that it needs. `waiting` is called while
        another process works on the entry, and may raise. Raises what `make` raises; a full disk is tried twice, with
        all other entries removed in between.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(key, waiting):
            found = self._whole(key)
            if not found:
                self._make(key, make)
            entry = self.folder / key
            os.utime(entry)
            loaded = load(entry)
        if not found:
            self.evict(self.limit_bytes)
        return loaded, found

    def evict(self, limit_bytes: int) -> None:
        """Remove the entries that were used longest ago until the rest fits, and what dead processes left. An entry that a
        process works on stays."""
        entries = sorted(self._entries())
        kept_bytes = sum(entry.size_bytes for entry in entries)
        for entry in entries:
            unfinished = entry.folder.name.startswith(".")
            if (kept_bytes > limit_bytes or unfinished) and self._remove(entry.folder.name.removeprefix(".")):
                kept_bytes -= entry.size_bytes

    def forget(self, data_sha256: str) -> None:
        """Remove all that was made of a data file, but for an entry in use at this moment."""
        for folder in self.folder.glob(f"{data_sha256[:32]}-*"):
            if folder.is_dir():
                self._remove(folder.name)

    def _make(self, key: str, make: Callable[[Path], None]) -> None:
        prepared, final = self.folder / f".{key}", self.folder / key
        for attempt in (1, 2):
            shutil.rmtree(final, ignore_errors=True)
            shutil.rmtree(prepared, ignore_errors=True)
            try:
                prepared.mkdir(mode=0o700)
                make(prepared)
                sums = {path.name: sha256_of(path) for path in sorted(prepared.iterdir())}
                (prepared / MANIFEST).write_bytes(msgspec.json.encode(sums))
                publish_folder(prepared, final)
                return
            except BaseException as error:
                shutil.rmtree(prepared, ignore_errors=True)
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                if attempt == 2 or not full:
                    raise
            self.evict(0)

    def _whole(self, key: str) -> bool:
        """Whether the entry is there and is, byte for byte, what was made."""
        entry = self.folder / key
        try:
            sums = msgspec.json.decode((entry / MANIFEST).read_bytes(), type=dict[str, str])
            return all(sha256_of(entry / name) == expected for name, expected in sums.items())
        except (OSError, msgspec.DecodeError):
            return False

    def _entries(self) -> Iterator[_Entry]:
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                if folder.is_dir():
                    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    yield _Entry(folder.stat().st_mtime, size, folder)
            except FileNotFoundError:
                continue  # another process removed it

    def _remove(self, key: str) -> bool:
        """Whether the entry, whole or unfinished, is gone: not if another process works on it."""
        lock = self.folder / f"{key}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        try:
            if os.fstat(descriptor).st_nlink == 0:
                return False  # removed and perhaps made anew since it was opened
            shutil.rmtree(self.folder / key, ignore_errors=True)
            shutil.rmtree(self.folder / f".{key}", ignore_errors=True)
            lock.unlink()
            return True
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        descriptor = -1
        while descriptor < 0:
            descriptor = os.open(self.folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while not _try_lock(descriptor):
                    waiting()
                    time.sleep(_WAIT_S)
                if os.fstat(descriptor).st_nlink:
                    yield
                    return
            finally:
                os.close(descriptor)
                descriptor = -1


def key_of(data_sha256: str, renderer_hash: str) -> str:
    """The name of an entry: the file's hash, so that it can be forgotten, and a hash of all else that decides its bytes."""
    rest = [FORMAT, examples.VERSION, tokenizers.__version__, data_sha256, renderer_hash]
    return f"{data_sha256[:32]}-{hashlib.sha256(msgspec.json.encode(rest)).hexdigest()[:32]}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
