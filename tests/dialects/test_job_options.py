"""What a job may be asked for beside the three public hyperparameters, and how its model is named, through both SDKs."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from zhipuai import ZhipuAI
from zhipuai.core._errors import APIRequestFailedError

from tests.live_server import LiveServer, chat_rows

OPTIONS: dict[str, Any] = {
    "training_type": "lora",
    "lora_rank": 4,
    "lora_alpha": "16",
    "max_length": "256",
    "warmup_ratio": "0.1",
    "seed": 11,
    "tensorboard": True,
}
NAME = re.compile(r"tiny:[0-9]{10}:[A-Za-z0-9_-]*:[a-z0-9]{8}")


@pytest.fixture(scope="module", params=["zhipuai", "openai"])
def client(live_server: LiveServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    made: Any = {
        "zhipuai": lambda: ZhipuAI(api_key=live_server.key, base_url=f"{live_server.address}/api/paas/v4"),
        "openai": lambda: OpenAI(api_key=live_server.key, base_url=f"{live_server.address}/v1"),
    }[request.param]()
    with made:
        yield made


@pytest.fixture(scope="module")
def file_id(client: Any) -> str:
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows()).encode()
    return client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id


def hyperparameters(job: Any) -> dict[str, Any]:
    return job.hyperparameters.model_dump()


def test_extra_body_is_understood_and_echoed(client: Any, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        hyperparameters={"n_epochs": "2", "batch_size": "auto", "learning_rate_multiplier": "0.5"},
        extra_body=OPTIONS,
    )
    client.fine_tuning.jobs.cancel(job.id)
    found = hyperparameters(job)
    asked = {"n_epochs": 2, "learning_rate_multiplier": 0.5, "lora_rank": 4, "lora_alpha": 16, "max_length": 256}
    assert {name: found[name] for name in asked} == asked and found["warmup_ratio"] == 0.1
    assert (job.seed, job.training_type, job.tensorboard) == (11, "lora", f"jobs/{job.id}/tensorboard")


def test_a_tuned_model_is_trained_further_under_a_name_of_its_base(live_server: LiveServer, tuned_model: str) -> None:
    file = live_server.upload(chat_rows())
    with OpenAI(api_key=live_server.key, base_url=f"{live_server.address}/v1") as client:
        made = client.fine_tuning.jobs.create(
            model=tuned_model, training_file=file, hyperparameters={"n_epochs": 1, "batch_size": 6}
        )
        assert live_server.wait(made.id)["status"] == "succeeded"
        job: Any = client.fine_tuning.jobs.retrieve(made.id)
        assert job.model == tuned_model
        assert NAME.fullmatch(job.fine_tuned_model) and "::" in job.fine_tuned_model, "no suffix leaves its place empty"
        answer = client.chat.completions.create(
            model=job.fine_tuned_model, messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert answer.usage is not None and answer.usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"training_type": "prefix"}, "training_type"),
        ({"training_type": "qlora"}, "training_type"),
        ({"lora_rank": 0}, "hyperparameters.lora_rank"),
        ({"lora_alpha": "many"}, "hyperparameters.lora_alpha"),
        ({"max_length": 10**6}, "hyperparameters.max_length"),
        ({"warmup_ratio": 0.9}, "hyperparameters.warmup_ratio"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_wrong_option_is_named(client: Any, file_id: str, options: dict[str, Any], param: str) -> None:
    with pytest.raises((BadRequestError, APIRequestFailedError)) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=options)
    error = caught.value.response.json()["error"]
    assert error["param"] == param and error["message"]


def test_a_model_can_be_called_only_once_its_job_succeeded(live_server: LiveServer) -> None:
    """The Zhipu dialect names the model from the start; the name answers as no model does."""
    client: Any = ZhipuAI(api_key=live_server.key, base_url=f"{live_server.address}/api/paas/v4")
    file = live_server.upload(chat_rows())
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="x", hyperparameters={"n_epochs": 50})
    assert NAME.fullmatch(job.fine_tuned_model)
    with pytest.raises(APIRequestFailedError) as caught:
        client.chat.completions.create(model=job.fine_tuned_model, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.response.json()["error"]["code"] == "1211"
    client.fine_tuning.jobs.cancel(job.id)
    client.close()
