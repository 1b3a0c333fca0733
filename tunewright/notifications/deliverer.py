"""The loop that empties the outbox. Several servers may run one each: a try is claimed in the database first."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import structlog

from tunewright.clock import mono_s
from tunewright.errors import TunewrightError
from tunewright.notifications.sending import Sending

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()

THREADS = 24
MOST_OF_A_PROJECT = 8
"""Tries of one project at the same time, so that its slow receivers leave room for others'."""
KEPT_S = 30 * 24 * 3600
"""How long ended deliveries are shown."""
_PAUSE_S = 1.0
_CLEAN_EVERY_S = 3600.0


class Deliverer:
    """`start()` runs it in a thread of its own; tests may call `run_once()` instead.

    A channel has one try under way at a time, so a slow receiver delays only itself.
    """

    def __init__(self, storage: "Storage", sending: Sending) -> None:
        self._storage = storage
        self._sending = sending
        self._lock = threading.Lock()
        self._busy: dict[str, str] = {}
        """Channel id -> project id of tries under way."""
        self._pool: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._cleaned_s: float | None = None

    def start(self) -> None:
        """Deliver what is due now and from now on."""
        self._thread = threading.Thread(target=self._run, name="notifications", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no more tries, end messages being sent and wait for webhooks under way, at most about 10 s. What is not
        stored as delivered is tried again."""
        self._stopping.set()
        self._sending.services.stop()
        self._woken.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run_once(self) -> int:
        """Begin every try that is due and has room; how many. Raises Unavailable if the database does not answer."""
        with self._storage.read() as tx:
            due = tx.deliveries.due_channels(self._sending.clock())
        begun = 0
        for project_id, channel_id in due:
            if self._take(project_id, channel_id):
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="notification")
                self._pool.submit(self._try, project_id, channel_id)
                begun += 1
        return begun

    def idle(self) -> bool:
        """Whether no try is under way."""
        with self._lock:
            return not self._busy

    def _take(self, project_id: str, channel_id: str) -> bool:
        with self._lock:
            if channel_id in self._busy or len(self._busy) >= THREADS or self._stopping.is_set():
                return False
            if sum(other == project_id for other in self._busy.values()) >= MOST_OF_A_PROJECT:
                return False
            self._busy[channel_id] = project_id
            return True

    def _try(self, project_id: str, channel_id: str) -> None:
        try:
            self._sending.try_next(project_id, channel_id)
        except TunewrightError as error:
            log.warning("notifications_pass_failed", code=error.code)
        except Exception:
            log.exception("notifications_pass_failed")
        finally:
            with self._lock:
                del self._busy[channel_id]
            self._woken.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            begun = 0
            try:
                begun = self.run_once()
                self._forget_old()
            except TunewrightError as error:
                log.warning("notifications_pass_failed", code=error.code)
            except Exception:
                log.exception("notifications_pass_failed")
            if begun == 0:
                self._stopping.wait(_PAUSE_S)
            else:
                self._woken.wait(_PAUSE_S)

    def _forget_old(self) -> None:
        if self._cleaned_s is None or mono_s() - self._cleaned_s > _CLEAN_EVERY_S:
            self._cleaned_s = mono_s()
            with self._storage.write() as tx:
                tx.deliveries.forget_before(self._sending.clock() - KEPT_S)
