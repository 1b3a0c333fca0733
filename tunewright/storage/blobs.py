"""Bytes by key through obstore: local disk by default, S3 and its kin by URL alone."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
import obstore.exceptions
import obstore.store

from tunewright.errors import Misconfigured, NotFound, StorageFull, Unavailable
from tunewright.files_on_disk import fsync_file, fsync_folder
from tunewright.i18n import mark

_KEY = re.compile(r"[a-z][a-z0-9-]{0,31}(/[A-Za-z0-9][A-Za-z0-9_-]{0,79}){1,3}(\.jsonl)?")


class Blobs:
    """Keys are ours (`files/{project_id}/{file_id}`), never a caller's text; any other shape is a ValueError.
    All methods block."""

    def __init__(self, url: str) -> None:
        """`url` is `file:///absolute/folder`, `s3://bucket/prefix`, ... Raises Misconfigured if it can't be opened."""
        self._folder = _local_folder(url)
        self._store: Any
        try:
            if self._folder is not None:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._store = obstore.store.LocalStore(self._folder)
            else:
                self._store = obstore.store.from_url(url)
        except (obstore.exceptions.BaseError, OSError, ValueError):
            raise Misconfigured(
                "blob_url_invalid",
                mark("The place for files can't be opened; it must look like file:///folder or s3://bucket"),
            ) from None  # the driver's text may hold credentials

    def put_file(self, key: str, path: Path) -> None:
        """Store a finished local file under `key`, visible only when whole and durable; consumes `path`
        (on the same disk: by rename, no second copy). Raises StorageFull, Unavailable (`blobs_unavailable`)."""
        _check(key)
        path.stat()  # a missing source is the caller's fault, not a missing blob
        with _store_errors_translated():
            if self._folder is None:
                obstore.put(self._store, key, path, use_multipart=True)
                path.unlink()
            else:
                _move(path, self._folder / key, self._folder)

    def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in pieces of about `chunk_bytes`; `end` beyond the blob means to its end.

        Raises NotFound (`blob_missing`) and Unavailable (`blobs_unavailable`), the former at once, not at the first piece.
        """
        _check(key)
        with _store_errors_translated():
            size = obstore.head(self._store, key)["size"]
            stop = size if end is None else min(end, size)
            if start >= stop:
                return iter(())
            result = obstore.get(self._store, key, options={"range": (start, stop)})
            return _pieces(result.stream(min_chunk_size=chunk_bytes))

    def local_copy(self, key: str, target: Path) -> None:
        """Put the blob's bytes at `target` (a hard link where the store is the local disk, else a download), in place of
        what is there. Never write to it. Raises NotFound (`blob_missing`), StorageFull, Unavailable."""
        _check(key)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            with _store_errors_translated():
                if self._folder is None or not _linked(self._folder / key, temporary):
                    with open(temporary, "xb", opener=_private) as stream:
                        for piece in self.read(key):
                            stream.write(piece)
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)  # replacing a link by its twin leaves both names

    def delete(self, key: str) -> None:
        """No error if it is gone."""
        _check(key)
        try:
            with _store_errors_translated():
                obstore.delete(self._store, key)
        except NotFound:
            pass


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError("a blob's key has parts of letters, digits, '-' and '_' only, and '.jsonl' at most at the end")


def _local_folder(url: str) -> Path | None:
    """The folder of a `file:` URL; None for other schemes."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _move(path: Path, target: Path, root: Path) -> None:
    """Rename, or copy where the file systems differ; whole and durable before it has its name."""
    missing = [folder for folder in target.parents if folder.is_relative_to(root) and not folder.is_dir()]
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in reversed(missing):  # their names must last too
        fsync_folder(folder.parent)
    try:
        os.chmod(path, 0o600)
        fsync_file(path)
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_then_rename(path, target)
        path.unlink()
    fsync_folder(target.parent)


def _copy_then_rename(path: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with path.open("rb") as source, open(temporary, "wb", opener=_private) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _linked(blob: Path, target: Path) -> bool:
    """Whether a hard link could be made; FileNotFoundError if there is no blob."""
    try:
        os.link(blob, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            return False
        raise
    return True


def _pieces(stream: Any) -> Iterator[bytes]:
    with _store_errors_translated():
        for piece in stream:
            yield bytes(piece)


@contextmanager
def _store_errors_translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("blob_missing", mark("The content of this file is missing")) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("storage_full", mark("The disk is full")) from error
        raise _unavailable() from error
    except obstore.exceptions.BaseError as error:
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    return Unavailable("blobs_unavailable", mark("The store of files does not answer"))
