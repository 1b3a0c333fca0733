"""Numbers for Prometheus. They name models of all projects, so they are for the operator, whom the gate knows by a token."""

import asyncio

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from tunewright.api.access import exchange_of
from tunewright.api.body import router_at
from tunewright.api.server_metrics import ServerMetrics
from tunewright.api.services import PlatformOf
from tunewright.errors import PermissionDenied
from tunewright.i18n import mark

router = router_at("")


@router.get("/metrics")
async def metrics(request: Request, platform: PlatformOf) -> Response:
    """Everything in Prometheus' text format."""
    if exchange_of(request.scope).caller is not None:
        raise PermissionDenied(
            "metrics_closed",
            mark("Metrics are the operator's: they take the token TUNEWRIGHT_METRICS_TOKEN, not a key."),
        )
    server: ServerMetrics = request.app.state.metrics
    text = platform.metrics.text(await platform.serving.states()) + await asyncio.to_thread(server.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST, headers={"Cache-Control": "no-store"})
