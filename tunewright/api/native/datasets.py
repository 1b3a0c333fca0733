"""Datasets: their reports, rows, problems and versions."""

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote as percent_encoded

import msgspec
from fastapi import Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.idempotency import IdempotencyOf, UploadIdempotencyOf
from tunewright.api.lists import After, Limit, clamped, page
from tunewright.api.native.jobs import PREFIX
from tunewright.api.receiving import receive_file, watch_of
from tunewright.api.refusals import StrictBody
from tunewright.api.services import DatasetsOf
from tunewright.api.streaming import unless_gone
from tunewright.api.threads import stoppable
from tunewright.datasets import export
from tunewright.datasets.contents import ShownRow
from tunewright.datasets.mending.repair import Choice
from tunewright.datasets.presentation import problem_object, stored_object, summary_object
from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.datasets.uploads import KEEP

MOST_DATASETS = 100
MOST_ROWS = 200
MOST_CODES = 200
MOST_LINES = 50_000
_LARGEST_SEED = 2**31 - 1
_FORM_FIELDS = frozenset({"purpose", "parent_id"})
_FORM_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "default": "fine-tune"},
                        "parent_id": {"type": "string"},
                    },
                }
            }
        },
    }
}

Purpose = Literal["fine-tune", "fine-tune-function-calling", "fine-tune-vision-cogview", "fine-tune-vision-cogvlm"]
Kind = Literal["chat", "function", "preference", "image_understanding", "image_generation"]
Status = Literal["processing", "processed", "error"]
Severity = Literal["error", "warning"]
_Result = TypeVar("_Result")

router = router_at(PREFIX)


class RepairBody(StrictBody):
    """Which patches to apply: those of `codes`, and in `lines`; all where absent."""

    codes: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=MOST_CODES)] | None = None
    lines: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=MOST_LINES)] | None = None
    drop_bad_rows: bool = False


class SplitBody(StrictBody):
    """The share of rows that goes into the validation dataset."""

    validation_ratio: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED)] = 0


@router.post("/datasets", openapi_extra=_FORM_SCHEMA)
async def create_dataset(
    request: Request, caller: CallerOf, datasets: DatasetsOf, idempotency: UploadIdempotencyOf
) -> Json:
    """Upload a dataset. Rows with errors are kept and make its status `error`; the report says what to do about them."""
    preset = {"purpose": "fine-tune", "on_problems": KEEP}
    file = await receive_file(
        request,
        caller.project_id,
        datasets,
        idempotency,
        preset=preset,
        only=_FORM_FIELDS,
        purposes=FINE_TUNE_PURPOSES,
    )
    return Json(_shown(request, file), status_code=201)


@router.get("/datasets")
def list_datasets(
    caller: CallerOf,
    datasets: DatasetsOf,
    after: After,
    limit: Limit = None,
    purpose: Purpose | None = None,
    kind: Kind | None = None,
    status: Status | None = None,
) -> Json:
    """Newest first, without statistics and single problems."""
    found, more = datasets.datasets(
        caller.project_id,
        purpose=purpose,
        kind=kind,
        status=status,
        after=after,
        limit=clamped(limit, 20, MOST_DATASETS),
    )
    return Json(page(found, more, summary_object))


@router.get("/datasets/{file_id}")
def retrieve_dataset(request: Request, file_id: str, caller: CallerOf, datasets: DatasetsOf) -> Json:
    """One dataset with its report."""
    return Json(_shown(request, datasets.dataset(caller.project_id, file_id)))


@router.get("/datasets/{file_id}/rows")
def list_rows(
    request: Request,
    file_id: str,
    caller: CallerOf,
    datasets: DatasetsOf,
    after: After,
    limit: Limit = None,
    search: Annotated[str, Query(max_length=200)] = "",
    problems: Literal["only"] | None = None,
) -> Json:
    """Rows in the order of the file. With `search` a page may be empty although more follow: `next_after` goes on."""
    file = datasets.dataset(caller.project_id, file_id)
    found = datasets.contents.rows(
        file, after=after, limit=clamped(limit, 20, MOST_ROWS), search=search, problems_only=problems is not None
    )
    language = exchange_of(request.scope).language
    return Json(
        {
            "object": "list",
            "data": [_row_object(row, language) for row in found.rows],
            "has_more": found.next_after is not None,
            "next_after": found.next_after,
        }
    )


