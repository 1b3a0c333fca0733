"""Bytes by key through obstore: local disk by default, S3 and its kin by URL alone."""

from collections.abc import Iterator
from pathlib import Path


class Blobs:
    """Keys are ours (`files/{project_id}/{file_id}`), never a caller's text. All methods block."""

    def __init__(self, url: str) -> None:
        """`url` is `file:///absolute/folder`, `s3://bucket/prefix`, ... Raises Misconfigured if it can't be opened."""
        raise NotImplementedError

    def put_file(self, key: str, path: Path) -> None:
        """Store a finished local file under `key`, visible only when whole and durable; consumes `path`
        (on the same disk: by rename, no second copy). Raises StorageFull."""
        ...

    def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end). Raises NotFound(`blob_missing`)."""
        ...

    def local_copy(self, key: str, target: Path) -> None:
        """Put the blob's bytes at `target` (a hard link where the store is the local disk, else a download)."""
        ...

    def delete(self, key: str) -> None:
        """No error if it is gone."""
        ...
