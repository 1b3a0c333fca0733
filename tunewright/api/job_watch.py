"""One look at the database for all streams of a job's events: a thousand of them cost no more queries than one."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

from starlette.concurrency import run_in_threadpool

from tunewright.jobs.records import TERMINAL, Job, JobEvent

POLL_S = 0.5
"""How often the database is asked. A trainer's step takes longer."""

Look = Callable[[str | None], tuple[Job, list[JobEvent]]]
"""(the job, its next events after that id); the job is read first, so that events of its last state are seen with it."""


class News(NamedTuple):
    """What was new at one look: `events` are those that follow the event `after`. Every look that has news has the next
    `number`."""

    number: int
    after: str | None
    job: Job
    events: list[JobEvent]
    frames: dict[str, bytes]
    """The events as they are sent, by language, once somebody has made them."""


class JobWatch:
    """Looks at one job for as long as somebody waits. Of one event loop, and not to be used by threads."""

    def __init__(self, look: Look, stopping: Callable[[], bool]) -> None:
        self._look = look
        self._stopping = stopping
        self._waiting: set[asyncio.Future[News | None]] = set()
        self._cursor: str | None = None
        self._number = 0
        self._poll: asyncio.Task[None] | None = None

    def ticket(self, cursor: str | None, seen: int | None = None) -> "asyncio.Future[News | None]":
        """Comes with the next news: None if there is something that the holder must look at itself, or the server stops.

        Take it before you look yourself, or name the number of the news that you have `seen`, so that nothing can happen in
        between.
        """
        ticket: asyncio.Future[News | None] = asyncio.get_running_loop().create_future()
        if seen is not None and seen != self._number:
            ticket.set_result(None)
            return ticket
        self._waiting.add(ticket)
        ticket.add_done_callback(self._waiting.discard)
        if self._poll is None or self._poll.done():
            self._cursor = cursor
            self._poll = asyncio.ensure_future(self._polling())
        return ticket

    async def _polling(self) -> None:
        """Ends when nobody waits any more."""
        while True:
            await asyncio.sleep(0 if self._stopping() else POLL_S)
            if not self._waiting:
                return
            if self._stopping():
                self._tell(None)
                continue
            try:
                job, events = await run_in_threadpool(self._look, self._cursor)
            except Exception:  # whoever waits meets it too, and says so in its own stream
                self._tell(None)
                continue
            if events or job.status in TERMINAL:
                self._number += 1
                news = News(self._number, self._cursor, job, events, {})
                self._cursor = events[-1].id if events else self._cursor
                self._tell(news)

    def _tell(self, news: News | None) -> None:
        for ticket in list(self._waiting):
            if not ticket.done():
                ticket.set_result(news)


class JobWatches:
    """The watch of each job that is watched; it goes with the last stream that holds it."""

    def __init__(self) -> None:
        self._watches: WeakValueDictionary[tuple[str, str], JobWatch] = WeakValueDictionary()

    def of(self, project_id: str, job_id: str, look: Look, stopping: Callable[[], bool]) -> JobWatch:
        """`look` must be the same for everybody who may ask: it is scoped by project and job alone."""
        watch = self._watches.get((project_id, job_id))
        if watch is None:
            watch = self._watches[project_id, job_id] = JobWatch(look, stopping)
        return watch
