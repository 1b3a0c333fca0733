"""What the project's requests cost, in tokens: sums by day, model and key, and the single requests."""

from typing import Annotated, Any, Literal

import msgspec
from fastapi import Query

from tunewright.accounts.usage import UsageRow, UsageSum
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.errors import invalid
from tunewright.api.lists import After, Limit, clamped, page
from tunewright.api.native.jobs import PREFIX
from tunewright.api.services import UsageOf
from tunewright.clock import wall_s
from tunewright.i18n import mark

MOST_GROUPS = 1000
MOST_ROWS = 1000
DEFAULT_SPAN_S = 30 * 24 * 3600
_GROUPS = {"day": "day", "model": "model", "key": "key_id"}

router = router_at(PREFIX)

Seconds = Annotated[int | None, Query(ge=0, le=2**40)]
Model = Annotated[str | None, Query(max_length=512)]


@router.get("/usage")
def usage(
    caller: CallerOf,
    usage: UsageOf,
    start_time: Seconds = None,
    end_time: Seconds = None,
    group_by: Annotated[str, Query(max_length=32, description="Of day, model and key, with commas between")] = "day",
    limit: Limit = None,
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Json:
    """Sums of requests and tokens; of the last 30 days if no time is given."""
    until = wall_s() + 1 if end_time is None else end_time
    since = max(0, until - DEFAULT_SPAN_S) if start_time is None else start_time
    names = [name.strip() for name in group_by.split(",")]
    if not all(name in _GROUPS for name in names):
        raise invalid("group_by", mark("{field} must name day, model or key."))
    size = clamped(limit, 100, MOST_GROUPS)
    by = frozenset(_GROUPS[name] for name in names)
    groups, more, total = usage.sums(
        caller.project_id, since=since, until=until, by=by, skip=(page - 1) * size, limit=size
    )
    return Json(
        {
            "object": "list",
            "data": [{name: getattr(group, name) for name in sorted(by)} | _counts(group) for group in groups],
            "has_more": more,
            "next_page": page + 1 if more else None,
            "totals": _counts(total),
            "start_time": since,
            "end_time": until,
        }
    )


@router.get("/usage/requests")
def requests(
    caller: CallerOf,
    usage: UsageOf,
    after: After,
    limit: Limit = None,
    status: Literal["running", "ok", "interrupted", "error"] | None = None,
    model: Model = None,
) -> Json:
    """Single requests, newest first."""
    found, more = usage.rows(
        caller.project_id, status=status, model=model, after=after, limit=clamped(limit, 100, MOST_ROWS)
    )
    return Json(page(found, more, _row))


def _counts(group: UsageSum) -> dict[str, int]:
    return {
        "requests": group.requests,
        "interrupted": group.interrupted,
        "errors": group.errors,
        "prompt_tokens": group.prompt_tokens,
        "completion_tokens": group.completion_tokens,
        "cached_tokens": group.cached_tokens,
        "total_tokens": group.prompt_tokens + group.completion_tokens,
    }


def _row(row: UsageRow) -> dict[str, Any]:
    shown = msgspec.structs.asdict(row) | {"object": "usage.request"}
    for name in ("project_id", "server"):
        del shown[name]
    return shown
