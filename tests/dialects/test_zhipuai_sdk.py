"""The unmodified `zhipuai` package against a real server, in raw-key and in JWT mode."""

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from zhipuai import ZhipuAI
from zhipuai.core._errors import APIAuthenticationError, APIRequestFailedError, APIStatusError

from tests.live_server import LiveServer, chat_rows


def client_of(server: LiveServer, **options: Any) -> Any:
    return ZhipuAI(api_key=server.key, base_url=f"{server.address}/api/paas/v4", **options)


@pytest.fixture(scope="module", params=[True, False], ids=["raw-key", "jwt"])
def client(live_server: LiveServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    client = client_of(live_server, disable_token_cache=request.param)
    yield client
    client.close()


def rows_file(n: int = 8) -> io.BytesIO:
    stream = io.BytesIO("".join(json.dumps(row) + "\n" for row in chat_rows(n)).encode())
    stream.name = "训练集.jsonl"
    return stream


def test_files(client: Any) -> None:
    made = client.files.create(file=rows_file(), purpose="fine-tune")
    assert (made.filename, made.status, made.samples) == ("训练集.jsonl", "processed", 8)
    assert made.id in [file.id for file in client.files.list().data]
    assert client.files.content(made.id).content == rows_file().getvalue()
    assert client.files.delete(made.id).deleted is True


def test_a_job_from_creation_to_chat(client: Any, live_server: LiveServer) -> None:
    file = client.files.create(file=rows_file(), purpose="fine-tune")
    mark = f"r-{time.time_ns()}"
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5},
        suffix="zp",
        request_id=mark,
    )
    assert job.request_id == mark
    assert job.status in ("created", "pending", "running")
    assert job.fine_tuned_model is not None, "the Zhipu dialect names the model from the start"
    again = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, request_id=mark)
    assert again.id == job.id
    live_server.wait(job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded" and job.finished_at
    metrics = [e.data for e in client.fine_tuning.jobs.list_events(job.id, limit=100).data if e.type == "metrics"]
    assert metrics[0] is not None and metrics[0].current_steps == metrics[0].total_steps
    assert isinstance(metrics[0].loss, float) and ":" in metrics[0].elapsed_time
    assert job.id in [other.id for other in client.fine_tuning.jobs.list(limit=5).data]

    stream = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "你好"}], stream=True, max_tokens=8
    )
    chunks = list(stream)
    assert all(chunk.choices and chunk.choices[0].delta.role == "assistant" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 0

    removed = client.fine_tuning.models.delete(job.fine_tuned_model)
    assert removed.delete_status == "deleted" and removed.model_name == job.fine_tuned_model
    assert client.fine_tuning.models.delete(job.fine_tuned_model).delete_status == "deleted"
    assert client.fine_tuning.jobs.delete(job.id).id == job.id


def test_replayed_message_dumps_and_clamped_sampling(client: Any, tuned_model: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    first = client.chat.completions.create(model=tuned_model, messages=messages, temperature=0, top_p=1, max_tokens=6)
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(model=tuned_model, messages=messages, temperature=1, max_tokens=6)
    assert second.usage.completion_tokens > 0
    assert second.usage.model_extra["prompt_tokens_details"]["cached_tokens"] >= first.usage.prompt_tokens - 1
    same = client.chat.completions.create(model=tuned_model, messages=messages[:1], do_sample=False, max_tokens=6)
    assert same.choices[0].message.content == first.choices[0].message.content


def test_cancel(client: Any, live_server: LiveServer) -> None:
    file = client.files.create(file=rows_file(), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, hyperparameters={"n_epochs": 50})
    client.fine_tuning.jobs.cancel(job.id)
    assert live_server.wait(job.id)["status"] == "cancelled"


def test_bad_rows_are_refused_with_the_line_and_the_field(client: Any) -> None:
    bad = b'{"messages":[{"role":"user","content":"hi"},{"role":"assistnat","content":"x"}]}\n'
    with pytest.raises(APIRequestFailedError) as caught:
        client.files.create(file=("bad.jsonl", bad), purpose="fine-tune")
    error = caught.value.response.json()["error"]
    assert error["code"].isdigit()
    assert "line 1" in error["message"] and "messages[1].role" in error["message"]


def test_unknown_base_and_unknown_job_are_404_with_the_documented_codes(client: Any) -> None:
    with pytest.raises(APIStatusError) as base:
        client.fine_tuning.jobs.create(model="no-such-base", training_file="file-x")
    assert (base.value.status_code, base.value.response.json()["error"]["code"]) == (404, "1608")
    with pytest.raises(APIStatusError) as job:
        client.fine_tuning.jobs.retrieve("ftjob-x")
    assert (job.value.status_code, job.value.response.json()["error"]["code"]) == (404, "1601")


def test_a_wrong_secret_is_refused_in_both_modes(live_server: LiveServer) -> None:
    key = live_server.key.split(".")[0] + "." + "x" * 40
    for raw in (True, False):
        client: Any = ZhipuAI(api_key=key, base_url=f"{live_server.address}/api/paas/v4", disable_token_cache=raw)
        with pytest.raises(APIAuthenticationError):
            client.files.list()
        client.close()


def test_messages_are_chinese_when_asked(live_server: LiveServer) -> None:
    client = client_of(live_server, custom_headers={"Accept-Language": "zh-CN"})
    with pytest.raises(APIStatusError) as caught:
        client.fine_tuning.jobs.retrieve("ftjob-x")
    assert any("\u4e00" <= character <= "\u9fff" for character in caught.value.response.json()["error"]["message"])
    client.close()
