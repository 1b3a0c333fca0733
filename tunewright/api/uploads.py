"""Uploads in parts over HTTP: the same under every prefix."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, Field, StrictInt, StrictStr
from starlette.concurrency import run_in_threadpool

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.idempotency import IdempotencyOf
from tunewright.api.lists import After, Limit, clamped, page
from tunewright.api.multipart import EXPIRES_SECONDS, boundary_of, read_form
from tunewright.api.renderings import file_object
from tunewright.api.services import UploadsOf
from tunewright.api.threads import to_the_end
from tunewright.datasets.parted_uploads import UploadState
from tunewright.datasets.records import UploadPart
from tunewright.datasets.uploads import REFUSE

PAGE = 1000
MOST_PARTS_LISTED = 10_000
_PART_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}, "sha256": {"type": "string"}},
                }
            }
        },
    }
}


class ExpiresAfter(BaseModel):
    """When the file is to be removed. Files stay here until they are deleted, so it is checked and has no effect."""

    anchor: Literal["created_at"]
    seconds: StrictInt = Field(ge=EXPIRES_SECONDS[0], le=EXPIRES_SECONDS[1])


class CreateBody(BaseModel):
    """`on_problems`: `refuse` (the default) or `keep` a file whose rows have errors."""

    filename: StrictStr
    purpose: StrictStr
    size_bytes: StrictInt = Field(alias="bytes", ge=1)
    mime_type: StrictStr
    expires_after: ExpiresAfter | None = None
    on_problems: StrictStr | None = None


class CompleteBody(BaseModel):
    """`md5` of the whole file in hex is checked if it is there."""

    part_ids: list[StrictStr]
    md5: StrictStr | None = None


class UploadRoutes:
    """The routes."""

    def router(self, prefix: str) -> APIRouter:
        """A router with all of them."""
        router = router_at(prefix)
        router.add_api_route("/uploads", self.create, methods=["POST"])
        router.add_api_route("/uploads/{upload_id}", self.retrieve, methods=["GET"])
        router.add_api_route("/uploads/{upload_id}/parts", self.add_part, methods=["POST"], openapi_extra=_PART_SCHEMA)
        router.add_api_route("/uploads/{upload_id}/parts", self.list_parts, methods=["GET"])
        router.add_api_route("/uploads/{upload_id}/complete", self.complete, methods=["POST"])
        router.add_api_route("/uploads/{upload_id}/cancel", self.cancel, methods=["POST"])
        return router

    def create(
        self, request: Request, body: CreateBody, caller: CallerOf, uploads: UploadsOf, idempotency: IdempotencyOf
    ) -> Json:
        """Begin a file that comes in parts."""
        state = uploads.create(
            caller.project_id,
            filename=body.filename,
            purpose=body.purpose,
            size_bytes=body.size_bytes,
            mime_type=body.mime_type,
            on_problems=body.on_problems or REFUSE,
            idempotency=idempotency,
        )
        return _shown(request, state)

    def retrieve(self, request: Request, upload_id: str, caller: CallerOf, uploads: UploadsOf) -> Json:
        """One upload, with how much of it is there."""
        return _shown(request, uploads.get(caller.project_id, upload_id))

    async def add_part(
        self,
        request: Request,
        upload_id: str,
        caller: CallerOf,
        uploads: UploadsOf,
        sha256: Annotated[
            str | None, Header(alias="X-Part-SHA256", description="Of the bytes of `data`, in hex")
        ] = None,
    ) -> Json:
        """Add bytes to an upload. They are hashed and written as they arrive."""
        boundary_of(request)  # before the disk is touched
        part = await run_in_threadpool(uploads.begin_part, caller.project_id, upload_id)
        try:
            form = await read_form(request, part, file_part="data", required=())
            made = await to_the_end(part.finish, form.fields.get("sha256"), sha256)
        except BaseException:
            part.abort()  # unlinks a file; quick enough for the loop, and a cancelled task can't wait for a thread
            raise
        return Json(part_object(made))

    def list_parts(
        self, upload_id: str, caller: CallerOf, uploads: UploadsOf, after: After, limit: Limit = None
    ) -> Json:
        """The parts that are there, oldest first: what needn't be sent again after a cut."""
        size = clamped(limit, PAGE, MOST_PARTS_LISTED)
        found, more = uploads.parts(caller.project_id, upload_id, after=after, limit=size)
        return Json(page(found, more, part_object))

    async def complete(
        self, request: Request, upload_id: str, body: CompleteBody, caller: CallerOf, uploads: UploadsOf
    ) -> Json:
        """Join the parts in the order given, check the rows and keep the file.

        It goes on when the client leaves: for a large file clients run out of patience, and then ask again.
        """
        state = await to_the_end(uploads.complete, caller.project_id, upload_id, body.part_ids, body.md5)
        return _shown(request, state)

    async def cancel(self, request: Request, upload_id: str, caller: CallerOf, uploads: UploadsOf) -> Json:
        """End an upload; its parts are dropped."""
        return _shown(request, await to_the_end(uploads.cancel, caller.project_id, upload_id))


def upload_object(state: UploadState, language: str) -> dict[str, Any]:
    """`parts`, `received_bytes` and `completing` say how far it is."""
    upload = state.upload
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.size_bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "mime_type": upload.mime_type,
        "status": upload.status,
        "file": None if state.file is None else file_object(state.file, language),
        "parts": state.parts,
        "received_bytes": state.received_bytes,
        "completing": None if state.completing is None else round(state.completing, 3),
        "on_problems": upload.on_problems,
    }


def _shown(request: Request, state: UploadState) -> Json:
    return Json(upload_object(state, exchange_of(request.scope).language))


def part_object(part: UploadPart) -> dict[str, Any]:
    """`bytes` and `sha256` beside what the SDK knows."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": part.created_at,
        "upload_id": part.upload_id,
        "bytes": part.size_bytes,
        "sha256": part.sha256,
    }
