"""A real server: killed in the middle of parts and of a completion, and its memory while a large file comes in parts."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live_server import LiveServer, chat_rows

PART = 4 * 2**20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path / "home")
    server.start()
    yield server
    server.stop()


def rows(size: int) -> bytes:
    """A chat file of about `size` bytes."""
    block = "".join(json.dumps(row) + "\n" for row in chat_rows(500)).encode()
    return block * max(1, size // len(block))


def create(server: LiveServer, size: int) -> str:
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": size, "mime_type": "application/jsonl"}
    with server.api() as api:
        answer = api.post("/uploads", json=body)
    answer.raise_for_status()
    return answer.json()["id"]


def send(api: httpx.Client, upload_id: str, data: bytes) -> str:
    headers = {"X-Part-SHA256": hashlib.sha256(data).hexdigest()}
    answer = api.post(f"/uploads/{upload_id}/parts", files={"data": ("upload", data)}, headers=headers)
    answer.raise_for_status()
    return answer.json()["id"]


def parts(api: httpx.Client, upload_id: str) -> list[dict[str, Any]]:
    return api.get(f"/uploads/{upload_id}/parts").raise_for_status().json()["data"]


def on_disk(server: LiveServer, *folders: str) -> list[str]:
    return sorted(
        path.relative_to(server.home).as_posix()
        for folder in folders
        for path in (server.home / folder).rglob("*")
        if path.is_file()
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen")
        time.sleep(0.001)


def test_kills_between_and_inside_parts_cost_one_part_each(server: LiveServer) -> None:
    content = rows(8 * PART)
    chance = random.Random(7)
    upload_id = create(server, len(content))
    pieces = {
        hashlib.sha256(content[at : at + PART]).hexdigest(): content[at : at + PART]
        for at in range(0, len(content), PART)
    }
    acknowledged: set[str] = set()
    for _ in range(5):
        stop = threading.Timer(chance.uniform(0.01, 0.3), server.kill)
        with server.api() as api:
            stop.start()
            try:
                for sha256, piece in pieces.items():
                    if sha256 not in {part["sha256"] for part in parts(api, upload_id)}:
                        acknowledged.add(send(api, upload_id, piece))
            except httpx.TransportError:
                pass
        stop.join()
        server.start()
        assert on_disk(server, "tmp") == []
        with server.api() as api:
            there = parts(api, upload_id)
        assert acknowledged <= {part["id"] for part in there}, "what was answered for is there"
        assert len(on_disk(server, "uploads")) == len(there), "and nothing else"
    with server.api() as api:
        known = {part["sha256"]: part["id"] for part in parts(api, upload_id)}
        ids = [known.get(sha256) or send(api, upload_id, piece) for sha256, piece in pieces.items()]
        done = api.post(f"/uploads/{upload_id}/complete", json={"part_ids": ids}).raise_for_status().json()
        assert done["file"]["bytes"] == len(content)
        digest = hashlib.sha256()
        with api.stream("GET", f"/files/{done['file']['id']}/content") as answer:
            for chunk in answer.iter_bytes():
                digest.update(chunk)
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()
    assert on_disk(server, "uploads", "tmp") == []
    assert all(done["file"]["id"] in path for path in on_disk(server, "blobs"))


def test_kills_in_a_completion_leave_no_half_file(server: LiveServer) -> None:
    content = rows(6 * PART)
    upload_id = create(server, len(content))
    with server.api() as api:
        ids = [send(api, upload_id, content[at : at + PART]) for at in range(0, len(content), PART)]

    def complete() -> httpx.Response:
        with server.api() as api:
            return api.post(f"/uploads/{upload_id}/complete", json={"part_ids": ids})

    def failing() -> None:
        with pytest.raises(httpx.TransportError):
            complete()

    for happened in (
        lambda: bool(on_disk(server, "tmp")),  # the parts are being joined
        lambda: sum(path.stat().st_size for path in (server.home / "tmp").glob("upload-*.part")) >= len(content),
    ):
        client = threading.Thread(target=failing)
        client.start()
        wait_for(happened)
        server.kill()
        client.join()
        server.start()
        assert on_disk(server, "tmp", "blobs") == []
        with server.api() as api:
            assert api.get("/files").json()["data"] == []
            assert api.get(f"/uploads/{upload_id}").json()["received_bytes"] == len(content)
    done = complete().json()
    assert complete().json() == done
    with server.api() as api:
        assert [file["id"] for file in api.get("/files").json()["data"]] == [done["file"]["id"]]
    assert on_disk(server, "uploads", "tmp") == []


def test_a_large_file_in_parts_takes_little_memory(server: LiveServer) -> None:
    """200 MiB in parts of 16 MiB, two at a time: the server's own memory stays where it was."""
    assert server._process is not None
    process = psutil.Process(server._process.pid)
    server.upload(chat_rows())  # what the first upload loads is not growth
    long = {"role": "assistant", "content": "Well, " * 10_000}  # long rows: their check is not what this test is about
    piece = (json.dumps({"messages": [{"role": "user", "content": "Tell me."}, long]}) + "\n").encode() * 270
    count = 200 * 2**20 // len(piece) + 1
    upload_id = create(server, count * len(piece))
    before = process.memory_info().rss
    most = before
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.02):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    made: dict[int, str] = {}

    def sender(numbers: range) -> None:
        with server.api() as api:
            for number in numbers:
                made[number] = send(api, upload_id, piece)

    try:
        senders = [threading.Thread(target=sender, args=(range(first, count, 2),)) for first in (0, 1)]
        for each in senders:
            each.start()
        for each in senders:
            each.join()
        arrived = most
        with server.api() as api:
            answer = api.post(
                f"/uploads/{upload_id}/complete",
                json={"part_ids": [made[number] for number in range(count)]},
                timeout=250,
            )
        answer.raise_for_status()
    finally:
        stop.set()
        watcher.join()
    assert answer.json()["file"]["bytes"] == count * len(piece)
    print(f"growth: {(arrived - before) / 2**20:.0f} MiB with the parts, {(most - before) / 2**20:.0f} MiB in all")
    assert arrived - before <= 64 * 2**20
    assert most - before <= 64 * 2**20, "the check runs in a process of its own"
