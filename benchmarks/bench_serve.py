"""Our engine beside its peers: `make bench-serve`, or `python benchmarks/bench_serve.py --base BASE_FOLDER`.

N requests at once, 128-token prompts, 64 new tokens each, greedy; to the base alone, then spread over adapters of rank 16 on
all linear layers. Everything is pinned to one core with one thread, and runs one after the other. Ours is a worker process
that is asked over its own protocol; peers run in process, without a server. Figures are output tokens over the whole run, prompts
included, by processor time (by the clock in brackets).

Peers are those of our own environment: transformers' `generate` as one static batch, with PEFT's mixed batches for adapters, and
transformers' continuous batching. Not run, because they do not install from wheels here: vLLM's CPU build (it pins a torch build
that the package registry does not have) and llama-cpp-python.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_train import starter
from serve_speed import NEW_TOKENS, load, process_of, prompts, run, vocabulary_of, worker_with, write_adapter

OURS = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "int8": {"weights": "int8"},
}
PEERS = (
    ("transformers generate, one batch", "static", "float32"),
    ("transformers generate, one batch", "static", "bfloat16"),
    ("transformers continuous batching", "continuous", "bfloat16"),
)


def show(name: str, what: str, found: list[dict[str, Any] | None]) -> None:
    """One line: a figure for each number of requests."""
    speeds = [f"{one['tokens_per_cpu_s']:.0f} ({one['tokens_per_s']:.0f})" if one else "-" for one in found]
    waits = [f"{one['ttft_ms']:.0f}" if one and one["ttft_ms"] == one["ttft_ms"] else "-" for one in found]
    print(f"| {name} | {what} | {' / '.join(speeds)} | {' / '.join(waits)} |", flush=True)


def ours(base: Path, given: argparse.Namespace) -> None:
    """All formats that are asked for."""
    for label in given.formats:
        with worker_with(base, max(given.adapters), threads=1, slots=max(given.concurrent), **OURS[label]) as (
            worker,
            adapters,
        ):
            process = process_of(worker)
            load(worker, [])
            name = f"Tunewright, {label}; ready in {worker.start_s:.1f} s, {process.memory_info().rss / 1e6:.0f} MB"
            load(worker, adapters)
            for count in (0, *given.adapters):
                found = [
                    asyncio.run(run(worker.port, process, vocabulary_of(base), n, adapters[:count]))._asdict()
                    for n in given.concurrent
                ]
                show(name, f"{count} adapters" if count else "base", list(found))


def peer(base: Path, kind: str, dtype: str, n: int, adapters: list[str]) -> dict[str, Any] | None:
    """The figures of a run; None if it failed, for which the reason goes to stderr."""
    request = {
        "model": str(base), "kind": kind, "dtype": dtype, "adapters": adapters, "new_tokens": NEW_TOKENS,
        "prompts": prompts(n, len(adapters), vocabulary_of(base)),
    }  # fmt: skip
    script = Path(__file__).parent / "peers" / "serve_transformers.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        print(f"{kind} {dtype}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:300]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers(base: Path, given: argparse.Namespace) -> None:
    """All peers, the base and four adapters."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = [write_adapter(base, Path(folder) / f"a{seed}", seed)["adapter_path"] for seed in range(4)]
        for name, kind, dtype in PEERS:
            if kind not in given.peers:
                continue
            for some in ([], adapters) if kind == "static" else ([],):
                found = [peer(base, kind, dtype, n, some) for n in given.concurrent]
                show(f"{name}, {dtype}", f"{len(some)} adapters" if some else "base", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the model; the starter is pulled if it is not said")
    parser.add_argument("--core", type=int, default=0, help="the core that everything runs on")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--formats", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--peers", nargs="*", default=["static", "continuous"], choices=["static", "continuous"])
    given = parser.parse_args()
    os.sched_setaffinity(0, {given.core})
    base = given.base.resolve() if given.base else starter()
    numbers = " / ".join(map(str, given.concurrent))
    print(f"| engine | model | tokens per CPU-s (per s) at {numbers} requests | TTFT p50 ms |")
    print("|---|---|---|---|", flush=True)
    ours(base, given)
    peers(base, given)


if __name__ == "__main__":
    main()
