"""Blocking work that must not be left behind."""

import asyncio
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


async def to_the_end(
    function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """`function` in a thread. A cancellation takes effect when it has returned, so that nobody cleans up under it."""
    work = asyncio.ensure_future(run_in_threadpool(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        work.exception()  # looked at, so that nothing complains that nobody did
        raise


async def stoppable(function: Callable[[Callable[[], bool]], _Result]) -> _Result:
    """`function(stopped)` in a thread. A cancellation makes `stopped()` true and takes effect when the function has returned."""
    stop = threading.Event()
    work = asyncio.ensure_future(run_in_threadpool(function, stop.is_set))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({work})
        work.exception()  # looked at, so that nothing complains that nobody did
        raise
