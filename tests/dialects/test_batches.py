"""Batches and late answers through the unmodified SDKs against a real server."""

import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import openai
import pytest
from openai import OpenAI
from zhipuai import ZhipuAI
from zhipuai.types.chat.async_chat_completion import AsyncCompletion, AsyncTaskStatus

from tests.live_server import LiveServer, chat_rows

ENDED = ("completed", "failed", "cancelled", "expired")
_Thing = TypeVar("_Thing")


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=live_server.key, base_url=f"{live_server.address}/v1") as client:
        yield client


@pytest.fixture(scope="module")
def zhipu(live_server: LiveServer) -> Iterator[ZhipuAI]:
    with ZhipuAI(api_key=live_server.key, base_url=f"{live_server.address}/api/paas/v4") as client:
        yield client


def row(number: int, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": f"hi {number}"}], "max_tokens": 3}
    return {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": asked | body}


def jsonl(rows: list[Any]) -> io.BytesIO:
    data = io.BytesIO("".join(json.dumps(each) + "\n" for each in rows).encode())
    data.name = "requests.jsonl"
    return data


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def until(look: Callable[[], _Thing], good: Callable[[_Thing], bool]) -> _Thing:
    deadline = time.monotonic() + 60
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def ended(client: Any, batch_id: str) -> Any:
    return until(lambda: client.batches.retrieve(batch_id), lambda batch: batch.status in ENDED)


def test_openai_gets_every_answer_and_every_error_in_order(client: OpenAI, tuned_model: str) -> None:
    rows = [row(n, model=tuned_model if n % 2 else "tiny") for n in range(20)]
    rows[3]["body"]["temperature"] = 9
    rows[5]["body"]["model"] = "nowhere"
    file = client.files.create(file=jsonl(rows), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    assert made.status == "validating" and made.expires_at == made.created_at + 24 * 3600
    done = ended(client, made.id)
    assert done.status == "completed", done
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 18, 2)
    assert done.metadata == {"a": "b"} and done.errors is None
    assert made.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    answers = lines(client.files.content(done.output_file_id).read())
    assert [each["custom_id"] for each in answers] == [f"request-{n}" for n in range(20) if n not in (3, 5)]
    assert len({each["id"] for each in answers}) == 18
    for each in answers:
        assert each["error"] is None and each["response"]["status_code"] == 200 and each["response"]["request_id"]
        assert each["response"]["body"]["object"] == "chat.completion"
        assert 1 <= each["response"]["body"]["usage"]["completion_tokens"] <= 3
    wrong = lines(client.files.content(done.error_file_id).read())
    found = [(each["custom_id"], each["response"]["status_code"]) for each in wrong]
    assert found == [("request-3", 400), ("request-5", 404)]
    assert wrong[1]["response"]["body"]["error"]["code"] == "model_not_found"
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert client.files.retrieve(file.id).id == file.id, "openai's users never asked for its deletion"


def test_all_that_is_wrong_with_the_lines_is_said_at_once(client: OpenAI) -> None:
    rows = [row(1), row(1), row(2) | {"method": "GET"}, row(3, "/v1/embeddings"), {**row(4), "body": {"stream": True}}]
    rows += [{**row(5), "custom_id": ""}, row(6, stream=True)]
    file = client.files.create(file=jsonl(rows), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    failed = ended(client, made.id)
    assert failed.status == "failed" and failed.output_file_id is None
    found = [(error.line, error.code, error.param) for error in failed.errors.data]
    assert found == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "invalid_method", "method"),
        (4, "invalid_url", "url"),
        (5, "invalid_request", "body.model"),
        (6, "invalid_custom_id", "custom_id"),
        (7, "invalid_request", "body.stream"),
    ]
    assert all(error.message for error in failed.errors.data)


def test_wrong_creations_are_refused(client: OpenAI, live_server: LiveServer) -> None:
    training = live_server.upload(chat_rows(3))
    file = client.files.create(file=jsonl([row(1)]), purpose="batch")
    right: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for wrong in (
        {"input_file_id": training},
        {"input_file_id": file.id, "endpoint": "/v1/nothing"},
        {"input_file_id": file.id, "completion_window": "1h"},
        {"input_file_id": file.id, "metadata": {"a": "b" * 600}},
    ):
        with pytest.raises(openai.BadRequestError):
            client.batches.create(**{**right, **wrong})
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-x", **right)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch-x")
    first, again = (
        client.batches.create(input_file_id=file.id, extra_headers={"Idempotency-Key": "batch-once"}, **right)
        for _ in range(2)
    )
    assert first.id == again.id
    ended(client, first.id)


