"""The error tables: every kind has a row, and the headers tell SDKs whether a repeat is any use."""

import asyncio
import json
import threading

import pytest
from fastapi.exceptions import RequestValidationError

from tests.api.world import World
from tunewright import errors
from tunewright.api.app import ERROR_TABLES
from tunewright.api.errors import answer_to, from_validation, param_path, table_of
from tunewright.api.threads import to_the_end
from tunewright.errors import Conflict, InvalidRequest, Misconfigured, NotFound, RateLimited, StorageFull, Unavailable

ZHIPU, OPENAI = ERROR_TABLES
SDK_RETRIES = {408, 409, 429}


def headers_of(error: errors.TunewrightError, path: str) -> dict[str, str]:
    answer = answer_to(error, table_of(path, ERROR_TABLES), path, "en", "req-1")
    return {name.decode(): value.decode() for name, value in answer.headers}


def status_of(error: errors.TunewrightError, path: str) -> int:
    return answer_to(error, table_of(path, ERROR_TABLES), path, "en", "req-1").status


def test_every_kind_has_a_row_in_both_tables() -> None:
    kinds = {kind.kind for kind in errors.TunewrightError.__subclasses__()} - {"misconfigured"}
    assert len(kinds) >= 10
    for table in ERROR_TABLES:
        assert kinds <= set(table.by_kind)


def test_the_zhipu_codes_are_digits_and_no_status_is_422() -> None:
    for row in (*ZHIPU.by_kind.values(), *ZHIPU.by_code.values(), *ZHIPU.by_place.values()):
        assert row.code is not None and row.code.isdigit()
        assert row.status != 422


@pytest.mark.parametrize("path", ["/v1/files", "/api/paas/v4/files"])
def test_what_sdks_are_told_about_repeats(path: str) -> None:
    assert headers_of(Conflict("file_in_use", "x"), path)["x-should-retry"] == "false"
    full = headers_of(StorageFull("insufficient_storage", "x"), path)
    assert full == {"x-should-retry": "false"}
    busy = headers_of(Unavailable("database_busy", "x", retry_after_s=7), path)
    assert busy == {"retry-after": "7"}
    limited = headers_of(RateLimited("concurrency_limit", "x"), path)
    assert limited == {"retry-after": "1"}
    moment = headers_of(Conflict("invalid_state", "x", retryable=True), path)
    assert (moment["x-should-retry"], moment["retry-after"]) == ("true", "1")
    assert headers_of(InvalidRequest("invalid_value", "x"), path) == {}


def test_an_operators_problem_is_not_a_callers() -> None:
    error = Misconfigured("home_in_use", "Another server runs on {home}", home="/home/secret")
    answer = answer_to(error, OPENAI, "/v1/models", "en", "req-1")
    assert answer.status == 500
    assert b"secret" not in answer.body and b"req-1" in answer.body


def test_places_and_prefixes() -> None:
    gone = NotFound("model_not_found", "x")
    assert status_of(gone, "/api/paas/v4/chat/completions") == 400
    assert status_of(gone, "/api/paas/v4/fine_tuning/jobs") == 404
    assert status_of(gone, "/v1/chat/completions") == 404
    assert table_of("/api/paas/v4x", ERROR_TABLES) is OPENAI
    assert table_of("/api/v1/jobs", ERROR_TABLES) is OPENAI
    assert table_of("/api/paas/v4", ERROR_TABLES) is ZHIPU


@pytest.mark.parametrize(
    ("finding", "code", "param"),
    [
        ({"type": "missing", "loc": ("body", "a", 2, "b")}, "missing_required_parameter", "a[2].b"),
        ({"type": "missing", "loc": ("body",)}, "invalid_json", None),
        ({"type": "int_parsing", "loc": ("query", "limit"), "input": "x"}, "invalid_value", "limit"),
        ({"type": "never_heard_of", "loc": ("query", "x"), "input": "{y}"}, "invalid_value", "x"),
        (
            {"type": "string_too_long", "loc": ("header", "h"), "input": "a" * 99, "ctx": {"max_length": 5}},
            "invalid_value",
            "h",
        ),
    ],
)
def test_findings_of_the_framework_become_ours(finding: dict[str, object], code: str, param: str | None) -> None:
    error = from_validation(RequestValidationError([finding]))
    assert (error.code, error.param) == (code, param)
    assert len(error.text("zh")) < 200
    assert param_path(("a", 0, "b")) == "a[0].b"


def test_a_text_where_a_number_belongs_is_shown_as_a_text() -> None:
    finding = {"type": "int_type", "loc": ("body", "replicas"), "input": "2"}
    assert from_validation(RequestValidationError([finding])).text("en") == 'replicas must be a whole number, not "2".'


async def test_a_cancelled_upload_waits_for_its_thread() -> None:
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(5)
        ended.set()

    task = asyncio.ensure_future(to_the_end(work))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_event_streams_end_without_a_word_when_the_server_stops(world: World) -> None:
    async with world.client() as client:
        file = await world.upload(client)
        job = await client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"]})
        asyncio.get_running_loop().call_later(0.1, world.platform.stopping.set)
        try:
            answer = await client.get(f"/api/v1/jobs/{job.json()['id']}/events/stream")
        finally:
            world.platform.stopping.clear()
    assert answer.text.count("data: ") == 1
    assert json.loads(answer.text.split("data: ")[1])["code"] == "created"
    assert "event: end" not in answer.text and "error" not in answer.text
