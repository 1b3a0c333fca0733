"""The same suite for the local disk and for an object store (obstore's own in memory, which has S3's rules)."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunewright.errors import Misconfigured, NotFound, StorageFull, Unavailable
from tunewright.storage import Blobs, blobs

KEY = "files/proj-20270115080000000-aaaaaaaaaaaaaaaaaaaa/file-20270115080000000-bbbbbbbbbbbbbbbbbbbb"


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return Blobs("memory:///" if request.param == "memory" else f"file://{tmp_path}/blo%20bs")


@pytest.fixture
def disk(tmp_path: Path) -> Blobs:
    return Blobs(f"file://{tmp_path}/blobs")


@pytest.fixture
def source(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "upload.tmp"
        path.write_bytes(content)
        return path

    return write


def test_a_blob_comes_back_whole(store: Blobs, source: Callable[[bytes], Path]) -> None:
    content = os.urandom(12_000_001)
    path = source(content)
    store.put_file(KEY, path)
    assert not path.exists()
    pieces = list(store.read(KEY, chunk_bytes=1 << 20))
    assert b"".join(pieces) == content
    store.put_file(KEY, source(b"other"))
    assert b"".join(store.read(KEY)) == b"other"


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (0, 10), (3, 7), (9, 10), (5, None), (0, 99), (10, None), (10, 20), (99, None), (4, 4), (7, 3), (0, 0)],
)
def test_ranges(store: Blobs, source: Callable[[bytes], Path], start: int, end: int | None) -> None:
    store.put_file(KEY, source(b"0123456789"))
    assert (
        b"".join(store.read(KEY, start=start, end=end))
        == b"0123456789"[start : end if end is None else max(start, end)]
    )


def test_an_empty_blob(store: Blobs, source: Callable[[bytes], Path]) -> None:
    store.put_file(KEY, source(b""))
    assert list(store.read(KEY)) == []


def test_a_large_blob_is_read_in_pieces(disk: Blobs, source: Callable[[bytes], Path]) -> None:
    disk.put_file(KEY, source(bytes(5_000_000)))
    sizes = [len(piece) for piece in disk.read(KEY, chunk_bytes=1_000_000)]
    assert max(sizes) <= 2_000_000
    assert sum(sizes) == 5_000_000


def test_missing_blobs(store: Blobs, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        store.read(KEY)  # at once, not at the first piece
    assert caught.value.code == "blob_missing"
    with pytest.raises(NotFound):
        store.local_copy(KEY, tmp_path / "copy")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_deletion(store: Blobs, source: Callable[[bytes], Path]) -> None:
    store.put_file(KEY, source(b"x"))
    store.delete(KEY)
    with pytest.raises(NotFound):
        store.read(KEY)
    store.delete(KEY)


def test_local_copies(store: Blobs, source: Callable[[bytes], Path], tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    store.put_file(KEY, source(content))
    target = tmp_path / "work" / "train.jsonl"
    target.parent.mkdir()
    for _ in range(2):  # a second try replaces the first
        store.local_copy(KEY, target)
        assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()
        assert target.stat().st_mode & 0o777 == 0o600
    store.delete(KEY)
    assert target.read_bytes() == content, "the copy outlives the blob"
    assert os.listdir(target.parent) == ["train.jsonl"]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "files",
        "/files/a",
        "files/",
        "files//a",
        "files/../a",
        "files/..",
        "files/.hidden",
        "files/a/",
        "files/a b",
        "files/a\n",
        "files/a\0",
        "files/a%2e",
        "files/é",
        "files\\a",
        "Files/a",
        "files/-a",
        "files/" + "a" * 81,
        "files/a/b/c/d",
    ],
)
def test_keys_are_ours(store: Blobs, source: Callable[[bytes], Path], tmp_path: Path, key: str) -> None:
    path = source(b"x")
    for act in (
        lambda: store.put_file(key, path),
        lambda: store.read(key),
        lambda: store.local_copy(key, tmp_path / "copy"),
        lambda: store.delete(key),
    ):
        with pytest.raises(ValueError, match="key"):
            act()
    assert path.exists()


def test_the_disk_holds_the_file_itself(disk: Blobs, source: Callable[[bytes], Path], tmp_path: Path) -> None:
    path = source(b"rows")
    path.chmod(0o644)
    inode = path.stat().st_ino
    disk.put_file(KEY, path)
    stored = tmp_path / "blobs" / KEY
    assert stored.stat().st_ino == inode, "renamed, not copied"
    assert stored.stat().st_mode & 0o777 == 0o600
    assert stored.parent.stat().st_mode & 0o777 == 0o700
    disk.local_copy(KEY, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino == inode, "linked, not copied"


def test_files_and_folders_are_durable(
    disk: Blobs, source: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content before name, name before return; the folders made on the way too."""
    steps: list[str] = []
    monkeypatch.setattr(blobs, "fsync_file", lambda path: steps.append(f"file {path.name}"))
    monkeypatch.setattr(blobs, "fsync_folder", lambda path: steps.append(f"folder {path.name}"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    disk.put_file("files/p/f", source(b"x"))
    assert steps == ["folder blobs", "folder files", "file upload.tmp", "rename", "folder p"]


def test_another_file_system(
    disk: Blobs, source: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(b"rows")
    replace, link = os.replace, os.link

    def apart(act: Callable[..., None]) -> Callable[..., None]:
        def refuse(old: Any, new: Any) -> None:
            folders = {Path(old).parent, Path(new).parent}
            if tmp_path in folders and len(folders) == 2:
                raise OSError(errno.EXDEV, "other device")
            act(old, new)

        return refuse

    monkeypatch.setattr(os, "replace", apart(replace))
    monkeypatch.setattr(os, "link", apart(link))
    disk.put_file(KEY, path)
    assert not path.exists()
    assert b"".join(disk.read(KEY)) == b"rows"
    assert (tmp_path / "blobs" / KEY).stat().st_mode & 0o777 == 0o600
    disk.local_copy(KEY, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"rows"
    assert (tmp_path / "copy").stat().st_nlink == 1
    assert len([each for each in (tmp_path / "blobs").rglob("*") if each.is_file()]) == 1


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, Unavailable)]
)
def test_a_disk_that_refuses(
    disk: Blobs,
    source: Callable[[bytes], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
) -> None:
    path = source(b"rows")

    def refuse(_path: Path) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(blobs, "fsync_file", refuse)
    with pytest.raises(kind):
        disk.put_file(KEY, path)
    assert path.exists()
    assert not [each for each in (tmp_path / "blobs").rglob("*") if each.is_file()]


def test_a_missing_source_is_a_bug_and_not_a_missing_blob(disk: Blobs, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk.put_file(KEY, tmp_path / "none")


@pytest.mark.parametrize("url", ["", "x", "wat://x", "s3:///", "file:///dev/null/x", "https://"])
def test_urls_that_can_not_work(url: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        Blobs(url)
    assert caught.value.code == "blob_url_invalid"
