"""The services that routes name in their signatures; they live on `app.state.platform`."""

from typing import Annotated

from fastapi import Depends, Request

from tunewright.accounts.usage import UsageService
from tunewright.batches.service import AsyncTaskService, BatchService
from tunewright.completions.service import CompletionService
from tunewright.datasets.parted_uploads import PartedUploads
from tunewright.datasets.service import DatasetService
from tunewright.datasets.tokens.token_service import TokenService
from tunewright.deployments.service import DeploymentService
from tunewright.jobs.service import JobService
from tunewright.models.service import ModelService
from tunewright.notifications.service import NotificationService
from tunewright.wiring import Platform


async def _platform(request: Request) -> Platform:
    return request.app.state.platform


async def _datasets(request: Request) -> DatasetService:
    return request.app.state.platform.datasets


async def _uploads(request: Request) -> PartedUploads:
    return request.app.state.platform.uploads


async def _tokens(request: Request) -> TokenService:
    return request.app.state.platform.tokens


async def _jobs(request: Request) -> JobService:
    return request.app.state.platform.jobs


async def _models(request: Request) -> ModelService:
    return request.app.state.platform.models


async def _deployments(request: Request) -> DeploymentService:
    return request.app.state.platform.deployments


async def _completions(request: Request) -> CompletionService:
    return request.app.state.platform.completions


async def _notifications(request: Request) -> NotificationService:
    return request.app.state.platform.notifications


async def _usage(request: Request) -> UsageService:
    return request.app.state.platform.usage


async def _batches(request: Request) -> BatchService:
    return request.app.state.platform.batches


async def _async_tasks(request: Request) -> AsyncTaskService:
    return request.app.state.platform.async_tasks


PlatformOf = Annotated[Platform, Depends(_platform)]
DatasetsOf = Annotated[DatasetService, Depends(_datasets)]
UploadsOf = Annotated[PartedUploads, Depends(_uploads)]
TokensOf = Annotated[TokenService, Depends(_tokens)]
JobsOf = Annotated[JobService, Depends(_jobs)]
ModelsOf = Annotated[ModelService, Depends(_models)]
NotificationsOf = Annotated[NotificationService, Depends(_notifications)]
DeploymentsOf = Annotated[DeploymentService, Depends(_deployments)]
CompletionsOf = Annotated[CompletionService, Depends(_completions)]
UsageOf = Annotated[UsageService, Depends(_usage)]
BatchesOf = Annotated[BatchService, Depends(_batches)]
AsyncTasksOf = Annotated[AsyncTaskService, Depends(_async_tasks)]
