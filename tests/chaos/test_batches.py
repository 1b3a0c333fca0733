"""kill -9 of the server while batches and late answers are worked off."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_server import LiveServer

KILLS = 3
REQUESTS = 120


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path / "home", TUNEWRIGHT_ENGINE_SLOTS="4")
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def body(number: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"number {number}"}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 40, **fields}


def batch_of(server: LiveServer, **fields: Any) -> str:
    url = {"method": "POST", "url": "/v1/chat/completions"}
    rows = [{"custom_id": f"r{n}", **url, "body": body(n, **fields)} for n in range(REQUESTS)]
    rows[7]["body"]["temperature"] = 9
    return server.create_batch(server.upload(rows, purpose="batch"))


def wait(server: LiveServer, path: str, prefix: str = "/v1", *, seconds: float = 120, **wanted: Any) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    with server.api(prefix) as api:
        while True:
            found = api.get(path).json()
            if all(found[name] in values for name, values in wanted.items()):
                return found
            assert time.monotonic() < deadline, f"{found}\n{server.log.read_text()[-3000:]}"
            time.sleep(0.05)


def test_kills_lose_no_answer_and_repeat_none(server: LiveServer) -> None:
    rng = random.Random(5)
    batch_id = batch_of(server)
    with server.api("/api/paas/v4") as api:
        tasks = [api.post("/async/chat/completions", json=body(n)).json()["id"] for n in range(8)]
    journal = server.home / "batches" / batch_id / "journal.jsonl"
    lengths = []
    for number in range(KILLS):
        before = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 30
        while (not journal.exists() or journal.stat().st_size <= before) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        if number == 1:
            assert server.stop() == 0, "a polite end is one too"
        else:
            server.kill()
        lengths.append(journal.stat().st_size)
        with journal.open("ab") as stream:  # a write that was cut short
            stream.write(b'{"line": 5, "ok": true, "record": {"custom_id": "r4"')
        server.start()
    batch = wait(server, f"/batches/{batch_id}", status=("completed",))
    assert 0 < lengths[0] < lengths[-1], "the kills came while it ran, and it went on"
    assert batch["request_counts"] == {"total": REQUESTS, "completed": REQUESTS - 1, "failed": 1}
    with server.api() as api:
        answers = api.get(f"/files/{batch['output_file_id']}/content").text.splitlines()
        errors = api.get(f"/files/{batch['error_file_id']}/content").text.splitlines()
        direct = api.post("/chat/completions", json=body(11)).json()
    assert [json.loads(line)["custom_id"] for line in answers] == [f"r{n}" for n in range(REQUESTS) if n != 7]
    assert [json.loads(line)["custom_id"] for line in errors] == ["r7"]
    eleventh = json.loads(answers[10])["response"]["body"]
    assert eleventh["choices"][0]["message"] == direct["choices"][0]["message"]
    for task_id in tasks:
        done = wait(server, f"/async-result/{task_id}", "/api/paas/v4", task_status=("SUCCESS",))
        assert done["choices"][0]["message"]["role"] == "assistant"
    assert not list((server.home / "batches").iterdir())


def test_requests_that_somebody_waits_for_are_served_meanwhile(server: LiveServer) -> None:
    """Far more background work than slots; each of twelve requests is answered long before that is done."""
    batch_id = batch_of(server, max_tokens=600)
    wait(server, f"/batches/{batch_id}", status=("in_progress",))
    with server.api() as api:
        for number in range(12):
            answer = api.post("/chat/completions", json=body(number, max_tokens=3))
            assert answer.status_code == 200, answer.text
        assert api.get(f"/batches/{batch_id}").json()["status"] == "in_progress"
        api.post(f"/batches/{batch_id}/cancel").raise_for_status()
    wait(server, f"/batches/{batch_id}", status=("cancelled",))
