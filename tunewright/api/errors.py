"""How an error becomes an answer: the mechanism. Each dialect's `errors.py` holds its one table.

The domain raises kinds and codes (`tunewright/errors.py`); a table turns them into a status, a type and the dialect's code.
Raised errors travel up to `access.py`, which asks `answer_to` for the response. Nothing else builds an error body.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from tunewright.errors import (
    Conflict,
    InvalidRequest,
    Misconfigured,
    NotFound,
    RateLimited,
    TunewrightError,
    Unavailable,
    as_sent,
)
from tunewright.i18n import mark

RETRIED_STATUSES = frozenset({408, 409, 429})
"""Statuses below 500 after which the SDKs send the same request again, unasked."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `code` None means our own stable code; `final` tells SDKs that a repeat is useless."""

    status: int
    type: str
    code: str | None = None
    final: bool = False


Envelope = Callable[[Row, TunewrightError, str, str], dict[str, Any]]
"""(row, error, language, request id) -> the JSON body."""


@dataclass(frozen=True)
class ErrorTable:
    """What one dialect says. The most special row wins: `by_place` (first path segment, code), `by_code`, `by_kind`."""

    prefix: str
    envelope: Envelope
    by_kind: Mapping[str, Row]
    by_code: Mapping[str, Row] = field(default_factory=dict)
    by_place: Mapping[tuple[str, str], Row] = field(default_factory=dict)

    def owns(self, path: str) -> bool:
        """Whether `path` lies under this dialect's prefix."""
        return path == self.prefix or path.startswith(self.prefix + "/")

    def row(self, error: TunewrightError, path: str) -> Row:
        """The line for `error` raised on `path`."""
        place = path.removeprefix(self.prefix).lstrip("/").partition("/")[0]
        special = self.by_place.get((place, error.code)) or self.by_code.get(error.code)
        return special or self.by_kind.get(error.kind) or self.by_kind["internal"]


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A status, a single-line JSON body and the headers that go with it."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def table_of(path: str, tables: tuple[ErrorTable, ...]) -> ErrorTable:
    """The table of the dialect that `path` belongs to; paths of no dialect get the last one."""
    return next((table for table in tables if table.owns(path)), tables[-1])


def answer_to(error: TunewrightError, table: ErrorTable, path: str, language: str, request_id: str) -> ErrorAnswer:
    """The response for `error` in the dialect of `table`. A Misconfigured is the operator's affair: callers see only an id."""
    if isinstance(error, Misconfigured):
        error = unexpected(request_id)
    row = table.row(error, path)
    body = msgspec.json.encode(table.envelope(row, error, language, request_id))
    return ErrorAnswer(row.status, body, _headers(error, row))


def unexpected(request_id: str) -> TunewrightError:
    """What a caller sees of a bug: an id that the operator finds in the log."""
    return TunewrightError(
        "internal_error",
        mark("Something went wrong on the server. Its operator finds the cause under {request_id}."),
        request_id=request_id,
    )


def server_stopping(wait_s: int = 1) -> Unavailable:
    """The server ends before this request could be answered; who waits for so long finds the next one."""
    return Unavailable("server_stopping", mark("The server is stopping; send the request again."), retry_after_s=wait_s)


def _headers(error: TunewrightError, row: Row) -> tuple[tuple[bytes, bytes], ...]:
    headers: list[tuple[bytes, bytes]] = []
    if row.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, RateLimited | Unavailable) and not row.final:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if row.status in RETRIED_STATUSES or row.status >= 500 or isinstance(error, Conflict):
        if row.final or not (error.retryable or error.kind == "internal"):
            headers.append((b"x-should-retry", b"false"))
        elif isinstance(error, Conflict):
            headers.append((b"x-should-retry", b"true"))
            headers.append((b"retry-after", b"1"))
    allowed = error.values.get("allowed")
    if row.status == 405 and isinstance(allowed, str):
        headers.append((b"allow", allowed.encode()))
    size = error.values.get("size")
    if row.status == 416 and isinstance(size, int):
        headers.append((b"content-range", f"bytes */{size}".encode()))
    return tuple(headers)


def from_http_exception(error: HTTPException, allowed: str) -> TunewrightError:
    """Starlette's own refusals (unknown route, wrong method) as ours. `allowed` names the methods of the path."""
    if error.status_code == 405:
        return InvalidRequest(
            "method_not_allowed", mark("This path does not take that method; it takes {allowed}."), allowed=allowed
        )
    if error.status_code == 404:
        return NotFound("unknown_route", mark("There is nothing at this path."))
    return InvalidRequest("invalid_body", mark("The body of this request can't be read."))


def from_validation(error: RequestValidationError | ValidationError) -> TunewrightError:
    """The first finding of pydantic as a sentence of ours that names the field."""
    finding = error.errors()[0]
    location = tuple(finding["loc"])
    param = param_path(location[1:] if location and location[0] in ("body", "query", "path", "header") else location)
    if finding["type"] == "missing":
        return missing(param) if param else InvalidRequest("invalid_json", mark("The request needs a JSON body."))
    expected = _EXPECTED.get(finding["type"])
    if expected is None:
        return invalid(param, mark("{field} is not valid: {value}."), value=as_sent(finding.get("input")))
    limits = {name: value for name, value in (finding.get("ctx") or {}).items() if name in _LIMITS}
    return invalid(param, expected, value=as_sent(finding.get("input")), **limits)


def missing(param: str) -> InvalidRequest:
    """A required parameter is absent."""
    return InvalidRequest(
        "missing_required_parameter", mark("The required parameter {field} is missing."), param=param, field=param
    )


def invalid(param: str, sentence: str, **values: Any) -> InvalidRequest:
    """`invalid_value` at `param`; `sentence` is a marked text that may use {field}."""
    return InvalidRequest("invalid_value", sentence, param=param, field=param, **values)


def param_path(location: tuple[Any, ...]) -> str:
    """('messages', 2, 'role') -> 'messages[2].role'."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


_TEXT = mark("{field} must be text, not {value}.")
_WHOLE = mark("{field} must be a whole number, not {value}.")
_NUMBER = mark("{field} must be a number, not {value}.")
_BOOLEAN = mark("{field} must be true or false, not {value}.")
_LIST = mark("{field} must be a list, not {value}.")
_OBJECT = mark("{field} must be an object, not {value}.")
_AT_LEAST = mark("{field} must be at least {ge}, not {value}.")
_AT_MOST = mark("{field} must be at most {le}, not {value}.")
_TOO_LONG = mark("{field} has more than the {max_length} items or characters it may have.")
_TOO_SHORT = mark("{field} must not be empty.")
_ONE_OF = mark("{field} must be one of {expected}, not {value}.")
_LIMITS = frozenset({"ge", "le", "max_length", "expected"})
_EXPECTED = {
    "string_type": _TEXT,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _BOOLEAN,
    "bool_parsing": _BOOLEAN,
    "list_type": _LIST,
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "greater_than_equal": _AT_LEAST,
    "less_than_equal": _AT_MOST,
    "string_too_long": _TOO_LONG,
    "too_long": _TOO_LONG,
    "string_too_short": _TOO_SHORT,
    "too_short": _TOO_SHORT,
    "literal_error": _ONE_OF,
}
