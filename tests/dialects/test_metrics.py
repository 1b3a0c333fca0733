"""What Prometheus reads after real SDKs have called a real server."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.live_server import LiveServer, chat_rows

TOKEN = "a token of the operator's choice"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path_factory.mktemp("metrics") / "home", TUNEWRIGHT_METRICS_TOKEN=TOKEN)
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def read(server: LiveServer) -> dict[str, float]:
    """Name and labels of each sample -> value."""
    with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:
        answer = client.get(f"{server.address}/metrics")
    assert answer.status_code == 200, answer.text
    return {
        " ".join(
            (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()) if value))
        ): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_calls_are_counted(server: LiveServer) -> None:
    with OpenAI(api_key=server.key, base_url=f"{server.address}/v1") as client:
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}
        whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
        chunks = list(
            client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
        )
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ask, "model": "nowhere"})  # type: ignore[call-overload]
    streamed = chunks[-1].usage
    assert whole.usage is not None and streamed is not None
    found = read(server)
    assert found["tunewright_requests_total endpoint=/chat/completions model=tiny outcome=ok"] == 2
    assert found["tunewright_requests_refused_total code=model_not_found"] == 1
    written = whole.usage.completion_tokens + streamed.completion_tokens
    assert found["tunewright_completion_tokens_total model=tiny"] == written
    assert found["tunewright_prompt_tokens_total model=tiny"] == whole.usage.prompt_tokens + streamed.prompt_tokens
    assert found["tunewright_time_to_first_token_seconds_count model=tiny"] == 2
    assert 0 < found["tunewright_inter_token_seconds_count model=tiny"] <= written - 2
    assert found["tunewright_requests_running model=tiny"] == 0
    assert found["tunewright_engine_slots model=tiny worker=pool-tiny"] == 16
    assert found["tunewright_usage_rows_lost_total"] == 0
    deadline = time.monotonic() + 20
    with server.api("/api/v1") as api:
        while (totals := api.get("/usage").json()["totals"])["completion_tokens"] != written:
            assert time.monotonic() < deadline, "the ledger says what the answers said, a moment later"
            time.sleep(0.1)
    assert (totals["requests"], totals["errors"], totals["interrupted"]) == (2, 0, 0)


def test_the_server_tells_of_itself(server: LiveServer) -> None:
    before = read(server)
    with server.api("") as api:
        assert api.get("/v1/files").status_code == 200
        assert api.get("/v1/files/file-of-nobody").status_code == 404
        assert api.get("/v1/a-path-of-my-own").status_code == 404
        assert api.request("PROPFIND", "/v1/files").status_code == 405
    assert httpx.get(f"{server.address}/v1/files", trust_env=False).status_code == 401
    job = server.wait(server.create_job(server.upload(chat_rows(4)), hyperparameters={"n_epochs": 1}))
    found = read(server)

    def grown(sample: str) -> float:
        return found.get(sample, 0) - before.get(sample, 0)

    assert grown("tunewright_http_requests_total method=GET route=/v1/files status=200") == 1
    assert grown("tunewright_http_requests_total method=GET route=/v1/files/{file_id} status=404") == 1
    assert grown("tunewright_http_requests_total method=GET status=404") == 1
    assert grown("tunewright_http_requests_total method=GET status=401") == 1
    assert grown("tunewright_http_requests_total method=other route=/v1/files status=405") == 1
    assert grown("tunewright_http_request_seconds_count method=GET route=/v1/files") == 1
    assert grown("tunewright_http_request_seconds_sum method=GET route=/v1/files") > 0
    assert not any(word in sample for sample in found for word in ("nobody", "my-own", "PROPFIND"))
    assert grown(f"tunewright_jobs_ended_day state={job['status']}") == 1
    assert [found[f"tunewright_jobs state={state}"] for state in ("queued", "running")] == [0, 0]
    assert found["tunewright_jobs_oldest_wait_seconds"] == 0
    assert found["tunewright_database_up"] == 1 and 0 < found["tunewright_database_probe_seconds"] < 60
    assert grown("tunewright_event_loop_lag_seconds_count") > 0
    assert found["tunewright_home_free_bytes"] > 0
    assert found["process_resident_memory_bytes"] > 2**20 and found["process_open_fds"] > 3


def test_only_the_operators_token_opens_them(server: LiveServer) -> None:
    with server.api("") as api:
        assert api.get("/metrics").json()["error"]["code"] == "metrics_closed"
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {TOKEN}x"}):
            assert httpx.get(f"{server.address}/metrics", headers=headers, trust_env=False).status_code == 401
        operator = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{server.address}/v1/models", headers=operator, trust_env=False).status_code == 401
