"""Probes. Public, so they say no more than they must."""

from starlette.responses import PlainTextResponse

from tunewright.api.answers import Json
from tunewright.api.body import router_at
from tunewright.api.services import PlatformOf

router = router_at("")


@router.get("/healthz")
async def healthz() -> PlainTextResponse:
    """The process answers. Touches neither database nor workers."""
    return PlainTextResponse("ok", headers={"Cache-Control": "no-store"})


@router.get("/readyz")
def readyz(platform: PlatformOf) -> Json:
    """200 when requests can be served, else 503 with the names of the checks that fail."""
    failed = platform.not_ready()
    body = {"status": "not_ready", "failed": failed} if failed else {"status": "ready"}
    return Json(body, status_code=503 if failed else 200, headers={"Cache-Control": "no-store"})
