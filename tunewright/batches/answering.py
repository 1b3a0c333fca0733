"""One request that nobody waits for: asked again while the engines are in trouble, and never without an answer."""

import asyncio
from typing import Any, NamedTuple

import structlog

from tunewright.accounts.records import Caller
from tunewright.batches.ports import Speech
from tunewright.errors import TunewrightError, Unavailable

log = structlog.get_logger()

MOST_TRIES = 6
_PAUSE_S = 0.25


class Answer(NamedTuple):
    """`status` 200 and the dialect's answer, or another one and its error."""

    status: int
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether it is an answer and no error."""
        return self.status == 200


async def answered(
    speech: Speech, caller: Caller, body: dict[str, Any], request_id: str, *, priority: int, endpoint: str
) -> Answer:
    """The answer, or the error after as many tries as may help. Raises nothing but a cancellation."""
    for tries in range(1, MOST_TRIES + 1):
        try:
            return Answer(200, await speech.answer(caller, body, request_id, priority=priority, endpoint=endpoint))
        except Unavailable as error:
            if tries == MOST_TRIES:
                return Answer(*speech.failure(error, request_id))
            await asyncio.sleep(_PAUSE_S * 2**tries)
        except TunewrightError as error:
            return Answer(*speech.failure(error, request_id))
        except Exception:
            log.exception("offline_request_failed", request_id=request_id)
            break
    return Answer(*speech.failure(None, request_id))
