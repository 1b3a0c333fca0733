"""The application: layers from the outside in, then the routes."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Match

from tunewright import __version__
from tunewright.api.access import Access
from tunewright.api.addresses import HostCheck, PathCheck
from tunewright.api.auth import Gate
from tunewright.api.body import BodyLimits
from tunewright.api.draining import Draining
from tunewright.api.errors import from_http_exception, from_validation
from tunewright.api.job_watch import JobWatches
from tunewright.api.limits import RefusedKeys, RequestRate
from tunewright.api.native import dataset_tokens as native_dataset_tokens
from tunewright.api.native import datasets as native_datasets
from tunewright.api.native import deployments as native_deployments
from tunewright.api.native import health
from tunewright.api.native import jobs as native_jobs
from tunewright.api.native import metrics as native_metrics
from tunewright.api.native import models as native_models
from tunewright.api.native import notifications as native_notifications
from tunewright.api.native import receipts as native_receipts
from tunewright.api.native import uploads as native_uploads
from tunewright.api.native import usage as native_usage
from tunewright.api.offline import speeches
from tunewright.api.openai import batches as openai_batches
from tunewright.api.openai import chat as openai_chat
from tunewright.api.openai import embeddings as openai_embeddings
from tunewright.api.openai import errors as openai_errors
from tunewright.api.openai import files as openai_files
from tunewright.api.openai import fine_tuning as openai_fine_tuning
from tunewright.api.openai import models as openai_models
from tunewright.api.openai import uploads as openai_uploads
from tunewright.api.server_metrics import ServerMetrics
from tunewright.api.zhipu import async_chat as zhipu_async_chat
from tunewright.api.zhipu import batches as zhipu_batches
from tunewright.api.zhipu import chat as zhipu_chat
from tunewright.api.zhipu import embeddings as zhipu_embeddings
from tunewright.api.zhipu import errors as zhipu_errors
from tunewright.api.zhipu import files as zhipu_files
from tunewright.api.zhipu import fine_tuning as zhipu_fine_tuning
from tunewright.api.zhipu import models as zhipu_models
from tunewright.api.zhipu import uploads as zhipu_uploads
from tunewright.settings import Settings
from tunewright.wiring import Platform

ERROR_TABLES = (zhipu_errors.TABLE, openai_errors.TABLE)
"""The last one also answers on the paths of neither dialect."""
ROUTERS = (
    zhipu_chat.router,
    openai_chat.router,
    zhipu_files.router,
    zhipu_uploads.router,
    zhipu_fine_tuning.router,
    zhipu_models.router,
    zhipu_async_chat.router,
    zhipu_batches.router,
    zhipu_embeddings.router,
    openai_files.router,
    openai_uploads.router,
    openai_fine_tuning.router,
    openai_models.router,
    openai_batches.router,
    openai_embeddings.router,
    native_uploads.router,
    native_datasets.router,
    native_dataset_tokens.router,
    native_jobs.router,
    native_models.router,
    native_deployments.router,
    native_notifications.router,
    native_receipts.router,
    native_usage.router,
    native_metrics.router,
    health.router,
)


def create_app(platform: Platform) -> FastAPI:
    """The ASGI application. Its lifespan starts and stops `platform`."""
    settings = platform.settings
    metrics = ServerMetrics(platform)
    app = FastAPI(
        title="Tunewright",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        middleware=[
            Middleware(Access, tables=ERROR_TABLES, language=settings.language, metrics=metrics),
            Middleware(Draining, platform=platform),
            Middleware(HostCheck, allowed=allowed_hosts(settings)),
            Middleware(PathCheck),
            Middleware(BodyLimits, settings=settings),
            Middleware(RefusedKeys, settings=settings),
            Middleware(Gate, accounts=platform.accounts, metrics_token=settings.metrics_token),
            Middleware(RequestRate, settings=settings),
        ],
        exception_handlers={HTTPException: _raise_http, RequestValidationError: _raise_validation},  # type: ignore[dict-item]
    )
    app.state.platform = platform
    app.state.metrics = metrics
    platform.speeches.update(speeches(platform))
    app.state.job_watches = JobWatches()
    for router in ROUTERS:
        app.router.routes.extend(router.routes)  # flat, so that what walks the routes sees every one
    return app


def allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """The Host names answered; None means any: the operator said '*', or opened the address and named none."""
    if "*" in settings.allowed_hosts:
        return None
    if not _is_loopback(settings.host) and "allowed_hosts" not in settings.model_fields_set:
        return None
    return frozenset(host.lower() for host in settings.allowed_hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    platform: Platform = app.state.platform
    await run_in_threadpool(platform.start)
    try:
        async with app.state.metrics.watching_loop():
            yield
    finally:
        await run_in_threadpool(platform.stop)


async def _raise_http(request: Request, error: HTTPException) -> NoReturn:
    raise from_http_exception(error, ", ".join(_methods(request.app.routes, request.scope))) from None


async def _raise_validation(request: Request, error: RequestValidationError) -> NoReturn:
    raise from_validation(error) from None


def _methods(routes: list[BaseRoute], scope: object) -> list[str]:
    """The methods that the path of `scope` takes."""
    found: set[str] = set()
    for route in routes:
        if route.matches(scope)[0] is not Match.NONE:  # type: ignore[arg-type]
            found |= getattr(route, "methods", None) or set()
    return sorted(found)
