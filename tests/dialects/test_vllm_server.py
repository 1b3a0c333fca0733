"""The unmodified `openai` package against a real server whose engine is vLLM itself; skipped where there is none."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from tests.engines import real_vllm
from tests.live_server import LiveServer, chat_rows
from tests.promises.test_pool import worker_state
from tests.tiny_models import tiny_llama

QUESTION: list[Any] = [{"role": "user", "content": "What is number 1?"}]
LIMIT_S = 900


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    python = real_vllm.needs_vllm()
    folder = tmp_path_factory.mktemp("vllm")
    settings = {
        "TUNEWRIGHT_ENGINE": "vllm",
        "TUNEWRIGHT_VLLM_PYTHON": python,
        "TUNEWRIGHT_FIRST_TOKEN_LIMIT_S": str(LIMIT_S),  # what is asked first waits for the worker
    }
    server = LiveServer(folder / "home", **settings, **real_vllm.mended(folder / "mended"))
    server.add_base(tiny_llama(folder / "tiny", hidden=128))  # heads of 32: vLLM's attention knows no smaller ones
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=server.key, base_url=f"{server.address}/v1", timeout=LIMIT_S, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tuned(server: LiveServer) -> str:
    file_id = server.upload(chat_rows())
    job_id = server.create_job(file_id, hyperparameters={"n_epochs": 8, "batch_size": 4}, seed=1)
    job = server.wait(job_id, LIMIT_S)
    assert job["status"] == "succeeded", job
    return job["fine_tuned_model"]


def processes_of_vllm() -> list[psutil.Process]:
    """Those below this test's server."""
    return [one for one in psutil.Process().children(recursive=True) if one.name().startswith("VLLM")]


@pytest.mark.timeout(LIMIT_S)
def test_base_and_adapter_answer(client: OpenAI, tuned: str) -> None:
    """Whole and streamed alike, with what both say of their tokens, and each model by itself in one batch."""
    create: Any = client.chat.completions.create
    asked = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    texts = {}
    for model in ("tiny", tuned):
        whole = create(model=model, **asked)
        scored = whole.choices[0].logprobs.content
        assert whole.usage.completion_tokens == len(scored) and all(len(token.top_logprobs) == 3 for token in scored)
        assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in scored)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in create(model=model, stream=True, **asked))
        assert streamed == whole.choices[0].message.content
        texts[model] = streamed
    assert texts["tiny"] != texts[tuned] and len(texts["tiny"]) > 2
    streams = [(model, create(model=model, stream=True, **asked)) for model in ["tiny", tuned] * 3]  # side by side
    for model, stream in streams:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == texts[model]


@pytest.mark.timeout(LIMIT_S)
def test_stops_choices_seeds_and_biases(client: OpenAI) -> None:
    create: Any = client.chat.completions.create
    text = create(model="tiny", messages=QUESTION, max_tokens=20, temperature=0).choices[0].message.content
    cut = create(model="tiny", messages=QUESTION, max_tokens=20, temperature=0, stop=[text[3:6]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(text[3:6])], "stop")
    several, again = (
        create(model="tiny", messages=QUESTION, max_tokens=8, temperature=1, seed=5, n=3) for _ in range(2)
    )
    found = [choice.message.content for choice in several.choices]
    assert found == [choice.message.content for choice in again.choices] and len(set(found)) == 3
    biased = create(
        model="tiny", messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, logit_bias={"100": 100}
    )
    assert len({token.token for token in biased.choices[0].logprobs.content}) == 1


@pytest.mark.timeout(LIMIT_S)
def test_tools_are_read_and_schemas_refused(client: OpenAI) -> None:
    create: Any = client.chat.completions.create
    parameters = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}
    tools = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    answer = create(model="tiny", messages=QUESTION, tools=tools, max_tokens=8, temperature=0)
    assert answer.usage.prompt_tokens > create(model="tiny", messages=QUESTION, max_tokens=1).usage.prompt_tokens
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": parameters, "strict": True}}
    for more in ({"response_format": schema}, {"tools": tools, "tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError) as refused:
            create(model="tiny", messages=QUESTION, **more)
        assert refused.value.code == "invalid_schema"


@pytest.mark.timeout(LIMIT_S)
def test_who_leaves_frees_the_engine(client: OpenAI, server: LiveServer) -> None:
    create: Any = client.chat.completions.create
    stream = create(model="tiny", messages=QUESTION, stream=True, max_tokens=1500, logit_bias={"2": -100, "0": -100})
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + 20
    while worker_state(server).active:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.mark.timeout(LIMIT_S)
def test_a_killed_engine_comes_back_and_a_stop_leaves_nothing(client: OpenAI, server: LiveServer) -> None:
    create: Any = client.chat.completions.create
    text = create(model="tiny", messages=QUESTION, max_tokens=8, temperature=0).choices[0].message.content
    before = processes_of_vllm()
    assert len(before) >= 1
    os.kill(before[0].pid, signal.SIGKILL)
    psutil.wait_procs(before, 30)
    deadline_s = time.monotonic() + 300
    while True:
        try:
            again = create(model="tiny", messages=QUESTION, max_tokens=8, temperature=0)
            break
        except openai.InternalServerError:
            assert time.monotonic() < deadline_s
            time.sleep(1)
    assert again.choices[0].message.content == text
    left = processes_of_vllm()
    assert left and not {one.pid for one in before} & {one.pid for one in left}
    server.stop()
    assert not psutil.wait_procs(left, 30)[1]
