"""Tuned models on instances of their own, called by the real SDKs: whole, with the adapter beside the base, and merged."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import tomlkit
from openai import OpenAI
from zhipuai import ZhipuAI
from zhipuai.core._errors import APIRequestFailedError

from tests.conftest import METRICS_TOKEN
from tests.deployments import deploy, events, processes, undeploy, wait_for
from tests.live_server import LiveServer, chat_rows

QUESTION: Any = [{"role": "user", "content": "What is number 1?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def openai_sdk(live_server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=live_server.key, base_url=f"{live_server.address}/v1", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def zhipu_sdk(live_server: LiveServer) -> Iterator[Any]:
    client = ZhipuAI(api_key=live_server.key, base_url=f"{live_server.address}/api/paas/v4", max_retries=0)
    yield client
    client.close()


def answer_of(sdk: Any, model: str) -> str:
    return sdk.chat.completions.create(model=model, messages=QUESTION, **GREEDY).choices[0].message.content


def test_a_whole_model_is_called_once_it_is_deployed_and_goes_with_its_card(
    live_server: LiveServer, openai_sdk: OpenAI, zhipu_sdk: Any
) -> None:
    home = live_server.home
    live_server.run("models", "add", str(home / "models" / "tiny"), "--code", "tiny-own")
    catalogue = tomlkit.parse((home / "catalogue.toml").read_text())
    catalogue["bases"]["tiny-own"]["methods"] = ["lora", "full"]  # type: ignore[index]
    (home / "catalogue.toml").write_text(tomlkit.dumps(catalogue))
    learn = {"n_epochs": 6, "batch_size": 2, "learning_rate_multiplier": 10}
    wanted = {"model": "tiny-own", "training_type": "full", "hyperparameters": learn}
    job = live_server.wait(live_server.create_job(live_server.upload(chat_rows()), **wanted))
    name = job["fine_tuned_model"]
    with pytest.raises(openai.BadRequestError) as refused:
        answer_of(openai_sdk, name)
    assert refused.value.code == "model_not_deployed" and "/api/v1/deployments" in str(refused.value)

    made = deploy(live_server, name, name="my-own")
    assert made["proof"]["kind"] == "full" and made["proof"]["max_logit_shift"] > 0
    assert made["memory"]["source"] == "measured" and made["replicas"][0]["memory_bytes"] > 0
    text = answer_of(openai_sdk, name)
    assert text and text != answer_of(openai_sdk, "tiny"), "its own weights answer"
    for code in (name, "my-own", made["id"]):
        assert answer_of(zhipu_sdk, code) == text
        streamed = zhipu_sdk.chat.completions.create(model=code, messages=QUESTION, stream=True, **GREEDY)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text

    zhipu_sdk.fine_tuning.models.delete(name)
    zhipu_sdk.fine_tuning.models.delete(name)
    for code in (name, "my-own", made["id"]):
        with pytest.raises(openai.NotFoundError) as gone:
            answer_of(openai_sdk, code)
        assert gone.value.code == "model_not_found"
        with pytest.raises(APIRequestFailedError):
            answer_of(zhipu_sdk, code)
    with live_server.api("/api/v1") as api:
        assert api.get(f"/deployments/{made['id']}").status_code == 404
    folder, deadline = live_server.home / "workers" / made["id"], time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists(), "processes and their folders go too"


def test_a_lora_model_answers_alike_from_pool_and_instances(
    live_server: LiveServer, tuned_model: str, openai_sdk: OpenAI
) -> None:
    from_pool = answer_of(openai_sdk, tuned_model)
    beside = deploy(live_server, tuned_model)
    assert beside["proof"]["kind"] == "lora"
    assert beside["proof"]["tensors_applied"] == beside["proof"]["tensors"] > 0 < beside["proof"]["max_logit_shift"]
    assert answer_of(openai_sdk, tuned_model) == answer_of(openai_sdk, beside["name"]) == from_pool
    with live_server.api("/api/v1") as api:
        twice = api.post("/deployments", json={"model": tuned_model})
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "already_deployed")
    with live_server.api("/api/v1") as api:
        rows = api.get("/usage/requests", params={"model": beside["name"]}).json()["data"]
    assert rows[0]["deployment_id"] == beside["id"], "the ledger says who answered"
    operator = {"Authorization": f"Bearer {METRICS_TOKEN}"}
    metrics = httpx.get(f"{live_server.address}/metrics", headers=operator, trust_env=False).text
    slots = [line for line in metrics.splitlines() if line.startswith("tunewright_engine_slots{")]
    assert any(beside["id"] in line for line in slots), "metrics tell of instances too"
    late = {"model": beside["name"], "messages": QUESTION, **GREEDY}
    with live_server.api("/api/paas/v4") as api:
        task = api.post("/async/chat/completions", json=late).json()
        while (answer := api.get(f"/async-result/{task['id']}").json())["task_status"] == "PROCESSING":
            time.sleep(0.1)
    assert answer["choices"][0]["message"]["content"] == from_pool
    undeploy(live_server, beside["id"])
    assert answer_of(openai_sdk, tuned_model) == from_pool, "back to the pool"

    merged = deploy(live_server, tuned_model, merge=True)
    proof = merged["proof"]
    assert proof["kind"] == "merged" and proof["difference"] <= proof["tolerance"] < proof["effect"]
    assert answer_of(openai_sdk, tuned_model) == answer_of(openai_sdk, merged["name"]) == from_pool
    before = (live_server.home / "workers" / merged["id"] / "merged" / "MANIFEST.json").stat().st_mtime_ns
    os.kill(processes(live_server, merged["id"])["1"].pid, signal.SIGKILL)
    wait_for(live_server, merged["id"], lambda found: "replica_died" in events(live_server, merged["id"]))
    wait_for(live_server, merged["id"], lambda found: found["status"] == "ready")
    after = (live_server.home / "workers" / merged["id"] / "merged" / "MANIFEST.json").stat().st_mtime_ns
    assert after == before, "merged once"
    undeploy(live_server, merged["id"])
