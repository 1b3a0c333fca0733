"""Many streams of one job's events, one look at the database."""

import asyncio

import msgspec
import pytest

from tests.contract import rows
from tunewright.api import job_watch
from tunewright.api.job_watch import JobWatch, JobWatches
from tunewright.api.native.jobs import _frames
from tunewright.errors import Unavailable
from tunewright.jobs import events
from tunewright.jobs.records import RUNNING, SUCCEEDED, Job, JobEvent


class History:
    """A job that goes on, and how often it was looked at."""

    def __init__(self) -> None:
        self.job: Job = rows.job("p", status=RUNNING, error=None)
        self.events: list[JobEvent] = []
        self.looks = 0
        self.together = 0
        """Looks for all streams that wait."""
        self.broken = False
        self.stopping = False
        self.watch = JobWatch(self.look_together, lambda: self.stopping)

    def add(self, n: int = 1) -> None:
        self.events += [events.message(self.job, "said", "It goes on") for _ in range(n)]

    def look(self, cursor: str | None) -> tuple[Job, list[JobEvent]]:
        self.looks += 1
        if self.broken:
            raise Unavailable("database_busy", "busy")
        ids = [event.id for event in self.events]
        return self.job, self.events[ids.index(cursor) + 1 :] if cursor in ids else list(self.events)

    def look_together(self, cursor: str | None) -> tuple[Job, list[JobEvent]]:
        self.together += 1
        return self.look(cursor)

    @property
    def alone(self) -> int:
        return self.looks - self.together

    async def rounds(self, n: int) -> None:
        """Wait for so many looks for all; of two the second has begun now."""
        last = self.together + n
        while self.together < last:
            await asyncio.sleep(0.005)

    async def follow(self, cursor: str | None = None) -> list[str]:
        frames = _frames(self.look, self.watch, cursor, "en", lambda: self.stopping)
        text = b"".join([frame async for frame in frames]).decode()
        return [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")]


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> History:
    monkeypatch.setattr(job_watch, "POLL_S", 0.01)
    return History()


async def test_a_hundred_streams_see_everything_and_look_together(history: History) -> None:
    history.add(3)
    streams = [asyncio.ensure_future(history.follow()) for _ in range(100)]
    alone = 0
    while (
        history.alone < 200 or history.alone > alone
    ):  # each looks at what there was before it came, until that is all
        alone = history.alone
        await history.rounds(3)
    for _ in range(10):
        history.add(2)
        await history.rounds(2)
    assert history.alone == alone, "one look at a time, however many streams wait for it"
    history.job = msgspec.structs.replace(history.job, status=SUCCEEDED)
    ids = [event.id for event in history.events]
    assert await asyncio.gather(*streams) == [[*ids, ids[-1]]] * 100  # the last frame repeats the last id


async def test_a_stream_that_was_away_goes_on_where_it_was(history: History) -> None:
    history.add(5)
    early, late = asyncio.ensure_future(history.follow()), asyncio.ensure_future(history.follow(history.events[3].id))
    await asyncio.sleep(0.05)
    history.add()
    await asyncio.sleep(0.05)
    history.job = msgspec.structs.replace(history.job, status=SUCCEEDED)
    ids = [event.id for event in history.events]
    assert await early == [*ids, ids[-1]] and await late == [*ids[4:], ids[-1]]


async def test_news_that_came_between_two_tickets_is_not_waited_for(history: History) -> None:
    first = history.watch.ticket(None)
    history.add()
    news = await first
    assert news is not None and [event.id for event in news.events] == [history.events[0].id]
    second = history.watch.ticket(history.events[0].id, news.number)
    history.add()
    assert await second is not None
    assert await history.watch.ticket(history.events[0].id, news.number) is None, "it missed a round"


async def test_streams_end_when_the_server_stops_and_meet_the_databases_trouble_themselves(history: History) -> None:
    stream = asyncio.ensure_future(history.follow())
    await asyncio.sleep(0.05)
    history.stopping = True
    assert await stream == []
    history.stopping = False
    stream = asyncio.ensure_future(history.follow())
    await asyncio.sleep(0.05)
    history.broken = True
    with pytest.raises(Unavailable):
        await stream


async def test_nobody_looks_when_nobody_watches(history: History) -> None:
    watches = JobWatches()
    watch = watches.of("p", "j", history.look, lambda: False)
    assert watches.of("p", "j", history.look, lambda: False) is watch
    assert watches.of("q", "j", history.look, lambda: False) is not watch
    ticket = watch.ticket(None)
    while not history.looks:
        await asyncio.sleep(0.01)
    ticket.cancel()
    poll = watch._poll
    assert poll is not None
    await asyncio.wait_for(poll, 60)
    before = history.looks
    await asyncio.sleep(0.05)
    assert history.looks == before
