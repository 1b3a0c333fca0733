"""Locks, full disks, repeated requests and kills, as clients of a real server see them."""

import asyncio
import json
import os
import random
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.live_server import LiveServer, chat_rows

FSIZE_LIMIT = 6 * 2**20


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path / "home")
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def rows_count(server: LiveServer, table: str) -> int:
    database = sqlite3.connect(f"file:{server.home / 'tunewright.db'}?mode=ro", uri=True)
    try:
        return database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
    finally:
        database.close()


# --- duplicates -----------------------------------------------------------------------------------------------


def test_r49_fifty_requests_with_one_key_make_one_job(live_server: LiveServer) -> None:
    file_id = live_server.upload(chat_rows(3))
    body = {"model": "tiny", "training_file": file_id, "hyperparameters": {"n_epochs": 1}}
    before = rows_count(live_server, "jobs")
    barrier = threading.Barrier(50)

    def create(_: int) -> httpx.Response:
        with live_server.api() as api:
            barrier.wait(30)
            return api.post("/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "one-key"})

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(create, range(50)))
    assert {answer.status_code for answer in answers} == {200}
    lasting = ("id", "created_at", "model", "training_file", "seed", "object")
    assert len({tuple(answer.json()[name] for name in lasting) for answer in answers}) == 1
    assert rows_count(live_server, "jobs") == before + 1
    with live_server.api() as api:
        other = api.post("/fine_tuning/jobs", json={**body, "suffix": "x"}, headers={"Idempotency-Key": "one-key"})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


# --- somebody else has the database ---------------------------------------------------------------------------

_LOCKER = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
database.execute("ROLLBACK")
"""


@contextmanager
def locked(server: LiveServer, seconds: float) -> Iterator[None]:
    command = [sys.executable, "-c", _LOCKER, str(server.home / "tunewright.db"), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as locker:
        assert locker.stdout is not None and locker.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            locker.kill()


_PROBE = """
import http.client, json, select, sys, time
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
took = []
while not took or not select.select([sys.stdin], [], [], 0.02)[0]:
    began = time.monotonic()
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200
    took.append(time.monotonic() - began)
print(json.dumps(took))
"""


@contextmanager
def probed(server: LiveServer) -> Iterator[list[float]]:
    """Seconds that `/healthz` took, again and again, once the block has ended: by a process of its own, so that they say
    nothing of what else this one does."""
    took: list[float] = []
    command = [sys.executable, "-c", _PROBE, server.host, str(server.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        try:
            yield took
        finally:
            said, _ = probe.communicate()
        took += sorted(json.loads(said))


@pytest.mark.parametrize(("seconds", "status"), [(3, 200), (20, 503)])
def test_r43_a_database_locked_by_another_process(server: LiveServer, seconds: float, status: int) -> None:
    file_id = server.upload(chat_rows(3))

    def create(n: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        with server.api() as api:
            answer = api.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id, "seed": n})
        return answer, time.monotonic() - began

    with ThreadPoolExecutor(10) as threads, locked(server, seconds), probed(server) as took:
        writes = [threads.submit(create, n) for n in range(10)]
        with server.api() as api:
            began = time.monotonic()
            assert api.get(f"/files/{file_id}").status_code == 200
            assert time.monotonic() - began < 1, "readers wait for no writer"
        for answer, took_s in (write.result() for write in writes):
            assert answer.status_code == status, answer.text
            assert took_s < 6.5
            if status == 503:
                assert answer.json()["error"]["code"] == "database_busy"
                assert int(answer.headers["retry-after"]) >= 1
    assert took[int(len(took) * 0.99)] < 0.25, took[-5:]
    with server.api() as api:
        assert len(api.get("/fine_tuning/jobs").json()["data"]) == (10 if status == 200 else 0)


# --- a disk that is full --------------------------------------------------------------------------------------


def test_r42_a_full_disk_refuses_the_upload_and_nothing_else(server: LiveServer) -> None:
    """Files of the server can't grow beyond a limit: a write fails half way, as on a full disk."""
    process = server._process
    assert process is not None
    kept = server.upload(chat_rows(3))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FSIZE_LIMIT, FSIZE_LIMIT))
    big = (json.dumps(chat_rows(1)[0]) + "\n").encode()
    big *= 2 * FSIZE_LIMIT // len(big)
    with server.api() as api:
        for _ in range(3):
            answer = api.post("/files", data={"purpose": "fine-tune"}, files={"file": ("big.jsonl", big)})
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage"), answer.text
        assert list((server.home / "tmp").iterdir()) == []
        assert [file["id"] for file in api.get("/files").json()["data"]] == [kept]
        assert api.get(f"/files/{kept}/content").status_code == 200
    assert server.upload(chat_rows(5)), "what fits is taken, without a restart"
    for line in server.log.read_text().splitlines():
        assert json.loads(line)["level"] != "error", line


