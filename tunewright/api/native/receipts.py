"""What a job did to each row: pages of receipts, and all of them as a file."""

from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.lists import After, Limit, clamped
from tunewright.api.native.jobs import PREFIX
from tunewright.api.services import DatasetsOf, JobsOf
from tunewright.datasets.records import File
from tunewright.errors import NotFound
from tunewright.i18n import mark
from tunewright.jobs import receipts
from tunewright.jobs.service import JobService

MOST_ROWS = 200
Flag = Literal["never_learned", "contradicts"]

router = router_at(PREFIX)


@router.get("/jobs/{job_id}/rows")
def list_rows(
    job_id: str,
    caller: CallerOf,
    jobs: JobsOf,
    datasets: DatasetsOf,
    after: After,
    limit: Limit = None,
    flag: Flag | None = None,
) -> Json:
    """Receipts in the order of the training file. With `flag` a page may be empty although more follow."""
    file = _file(caller.project_id, job_id, jobs, datasets)
    found = datasets.contents.rows(file, after=after, limit=clamped(limit, 20, MOST_ROWS), search=flag or "")
    return Json(
        {
            "object": "list",
            "data": [msgspec.Raw(row.data or b"null") for row in found.rows],
            "has_more": found.next_after is not None,
            "next_after": found.next_after,
        }
    )


@router.get("/jobs/{job_id}/receipts")
async def download_receipts(
    job_id: str,
    caller: CallerOf,
    jobs: JobsOf,
    datasets: DatasetsOf,
    format: Annotated[Literal["jsonl", "csv"], Query()] = "jsonl",
) -> StreamingResponse:
    """All receipts of a job."""
    file = await run_in_threadpool(_file, caller.project_id, job_id, jobs, datasets)
    _, pieces = await run_in_threadpool(datasets.content, caller.project_id, file.id, 0, file.size_bytes)
    media_type = "application/x-ndjson"
    if format == "csv":
        pieces, media_type = receipts.table(receipts.lines_of(pieces)), "text/csv; charset=utf-8"
    headers = {"Content-Disposition": f'attachment; filename="{job_id}-receipts.{format}"', "Cache-Control": "no-store"}
    return StreamingResponse(_sent(pieces), media_type=media_type, headers=headers)


def _file(project_id: str, job_id: str, jobs: JobService, datasets: Any) -> File:
    job = jobs.get(project_id, job_id)
    if not job.receipts:
        raise NotFound(
            "receipts_not_found",
            mark("Job {job} has no receipts of its rows: it has not succeeded, or was created with receipts off."),
            job=job.id,
        )
    return datasets.get(project_id, job.receipts["file"])


async def _sent(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    while piece := await run_in_threadpool(next, pieces, b""):
        yield piece