@router.get("/datasets/{file_id}/problems")
async def download_problems(
    request: Request,
    file_id: str,
    caller: CallerOf,
    datasets: DatasetsOf,
    format: Literal["jsonl", "csv"] = "jsonl",
    code: Annotated[str | None, Query(max_length=64)] = None,
    severity: Severity | None = None,
) -> StreamingResponse:
    """All problems in the order of their lines, those of the whole file first."""
    file = await run_in_threadpool(datasets.dataset, caller.project_id, file_id)
    problems = datasets.contents.problems(file, code=code, severity=severity)
    write, media_type = (
        (export.table, "text/csv; charset=utf-8") if format == "csv" else (export.json_lines, "application/x-ndjson")
    )
    pieces = write(problems, exchange_of(request.scope).language)
    first = await run_in_threadpool(next, pieces, b"")  # what is wrong with the blob still has a status
    name = percent_encoded(f"{file.filename}-problems.{format}", safe="")
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}", "Cache-Control": "no-store"}
    return StreamingResponse(_pieces(first, pieces), media_type=media_type, headers=headers)


@router.get("/datasets/{file_id}/versions")
def list_versions(file_id: str, caller: CallerOf, datasets: DatasetsOf) -> Json:
    """Where the dataset comes from and what was made from it."""
    family = datasets.versions.family(caller.project_id, file_id)
    shown = {relative.file.id: relative.relation for relative in family}
    files = [relative.file for relative in family]
    return Json(page(files, False, lambda file: {**summary_object(file), "relation": shown[file.id]}))


@router.post("/datasets/{file_id}/repair")
async def repair_dataset(
    request: Request,
    file_id: str,
    body: RepairBody,
    caller: CallerOf,
    datasets: DatasetsOf,
    idempotency: IdempotencyOf,
) -> Json:
    """Apply patches into a new version; the dataset itself stays as it is."""
    file = await run_in_threadpool(datasets.dataset, caller.project_id, file_id)
    choice = Choice(
        codes=None if body.codes is None else frozenset(body.codes),
        lines=None if body.lines is None else frozenset(body.lines),
        drop_bad_rows=body.drop_bad_rows,
    )
    made = await _while_wanted(
        request,
        lambda stopped: datasets.versions.repair(file, choice, idempotency=idempotency, watch=watch_of(stopped)),
    )
    return Json(_shown(request, made), status_code=201)


@router.post("/datasets/{file_id}/split")
async def split_dataset(
    request: Request, file_id: str, body: SplitBody, caller: CallerOf, datasets: DatasetsOf, idempotency: IdempotencyOf
) -> Json:
    """Make a training and a validation dataset; the dataset itself stays as it is."""
    file = await run_in_threadpool(datasets.dataset, caller.project_id, file_id)
    made = await _while_wanted(
        request,
        lambda stopped: datasets.versions.split(
            file, body.validation_ratio, body.seed, idempotency=idempotency, watch=watch_of(stopped)
        ),
    )
    shown = {"training": _shown(request, made.training), "validation": _shown(request, made.validation)}
    return Json({"object": "dataset.split", **shown}, status_code=201)


async def _while_wanted(request: Request, work: Callable[[Callable[[], bool]], _Result]) -> _Result:
    """A client that leaves ends the work; nothing stays then."""
    return await unless_gone(request.receive, stoppable(work))


def _shown(request: Request, file: File) -> dict[str, Any]:
    return stored_object(file, exchange_of(request.scope).language)


def _row_object(row: ShownRow, language: str) -> dict[str, Any]:
    """`row` is the row as it stands in the file; `text` instead is the beginning of a line that is not JSON."""
    shown: dict[str, Any] = {"line": row.line, "row": None if row.data is None else msgspec.Raw(row.data)}
    if row.data is None:
        shown["text"] = row.text
    shown["problems"] = [problem_object(problem, language) for problem in row.problems]
    return shown


async def _pieces(first: bytes, rest: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    while piece := await run_in_threadpool(next, rest, b""):
        yield piece
