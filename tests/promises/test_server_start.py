"""The server starts light: no torch in its process, probes answer, the home is private."""

import json
import os
import stat
from pathlib import Path

import httpx
import pytest

from tests.live_server import LiveServer, chat_rows


def test_the_server_does_not_load_torch(live_server: LiveServer, tuned_model: str) -> None:
    """Even after a job and a chat, the server's process has mapped none of torch's libraries."""
    process = live_server._process
    assert process is not None
    with live_server.api() as api:
        body = {"model": tuned_model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        api.post("/chat/completions", json=body).raise_for_status()
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_probes_need_no_key(live_server: LiveServer) -> None:
    with httpx.Client(base_url=live_server.address, trust_env=False) as anyone:
        assert anyone.get("/healthz").status_code == 200
        assert anyone.get("/readyz").status_code == 200
        assert anyone.get("/v1/models").status_code == 401


def test_the_home_is_private(live_server: LiveServer) -> None:
    assert stat.S_IMODE(live_server.home.stat().st_mode) == 0o700
    for name in ("master.key", "first.key", "tunewright.db"):
        assert stat.S_IMODE((live_server.home / name).stat().st_mode) & 0o077 == 0, name


def test_a_second_server_on_one_home_refuses(live_server: LiveServer) -> None:
    second = LiveServer(live_server.home)
    second.log = live_server.home.parent / "second.log"
    try:
        second.start()
    except RuntimeError as error:
        assert str(error).startswith("exit code 78: tunewright: Another server runs on"), error
    else:
        second.stop()
        raise AssertionError("two servers share a home")


def test_a_created_key_stands_alone_on_stdout(live_server: LiveServer) -> None:
    key = live_server.run("keys", "create", "--name", "ci").rstrip("\n")
    identifier, _, secret = key.partition(".")
    assert len(identifier) == 32 and int(identifier, 16) >= 0 and len(secret) >= 32
    with httpx.Client(base_url=live_server.address, trust_env=False) as client:
        answer = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    assert key.partition(".")[2] not in live_server.log.read_text()


def test_the_log_is_json_lines_even_when_an_answer_breaks_off(live_server: LiveServer) -> None:
    """What goes wrong after the head of an answer is logged by the web server itself."""
    file_id = live_server.upload(chat_rows(100))
    blob = next(live_server.home.glob(f"blobs/files/*/{file_id}"))
    blob.chmod(0o600)
    os.truncate(blob, 100)
    with live_server.api() as api, pytest.raises(httpx.RemoteProtocolError):
        api.get(f"/files/{file_id}/content")
    lines = live_server.log.read_text().splitlines()
    assert lines
    entries = [json.loads(line) for line in lines]
    assert any(entry.get("logger") == "uvicorn.error" and entry["level"] == "error" for entry in entries)
    assert all({"event", "level", "ts"} <= entry.keys() for entry in entries)
    assert "number 1" not in "".join(lines) and live_server.key not in "".join(lines)