def test_zhipu_reads_its_batches_and_the_input_goes(zhipu: ZhipuAI) -> None:
    rows = [row(n, "/v4/chat/completions") for n in range(3)]
    file = zhipu.files.create(file=jsonl(rows), purpose="batch")
    made = zhipu.batches.create(input_file_id=file.id, endpoint="/v4/chat/completions")  # type: ignore[arg-type]
    done = ended(zhipu, made.id)
    assert done.status == "completed" and done.completion_window == "24h"
    answers = lines(zhipu.files.content(done.output_file_id).content)
    assert [(each["id"], each["response"]["body"]["request_id"]) for each in answers] == [
        (made.id, f"request-{n}") for n in range(3)
    ]
    gone = until(lambda: [each.id for each in zhipu.files.list(purpose="batch").data], lambda ids: file.id not in ids)
    assert file.id not in gone


def test_lists_end_with_an_empty_page(client: OpenAI, zhipu: ZhipuAI, live_server: LiveServer) -> None:
    file = client.files.create(file=jsonl([row(1)]), purpose="batch")
    made = [
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"n": str(n)}
        ).id
        for n in range(3)
    ]
    listed = [batch.id for batch in client.batches.list(limit=2)]
    assert set(made) <= set(listed) and len(listed) == len(set(listed))
    assert [batch.id for batch in zhipu.batches.list(limit=2)] == listed
    address = f"{live_server.address}/v1"
    with OpenAI(api_key=live_server.key, base_url=address, _strict_response_validation=True) as strict:
        assert [batch.id for batch in strict.batches.list(limit=2)] == listed
    for batch_id in made:
        ended(client, batch_id)


def test_a_cancelled_batch_keeps_what_was_answered(client: OpenAI) -> None:
    rows = [row(n, max_tokens=60, temperature=0) for n in range(400)]
    file = client.files.create(file=jsonl(rows), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(
        lambda: client.batches.retrieve(made.id),
        lambda batch: bool(batch.request_counts and batch.request_counts.completed),
    )
    with pytest.raises(openai.ConflictError) as used:
        client.files.delete(file.id)
    assert used.value.code == "file_in_use"
    assert client.batches.cancel(made.id).status == "cancelling"
    done = ended(client, made.id)
    assert done.status == "cancelled" and done.cancelled_at >= done.cancelling_at
    answers = lines(client.files.content(done.output_file_id).read())
    assert 0 < len(answers) == done.request_counts.completed < 400
    assert client.batches.cancel(made.id).status == "cancelled"


def test_late_answers_are_parsed_in_every_state(zhipu: ZhipuAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
    made = zhipu.chat.asyncCompletions.create(**asked, request_id="late-1")
    assert isinstance(made, AsyncTaskStatus) and made.task_status == "PROCESSING" and made.request_id == "late-1"
    assert zhipu.chat.asyncCompletions.create(**asked, request_id="late-1").id == made.id

    def look() -> Any:
        return zhipu.chat.asyncCompletions.retrieve_completion_result(str(made.id))

    done = until(look, lambda task: task.task_status != "PROCESSING")
    assert isinstance(done, AsyncCompletion) and done.task_status == "SUCCESS"
    assert done.id == made.id and done.request_id == "late-1"
    assert done.choices[0].message.role == "assistant" and done.choices[0].finish_reason in ("stop", "length")
    assert 1 <= done.usage.completion_tokens <= 4
    with pytest.raises(Exception, match="1231"):
        zhipu.chat.asyncCompletions.create(**{**asked, "max_tokens": 5}, request_id="late-1")
    with pytest.raises(Exception, match="1211"):
        zhipu.chat.asyncCompletions.create(**{**asked, "model": "nowhere"})
    with pytest.raises(Exception, match="404"):
        zhipu.chat.asyncCompletions.retrieve_completion_result("task-x")


def test_a_late_answer_that_fails_says_so(zhipu: ZhipuAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "word " * 9000}]}
    made = zhipu.chat.asyncCompletions.create(**asked)

    def look() -> Any:
        return zhipu.chat.asyncCompletions.retrieve_completion_result(str(made.id))

    failed = until(look, lambda task: task.task_status != "PROCESSING")
    assert isinstance(failed, AsyncTaskStatus) and failed.task_status == "FAIL"
    assert failed.model_extra is not None and failed.model_extra["error"]["reason"] == "context_length_exceeded"


def test_what_is_answered_offline_is_in_the_ledger(live_server: LiveServer) -> None:
    with live_server.api("/api/v1") as api:
        rows = api.get("/usage/requests", params={"limit": 1000}).json()["data"]
    assert {"/batches", "/async/chat/completions"} <= {each["endpoint"] for each in rows}
