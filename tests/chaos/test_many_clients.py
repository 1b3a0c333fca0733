"""Many clients at once: slow ones, idle ones, ones that leave, and more than there is room for. The engine costs nothing here."""

import asyncio
import itertools
import json
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.raw_streams import answer_of, open_request, percentile, words
from tests.live_server import LiveServer
from tests.open_files import DATABASE_FILES, open_files
from tests.promises.test_pool import worker_process, worker_state

# Connections that are broken off and dropped are the point here; asyncio warns of each.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STALL_LIMIT_S = 3.0
SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]
MIB = 2**20
Serve = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path, tiny_base: Path) -> Serve:
    """`with serve(step_s=..., padding=..., slots=..., queue=...) as server`"""

    @contextmanager
    def run(slots: int = 64, queue: int = 256, **engine: float) -> Iterator[LiveServer]:
        server = LiveServer(
            tmp_path / "home",
            module="tests.serve_fake",
            TUNEWRIGHT_ENGINE_SLOTS=str(slots),
            TUNEWRIGHT_ENGINE_QUEUE=str(queue),
            TUNEWRIGHT_MAX_STREAMS_PER_KEY="10000",
            TUNEWRIGHT_FIRST_TOKEN_LIMIT_S="60",
            FAKE_STALL_LIMIT_S=str(STALL_LIMIT_S),
        )
        server.add_base(tiny_base)
        (server.home / "workers" / "fake.json").write_text(json.dumps(engine))
        server.start()
        try:
            yield server
        finally:
            server.stop()

    return run


class Gauge:
    """What the server's process holds, against what it held when this was made."""

    def __init__(self, server: LiveServer) -> None:
        assert server._process is not None
        self.process = psutil.Process(server._process.pid)
        self._fds, _ = open_files(self.process.pid)
        self._rss = self.process.memory_info().rss
        self._cpu = self._cpu_s()

    def _cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    @property
    def more_mib(self) -> float:
        return (self.process.memory_info().rss - self._rss) / MIB

    @property
    def cpu_s(self) -> float:
        return self._cpu_s() - self._cpu

    async def fds_come_back(self, limit_s: float = 5.0) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            now, of_database = open_files(self.process.pid)
            assert of_database <= DATABASE_FILES
            if (more := now - self._fds).total() <= 3:
                return
            assert time.monotonic() < deadline, f"descriptors more than before: {more}"
            await asyncio.sleep(0.05)


async def warm(server: LiveServer) -> None:
    """Threads and database connections come with the first requests at once, and stay."""
    await answer_of(server, max_tokens=1)
    await asyncio.gather(*(answer_of(server, max_tokens=1) for _ in range(30)))


async def engine_is_idle(server: LiveServer, limit_s: float) -> None:
    left = time.monotonic()
    while (state := await asyncio.to_thread(worker_state, server)).active or state.waiting:
        assert time.monotonic() - left < limit_s, state
        await asyncio.sleep(0.05)


@asynccontextmanager
async def probed(server: LiveServer) -> AsyncIterator[list[float]]:
    """How long /healthz takes, ten times a second."""
    times: list[float] = []

    async def probe() -> None:
        async with httpx.AsyncClient(base_url=server.address, trust_env=False, timeout=30) as client:
            while True:
                began = time.perf_counter()
                (await client.get("/healthz")).raise_for_status()
                times.append(time.perf_counter() - began)
                await asyncio.sleep(0.1)

    probing = asyncio.ensure_future(probe())
    yield times
    assert not probing.done() or probing.result()
    probing.cancel()
    print(f"/healthz: p50 {1000 * percentile(times, 0.5):.0f} ms, p99 {1000 * percentile(times, 0.99):.0f} ms")


