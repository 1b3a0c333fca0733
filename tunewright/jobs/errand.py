"""One slow call in a thread of its own, so that the control loop never waits."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tunewright.jobs.records import Job

T = TypeVar("T")


class Errand(Generic[T]):
    """Starts at once. A daemon thread: a process that ends leaves it behind, so the call must survive being cut off."""

    def __init__(self, call: Callable[[], T], then: Callable[[], None]) -> None:
        """`then` is called from that thread once the call is over, whatever came of it."""
        self._call = call
        self._then = then
        self._value: T
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name="errand", daemon=True).start()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def result(self) -> T:
        """What the call returned; raises what it raised. Only once it is over."""
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # handed to `result`
            self._error = error
        self._over.set()
        self._then()


class Errands:
    """At most one errand for each job, of one kind for one attempt. May be forgotten: the call is then made again."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._known: dict[str, tuple[str, int, Errand[Any]]] = {}

    def result_of(self, job: Job, kind: str, call: Callable[[], T]) -> Errand[T] | None:
        """Start `call` beside the loop unless that is done already; the errand itself once it is over, then forgotten."""
        known = self._known.get(job.id)
        if known is None or known[:2] != (kind, job.attempt):
            self._known[job.id] = (kind, job.attempt, Errand(call, self._wake))
            return None
        if not known[2].over:
            return None
        del self._known[job.id]
        return known[2]

    def forget_others(self, job_ids: set[str]) -> None:
        """Keep those of these jobs only."""
        self._known = {job_id: known for job_id, known in self._known.items() if job_id in job_ids}
