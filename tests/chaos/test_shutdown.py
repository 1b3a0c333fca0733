"""The server's end, asked for or not, while many streams are open: nobody takes half an answer for a whole one."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.chaos.streams import Streams
from tests.live_server import TUNEWRIGHT, LiveServer, chat_rows
from tests.promises.test_pool import worker_process, worker_state
from tunewright.runners.local import LocalRunner

GRACE_S = 2
DELAY_S = 2
"""Of the server with a fake engine."""


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path) -> Iterator[LiveServer]:
    # A trainer that still imports its libraries does not save at once: it is given as long as the streams, not ten seconds.
    graces = {"TUNEWRIGHT_DRAIN_GRACE_S": str(GRACE_S), "TUNEWRIGHT_CANCEL_GRACE_S": str(GRACE_S)}
    server = LiveServer(tmp_path / "home", TUNEWRIGHT_ENGINE_SLOTS="64", **graces)
    server.add_base(tiny_base)
    server.start()
    yield server
    server.stop()


def warm(server: LiveServer) -> None:
    with server.api() as api:
        api.post(
            "/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        ).raise_for_status()


async def until_draining(client: httpx.AsyncClient) -> None:
    """Return as soon as the server says that it is not ready."""
    while (answer := await client.get("/readyz")).status_code == 200:
        await asyncio.sleep(0.01)
    assert (answer.status_code, answer.json()["failed"]) == (503, ["draining"])


def test_r05_sigterm_ends_streams_with_an_answer_or_an_error(server: LiveServer) -> None:
    warm(server)
    job_id = server.create_job(server.upload(chat_rows()), hyperparameters={"n_epochs": 50, "batch_size": 1})
    events: list[bytes] = []
    streams = Streams(server, 50)
    process = server._process
    assert process is not None
    took: list[float] = []

    def follow() -> None:
        with server.api("/api/v1") as api, api.stream("GET", f"/jobs/{job_id}/events/stream") as answer:
            events.extend(answer.iter_raw())

    async def stop() -> None:
        following = asyncio.create_task(asyncio.to_thread(follow))
        while not events:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await following
        took.append(time.monotonic() - began)

    streams.run(stop)
    assert process.wait(GRACE_S + 5) == 0
    assert streams.ends["broken"] == streams.ends["cut"] == 0, streams.ends
    assert streams.ends["error"] > 0 and streams.codes == {"server_stopping": streams.ends["error"]}
    assert b"".join(events).endswith(b"\n\n") and b"event: end" not in b"".join(events)
    assert took[0] < 2, "event streams end at once: their clients come again"


def test_r05_short_streams_end_as_usual_and_readiness_fails_first(tmp_path: Path, tiny_base: Path) -> None:
    server = LiveServer(tmp_path / "home", TUNEWRIGHT_DRAIN_DELAY_S="3")
    server.add_base(tiny_base)
    server.start()
    warm(server)
    streams = Streams(server, 5, max_tokens=300)
    process = server._process
    assert process is not None

    async def stop() -> None:
        process.send_signal(signal.SIGTERM)
        async with httpx.AsyncClient(base_url=server.address, trust_env=False) as client:
            await until_draining(client)
            headers = {"Authorization": f"Bearer {server.key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200

    streams.run(stop)
    assert process.wait(40) == 0
    server.stop()
    assert streams.ends == {"done": 5}


@pytest.fixture
def fake(tmp_path: Path, tiny_base: Path) -> Iterator[LiveServer]:
    """A server whose engine says a word every 10 ms."""
    server = LiveServer(
        tmp_path / "home",
        module="tests.serve_fake",
        TUNEWRIGHT_ENGINE_SLOTS="128",
        TUNEWRIGHT_MAX_STREAMS_PER_KEY="128",
        TUNEWRIGHT_DRAIN_DELAY_S=str(DELAY_S),
        TUNEWRIGHT_DRAIN_GRACE_S="3",
    )
    server.add_base(tiny_base)
    (server.home / "workers" / "fake.json").write_text('{"step_s": 0.01}')
    yield server
    server.stop()


def test_r05_drain(fake: LiveServer) -> None:
    """50 streams: those shorter than the grace end as usual, longer ones with an error. Newcomers are served, then refused."""
    fake.start()
    warm(fake)
    long, short = Streams(fake, 25), Streams(fake, 25, max_tokens=150)
    process = fake._process
    assert process is not None
    began: list[float] = []
    headers = {"Authorization": f"Bearer {fake.key}", "Accept-Language": "zh"}
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}

    async def stop() -> None:
        async with httpx.AsyncClient(base_url=fake.address, trust_env=False, headers=headers, timeout=30) as client:
            whole = asyncio.ensure_future(client.post("/v1/chat/completions", json={**ask, "max_tokens": 1900}))
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            began.append(time.monotonic())
            await until_draining(client)
            assert (await client.post("/v1/chat/completions", json=ask)).status_code == 200
            await asyncio.sleep(began[0] + DELAY_S + 0.5 - time.monotonic())
            for prefix, code in (("/v1", "server_stopping"), ("/api/paas/v4", "1305")):
                refused = await client.post(f"{prefix}/chat/completions", json=ask)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)
                assert 3 <= int(refused.headers["retry-after"]) <= 6 and refused.headers["connection"] == "close"
            assert (await client.get("/healthz")).status_code == 200
            late = await whole
            assert (late.status_code, late.json()["error"]["code"]) == (503, "server_stopping")

    long.run(lambda: short._run(stop))
    assert process.wait(10) == 0
    assert time.monotonic() - began[0] < DELAY_S + 3 + 5
    assert short.ends == {"done": 25}
    assert long.ends == {"error": 25} and long.codes == {"server_stopping": 25}


async def test_r07_a_restart_under_a_service_manager_loses_nothing(fake: LiveServer) -> None:
    """The socket outlives the server, as with a systemd socket unit: who comes between two servers waits in its queue."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    fake.start(listener=listener)
    warm(fake)
    calls: list[asyncio.Task[str]] = []
    async with openai.AsyncOpenAI(api_key=fake.key, base_url=f"{fake.address}/v1", timeout=30) as client:

        async def call(stream: bool) -> str:
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
            if not stream:
                return (await client.chat.completions.create(**ask)).choices[0].finish_reason
            chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
            return chunks[-1].choices[0].finish_reason or "cut"

        restarted = asyncio.ensure_future(asyncio.to_thread(lambda: (fake.stop(), fake.start(listener=listener))))
        while not restarted.done() or len(calls) < 80:
            calls.append(asyncio.ensure_future(call(stream=len(calls) % 4 == 0)))
            await asyncio.sleep(0.05)
        assert set(await asyncio.gather(*calls)) == {"length"}
        assert (await restarted)[0] == 0
    listener.close()


