"""What the real SDKs send, recorded once and replayed byte for byte (ids and the key aside)."""

import http.client
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.live_server import LiveServer, chat_rows

RECORDED = [
    json.loads(line) for line in (Path(__file__).parent / "recorded_requests.jsonl").read_text("utf-8").splitlines()
]
_FILE_ID = re.compile(r"file-\d{17}-abcde|file-v|file-x")
_JOB_ID = re.compile(r"ftjob-\d{17}-abcde")
_EVENT_ID = re.compile(r"ftevent-\d(?!\d)")
_BATCH_ID = re.compile(r"batch_\d")
_MODEL_NAME = "glm-4-9b:1000001:demo_test:ab12cd34"

# (method, path pattern) -> expected status on the Zhipu prefix, on the OpenAI prefix. First match wins.
EXPECTED: list[tuple[str, str, int, int]] = [
    ("POST", r"/files$", 200, 200),
    ("GET", r"/files(\?|$)", 200, 200),
    ("GET", r"/files/[^/]+(/content)?$", 200, 200),
    ("DELETE", r"/files/[^/]+$", 200, 200),
    ("POST", r"/fine_tuning/jobs$", 200, 200),
    ("GET", r"/fine_tuning/jobs", 200, 200),
    ("POST", r"/fine_tuning/jobs/[^/]+/(cancel|pause|resume)$", 200, 200),
    ("DELETE", r"/fine_tuning/jobs/[^/]+$", 200, 200),
    ("DELETE", r"/fine_tuning/fine_tuned_models/org/", 404, 404),
    ("DELETE", r"/fine_tuning/fine_tuned_models/", 200, 200),
    ("GET", r"/models$", 200, 200),
    ("GET", r"/models/org", 404, 404),
    ("GET", r"/models/", 200, 200),
    ("DELETE", r"/models/", 200, 200),
    ("POST", r"/v1/chat/completions$|/v4/chat/completions$", 200, 200),
    ("POST", r"/batches$", 200, 200),
    ("GET", r"/batches", 200, 200),
    ("POST", r"/batches/[^/]+/cancel$", 200, 200),
    ("POST", r"/async/chat/completions$", 200, 200),
    ("GET", r"/async-result/(done|proc|fail)", 404, 404),  # tasks of the recording's own server
    ("POST", r"/embeddings$", 400, 404),  # no such model here
    # Capabilities of later releases: refused as unknown routes, in the dialect's shape.
    ("POST", r"/(async/|images/|moderations|videos/)", 404, 404),
    ("GET", r"/async-result/", 404, 404),
]
# Calls whose content this release refuses, with the status of both prefixes.
REFUSED = {
    "fine_tuning.jobs.create(extra_body)": 400,  # method dpo
    "fine_tuning.jobs.create(method dpo)": 400,
    "chat image data-uri (client strips prefix)": 400,  # a text model
    "chat image data-uri (kept)": 400,
    "plain key without dot, /v1 prefix": 401,
    "files.create(file=bytes)": 400,  # {"a": 1} is no image row
}


def expected_status(request: dict[str, Any]) -> int:
    if request["call"] in REFUSED:
        return REFUSED[request["call"]]
    for method, path, zhipu, openai in EXPECTED:
        if request["method"] == method and re.search(path, request["target"]):
            return zhipu if request["target"].startswith("/api/paas") else openai
    raise LookupError(request["target"])


@pytest.fixture(scope="module")
def things(live_server: LiveServer, tuned_model: str) -> dict[str, str]:
    """Ids to put where the recording has those of its own server."""
    file_id = live_server.upload(chat_rows())
    other_id = live_server.upload(chat_rows(5))
    job_id = live_server.create_job(file_id, suffix="replayed")
    with live_server.api() as api:
        event_id = api.get(f"/fine_tuning/jobs/{job_id}/events").json()["data"][0]["id"]
    return {"file": file_id, "validation": other_id, "job": job_id, "model": tuned_model, "event": event_id}


