"""Our engine beside its peers: `make bench-serve`, or `python benchmarks/bench_serve.py --base BASE_FOLDER`.

N requests at once, 128-token prompts, 64 new tokens each, greedy; to the base alone, then spread over adapters of rank 16 on
all linear layers. Everything is pinned to one core with one thread, and runs one after the other. Ours is a worker process
that is asked over its own protocol; peers run in a process each, without a server, by the Python of an environment of their
own under `.venvs/` (transformers: by ours). Figures are output tokens over the whole run, prompts included, by processor
time (by the clock in brackets). A peer that does not install or fails is a line with the reason.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_train import PEERS, VENVS, Bench, environment, starter
from loading_speed import print_loading
from peers.gguf_files import write_adapter as write_gguf_adapter
from peers.gguf_files import write_base
from peers.serve_contenders import ENGINES, ENVIRONMENTS, Engine
from serve_speed import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    load,
    process_of,
    prompts,
    run,
    vocabulary_of,
    worker_with,
    write_adapter,
)

OURS = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "float16 weights": {"weights": "float16"},
    "int8": {"weights": "int8"},
}
PEER_ADAPTERS = 4
SLOW = 10
"""bfloat16 is left out where its products are so many times as slow as those in float32: each line would take hours."""


class Table:
    """Prints its head, then a line for each engine and kind of load with a figure for each number of requests."""

    def __init__(self, concurrent: list[int]) -> None:
        numbers = " / ".join(map(str, concurrent))
        print(f"| engine | asked of | tokens per CPU-s (per s) at {numbers} requests | TTFT p50 ms | ready s | MB |")
        print("|---|---|---|---|---|---|", flush=True)

    def show(self, name: str, adapters: int, found: list[dict[str, Any]], ready_s: float) -> None:
        speeds = " / ".join(f"{one['tokens_per_cpu_s']:.0f} ({one['tokens_per_s']:.0f})" for one in found)
        waits = " / ".join("-" if one["ttft_ms"] is None else f"{one['ttft_ms']:.0f}" for one in found)
        asked_of = f"{adapters} adapters" if adapters else "base"
        print(f"| {name} | {asked_of} | {speeds} | {waits} | {ready_s:.1f} | {found[-1]['rss_mb']:.0f} |", flush=True)

    def fail(self, name: str, why: str) -> None:
        print(f"| {name} | did not run: {why} |", flush=True)


def ours(base: Path, label: str, given: argparse.Namespace, table: Table) -> None:
    """All lines of one number format."""
    most = max(given.adapters, default=0)
    with worker_with(base, most, threads=1, slots=max(given.concurrent), **OURS[label]) as (worker, adapters):
        process = process_of(worker)
        load(worker, [])
        for count in (0, *given.adapters):
            load(worker, adapters[:count])
            found = [
                asyncio.run(run(worker.port, process, vocabulary_of(base), n, adapters[:count]))._asdict()
                for n in given.concurrent
            ]
            table.show(f"Tunewright, {label}", count, found, worker.start_s)


class Peers:
    """Runs peers on files that are made once."""

    def __init__(self, base: Path, folder: Path, given: argparse.Namespace) -> None:
        self.base, self.folder, self.given = base, folder, given
        self.adapters = [
            Path(write_adapter(base, folder / f"a{seed}", seed)["adapter_path"]) for seed in range(PEER_ADAPTERS)
        ]

    def show(self, engine: Engine, table: Table) -> None:
        """The lines of one engine."""
        name = f"{engine.label}, {engine.weights}"
        for adapters in ([], self.adapters) if engine.adapters else ([],):
            found = self._run(engine, adapters)
            if isinstance(found, str):
                table.fail(name, found)
            else:
                table.show(name, len(adapters), found[1:], found[0]["ready_s"])

    def _run(self, engine: Engine, adapters: list[Path]) -> list[dict[str, Any]] | str:
        """What a process of the peer prints, or why it failed."""
        request = self.folder / "request.json"
        request.write_text(json.dumps(self._request(engine, adapters)))
        python = VENVS / engine.environment / "bin" / "python" if engine.environment else Path(sys.executable)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [str(python), str(PEERS / f"serve_{engine.name}.py"), str(request)]
        with (self.folder / "log.txt").open("w+") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
            )
            limit = threading.Timer(self.given.limit_s, os.killpg, (process.pid, signal.SIGKILL))
            limit.start()
            printed, _ = process.communicate()
            limit.cancel()
            log.seek(0)
            words = [line.strip() for line in log if line.strip()] or ["nothing said"]
        found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        if process.returncode == -signal.SIGKILL:
            return f"stopped after {self.given.limit_s:.0f} s"
        if process.returncode or len(found) != 1 + len(self.given.concurrent):
            return f"exit {process.returncode}: {words[-1][:200]}"
        return found

    def _request(self, engine: Engine, adapters: list[Path]) -> dict[str, Any]:
        vocabulary = vocabulary_of(self.base)
        model, files = self.base, adapters
        if engine.gguf:
            model = self.folder / f"{engine.weights}.gguf"
            if not model.exists():
                write_base(self.base, model, engine.weights)
            files = [self._gguf(adapter) for adapter in adapters]
        return {
            "model": str(model), "kind": engine.kind, "weights": engine.weights, "adapters": [str(one) for one in files],
            "new_tokens": NEW_TOKENS, "context_tokens": PROMPT_TOKENS + 2 * NEW_TOKENS, "started_s": time.time(),
            "runs": [prompts(n, len(adapters), vocabulary) for n in self.given.concurrent],
        }  # fmt: skip

    def _gguf(self, adapter: Path) -> Path:
        target = adapter.with_suffix(".gguf")
        return target if target.exists() else write_gguf_adapter(self.base, adapter, target)


def bfloat16_is_slow(base: Path) -> bool:
    """Whether to leave bfloat16 out; prints why."""
    speeds = Bench(base, steps=0, threads=1).gemm()
    print(f"matrix products: {json.dumps(speeds)}")
    fast, slow = speeds["float32_gflop_per_cpu_s"], speeds["bf16_gflop_per_cpu_s"]
    if slow * SLOW < fast:
        print(f"bfloat16 is left out: its products are {fast / slow:.0f} times as slow as those in float32 here\n")
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the model; the starter is pulled if it is not said")
    parser.add_argument("--core", type=int, default=0, help="the core that everything runs on")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="*", default=[4, 32])
    parser.add_argument("--formats", nargs="*", default=list(OURS), choices=list(OURS))
    names = sorted({engine.name for engine in ENGINES})
    parser.add_argument("--peers", nargs="*", default=names, choices=names)
    parser.add_argument("--limit-s", type=float, default=1800.0, help="for one line of a peer")
    parser.add_argument("--quick", action="store_true", help="8 requests at once, four adapters")
    given = parser.parse_args()
    if given.quick:
        given.concurrent, given.adapters = [8], [PEER_ADAPTERS]
    missing = {one.name: environment(one) for one in ENVIRONMENTS if one.name in given.peers}
    os.sched_setaffinity(0, {given.core})
    base = given.base.resolve() if given.base else starter()
    left_out = {"bfloat16"} if bfloat16_is_slow(base) else set()
    table = Table(given.concurrent)
    for label in given.formats:
        if label not in left_out:
            ours(base, label, given, table)
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        peers = Peers(base, Path(folder), given)
        for engine in ENGINES:
            if engine.name not in given.peers or engine.weights in left_out:
                continue
            if why := missing.get(engine.environment):
                table.fail(f"{engine.label}, {engine.weights}", why)
            else:
                peers.show(engine, table)
    print_loading(base)


if __name__ == "__main__":
    main()
