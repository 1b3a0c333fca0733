"""Chat completions whose answer is fetched later, as the Zhipu platform has them.

Its SDKs tell a finished task from others by what is in the body: only a success may have choices and usage.
"""

from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.services import AsyncTasksOf
from tunewright.api.zhipu.chat import ChatBody
from tunewright.api.zhipu.errors import PREFIX
from tunewright.batches.records import AsyncTask

router = router_at(PREFIX)


@router.post("/async/chat/completions")
async def create(request: Request, body: ChatBody, caller: CallerOf, tasks: AsyncTasksOf) -> Json:
    """Take a conversation to be answered, or find the task that the same `request_id` made before."""
    request_id = body.request_id or exchange_of(request.scope).request_id
    task = await run_in_threadpool(tasks.create, caller, "zhipu", await request.json(), request_id)
    return Json(_status(task))


@router.get("/async-result/{task_id}")
def retrieve(task_id: str, caller: CallerOf, tasks: AsyncTasksOf) -> Json:
    """The answer of a task, or how it is with it."""
    return Json(_shown(tasks.get(caller.project_id, task_id)))


def _status(task: AsyncTask) -> dict[str, Any]:
    return {"id": task.id, "request_id": task.request_id, "model": task.model, "task_status": task.status}


def _shown(task: AsyncTask) -> dict[str, Any]:
    if task.answer is not None:
        return task.answer | _status(task)
    return _status(task) if task.error is None else _status(task) | {"error": task.error}
