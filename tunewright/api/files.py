"""Files over HTTP: what both dialects share."""

from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any
from urllib.parse import quote as percent_encoded

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.idempotency import UploadIdempotencyOf
from tunewright.api.lists import After, Ascending, Limit, clamped, page
from tunewright.api.ranges import wanted_range
from tunewright.api.receiving import receive_file
from tunewright.api.renderings import file_object
from tunewright.api.services import DatasetsOf
from tunewright.datasets.records import File

MOST_FILES = 10_000

_UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string"},
                        "file": {"type": "string", "format": "binary"},
                        "on_problems": {"enum": ["refuse", "keep"]},
                    },
                }
            }
        },
    }
}

Purpose = Annotated[str | None, Query(max_length=64)]


class FileRoutes:
    """The routes. `page_size` is how many files a list without `limit` holds."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size

    def router(self, prefix: str) -> APIRouter:
        """A router with all of them."""
        router = router_at(prefix)
        router.add_api_route("/files", self.create, methods=["POST"], openapi_extra=_UPLOAD_SCHEMA)
        router.add_api_route("/files", self.list_files, methods=["GET"])
        router.add_api_route("/files/{file_id}", self.retrieve, methods=["GET"])
        router.add_api_route("/files/{file_id}", self.delete, methods=["DELETE"])
        router.add_api_route("/files/{file_id}/content", self.content, methods=["GET"])
        return router

    async def create(
        self, request: Request, caller: CallerOf, datasets: DatasetsOf, idempotency: UploadIdempotencyOf
    ) -> Json:
        """Upload a file. It is checked row by row; what is wrong with it leaves nothing behind, unless `on_problems` is
        `keep`."""
        file = await receive_file(request, caller.project_id, datasets, idempotency)
        return Json(_shown(request, file))

    def list_files(
        self,
        request: Request,
        caller: CallerOf,
        datasets: DatasetsOf,
        after: After,
        ascending: Ascending,
        purpose: Purpose = None,
        limit: Limit = None,
    ) -> Json:
        """Newest first unless `order` says otherwise."""
        size = clamped(limit, self._page_size, MOST_FILES)
        found, more = datasets.list(
            caller.project_id, purpose=purpose or None, after=after, limit=size, ascending=ascending
        )
        return Json(page(found, more, lambda file: _shown(request, file)))

    def retrieve(self, request: Request, file_id: str, caller: CallerOf, datasets: DatasetsOf) -> Json:
        """One file."""
        return Json(_shown(request, datasets.get(caller.project_id, file_id)))

    def delete(self, file_id: str, caller: CallerOf, datasets: DatasetsOf) -> Json:
        """Remove a file that no unfinished job uses."""
        file = datasets.delete(caller.project_id, file_id)
        return Json({"id": file.id, "object": "file", "deleted": True})

    async def content(
        self,
        file_id: str,
        caller: CallerOf,
        datasets: DatasetsOf,
        range_: Annotated[str | None, Header(alias="Range", description="One range of bytes")] = None,
        if_range: Annotated[str | None, Header(alias="If-Range", description="The ETag of an earlier answer")] = None,
    ) -> StreamingResponse:
        """The bytes as they were uploaded, or one range of them."""
        file = await run_in_threadpool(datasets.get, caller.project_id, file_id)
        etag = f'"{file.sha256}"'
        part = wanted_range(range_, file.size_bytes) if if_range in (None, etag) else None
        start, end = part or (0, file.size_bytes)
        _, chunks = await run_in_threadpool(datasets.content, caller.project_id, file_id, start, end)
        first = await run_in_threadpool(next, chunks, b"")  # what is wrong with the blob still has a status
        headers = {
            "Content-Length": str(end - start),
            "Content-Disposition": f"attachment; filename*=UTF-8''{percent_encoded(file.filename, safe='')}",
            "Cache-Control": "no-store",
            "Accept-Ranges": "bytes",
            "ETag": etag,
        }
        if part is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
        return StreamingResponse(
            _chunks(first, chunks),
            status_code=200 if part is None else 206,
            media_type="application/octet-stream",
            headers=headers,
        )


def _shown(request: Request, file: File) -> dict[str, Any]:
    return file_object(file, exchange_of(request.scope).language)


async def _chunks(first: bytes, rest: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    while chunk := await run_in_threadpool(next, rest, b""):
        yield chunk
