"""Token counts and previews of stored datasets. Counting uses all cores, in a process of its own and one file at a time.

Equal requests share one count. It goes on for a minute after the last who waited has left, so that a client whose
patience was shorter finds it done when it asks again; after that it is given up.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from tunewright.clock import mono_s
from tunewright.datasets.blob_keys import content_key
from tunewright.datasets.records import File
from tunewright.datasets.tokens.preview import ShownExample, preview
from tunewright.datasets.tokens.token_counts import EXIT_DISK_FULL, CountOrder, TokenStatistics
from tunewright.errors import InvalidRequest, NotFound, StorageFull, TunewrightError, Unavailable
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.rendering.renderer import renderer_of
from tunewright.settings import HomeFolder, Settings
from tunewright.worker_environment import worker_environment

if TYPE_CHECKING:
    from tunewright.storage import Blobs

log = structlog.get_logger()

PREFIX = "count-"
COMMAND = ("-m", "tunewright.datasets.tokens.token_counts")
ABANDONED_S = 60.0
_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_Key = tuple[str, str, str, int]


class Count:
    """One count under way or done. Everybody who waits calls `join` first and `leave` last."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self._result: TokenStatistics | TunewrightError | None = None
        self._waiting = 0
        self._left_at = mono_s()
        self._lock = threading.Lock()

    def join(self) -> None:
        """Somebody more waits."""
        with self._lock:
            self._waiting += 1

    def leave(self) -> None:
        """Somebody waits no longer."""
        with self._lock:
            self._waiting -= 1
            self._left_at = mono_s()

    def abandoned(self) -> bool:
        """Whether nobody has waited for `ABANDONED_S`."""
        with self._lock:
            return not self._waiting and mono_s() - self._left_at > ABANDONED_S

    def finish(self, result: TokenStatistics | TunewrightError) -> None:
        """To be called once."""
        self._result = result
        self.done.set()

    def result(self) -> TokenStatistics:
        """Once `done`. Raises the error that ended the count."""
        if isinstance(self._result, TokenStatistics):
            return self._result
        raise self._result or _failed()


class TokenService:
    """Every method but `count` blocks."""

    def __init__(self, blobs: "Blobs", home: HomeFolder, settings: Settings) -> None:
        self._blobs = blobs
        self._home = home
        self._settings = settings
        self._results = home.token_cache.parent / "token-counts"
        self._counts: dict[_Key, Count] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token-counts")

    def count(self, file: File, base: Path, max_length: int) -> Count:
        """The statistics of `file` for rows of up to `max_length` tokens, begun unless it is under way; joined already."""
        key = (file.project_id, file.sha256, str(base), max_length)
        with self._lock:
            count = self._counts.get(key)
            if count is None:
                if self._stopping.is_set():
                    raise _failed()
                count = self._counts[key] = Count()
                self._thread.submit(self._work, key, count, file, base)
            count.join()
        return count

    def preview(self, file: File, line: int, base: Path, max_length: int) -> list[ShownExample]:
        """The conversations of one row of `file`. Raises NotFound(`row_not_found`) and what `preview.preview` raises."""
        data = self._line(file, line)
        if not data.strip():
            raise NotFound("row_not_found", mark("Line {line} of this file holds no row."), param="line", line=line)
        if len(data) > self._settings.max_line_bytes:
            raise InvalidRequest(
                "line_too_long",
                mark("line {line} is longer than {limit} bytes"),
                param="line",
                line=line,
                limit=self._settings.max_line_bytes,
            )
        return preview(data, line, renderer_of(base), max_length)

    def forget(self, file: File) -> None:
        """Remove what was kept of a deleted file's tokens."""
        from tunewright.datasets.tokens.packed_cache import PackedCache

        PackedCache(self._home.token_cache, self._settings.token_cache_bytes).forget(file.sha256)
        for path in self._results.glob(f"{file.sha256[:32]}-*.json"):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what counts of a dead server left."""
        for folder in self._home.temporary.glob(f"{PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """End the count under way; those who wait get an error."""
        self._stopping.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for count in self._counts.values():
                count.finish(_failed())
            self._counts.clear()

    def _work(self, key: _Key, count: Count, file: File, base: Path) -> None:
        result: TokenStatistics | TunewrightError = _failed()
        try:
            result = self._counted(count, file, base, key[-1])
        except TunewrightError as error:
            result = error
        except Exception:
            log.exception("token_count_failed", file_id=file.id)
        finally:
            with self._lock:
                self._counts.pop(key, None)
            count.finish(result)

    def _counted(self, count: Count, file: File, base: Path, max_length: int) -> TokenStatistics:
        from tunewright.datasets.tokens.packed_cache import key_of

        name = f"{key_of(file.sha256, renderer_of(base).hash)}-{max_length}.json"
        with suppress(FileNotFoundError, msgspec.DecodeError):
            return msgspec.json.decode((self._results / name).read_bytes(), type=TokenStatistics)
        if count.abandoned():
            raise _failed()
        found = self._run(count, file, base, max_length)
        self._results.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self._results / name, msgspec.json.encode(found))
        return found

    def _run(self, count: Count, file: File, base: Path, max_length: int) -> TokenStatistics:
        with tempfile.TemporaryDirectory(dir=self._home.temporary, prefix=PREFIX) as name:
            folder = Path(name)
            data = folder / "data.jsonl"
            self._blobs.local_copy(content_key(file.project_id, file.id), data)
            order = CountOrder(
                data=str(data),
                data_sha256=file.sha256,
                base=str(base),
                max_length=max_length,
                max_line_bytes=self._settings.max_line_bytes,
                cache=str(self._home.token_cache),
                cache_bytes=self._settings.token_cache_bytes,
            )
            (folder / "order.json").write_bytes(msgspec.json.encode(order))
            self._run_child(count, folder)
            return msgspec.json.decode((folder / "result.json").read_bytes(), type=TokenStatistics)

    def _run_child(self, count: Count, folder: Path) -> None:
        with (folder / "log").open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", *COMMAND, str(folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=worker_environment(),
                umask=0o077,
            )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_S)
                    break
                if self._stopping.is_set() or count.abandoned():
                    raise _failed()
        finally:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
        if child.returncode == EXIT_DISK_FULL:
            raise StorageFull("insufficient_storage", mark("There is no room on the disk to count tokens."))
        if child.returncode:
            log.error("token_count_failed", log=(folder / "log").read_text("utf-8", "replace")[-2000:])
            raise _failed()

    def _line(self, file: File, number: int) -> bytes:
        """A line without its end, or the beginning of one that is too long; nothing if the file has fewer."""
        most = self._settings.max_line_bytes + len(_BOM) + 1
        found, before = b"", number - 1
        for chunk in self._blobs.read(content_key(file.project_id, file.id), _CHUNK_BYTES):
            inside = chunk.count(b"\n")
            if inside < before:
                before -= inside
                continue
            start = 0
            for _ in range(before):
                start = chunk.index(b"\n", start) + 1
            before = 0
            rest, end, _ = chunk[start:].partition(b"\n")
            found += rest
            if end or len(found) > most:
                break
        return found.removeprefix(_BOM) if number == 1 else found


def _failed() -> Unavailable:
    return Unavailable("tokenising_failed", mark("The tokens of this file could not be counted now; try again."))
