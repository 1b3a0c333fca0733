"""How fast an engine worker starts, how large it is, and how soon it is back: `python benchmarks/start_speed.py MODEL_FOLDER`.

First workers by themselves, in turn: with the model's own code asked in the process at each start, as every start once did, and
with what that code said remembered. Then a replica of a deployment is killed with -9, and the server with it. On a busy machine
go by the processor seconds.
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.deployments import processes, wait_for
from tests.engines.engine_worker import WorkerRun, generate, worker_spec
from tests.live_server import LiveServer

LIMIT_S = 600.0
_FLOAT_BYTES = 4


class Start(NamedTuple):
    """Seconds until ready by the clock and of the processor, and what the process holds then."""

    ready_s: float
    cpu_s: float
    rss_bytes: int


def weight_bytes(model: Path) -> int:
    """Of all weights in float32, each once."""
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as opened:
            names = opened.keys()
            for name in names:
                numbers = 1
                for size in opened.get_slice(name).get_shape():
                    numbers *= size
                total += _FLOAT_BYTES * numbers
    return total


def start(model: Path, folder: Path, threads: int, references: Path | None) -> Start:
    """A worker from its start to its first answer."""
    path = None if references is None else str(references)
    spec = worker_spec(model, threads=threads, context_tokens=1024, references_path=path)
    worker = WorkerRun(folder, spec).start(LIMIT_S)
    try:
        process = psutil.Process(worker.process.pid if worker.process else None)
        found = Start(worker.start_s, sum(process.cpu_times()), process.memory_info().rss)
        asyncio.run(generate(worker.port, prompt_ids=[100] * 8, max_tokens=2))
        return found
    finally:
        worker.kill()


def shown(name: str, starts: list[Start], weights: int) -> None:
    ready_s, cpu_s, rss_bytes = (statistics.median(values) for values in zip(*starts, strict=True))
    beyond = (rss_bytes - weights) / 1e6
    print(
        f"{name:<26} ready {ready_s:5.1f} s  {cpu_s:5.1f} CPU-s  RSS {rss_bytes / 1e6:.0f} MB, weights + {beyond:.0f} MB"
    )


def recoveries(model: Path, folder: Path, times: int, threads: int) -> None:
    """Kill a replica, then replica and server, so many times each; prints how long until all is as wished."""
    server = LiveServer(folder / "home", TUNEWRIGHT_ENGINE_THREADS=str(threads))
    server.run("models", "add", str(model), "--code", "starter")
    server.start()
    try:
        with server.api("/api/v1") as api:
            found = api.post("/deployments", json={"model": "starter", "name": "killed"}).json()["id"]
        wait_for(server, found, lambda seen: seen["status"] == "ready", LIMIT_S)
        for what, kill in (("a replica", _kill_replica), ("server and replica", _kill_both)):
            taken = [_recovery(server, found, kill) for _ in range(times)]
            clock, cpu = (sorted(values) for values in zip(*taken, strict=True))
            print(
                f"kill -9 of {what}: back after {clock[0]:.1f} to {clock[-1]:.1f} s, {cpu[0]:.1f} to {cpu[-1]:.1f} CPU-s"
            )
    finally:
        server.stop()


def _recovery(server: LiveServer, found: str, kill: Callable[[LiveServer, int], None]) -> tuple[float, float]:
    """Seconds from the death until the deployment is ready again, and processor seconds of the new replica until then."""
    old = next(iter(processes(server, found).values())).pid
    began = time.monotonic()
    kill(server, old)

    def back(seen: dict[str, Any]) -> bool:
        running = processes(server, found)
        return seen["status"] == "ready" and bool(running) and all(each.pid != old for each in running.values())

    wait_for(server, found, back, LIMIT_S)
    took_s = time.monotonic() - began
    new = next(iter(processes(server, found).values())).pid
    return took_s, sum(psutil.Process(new).cpu_times())


def _kill_replica(_: LiveServer, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _kill_both(server: LiveServer, pid: int) -> None:
    server.kill()
    os.kill(pid, signal.SIGKILL)
    server.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    model, weights = arguments.model, weight_bytes(arguments.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = folder / "references"
        first = start(model, folder / "first", arguments.threads, kept)
        shown("first start", [first], weights)
        ways: dict[str, list[Start]] = {"own code asked each time": [], "remembered": []}
        for turn in range(arguments.times):
            for number, (starts, references) in enumerate(zip(ways.values(), (None, kept), strict=True)):
                starts.append(start(model, folder / f"{turn}-{number}", arguments.threads, references))
        for way, starts in ways.items():
            shown(way, starts, weights)
        before, after = (statistics.median(each.cpu_s for each in starts) for starts in ways.values())
        print(f"remembered takes {after / before:.2f} of the processor time")
        recoveries(model, folder, arguments.times, arguments.threads)


if __name__ == "__main__":
    main()
