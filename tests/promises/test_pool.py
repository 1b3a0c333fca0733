"""The pool through the whole server: warm at success, mixed batches, slots that come back, adapters that are forgotten."""

import asyncio
import json
import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from tests.live_server import LiveServer, chat_rows
from tunewright.deployments.ports import State, WorkerProcess, WorkerSpec
from tunewright.deployments.worker_client import WorkerClient


def worker_process(server: LiveServer) -> WorkerProcess:
    """The process that serves `tiny`."""
    return msgspec.json.decode((server.home / "workers" / "tiny" / "worker.json").read_bytes(), type=WorkerProcess)


def worker_state(server: LiveServer) -> State:
    """What the worker of `tiny` says of itself."""
    spec = msgspec.json.decode((server.home / "workers" / "tiny" / "spec.json").read_bytes(), type=WorkerSpec)
    return asyncio.run(WorkerClient(worker_process(server).port, spec.secret).health())


def chat(server: LiveServer, model: str, text: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16, **more}
    with server.api() as api:
        answer = api.post("/chat/completions", json=body)
    answer.raise_for_status()
    return answer.json()


@pytest.fixture(scope="module")
def second_model(live_server: LiveServer) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Number {i}?"},
                {"role": "assistant", "content": "中国的首都是北京。"},
            ]
        }
        for i in range(8)
    ]
    job_id = live_server.create_job(
        live_server.upload(rows),
        suffix="second",
        hyperparameters={"n_epochs": 5, "batch_size": 2, "learning_rate_multiplier": 10},
    )
    job = live_server.wait(job_id)
    assert job["status"] == "succeeded", job
    return job["fine_tuned_model"]


def test_the_worker_is_warm_when_a_job_succeeds(live_server: LiveServer) -> None:
    job_id = live_server.create_job(live_server.upload(chat_rows(4)), hyperparameters={"n_epochs": 1})
    job = live_server.wait(job_id)
    assert job["status"] == "succeeded"
    before = worker_state(live_server)
    assert before.adapters, "the proof of effect has left the adapter in the worker's memory"
    assert chat(live_server, job["fine_tuned_model"], "What is number 1?")["usage"]["completion_tokens"] > 0
    assert worker_state(live_server).adapters == before.adapters, "nothing had to be loaded for the first call"


def test_base_and_adapters_share_a_batch_and_answer_as_alone(
    live_server: LiveServer, tuned_model: str, second_model: str
) -> None:
    questions = [(model, f"What is number {i}?") for i in range(4) for model in ("tiny", tuned_model, second_model)]
    alone = [chat(live_server, *question)["choices"] for question in questions]
    with ThreadPoolExecutor(len(questions)) as threads:
        together = list(threads.map(lambda question: chat(live_server, *question)["choices"], questions))
    assert together == alone
    assert alone[0] != alone[2], "the base answers like an adapter"


def test_a_client_that_leaves_frees_its_slot(live_server: LiveServer) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 1500}
    headers = {"Authorization": f"Bearer {live_server.key}"}
    address = f"{live_server.address}/v1/chat/completions"
    seen_at_work = False
    for _ in range(50):  # the tiny model may have said all its words before anyone looks
        with (
            httpx.Client(trust_env=False, timeout=30) as client,
            client.stream("POST", address, json={**body, "temperature": 0}, headers=headers) as answer,
        ):
            next(answer.iter_lines())
            seen_at_work = worker_state(live_server).active == 1
        if seen_at_work:
            break
    assert seen_at_work
    deadline = time.monotonic() + 10
    while worker_state(live_server).active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker_state(live_server).active == 0


def test_a_killed_worker_costs_the_next_caller_only_time(live_server: LiveServer) -> None:
    old = json.loads((live_server.home / "workers" / "tiny" / "worker.json").read_bytes())["pid"]
    os.kill(old, signal.SIGKILL)
    assert chat(live_server, "tiny", "hi")["usage"]["completion_tokens"] > 0
    assert json.loads((live_server.home / "workers" / "tiny" / "worker.json").read_bytes())["pid"] != old


def test_the_model_keeps_its_proof(live_server: LiveServer, tuned_model: str) -> None:
    with live_server.api() as api:
        card = api.get(f"/models/{tuned_model}").json()
    assert card["parent"] == "tiny"
    with sqlite3.connect(f"file:{live_server.home / 'tunewright.db'}?mode=ro", uri=True) as database:
        row = database.execute(
            "SELECT proof, renderer_hash FROM tuned_models WHERE name = ?", (tuned_model,)
        ).fetchone()
    database.close()
    proof = json.loads(row[0])
    assert proof["tensors_applied"] == proof["tensors"] > 0 and proof["max_logit_shift"] > 0
    assert len(row[1]) == 64
