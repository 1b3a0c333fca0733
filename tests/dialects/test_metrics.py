"""What Prometheus reads after real SDKs have called a real server."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.live_server import LiveServer

TOKEN = "a token of the operator's choice"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path_factory.mktemp("metrics") / "home", TUNEWRIGHT_METRICS_TOKEN=TOKEN)
    server.run("models", "add", str(tiny_base), "--code", "tiny")
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


def test_only_the_operators_token_opens_them(server: LiveServer) -> None:
    with server.api("") as api:
        assert api.get("/metrics").json()["error"]["code"] == "metrics_closed"
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {TOKEN}x"}):
            assert httpx.get(f"{server.address}/metrics", headers=headers, trust_env=False).status_code == 401
        operator = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{server.address}/v1/models", headers=operator, trust_env=False).status_code == 401