def test_r05_a_second_signal_is_quick(tmp_path: Path, tiny_base: Path) -> None:
    server = LiveServer(tmp_path / "home", TUNEWRIGHT_DRAIN_GRACE_S="60")
    server.add_base(tiny_base)
    server.start()
    warm(server)
    streams = Streams(server, 10)
    process = server._process
    assert process is not None

    async def stop_twice() -> None:
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 40)
        assert time.monotonic() - began < 2

    streams.run(stop_twice)
    assert set(streams.ends) == {"broken"}, streams.ends
    server.stop()
    server.start()
    assert server.stop() == 0


def test_r06_kill_9_mid_stream_is_seen_and_frees_the_engine(server: LiveServer) -> None:
    warm(server)
    streams = Streams(server, 50)
    active: list[int] = []

    async def kill() -> None:
        active.append((await asyncio.to_thread(worker_state, server)).active)
        server.kill()
        killed = time.monotonic()
        while (await asyncio.to_thread(worker_state, server)).active:
            assert time.monotonic() - killed < 2, "the worker goes on for nobody"
            await asyncio.sleep(0.05)

    streams.run(kill)
    assert active[0] > 25, "the streams were still under way"
    assert streams.ends["cut"] == streams.ends["error"] == 0 and streams.ends["broken"] >= active[0], streams.ends
    server.start()
    warm(server)


def test_stop_ends_the_workers_of_an_earlier_server(server: LiveServer) -> None:
    warm(server)
    worker = worker_process(server)
    server.kill()
    server.start()
    assert LocalRunner().alive(worker.pid, worker.start_ticks), "it is there to be adopted, if somebody asks for it"
    assert server.stop() == 0
    deadline = time.monotonic() + 10  # one that is slow to end is killed at the last moment, and goes a little later
    while LocalRunner().alive(worker.pid, worker.start_ticks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_cpu_s() -> float:
    """Processor time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"TUNEWRIGHT_PORT": "x"}, "TUNEWRIGHT_PORT"),
        ({"TUNEWRIGHT_DATABASE_URL": "sqlite:////nowhere/at/all.db"}, "/nowhere/at"),
        ({"TUNEWRIGHT_DATABASE_URL": "mysql://user:secret@host/x"}, "postgresql"),
        ({"TUNEWRIGHT_HOME": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_r08_what_the_operator_must_mend_is_one_line(tmp_path: Path, settings: dict[str, str], word: str) -> None:
    environment = {**os.environ, "TUNEWRIGHT_HOME": str(tmp_path / "home"), "TUNEWRIGHT_PORT": "0", **settings}
    before_s = children_cpu_s()
    subprocess.run([sys.executable, "-c", "import tunewright.wiring, tunewright.api.app"], check=True)
    imported_s = children_cpu_s()
    done = subprocess.run(
        [*TUNEWRIGHT, "serve"], capture_output=True, text=True, env=environment, timeout=30, check=False
    )
    assert done.returncode == 78
    assert children_cpu_s() - imported_s < 2 * (imported_s - before_s) + 0.5, (
        "what it takes to import; it tries nothing again"
    )
    assert len(done.stderr.splitlines()) == 1 and word in done.stderr and "secret" not in done.stderr
    assert done.stdout == ""