@pytest.mark.parametrize("cycles", [300, pytest.param(10_000, marks=SOAK)])
async def test_r26_callers_who_leave_cost_nothing(serve: Serve, cycles: int) -> None:
    """By FIN or RST; at once, while they wait, or in the middle of a stream; with a stream and without."""
    with serve(step_s=0.005) as server:
        await warm(server)
        gauge, worker = Gauge(server), psutil.Process(worker_process(server).pid)
        worker_fds = worker.num_fds()
        chance = random.Random(cycles)
        half_mib = 0.0

        async def leave(n: int) -> None:
            reader, writer = await open_request(server, stream=n % 3 > 0, max_tokens=1900)
            if n % 3 == 1:
                async for _ in words(reader):
                    break
            else:
                await asyncio.sleep(chance.uniform(0, 0.05))
            if n % 2:
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        for n in range(0, cycles, 10):
            await asyncio.gather(*(leave(n + k) for k in range(10)))
            if n == cycles // 2 - cycles // 2 % 10:
                half_mib = gauge.more_mib
        await engine_is_idle(server, 2)
        await gauge.fds_come_back()
        deadline = time.monotonic() + 5
        while worker.num_fds() - worker_fds > 3:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        growth = (gauge.more_mib - half_mib) / (cycles / 2) * 1000
        print(f"RSS of the server grew by {growth:.2f} MiB in 1,000 cycles")
        assert growth < 1 or cycles < 10_000
        assert (await answer_of(server, max_tokens=1))[0] == 200, "the key has its places back"


@pytest.mark.soak
def test_r26_clients_who_vanish_are_noticed(tmp_path: Path, tiny_base: Path) -> None:
    """No FIN and no RST, the link is gone: two streams and a caller who waits for a whole answer."""
    inside = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode:
        pytest.skip("this machine gives no network namespaces")
    command = [*inside, sys.executable, "-m", "tests.chaos.vanish", str(tmp_path / "home"), str(tiny_base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["active"] == 3
    assert result["seconds"] <= 30


async def test_r27_slow_readers_hold_nobody_up(serve: Serve) -> None:
    """A hundred that read a byte a second. What they do not take stays within small buffers, and they are given up in the end."""
    with serve(slots=128, step_s=0.05, padding=4000) as server:
        await warm(server)
        gauge = Gauge(server)

        async def gaps() -> list[float]:
            reader, writer = await open_request(server, stream=True, max_tokens=60)
            times = [at async for _, at in words(reader)]
            writer.close()
            return [later - earlier for earlier, later in itertools.pairwise(times)]

        async def slow() -> None:
            reader, writer = await open_request(server, stream=True, max_tokens=1900, receive_buffer=2048)
            try:
                async with asyncio.timeout(60):
                    while await reader.read(1):
                        await asyncio.sleep(1)
            except ConnectionError:
                pass
            writer.transport.abort()

        before = [gap for stream in await asyncio.gather(*(gaps() for _ in range(5))) for gap in stream]
        slow_ones = [asyncio.ensure_future(slow()) for _ in range(100)]
        try:
            await asyncio.sleep(1)
            during = [gap for stream in await asyncio.gather(*(gaps() for _ in range(5))) for gap in stream]
            waiting_mib = gauge.more_mib
            await engine_is_idle(server, 15)
            p95 = percentile(before, 0.95), percentile(during, 0.95)
            print(f"p95 gap {1000 * p95[0]:.1f} -> {1000 * p95[1]:.1f} ms, {waiting_mib:.0f} MiB for 100 slow readers")
            assert p95[1] < 1.1 * p95[0] + 0.1
            assert waiting_mib < 100 * 0.4
            await gauge.fds_come_back(20.0)  # although not one of them has closed its end
        finally:
            for one in slow_ones:
                one.cancel()
            await asyncio.gather(*slow_ones, return_exceptions=True)


async def test_r28_idle_and_slow_heads_hold_nobody_up(serve: Serve) -> None:
    """500 connections of which half say nothing and half a byte a second; their heads have ten seconds."""
    with serve(step_s=0.002) as server:
        await warm(server)
        gauge = Gauge(server)
        began = time.monotonic()

        async def linger(talks: bool) -> float:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            closed = asyncio.ensure_future(reader.read())
            try:
                for letter in b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaa":
                    if talks:
                        writer.write(bytes([letter]))
                    if (await asyncio.wait({closed}, timeout=1))[0]:
                        break
                assert (await closed)[:12] in (b"", b"HTTP/1.1 408")
            except ConnectionError:
                pass
            writer.transport.abort()
            return time.monotonic() - began

        slow = [asyncio.ensure_future(linger(n % 2 == 0)) for n in range(500)]
        times = []
        while time.monotonic() - began < 8:
            status, _, took = await answer_of(server, max_tokens=5)
            assert status == 200
            times.append(took)
            await asyncio.sleep(0.02)
        print(f"requests beside 500 slow heads: p99 {1000 * percentile(times, 0.99):.0f} ms of {len(times)}")
        assert percentile(times, 0.5) < 0.25
        assert max(await asyncio.gather(*slow)) < 20
        await gauge.fds_come_back()


@pytest.mark.parametrize(("streams", "tokens", "step_s"), [(200, 40, 0.25), pytest.param(1000, 600, 0.5, marks=SOAK)])
async def test_r29_many_streams_at_once(serve: Serve, streams: int, tokens: int, step_s: float) -> None:
    """Nothing is lost, doubled or out of order, and nobody waits long. The soak: 1,000 streams for five minutes."""
    needed = 4 * streams + 200
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or hard >= needed, "ulimit -Hn"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(needed, 4096), hard))
    with serve(slots=streams, queue=streams, step_s=step_s) as server:
        await warm(server)
        gauge = Gauge(server)
        late: list[float] = []
        most_mib = 0.0

        async def follow() -> None:
            reader, writer = await open_request(server, stream=True, max_tokens=tokens)
            first_at, n = 0.0, 0
            async for text, at in words(reader):
                for word in text.split():
                    assert int(word) == n
                    first_at = first_at or at
                    late.append(at - first_at - n * step_s)
                    n += 1
            assert n == tokens
            writer.close()

        async with probed(server) as health:
            following = [asyncio.ensure_future(follow()) for _ in range(streams)]
            while not all(task.done() for task in following):
                most_mib = max(most_mib, gauge.more_mib)
                await asyncio.sleep(0.25)
            await asyncio.gather(*following)
        per_token_ms = 1000 * gauge.cpu_s / (streams * tokens)
        print(
            f"{streams} streams: {len(late)} events in order, lateness p99 {1000 * percentile(late, 0.99):.0f} ms, "
            f"{most_mib:.0f} MiB over idle, {per_token_ms:.3f} ms of processor time a token"
        )
        assert most_mib < 300
        assert per_token_ms < (0.2 if tokens > 100 else 0.4), "the short run has its requests to begin as well"
        assert percentile(late, 0.99) < (1 if streams == 1000 else 2)
        assert percentile(health, 0.5) < 0.25
        await gauge.fds_come_back()


