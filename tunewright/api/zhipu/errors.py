"""The Zhipu dialect's one table: numeric codes, and the statuses that its SDKs turn into classes (400 401 429 500 503).

Numbers are those of the platform's error table; `reason` carries our stable code beside them.
"""

from typing import Any

from tunewright.api.errors import ErrorTable, Row
from tunewright.errors import TunewrightError

PREFIX = "/api/paas/v4"


def envelope(row: Row, error: TunewrightError, language: str, request_id: str) -> dict[str, Any]:
    """`code` is text of digits; `type` and `param` are there for OpenAI clients on this prefix. Short: users read it raw."""
    inner = {"code": row.code or "1214", "message": error.text(language), "type": row.type, "param": error.param}
    return {"error": {**inner, "reason": error.code, "request_id": request_id}}


_AUTHENTICATION = "authentication_error"
_INVALID = "invalid_request_error"
_NOT_FOUND = "not_found_error"
_RATE = "rate_limit_error"
_SERVER = "server_error"

TABLE = ErrorTable(
    prefix=PREFIX,
    envelope=envelope,
    by_kind={
        "invalid_request": Row(400, _INVALID, "1214"),
        "authentication": Row(401, _AUTHENTICATION, "1000"),
        "permission": Row(400, "permission_error", "1220"),
        "not_found": Row(404, _NOT_FOUND, "1214"),
        "conflict": Row(400, _INVALID, "1214"),
        "too_large": Row(413, _INVALID, "1210"),
        "unsupported_media": Row(415, _INVALID, "1210"),
        "idempotency_mismatch": Row(400, _INVALID, "1231"),
        "rate_limited": Row(429, _RATE, "1302"),
        "unavailable": Row(503, _SERVER, "1305"),
        "storage_full": Row(500, _SERVER, "1100", final=True),
        "internal": Row(500, _SERVER, "500"),
    },
    by_code={
        "missing_api_key": Row(401, _AUTHENTICATION, "1001"),
        "invalid_token": Row(401, _AUTHENTICATION, "1004"),
        "token_expired": Row(401, _AUTHENTICATION, "1003"),
        "missing_required_parameter": Row(400, _INVALID, "1213"),
        "unknown_parameter": Row(400, _INVALID, "1210"),
        "unsupported_parameter": Row(400, _INVALID, "1210"),
        "invalid_json": Row(400, _INVALID, "1210"),
        "invalid_body": Row(400, _INVALID, "1210"),
        "invalid_http": Row(400, _INVALID, "1210"),
        "invalid_multipart": Row(400, _INVALID, "1210"),
        "duplicate_key": Row(400, _INVALID, "1210"),
        "invalid_number": Row(400, _INVALID, "1210"),
        "invalid_unicode": Row(400, _INVALID, "1210"),
        "nesting_too_deep": Row(400, _INVALID, "1210"),
        "too_many_fields": Row(400, _INVALID, "1210"),
        "unknown_route": Row(404, _NOT_FOUND, "1222"),
        "method_not_allowed": Row(405, _INVALID, "1212"),
        "url_too_long": Row(414, _INVALID, "1210"),
        "headers_too_large": Row(431, _INVALID, "1210"),
        "range_not_satisfiable": Row(416, _INVALID, "1210"),
        "request_timeout": Row(408, _INVALID, "1234"),
        "too_many_uploads": Row(429, _RATE, "1302", final=True),
        "file_too_large": Row(435, _INVALID, "1214"),
        "model_not_found": Row(400, _INVALID, "1211"),
        "base_not_found": Row(404, _NOT_FOUND, "1608"),
        "model_not_pulled": Row(400, _INVALID, "1211"),
        "model_not_deployed": Row(400, _INVALID, "1212"),
        "embeddings_not_supported": Row(400, _INVALID, "1212"),
        "modality_not_supported": Row(400, _INVALID, "1212"),
        "model_not_tunable": Row(404, _NOT_FOUND, "1600"),
        "job_not_found": Row(404, _NOT_FOUND, "1601"),
        "context_length_exceeded": Row(400, _INVALID, "1261"),
        "rate_limit_exceeded": Row(429, _RATE, "1303"),
        "token_rate_exceeded": Row(429, _RATE, "1303"),
        "engine_overloaded": Row(429, _RATE, "1305"),
        "request_quarantined": Row(500, _SERVER, "500", final=True),
    },
    by_place={
        ("fine_tuning", "model_not_found"): Row(404, _NOT_FOUND, "1608"),
        ("models", "model_not_found"): Row(404, _NOT_FOUND, "1211"),
    },
)
