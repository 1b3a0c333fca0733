"""What the ledger says of answers that broke off (R-06, I8)."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.streams import Streams
from tests.live_server import LiveServer


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path / "home")
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def usage_rows(server: LiveServer) -> list[dict[str, Any]]:
    with server.api("/api/v1") as api:
        answer = api.get("/usage/requests")
    answer.raise_for_status()
    return answer.json()["data"]


def settled(server: LiveServer, rows: int) -> list[dict[str, Any]]:
    """All rows, newest first, once there are `rows` and none runs."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = usage_rows(server)
        if len(found) == rows and all(row["status"] != "running" for row in found):
            return found
        time.sleep(0.05)
    pytest.fail(f"{usage_rows(server)}")


STREAMS = 16


def test_a_killed_server_leaves_a_row_for_every_stream(server: LiveServer) -> None:
    streams = Streams(server, STREAMS)

    async def kill() -> None:
        server.kill()

    streams.run(kill)
    assert streams.ends == {"broken": STREAMS}
    server.start()
    rows = settled(server, STREAMS)
    assert {row["status"] for row in rows} == {"interrupted"}
    assert all(0 <= row["completion_tokens"] < 1900 and row["prompt_tokens"] > 0 for row in rows)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **fields}


def test_every_answer_leaves_a_row_however_it_ends(server: LiveServer) -> None:
    with server.api() as api:
        whole = api.post("/chat/completions", json=body(max_tokens=5)).json()
        assert api.post("/chat/completions", json=body(model="nowhere")).status_code == 404
        (row,) = settled(server, 1)
        assert (row["status"], row["dialect"], row["endpoint"]) == ("ok", "openai", "/chat/completions")
        for name in ("prompt_tokens", "completion_tokens"):
            assert row[name] == whole["usage"][name]
        assert 0 <= row["ttft_ms"] <= row["duration_ms"]
        with api.stream("POST", "/chat/completions", json=body(max_tokens=1900, stream=True)) as stream:
            lines = stream.iter_lines()
            seen = sum(next(lines).startswith("data: ") for _ in range(40))  # and then the client leaves
        left = settled(server, 2)[0]
        assert left["status"] == "interrupted"
        assert seen <= left["completion_tokens"] < 1900
    with httpx.Client(headers={"Authorization": f"Bearer {server.key}"}, timeout=60, trust_env=False) as client:
        url = f"{server.address}/api/paas/v4/chat/completions"
        frames = 0
        with (
            pytest.raises(httpx.TransportError),
            client.stream("POST", url, json=body(max_tokens=1900, stream=True)) as stream,
        ):
            for line in stream.iter_lines():
                frames += line.startswith("data: ") and bool(json.loads(line[6:])["choices"])
                if frames == 30:
                    server.kill()
    server.start()
    killed = settled(server, 3)[0]
    assert (killed["status"], killed["dialect"]) == ("interrupted", "zhipu")
    assert killed["completion_tokens"] < 1900
    with server.api("/api/v1") as api:
        sums = api.get("/usage", params={"group_by": "model,key"}).json()
        assert api.get("/usage", params={"group_by": "week"}).status_code == 400
    (group,) = sums["data"]
    assert (group["model"], group["requests"], group["interrupted"]) == ("tiny", 3, 2)
    assert sums["totals"]["completion_tokens"] == sum(row["completion_tokens"] for row in usage_rows(server))