# --- kill -9 around uploads and creations ----------------------------------------------------------------


def test_r01_kill_9_in_the_middle_of_uploads(server: LiveServer) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    line = (json.dumps(chat_rows(1)[0]) + "\n").encode()
    data = line * (4 * 2**20 // len(line))
    acknowledged: list[str] = []
    for _ in range(5):
        after_bytes = chance.randrange(len(data))
        head = (
            b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        )
        request = (
            f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
            f"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: {len(head) + len(data) + 9}\r\n\r\n"
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request + head + data[:after_bytes])
            time.sleep(chance.uniform(0, 0.05))
            server.kill()
        began = time.monotonic()
        server.start()
        assert time.monotonic() - began < 6
        assert list((server.home / "tmp").iterdir()) == []
        acknowledged.append(server.upload(chat_rows(2)))
        with server.api() as api:
            assert {file["id"] for file in api.get("/files").json()["data"]} == set(acknowledged)
    blobs = [path.name for path in (server.home / "blobs").rglob("*") if path.is_file()]
    assert sorted(blobs) == sorted(acknowledged)


def test_r03_kill_9_around_creations_makes_exactly_one_job_each(tmp_path: Path, tiny_base: Path) -> None:
    """The real SDK with its own retries, against a server that is killed and comes back on its port."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = LiveServer(tmp_path / "home", TUNEWRIGHT_MAX_RUNNING_JOBS="1")
    server.add_base(tiny_base)
    server.start()
    port, file_id = server.port, server.upload(chat_rows(1))
    made: list[str] = []

    def create(n: int) -> str:
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key=server.key, max_retries=8, timeout=30) as client:
            job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, seed=n, metadata={"n": str(n)})
            client.fine_tuning.jobs.cancel(job.id)
            return job.id

    try:
        with ThreadPoolExecutor(1) as threads:
            for n in range(6):
                creating = threads.submit(create, n)
                time.sleep(chance.uniform(0, 0.08))
                server.kill()
                server.start(port)
                made.append(creating.result(60))
        with server.api() as api:
            listed: list[dict[str, Any]] = api.get("/fine_tuning/jobs", params={"limit": 100}).json()["data"]
        assert sorted(job["id"] for job in listed) == sorted(made)
        assert sorted(job["metadata"]["n"] for job in listed) == [str(n) for n in range(6)]
    finally:
        server.stop()


# --- many event streams ----------------------------------------------------------------------------------------


def test_r29_two_hundred_event_streams_lose_nothing(server: LiveServer) -> None:
    job_id = server.create_job(server.upload(chat_rows(12)), hyperparameters={"n_epochs": 25, "batch_size": 1})

    async def follow(client: httpx.AsyncClient) -> list[str]:
        seen: list[str] = []
        async with client.stream("GET", f"/api/v1/jobs/{job_id}/events/stream") as answer:
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    seen.append(line[4:])
                elif line == "event: end":
                    return seen
        raise AssertionError("the stream ended without its last frame")

    async def all_of_them() -> list[list[str]]:
        headers = {"Authorization": f"Bearer {server.key}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.address, headers=headers, timeout=120, trust_env=False, limits=limits
        ) as client:
            return await asyncio.gather(*(follow(client) for _ in range(200)))

    with probed(server) as probes:
        seen = asyncio.run(all_of_them())
    assert server.job(job_id)["status"] == "succeeded"
    assert len(seen[0]) == len(set(seen[0])) > 300
    assert all(each == seen[0] for each in seen)
    assert probes[int(len(probes) * 0.99)] < 1.0, probes[-5:]
