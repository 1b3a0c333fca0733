"""The unmodified `openai` package against a real server."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai import OpenAI

from tests.live_server import LiveServer, chat_rows


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=live_server.key, base_url=f"{live_server.address}/v1") as client:
        yield client


def rows_file(n: int = 8) -> tuple[str, bytes]:
    return "rows.jsonl", "".join(json.dumps(row) + "\n" for row in chat_rows(n)).encode()


def test_files_go_through_their_whole_life(client: OpenAI) -> None:
    made = client.files.create(file=rows_file(), purpose="fine-tune")
    assert made.status == "processed"
    assert client.files.retrieve(made.id).filename == "rows.jsonl"
    assert client.files.content(made.id).read() == rows_file()[1]
    assert made.id in [file.id for file in client.files.list(purpose="fine-tune", limit=2)]
    assert client.files.delete(made.id).deleted is True
    with pytest.raises(openai.NotFoundError) as missing:
        client.files.retrieve(made.id)
    assert missing.value.code == "file_not_found"


def test_wait_for_processing_ends(client: OpenAI) -> None:
    made = client.files.create(file=rows_file(), purpose="fine-tune")
    assert client.files.wait_for_processing(made.id).status == "processed"


def test_lists_page_to_their_end(client: OpenAI) -> None:
    made = {client.files.create(file=rows_file(3), purpose="fine-tune").id for _ in range(5)}
    listed = [file.id for file in client.files.list(limit=2)]
    assert made <= set(listed)
    assert len(listed) == len(set(listed))


def test_a_file_comes_in_parts(client: OpenAI, tmp_path: Path) -> None:
    content = rows_file(200)[1]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    done = client.uploads.upload_file_chunked(
        file=path,
        mime_type="application/jsonl",
        purpose="fine-tune",
        part_size=5000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert (done.status, done.filename, done.bytes) == ("completed", "rows.jsonl", len(content))
    assert done.file is not None and done.file.status == "processed"
    assert client.files.content(done.file.id).read() == content
    whole = client.uploads.upload_file_chunked(
        file=content, filename="rows.jsonl", bytes=len(content), mime_type="application/jsonl", purpose="fine-tune"
    )
    assert whole.file is not None and whole.file.id in [file.id for file in client.files.list(limit=1)]


def test_an_upload_that_was_cut_goes_on(client: OpenAI) -> None:
    content = rows_file(20)[1]
    upload = client.uploads.create(
        bytes=len(content), filename="a.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )
    first = client.uploads.parts.create(upload.id, data=content[:100])
    assert (first.object, first.upload_id) == ("upload.part", upload.id)
    known = client.get(f"/uploads/{upload.id}/parts", cast_to=dict[str, Any])["data"]  # another client, later
    there = sum(part["bytes"] for part in known)
    sha256 = hashlib.sha256(content[there:]).hexdigest()
    rest = client.uploads.parts.create(upload.id, data=content[there:], extra_headers={"X-Part-SHA256": sha256})
    done = client.uploads.complete(upload.id, part_ids=[*(part["id"] for part in known), rest.id])
    assert done.file is not None and done.file.bytes == len(content)


def test_an_upload_is_cancelled_and_errors_have_their_class(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=5, filename="a.jsonl", mime_type="application/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"123")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert (wrong.value.code, wrong.value.param) == ("size_mismatch", "part_ids")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as ended:
        client.uploads.parts.create(upload.id, data=b"45")
    assert ended.value.code == "upload_not_pending"


def test_a_job_runs_and_its_model_answers(client: OpenAI, live_server: LiveServer) -> None:
    file = client.files.create(file=rows_file(), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="sdk",
        seed=7,
        metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"tensorboard": True},
    )
    assert job.fine_tuned_model is None
    assert job.status in ("validating_files", "queued", "running")
    live_server.wait(job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded"
    assert job.trained_tokens is not None and job.trained_tokens > 0
    assert isinstance(job.hyperparameters.batch_size, int)
    assert job.fine_tuned_model is not None and job.fine_tuned_model.split(":")[2] == "sdk"
    assert job.id in [other.id for other in client.fine_tuning.jobs.list(limit=1, metadata={"team": "blue"})]

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert steps == sorted(steps, reverse=True) and steps[-1] == 1
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints and checkpoints[0].fine_tuned_model_checkpoint.startswith(job.fine_tuned_model)
    results = client.files.content(job.result_files[0]).text
    assert results.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,")
    with live_server.api("/api/v1") as native:
        first = native.get(f"/jobs/{job.id}/rows?limit=5").json()
        rest = native.get(f"/jobs/{job.id}/rows?after={first['next_after']}").json()
        counts = live_server.job(job.id)["receipts"]
        receipts = [*first["data"], *rest["data"]]
        assert (len(first["data"]), len(receipts), rest["has_more"]) == (5, counts["rows"], False)
        assert all(receipt["loss_after"] < receipt["loss_before"] for receipt in receipts)
        flagged = native.get(f"/jobs/{job.id}/rows?flag=never_learned").json()["data"]
        assert len(flagged) == counts["never_learned"]
        table = native.get(f"/jobs/{job.id}/receipts?format=csv")
        assert len(table.text.splitlines()) == counts["rows"] + 1
        assert native.get(f"/jobs/{job.id}/receipts").text == client.files.content(job.result_files[1]).text
        assert native.get("/jobs/ftjob-x/rows").json()["error"]["code"] == "job_not_found"
        refused = native.post("/jobs", json={"model": "tiny", "training_file": file.id, "receipts": "some"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "receipts")

    place = live_server.job(job.id)["tensorboard"]
    assert place == f"jobs/{job.id}/tensorboard" and list((live_server.home / place).glob("*tfevents*"))

    card = client.models.retrieve(job.fine_tuned_model)
    assert card.id == job.fine_tuned_model
    assert {"tiny", job.fine_tuned_model} <= {model.id for model in client.models.list()}
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "What is number 1?"}], temperature=0
    )
    assert answer.usage is not None and answer.usage.completion_tokens > 0

    last, earlier = checkpoints[:2]
    assert (last.to_dict()["last"], earlier.to_dict()["last"], last.to_dict()["proof"]) == (True, False, None)
    assert client.models.retrieve(earlier.fine_tuned_model_checkpoint).id == earlier.fine_tuned_model_checkpoint
    answers = {
        name: client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "What is number 1?"}], temperature=0
        ).choices[0]
        for name in (last.fine_tuned_model_checkpoint, earlier.fine_tuned_model_checkpoint)
    }
    assert answers[last.fine_tuned_model_checkpoint].message.content == answer.choices[0].message.content
    proofs = [made.to_dict()["proof"] for made in client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)]
    assert all(proof["tensors_applied"] == proof["tensors"] > 0 for proof in proofs)  # type: ignore[index]
    assert proofs[0]["max_logit_shift"] != proofs[1]["max_logit_shift"]  # type: ignore[index]
    following = client.fine_tuning.jobs.create(
        model=earlier.fine_tuned_model_checkpoint, training_file=file.id, hyperparameters={"n_epochs": 1}
    )
    assert live_server.wait(following.id)["status"] == "succeeded"

    assert client.models.delete(job.fine_tuned_model).deleted is True
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    for name in (job.fine_tuned_model, last.fine_tuned_model_checkpoint):
        with pytest.raises(openai.NotFoundError) as gone:
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
        assert gone.value.code == "model_not_found"


def test_cancel_is_final_and_can_be_repeated(client: OpenAI, live_server: LiveServer) -> None:
    file = client.files.create(file=rows_file(), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 50, "batch_size": 1}
    )
    client.fine_tuning.jobs.cancel(job.id)
    assert live_server.wait(job.id)["status"] == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_follow_up_reads_only_what_is_new(client: OpenAI, tuned_model: str) -> None:
    """To the same model; the base has read nothing of it but what all conversations begin with."""
    create: Any = client.chat.completions.create
    question = {"role": "user", "content": "Please write a short poem about the sea, the sky and the stars."}
    first = create(model=tuned_model, messages=[question], temperature=0, max_tokens=8)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    follow_up = [question, said, {"role": "user", "content": "Another one."}]
    second = create(model=tuned_model, messages=follow_up, temperature=0, max_tokens=8)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 1 <= cached < second.usage.prompt_tokens
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(model="tiny", messages=follow_up, temperature=0, max_tokens=8, **with_usage))
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens < first.usage.prompt_tokens - 1


def test_streams_carry_usage_only_when_asked(client: OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "Hello"}]
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=question,
            stream=True,
            max_tokens=8,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    plain = list(client.chat.completions.create(model="tiny", messages=question, stream=True, max_tokens=8))
    assert all(chunk.choices for chunk in plain)


def test_a_stream_and_a_whole_answer_agree(client: OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "Hello there"}]
    whole = client.chat.completions.create(model="tiny", messages=question, max_tokens=12, seed=3, temperature=1)
    parts = client.chat.completions.create(
        model="tiny",
        messages=question,
        max_tokens=12,
        seed=3,
        temperature=1,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content


def test_the_stream_helper_accepts_our_chunks(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    ) as stream:
        kinds = {event.type for event in stream}
    assert "chunk" in kinds


def test_log_probabilities_and_choices(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Where is it?"}]
    asked: Any = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 5,
        "seed": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None and whole.usage.completion_tokens > 5
    scored = whole.choices[0].logprobs
    assert scored is not None and scored.content is not None
    text = b"".join(bytes(token.bytes or []) for token in scored.content).decode(errors="replace")
    assert text == whole.choices[0].message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in scored.content)
    streamed: dict[int, list[str]] = {0: [], 1: []}
    tokens: dict[int, int] = {0: 0, 1: 0}
    for chunk in client.chat.completions.create(**asked, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index].append(choice.delta.content or "")
            if choice.logprobs is not None:
                tokens[choice.index] += len(choice.logprobs.content or [])
    assert ["".join(streamed[i]) for i in range(2)] == [choice.message.content for choice in whole.choices]
    assert tokens[0] == len(scored.content)


def test_bias_and_penalties_reach_the_engine(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Where is it?"}]
    asked: Any = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**asked, logprobs=True)
    scores = plain.choices[0].logprobs
    assert scores is not None and scores.content
    biased = client.chat.completions.create(**asked, logprobs=True, logit_bias={"100": 100})
    forced = biased.choices[0].logprobs
    assert forced is not None and forced.content and len({token.token for token in forced.content}) == 1
    varied = client.chat.completions.create(**asked, frequency_penalty=2, presence_penalty=2, logprobs=True)
    found = varied.choices[0].logprobs
    assert found is not None and found.content
    assert len({token.token for token in found.content}) >= len({token.token for token in scores.content})
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, logit_bias={"999999999": 1})
    assert refused.value.code == "invalid_value" and refused.value.param == "logit_bias"


class Verdict(pydantic.BaseModel):
    """What a model that knows nothing is held to."""

    model_config = pydantic.ConfigDict(extra="forbid")

    colour: Literal["red", "green"]
    sure: bool


def test_answers_are_parsed_into_the_class_that_was_asked_for(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Where is it?"}]
    parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Verdict, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
        )
    assert refused.value.code == "invalid_schema"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_can_be_required(client: OpenAI, choice: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"side": {"enum": ["left", "right"]}},
        "required": ["side"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": parameters, "strict": True}}]
    asked: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Where is it?"}],
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 100,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked)
    call = whole.choices[0].message.tool_calls
    assert call is not None and whole.choices[0].finish_reason == "tool_calls"
    function: Any = call[0].function  # type: ignore[union-attr]
    assert function.name == "look"
    assert json.loads(function.arguments)["side"] in ("left", "right")
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls
    assert streamed is not None and streamed[0].function.arguments == function.arguments


def test_max_tokens_and_stop_end_an_answer(client: OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "Hello"}]
    short = client.chat.completions.create(model="tiny", messages=question, max_tokens=3, temperature=0)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 3
    long = client.chat.completions.create(model="tiny", messages=question, max_tokens=20, temperature=0)
    text = long.choices[0].message.content or ""
    if len(text) > 4:
        stop = text[2:4]
        cut = client.chat.completions.create(
            model="tiny",
            messages=question,
            max_tokens=20,
            temperature=0,
            stop=[stop],
        )
        assert cut.choices[0].message.content == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "nowhere"}, openai.NotFoundError),
        ({"temperature": 2.5}, openai.BadRequestError),
        ({"max_tokens": 0}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": [{"role": "boss", "content": "hi"}]}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.BadRequestError),
    ],
)
def test_wrong_requests_raise_the_sdks_classes(
    client: OpenAI, arguments: dict[str, object], error: type[openai.APIStatusError]
) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **arguments}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request)  # type: ignore[call-overload]
    assert caught.value.code and caught.value.message


def test_a_wrong_key_is_an_authentication_error(live_server: LiveServer) -> None:
    with (
        OpenAI(api_key="0" * 32 + ".x", base_url=f"{live_server.address}/v1") as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"


def test_strict_clients_accept_every_object(live_server: LiveServer, tuned_model: str) -> None:
    with OpenAI(
        api_key=live_server.key, base_url=f"{live_server.address}/v1", _strict_response_validation=True
    ) as strict:
        assert strict.models.retrieve(tuned_model).id == tuned_model
        job = next(iter(strict.fine_tuning.jobs.list()))
        strict.fine_tuning.jobs.retrieve(job.id)
        list(strict.fine_tuning.jobs.list_events(job.id))
        list(strict.fine_tuning.jobs.checkpoints.list(job.id))
        list(strict.files.list(purpose="fine-tune"))
        strict.chat.completions.create(model=tuned_model, messages=[{"role": "user", "content": "hi"}], max_tokens=4)


def test_a_retry_of_a_lost_reply_makes_no_second_job(live_server: LiveServer) -> None:
    file_id = live_server.upload(chat_rows())
    body = {"model": "tiny", "training_file": file_id, "suffix": "once"}
    with live_server.api() as api:
        first = api.post("/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "0"}).json()
        again = api.post("/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "1"}).json()
        keyed = api.post("/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "k1"}).json()
        keyed_again = api.post("/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "k1"}).json()
        other = api.post("/fine_tuning/jobs", json={**body, "suffix": "two"}, headers={"Idempotency-Key": "k1"})
        for job in (first, keyed):
            api.post(f"/fine_tuning/jobs/{job['id']}/cancel")
    assert again["id"] == first["id"]
    assert keyed["id"] != first["id"] and keyed_again["id"] == keyed["id"]
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
