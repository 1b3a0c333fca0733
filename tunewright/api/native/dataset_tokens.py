"""Tokens of datasets: how many there are for a model, and which of a row's are trained."""

import asyncio
from pathlib import Path as FolderPath
from typing import Annotated, Any

import msgspec
from fastapi import Path, Query, Request
from starlette.concurrency import run_in_threadpool

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.native.jobs import PREFIX
from tunewright.api.services import DatasetsOf, JobsOf, ModelsOf, PlatformOf, TokensOf
from tunewright.api.streaming import unless_gone
from tunewright.datasets.presentation import problem_object
from tunewright.datasets.records import File
from tunewright.datasets.tokens.estimates import estimate
from tunewright.datasets.tokens.token_counts import TokenStatistics
from tunewright.datasets.tokens.token_service import Count
from tunewright.jobs.hyperparameters import parse, resolve
from tunewright.jobs.records import SUCCEEDED
from tunewright.jobs.service import JobService
from tunewright.jobs.spec import Hyperparameters
from tunewright.models.records import Base

_POLL_S = 0.05
_JOBS_LOOKED_AT = 100

ModelName = Annotated[str, Query(max_length=256, description="A base, an alias or a tuned model, whose base is meant")]
Epochs = Annotated[int | None, Query(description="As a job takes it; what a job would choose where absent")]
Length = Annotated[int | None, Query(description="max_length of a job; what a job would choose where absent")]
Line = Annotated[int, Path(ge=1, le=10**9, description="Line of the file, from 1")]

router = router_at(PREFIX)


@router.get("/datasets/{file_id}/statistics")
async def dataset_statistics(
    request: Request,
    file_id: str,
    model: ModelName,
    caller: CallerOf,
    datasets: DatasetsOf,
    models: ModelsOf,
    jobs: JobsOf,
    tokens: TokensOf,
    platform: PlatformOf,
    n_epochs: Epochs = None,
    max_length: Length = None,
) -> Json:
    """Statistics of a dataset with the tokenizer of a model's base, and what training it would take.

    Counted once for each content, tokenizer and `max_length`; the answer waits for it.
    """

    def find() -> tuple[File, Base, Hyperparameters, list[float]]:
        file = datasets.dataset(caller.project_id, file_id)
        base = models.resolve(caller.project_id, model).base
        return file, base, _hyperparameters(file, base, n_epochs, max_length), _speeds(jobs, caller.project_id, base)

    file, base, wanted, speeds = await run_in_threadpool(find)
    count = tokens.count(file, FolderPath(base.path or ""), wanted.max_length)
    try:
        found = await unless_gone(request.receive, _counted(count))
    finally:
        count.leave()
    price = base.price_per_million_tokens
    taken = estimate(
        file.kind,
        found,
        n_epochs=wanted.n_epochs,
        tokens_per_image=base.tokens_per_image,
        price_per_million_tokens=platform.settings.price_per_million_tokens if price is None else price,
        speeds=speeds,
    )
    return Json(
        {
            "id": file.id,
            "object": "dataset.statistics",
            "kind": file.kind,
            "model": model,
            "base": base.code,
            "statistics": file.statistics,
            "tokens": _tokens_object(found, exchange_of(request.scope).language),
            "estimate": msgspec.to_builtins(taken),
        }
    )


@router.get("/datasets/{file_id}/rows/{line}/tokens")
def row_tokens(
    file_id: str,
    line: Line,
    model: ModelName,
    caller: CallerOf,
    datasets: DatasetsOf,
    models: ModelsOf,
    tokens: TokensOf,
    max_length: Length = None,
) -> Json:
    """Exactly the tokens of one row that training sees, and which of them it trains."""
    file = datasets.dataset(caller.project_id, file_id)
    base = models.resolve(caller.project_id, model).base
    wanted = _hyperparameters(file, base, None, max_length)
    examples = tokens.preview(file, line, FolderPath(base.path or ""), wanted.max_length)
    return Json(
        {
            "object": "dataset.row_tokens",
            "line": line,
            "model": model,
            "base": base.code,
            "max_length": wanted.max_length,
            "examples": examples,
        }
    )


async def _counted(count: Count) -> TokenStatistics:
    while not count.done.is_set():
        await asyncio.sleep(_POLL_S)
    return count.result()


def _hyperparameters(file: File, base: Base, n_epochs: int | None, max_length: int | None) -> Hyperparameters:
    """What a job on all rows of the file would have. Raises InvalidRequest(`invalid_value`) as creating one does."""
    asked = {"n_epochs": n_epochs, "max_length": max_length}
    method = "dpo" if file.kind == "preference" else "supervised"
    requested = parse(asked, method=method, context_tokens=base.context_tokens)
    return resolve(
        requested,
        rows=file.rows or 1,
        training_type="lora",
        method=method,
        context_tokens=base.context_tokens,
    )


def _speeds(jobs: JobService, project_id: str, base: Base) -> list[float]:
    """Tokens a second of the project's newest succeeded jobs on a base."""
    found, _ = jobs.list(project_id, limit=_JOBS_LOOKED_AT)
    done = [job for job in found if job.status == SUCCEEDED and job.base_code == base.code and job.trained_tokens]
    return [
        job.trained_tokens / max(1, job.finished_at - job.running_at)
        for job in done
        if job.trained_tokens and job.finished_at is not None and job.running_at is not None
    ]


def _tokens_object(found: TokenStatistics, language: str) -> dict[str, Any]:
    shown = msgspec.to_builtins(found)
    return shown | {"problems": [problem_object(problem, language) for problem in found.problems]}
