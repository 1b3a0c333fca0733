"""The lines of a batch's file: checked all at once before anything runs, then read one by one."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from tunewright import strict_json
from tunewright.batches.ports import ENDPOINTS
from tunewright.batches.records import BatchError
from tunewright.datasets.lines import read_lines
from tunewright.errors import TunewrightError, quote
from tunewright.i18n import mark

MOST_ERRORS = 1000
"""Errors that a batch shows; the last of them says how many more there are."""
LONGEST_ID = 512


class InputLine(NamedTuple):
    """A request of a file. `number` counts from 1."""

    number: int
    custom_id: str
    body: dict[str, Any]


def check_lines(path: Path, endpoint: str, most_requests: int, max_line_bytes: int) -> tuple[int, list[BatchError]]:
    """How many requests the file has, and everything that is wrong with its lines."""
    errors: list[BatchError] = []
    seen: dict[str, int] = {}
    total = wrong = 0
    with path.open("rb") as stream:
        for line in read_lines(stream, max_line_bytes):
            if line.data is not None and not line.data.strip():
                continue
            total += 1
            found = _check(line.data, line.number, endpoint, seen)
            wrong += len(found)
            errors += found[: MOST_ERRORS - len(errors)]
            if total > most_requests:
                sentence = mark("The file has more than {most} requests.")
                return total, [BatchError(code="too_many_requests", message=sentence, values={"most": most_requests})]
    if not total:
        errors.append(BatchError(code="empty_file", message=mark("The file has no requests.")))
    if wrong > len(errors):
        sentence = mark("{count} more errors are not shown.")
        errors[-1] = BatchError(code="more_errors", message=sentence, values={"count": wrong - len(errors) + 1})
    return total, errors


def input_lines(path: Path, max_line_bytes: int) -> Generator[InputLine, None, None]:
    """The requests of a file that was checked."""
    with path.open("rb") as stream:
        for line in read_lines(stream, max_line_bytes):
            if line.data is not None and line.data.strip():
                row = strict_json.loads(line.data)
                yield InputLine(line.number, row["custom_id"], row["body"])


def _check(data: bytes | None, number: int, endpoint: str, seen: dict[str, int]) -> list[BatchError]:
    errors: list[BatchError] = []

    def wrong(code: str, message: str, param: str | None = None, **values: Any) -> None:
        errors.append(BatchError(code=code, message=message, values=values, line=number, param=param))

    if data is None:
        wrong("line_too_long", mark("The line is too long."))
        return errors
    try:
        row = strict_json.loads(data)
    except TunewrightError as error:
        return [BatchError(code=error.code, message=error.message, values=error.values, line=number)]
    if not isinstance(row, dict):
        wrong("invalid_json_line", mark("The line must be a JSON object."))
        return errors
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= LONGEST_ID:
        wrong(
            "invalid_custom_id", mark("custom_id must be text of 1 to {most} characters."), "custom_id", most=LONGEST_ID
        )
    elif custom_id in seen:
        sentence = mark("The custom_id {value} is that of line {first}.")
        wrong("duplicate_custom_id", sentence, "custom_id", value=quote(custom_id), first=seen[custom_id])
    else:
        seen[custom_id] = number
    if row.get("method") != "POST":
        wrong("invalid_method", mark("method must be POST, not {value}."), "method", value=quote(row.get("method")))
    url = row.get("url")
    if not isinstance(url, str) or ENDPOINTS.get(url) != ENDPOINTS[endpoint]:
        wrong("invalid_url", mark("url must be {endpoint}, as the batch has it."), "url", endpoint=endpoint)
    body = row.get("body")
    if not isinstance(body, dict):
        wrong("invalid_request", mark("body must be an object."), "body")
    elif not isinstance(body.get("model"), str) or not body["model"]:
        wrong("invalid_request", mark("body.model must name a model."), "body.model")
    elif body.get("stream"):
        wrong("invalid_request", mark("body.stream must not be set in a batch."), "body.stream")
    return errors