@pytest.mark.parametrize("request_", RECORDED, ids=[f"{i}-{r['sdk']}-{r['call']}" for i, r in enumerate(RECORDED)])
def test_a_recorded_request_gets_its_answer(
    request_: dict[str, Any], live_server: LiveServer, things: dict[str, str]
) -> None:
    status, headers, body = replay(request_, live_server, fresh(request_, live_server, things))
    assert status == expected_status(request_), body[:500]
    assert "location" not in headers
    if "/content" in request_["target"] and status == 200:
        assert headers["content-type"].startswith("application/octet-stream")
        return
    if headers["content-type"].startswith("text/event-stream"):
        assert body.endswith(b"data: [DONE]\n\n")
        return
    answer = json.loads(body)
    assert "detail" not in answer
    assert ("error" in answer and bool(answer["error"])) == (status >= 400)
    if "data" in answer and answer.get("object") == "list" and "/models" not in request_["target"]:
        assert isinstance(answer["has_more"], bool)


def batch_rows() -> list[dict[str, Any]]:
    """Enough work that it can still be cancelled."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "temperature": 0}
    row = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return [{"custom_id": str(number), **row} for number in range(400)]


def fresh(request: dict[str, Any], server: LiveServer, things: dict[str, str]) -> dict[str, str]:
    """For a destructive request, something of its own to destroy."""
    things = dict(things)
    method, target = request["method"], request["target"]
    if "/batches" in target:
        things["file"] = server.upload(batch_rows(), purpose="batch")
        things["batch"] = server.create_batch(things["file"])
    if method == "DELETE" and "/files/" in target:
        things["file"] = server.upload(chat_rows(3))
    if "/fine_tuning/jobs/" in target and (method in ("POST", "DELETE")):
        things["job"] = server.create_job(things["file"], suffix="replayed")
        if method == "DELETE":
            with server.api() as api:
                api.post(f"/fine_tuning/jobs/{things['job']}/cancel").raise_for_status()
            server.wait(things["job"])
        while server.job(things["job"])["status"] == "validating_files":
            time.sleep(0.05)
        if target.endswith("/resume"):
            with server.api() as api:
                api.post(f"/fine_tuning/jobs/{things['job']}/pause").raise_for_status()
    if method == "DELETE" and "demo_test" in target:
        job = server.wait(server.create_job(things["file"], hyperparameters={"n_epochs": 1}))
        things["model"] = job["fine_tuned_model"]
    return things


def replay(request: dict[str, Any], server: LiveServer, things: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Send one recorded request; afterwards no job that it made is left running."""

    def put_ids(text: str) -> str:
        text = text.replace("file-v", things["validation"])
        text = _FILE_ID.sub(things["file"], text)
        text = _EVENT_ID.sub(things["event"], text)
        text = _BATCH_ID.sub(things.get("batch", ""), text)
        return _JOB_ID.sub(things["job"], text).replace(_MODEL_NAME, things["model"])

    headers = {name: value for name, value in request["headers"] if name not in ("Content-Length", "Connection")}
    key = "plainkey" if "plain key without dot" in request["call"] else server.key
    headers["Authorization"] = f"Bearer {key}"
    body = b""
    if "parts" in request:
        boundary = headers["Content-Type"].partition("boundary=")[2]
        for part in request["parts"]:
            lines = [f"--{boundary}", *part["headers"], "", part["content"], ""]
            body += "\r\n".join(lines).encode()
        body += f"--{boundary}--\r\n".encode()
    elif "body" in request:
        body = put_ids(request["body"]).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request(request["method"], put_ids(request["target"]), body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status == 200 and request["method"] == "POST" and request["target"].endswith("/fine_tuning/jobs"):
        with server.api() as api:
            api.post(f"/fine_tuning/jobs/{json.loads(content)['id']}/cancel").raise_for_status()
    if "batch" in things:
        with server.api() as api:
            for batch_id in {things["batch"], json.loads(content).get("id", things["batch"])}:
                api.post(f"/batches/{batch_id}/cancel").raise_for_status()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content
