"""The ledger of requests: what each one was answered, in tokens that were delivered.

A row is stored as `running` before the first token leaves, and then about once a second while tokens do; a server that dies
therefore leaves rows that are at most that much behind, and its next start ends them as `interrupted`. All writing is done by one
thread in batches, so a request waits for the disk at most once: at its first token, while the engine has long been at work.
"""

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
import structlog

from tunewright.clock import mono_s, wall_s
from tunewright.errors import TunewrightError

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()

RUNNING = "running"
OK = "ok"
INTERRUPTED = "interrupted"
ERROR = "error"

MOST_OPEN = 20_000
"""Rows that are running or wait for a database that takes no writes. Requests beyond are served and counted as lost."""
_PROGRESS_EVERY_S = 1.0
_GATHERED_S = 0.2
"""How long ends of rows wait for each other; begins are stored at once."""
_FORGET_EVERY_S = 3600.0
_LAST_FLUSH_S = 5.0


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request to a model. Tokens of the answer are those that were handed to the caller's connection.

    `model` is the name that was asked for, `tuned_id` None for a base. `server` is the one that writes the row.
    """

    id: str
    project_id: str
    key_id: str
    model: str
    base_code: str
    tuned_id: str | None = None
    deployment_id: str | None = None
    request_id: str
    dialect: str
    endpoint: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    status: str = RUNNING
    error_code: str | None = None
    ttft_ms: int | None = None
    duration_ms: int | None = None
    created_at: int
    server: str


class UsageSum(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of a group together. `day` is the Unix second of its UTC midnight; what is not grouped by is None."""

    day: int | None = None
    model: str | None = None
    key_id: str | None = None
    requests: int = 0
    interrupted: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class OpenUsage:
    """A row under way. Written by the request, read by the ledger's thread: `row` is replaced as a whole, and `delivered`
    are the tokens of the answer while it runs."""

    __slots__ = ("begun", "delivered", "row", "stored", "tried")

    def __init__(self, row: UsageRow) -> None:
        self.row = row
        self.delivered = 0
        self.begun: Future[None] = Future()
        """Done once the row is stored, or could not be."""
        self.stored: UsageRow | None = None
        self.tried = False

    def now(self) -> UsageRow:
        """The row as it is at this moment."""
        row = self.row
        if row.status != RUNNING or row.completion_tokens == self.delivered:
            return row
        return msgspec.structs.replace(row, completion_tokens=self.delivered)


class UsageLedger:
    """Thread-safe. `begin` and `end` cost microseconds; nothing here raises towards a request."""

    def __init__(self, storage: "Storage", server: str, kept_days: int) -> None:
        self._storage = storage
        self.server = server
        """Whoever starts it may say so until then."""
        self._kept_days = kept_days
        self._open: dict[str, OpenUsage] = {}
        self._changed = threading.Condition()
        self._begun = self._ended = self._stopping = False  # guarded by _changed
        self._thread: threading.Thread | None = None
        self._progress_s = self._forgot_s = float("-inf")
        self.lost = 0
        """Rows that were never stored."""

    def start(self, dead: Iterable[str] = ()) -> None:
        """End what an earlier server of this name, and servers that are `dead`, left open; then write. Raises Unavailable."""
        with self._storage.write() as tx:
            interrupted = sum(tx.usage.interrupt(server) for server in (self.server, *dead))
        if interrupted:
            log.warning("usage_interrupted", rows=interrupted)
        self._thread = threading.Thread(target=self._run, name="usage-ledger", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, for at most a few seconds. Safe to call twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_LAST_FLUSH_S)
            self._thread = None

    def begin(self, row: UsageRow) -> OpenUsage:
        """Store `row` soon; `begun` of the answer tells when. Before `start` and after `stop` nothing is stored."""
        opened = OpenUsage(row)
        with self._changed:
            if len(self._open) >= MOST_OPEN or self._thread is None:
                self.lost += 1
                opened.begun.set_result(None)
                return opened
            self._open[row.id] = opened
            self._begun = True
            self._changed.notify()
        return opened

    def end(self, opened: OpenUsage, row: UsageRow) -> None:
        """Store the last state of a row."""
        opened.row = row
        with self._changed:
            self._ended = True

    def _run(self) -> None:
        while True:
            with self._changed:
                if not (self._begun or self._stopping):
                    self._changed.wait(_GATHERED_S)
                if not (self._begun or self._ended or self._stopping or self._open):
                    continue
                self._begun = self._ended = False
                stopping = self._stopping
                opened = list(self._open.values())
            written = self._written(opened, everything=stopping)
            for each in opened:  # a request does not wait for a database that takes nothing
                if not each.begun.done():
                    each.begun.set_result(None)
            if stopping:
                return
            if not written:
                threading.Event().wait(_PROGRESS_EVERY_S)

    def _written(self, opened: list[OpenUsage], *, everything: bool) -> bool:
        try:
            self._write(opened, everything=everything)
            self._forget()
            return True
        except TunewrightError as error:
            log.warning("usage_not_written", code=error.code, rows=len(opened))
        except Exception:
            log.exception("usage_not_written", rows=len(opened))
        return False

    def _write(self, opened: list[OpenUsage], *, everything: bool) -> None:
        """One transaction for all that changed; of running rows only if it is time to."""
        now_s = mono_s()
        progress = everything or now_s - self._progress_s >= _PROGRESS_EVERY_S
        seen = [(each, each.now()) for each in opened]
        new = [(each, row) for each, row in seen if each.stored is None]
        changed = [
            (each, row)
            for each, row in seen
            if each.stored is not None and row != each.stored and (progress or row.status != RUNNING)
        ]
        if progress:
            self._progress_s = now_s
        if new or changed:
            again = [row for each, row in new if each.tried]
            for each, _ in new:
                each.tried = True
            with self._storage.write() as tx:
                tx.usage.remove(again)  # of a commit whose outcome was not heard
                tx.usage.insert([row for _, row in new])
                tx.usage.change([row for _, row in changed])
        for each, row in [*new, *changed]:
            each.stored = row
        done = [row.id for _, row in seen if row.status != RUNNING]
        with self._changed:
            for row_id in done:
                del self._open[row_id]

    def _forget(self) -> None:
        if mono_s() - self._forgot_s > _FORGET_EVERY_S:
            self._forgot_s = mono_s()
            with self._storage.write() as tx:
                tx.usage.forget_before(wall_s() - self._kept_days * 24 * 3600)


class UsageService:
    """What callers may know of their own use. Every method blocks."""

    def __init__(self, storage: "Storage") -> None:
        self._storage = storage

    def rows(
        self, project_id: str, *, status: str | None, model: str | None, after: str | None, limit: int
    ) -> tuple[list[UsageRow], bool]:
        """A page of single requests, newest first, and whether more follow. Raises InvalidRequest(`invalid_cursor`)."""
        with self._storage.read() as tx:
            found = tx.usage.list(project_id, status=status, model=model, after=after, limit=limit + 1)
        return found[:limit], len(found) > limit

    def sums(
        self, project_id: str, *, since: int, until: int, by: frozenset[str], skip: int, limit: int
    ) -> tuple[list[UsageSum], bool, UsageSum]:
        """A page of the groups of rows made in [since, until), whether more follow, and the sum of all groups."""
        with self._storage.read() as tx:
            found = tx.usage.sums(project_id, since=since, until=until, by=by, skip=skip, limit=limit + 1)
            total = tx.usage.sums(project_id, since=since, until=until, by=frozenset(), skip=0, limit=1)
        return found[:limit], len(found) > limit, total[0] if total else UsageSum()