@pytest.mark.parametrize("seconds", [8, pytest.param(120, marks=SOAK)])
async def test_r30_overload_is_refused_early_and_the_rest_is_served_as_ever(serve: Serve, seconds: int) -> None:
    """Three times what the engine can do. Whoever waits waits for one turn: the queue is as long as there are slots."""
    slots, tokens, step_s = 8, 20, 0.05
    with serve(slots=slots, queue=slots, step_s=step_s) as server:
        await warm(server)
        alone = [(await answer_of(server, max_tokens=tokens))[2] for _ in range(3)]

        async def closed_loop(until: float) -> int:
            done = 0
            while time.monotonic() < until:
                status, _, _ = await answer_of(server, max_tokens=tokens)
                done += status == 200
            return done

        began = time.monotonic()
        peak = sum(await asyncio.gather(*(closed_loop(began + 5) for _ in range(slots)))) / (time.monotonic() - began)
        gauge = Gauge(server)
        longest_queue = 0
        asked: list[asyncio.Task[tuple[int, bytes, float]]] = []
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            if len(asked) < (now - began) * 3 * peak:
                asked.append(asyncio.ensure_future(answer_of(server, max_tokens=tokens)))
            if len(asked) % 20 == 0:
                longest_queue = max(longest_queue, (await asyncio.to_thread(worker_state, server)).waiting)
            await asyncio.sleep(0.005)
        answers = await asyncio.gather(*asked)
        took = time.monotonic() - began
        served = [seconds for status, _, seconds in answers if status == 200]
        refused = [(answer, seconds) for status, answer, seconds in answers if status != 200]
        print(
            f"peak {peak:.1f}/s; at 3x: {len(served) / took:.1f}/s served, p99 {percentile(served, 0.99):.2f} s "
            f"(alone {max(alone):.2f} s); {len(refused)} refused, p50 {1000 * percentile([s for _, s in refused], 0.5):.0f} ms, "
            f"p99 {1000 * percentile([s for _, s in refused], 0.99):.0f} ms; queue {longest_queue}; {gauge.more_mib:.1f} MiB more"
        )
        assert len(served) / took >= 0.9 * peak * seconds / took
        assert len(refused) > len(served)
        assert all(b"engine_overloaded" in answer and b"\r\nretry-after: " in answer.lower() for answer, _ in refused)
        assert longest_queue <= slots
        assert percentile([seconds for _, seconds in refused], 0.5) < 0.1
        assert percentile(served, 0.99) < 2 * max(alone) + 0.5
        assert gauge.more_mib < 20
