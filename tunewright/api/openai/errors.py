"""The OpenAI dialect's one table: natural statuses and our stable codes. The native routes use it too."""

from typing import Any

from tunewright.api.errors import ErrorTable, Row
from tunewright.errors import TunewrightError
from tunewright.i18n import translate

PREFIX = "/v1"


def envelope(row: Row, error: TunewrightError, language: str, request_id: str) -> dict[str, Any]:
    """The four keys that the SDK reads, and the id under which the operator finds the request."""
    inner = {"message": error.text(language), "type": row.type, "param": error.param, "code": row.code or error.code}
    return {"error": {**inner, "request_id": request_id, **_rows_refused(error, language)}}


def _rows_refused(error: TunewrightError, language: str) -> dict[str, Any]:
    """For a refused data file: the first problems, each with its place, and how many there are of every code."""
    found = error.values.get("problems")
    if not isinstance(found, list | tuple):  # an adapter's problems are words of the sentence
        return {}
    problems = [
        {
            "code": problem["code"],
            "line": problem.get("line"),
            "pointer": problem.get("pointer"),
            "message": translate(problem["message"], language, **problem.get("values", {})),
        }
        for problem in found
    ]
    return {"problems": problems, "total": error.values.get("total"), "counts": error.values.get("counts")}


_INVALID = "invalid_request_error"
_SERVER = "server_error"

TABLE = ErrorTable(
    prefix=PREFIX,
    envelope=envelope,
    by_kind={
        "invalid_request": Row(400, _INVALID),
        "authentication": Row(401, "authentication_error"),
        "permission": Row(403, "permission_error"),
        "not_found": Row(404, "not_found_error"),
        "conflict": Row(409, "conflict_error"),
        "too_large": Row(413, _INVALID),
        "unsupported_media": Row(415, _INVALID),
        "idempotency_mismatch": Row(422, _INVALID),
        "rate_limited": Row(429, "rate_limit_error"),
        "unavailable": Row(503, _SERVER),
        "storage_full": Row(507, _SERVER, final=True),
        "internal": Row(500, _SERVER),
    },
    by_code={
        "base_not_found": Row(404, "not_found_error", "model_not_found"),
        "method_not_allowed": Row(405, _INVALID),
        "url_too_long": Row(414, _INVALID),
        "headers_too_large": Row(431, _INVALID),
        "range_not_satisfiable": Row(416, _INVALID),
        "request_timeout": Row(408, _INVALID),
        "too_many_uploads": Row(429, "rate_limit_error", final=True),
        "request_quarantined": Row(500, _SERVER, final=True),
        "upload_expired": Row(410, _INVALID),
    },
)
