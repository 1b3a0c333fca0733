"""One answer from whatever worker has a place for it, tried once more if the worker dies before anybody has seen any of it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing

import msgspec

from tunewright.deployments.ports import Done, Generate, TokenText
from tunewright.deployments.quarantine import Quarantine, fingerprint_of
from tunewright.deployments.worker_client import WorkerAbsent, WorkerGone, WorkerSlow
from tunewright.deployments.workers import Worker, engine_busy, engine_lost
from tunewright.errors import TunewrightError

Place = Callable[[], AbstractAsyncContextManager[Worker]]
"""Gives the worker to ask, for as long as it is asked. A WorkerGone that passes through it says: look after this one."""


async def attempts(
    quarantine: Quarantine, group: str, request: Generate, limit_s: float | None, place: Place
) -> AsyncGenerator[TokenText | Done, None]:
    """The answer piece by piece; `group` are the workers among which suspects take turns, `limit_s` is until the first piece.

    Raises Unavailable (`engine_lost`, `engine_busy`), TunewrightError (`request_quarantined`), what the engine refuses, and what
    `place` raises if it has none.
    """
    request = msgspec.structs.replace(request, fingerprint=fingerprint_of(group, request))
    for last_try in (False, True):
        passenger = await quarantine.board(group, request.fingerprint, limit_s)
        started, answered = False, False
        try:
            async with place() as worker:
                passenger.worker = worker.process.pid
                try:
                    async with aclosing(worker.client.generate(request, limit_s)) as replies:
                        async for reply in replies:
                            started = True
                            if isinstance(reply, TokenText):
                                passenger.n_tokens = reply.n_tokens
                                if passenger.suspect:
                                    quarantine.progress(passenger)
                            else:
                                answered = True  # whoever has the last piece may not ask for another
                            yield reply
                    return
                except TunewrightError:
                    answered = True
                    raise
                except WorkerAbsent:
                    passenger.worker = 0  # it was never aboard
                    raise
        except WorkerSlow:
            raise engine_busy() from None
        except WorkerGone:
            if started or last_try:
                quarantine.check(request.fingerprint)
                raise engine_lost() from None
        finally:
            quarantine.leave(passenger, answered=answered)
