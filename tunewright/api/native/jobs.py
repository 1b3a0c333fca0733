"""What neither dialect has of jobs: their events as they happen."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

import msgspec
from fastapi import Header, Request
from starlette.concurrency import run_in_threadpool

from tunewright.api.access import exchange_of
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.lists import After
from tunewright.api.openai.fine_tuning import STATUS_WORDS, name_shown
from tunewright.api.renderings import event_object, job_object
from tunewright.api.services import JobsOf, PlatformOf
from tunewright.api.streaming import EventStream
from tunewright.jobs.records import TERMINAL, Job, JobEvent

PREFIX = "/api/v1"
BATCH = 500
POLL_S = 0.5
"""How often a stream asks the database. A trainer's step takes longer."""

router = router_at(PREFIX)


@router.get("/jobs/{job_id}/events/stream")
async def stream_events(
    request: Request,
    job_id: str,
    caller: CallerOf,
    jobs: JobsOf,
    platform: PlatformOf,
    after: After,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=128)] = None,
) -> EventStream:
    """A job's events, oldest first, as they happen; a last frame `event: end` with the job when it has ended.

    A client that lost the connection goes on with `Last-Event-ID`. When the server stops, the stream ends without that
    frame.
    """
    await run_in_threadpool(jobs.get, caller.project_id, job_id)  # 404 has a status, not a frame
    language = exchange_of(request.scope).language

    def look(cursor: str | None) -> tuple[Job, list[JobEvent]]:
        job = jobs.get(caller.project_id, job_id)  # first: events that came with its last state are then seen below
        return job, jobs.events_since(caller.project_id, job_id, cursor, BATCH)

    frames = _frames(look, last_event_id or after, language, platform.stopping.is_set)
    return EventStream(frames, stop_is_error=False)


async def _frames(
    look: Callable[[str | None], tuple[Job, list[JobEvent]]],
    cursor: str | None,
    language: str,
    stopping: Callable[[], bool],
) -> AsyncGenerator[bytes, None]:
    while not stopping():
        job, events = await run_in_threadpool(look, cursor)
        for event in events:
            cursor = event.id
            yield _frame(event.id, event_object(event, language))
        if events:
            continue
        if job.status in TERMINAL:
            yield b"event: end\n" + _frame(cursor, job_object(job, STATUS_WORDS, name_shown(job), language))
            return
        await asyncio.sleep(POLL_S)


def _frame(event_id: str | None, data: dict[str, Any]) -> bytes:
    head = f"id: {event_id}\n".encode() if event_id else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"
