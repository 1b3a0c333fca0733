"""What the gateway costs beside the model: `python benchmarks/gateway_cost.py [--streams 32] [--tokens 400] [--profile OUT]`.

The engine worker is that of the tests without a model (`tests/fake_worker.py`); everything else is the product: a real server and
real sockets. Printed are the milliseconds that a request takes longer through the server than over the worker's own protocol
(one at a time, in turn, so that both meet the same neighbours), and processor time of server and worker for each streamed token.
The goals: at most 5 ms more at the median, and at most 0.2 ms of the server's processor time for a token at 32 streams.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.live_server import LiveServer
from tests.tiny_models import tiny_llama
from tunewright.deployments.ports import Done, Generate, WorkerProcess, WorkerSpec, decode_reply, encode_line

STEP_S = 0.02
"""Between the tokens of a stream: 50 a second, as fast as anybody reads."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--streams", type=int, default=32)
    options.add_argument("--tokens", type=int, default=400)
    options.add_argument("--requests", type=int, default=200)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        base = tiny_llama(Path(folder) / "tiny")
        for step_s, run in ((0.001, added_latency), (STEP_S, cost_of_tokens)):
            server = LiveServer(
                Path(folder) / f"home-{run.__name__}",
                module="tests.serve_fake",
                TUNEWRIGHT_ENGINE_SLOTS="512",
                TUNEWRIGHT_MAX_STREAMS_PER_KEY="512",
            )
            server.run("models", "add", str(base), "--code", "tiny")
            (server.home / "workers" / "fake.json").write_text(json.dumps({"step_s": step_s}))
            server.start()
            try:
                asyncio.run(run(server, given))
            finally:
                server.stop()


async def added_latency(server: LiveServer, given: argparse.Namespace) -> None:
    await through_server(server, 1, stream=False)
    folder = server.home / "workers" / "tiny"
    process = msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess)
    secret = msgspec.json.decode((folder / "spec.json").read_bytes(), type=WorkerSpec).secret
    if server._process is None:
        raise RuntimeError("no server")
    own = psutil.Process(server._process.pid)
    before_s = cpu_s(own)
    gateway, direct = [], []
    for _ in range(given.requests):
        began = time.perf_counter()
        await to_worker(process.port, secret)
        direct.append(time.perf_counter() - began)
        began = time.perf_counter()
        await through_server(server, 1, stream=False)
        gateway.append(time.perf_counter() - began)
    more = 1000 * (statistics.median(gateway) - statistics.median(direct))
    cpu_ms = 1000 * (cpu_s(own) - before_s) / given.requests
    print(
        f"a request takes {more:.2f} ms longer at the median ({1000 * statistics.median(direct):.2f} ms without the server); "
        f"{cpu_ms:.2f} ms of the server's processor time"
    )


async def to_worker(port: int, secret: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode_line(Generate(secret=secret, request_id="r", prompt_ids=list(range(40)), max_tokens=1)) + b"\n")
    while not isinstance(decode_reply(await reader.readline()), Done):
        pass
    writer.close()


async def through_server(server: LiveServer, tokens: int, *, stream: bool) -> int:
    """One request on a connection of its own; returns the number of frames (or 1)."""
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream}
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write((head + body).encode())
    frames = 0
    while data := await reader.read(65536):
        frames += data.count(b"data: {")
    writer.close()
    return frames


async def cost_of_tokens(server: LiveServer, given: argparse.Namespace) -> None:
    await through_server(server, 1, stream=True)
    folder = server.home / "workers" / "tiny"
    pid = msgspec.json.decode((folder / "worker.json").read_bytes(), type=WorkerProcess).pid
    if server._process is None:
        raise RuntimeError("no server")
    processes = {"server": psutil.Process(server._process.pid), "worker": psutil.Process(pid)}
    before = {name: cpu_s(process) for name, process in processes.items()}
    began = time.perf_counter()
    frames = sum(
        await asyncio.gather(*(through_server(server, given.tokens, stream=True) for _ in range(given.streams)))
    )
    seconds = time.perf_counter() - began
    tokens = given.tokens * given.streams
    print(f"{given.streams} streams of {given.tokens} tokens, {tokens / seconds:.0f} tokens a second, {frames} frames:")
    for name, process in processes.items():
        print(f"  {name}: {1000 * (cpu_s(process) - before[name]) / tokens:.3f} ms of processor time a token")


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
