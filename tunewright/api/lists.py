"""Pages: the query they come from and the shape they leave in, the same in both dialects."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request

from tunewright.api.errors import invalid
from tunewright.i18n import mark

Limit = Annotated[int | None, Query(ge=1, description="How many at most; a larger number than the route allows is cut")]

_Item = TypeVar("_Item")
_CURSOR = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
_ASCENDING = {"asc": True, "ascending": True, "desc": False, "descending": False, "created_at": False}


async def _after(after: Annotated[str | None, Query(description="Id of the last item of the page before")] = None):
    if after and not _CURSOR.fullmatch(after):
        raise invalid("after", mark("{field} must be the id of an item."))
    return after or None


async def _ascending(order: Annotated[str | None, Query(description="asc or desc (default)")] = None) -> bool:
    if order and order not in _ASCENDING:
        raise invalid("order", mark("{field} must be asc or desc."))
    return _ASCENDING.get(order or "desc", False)


async def _metadata(request: Request) -> dict[str, str] | None:
    """`metadata[k]=v`, any number of times. The literal `metadata=null` filters nothing."""
    pairs = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    return pairs or None


After = Annotated[str | None, Depends(_after)]
Ascending = Annotated[bool, Depends(_ascending)]
MetadataFilter = Annotated[dict[str, str] | None, Depends(_metadata)]


def clamped(limit: int | None, default: int, most: int) -> int:
    """The page size to serve."""
    return min(limit or default, most)


def page(items: Sequence[_Item], has_more: bool, render: Callable[[_Item], dict[str, Any]]) -> dict[str, Any]:
    """`{object, data, has_more, first_id, last_id}`: `data` is never null, `has_more` never absent (clients loop on both)."""
    data = [render(item) for item in items]
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
