"""How fast an engine worker serves: `python benchmarks/serve_speed.py MODEL_FOLDER [--concurrent 1 8 32] [--adapters 4 32]`.

Each run sends N requests at once (128-token prompts, 64 new tokens, greedy) over the worker's own protocol, first to the
base alone, then spread over so many adapters of rank 16 on all linear layers. Client and worker share the machine. Tokens
per second of the worker's processor time are less disturbed by what else runs on it.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.engines.engine_worker import WorkerRun, exchange, generate_request, worker_spec
from tunewright.deployments.ports import Done, TokenText, Trouble
from tunewright.files_on_disk import sha256_of

BASE_CODE = "bench"
PROMPT_TOKENS, NEW_TOKENS, RANK = 128, 64, 16


def write_adapter(model: Path, folder: Path, seed: int) -> dict[str, str]:
    """A random adapter for a Llama-shaped base, in PEFT's format; returns the adapter fields of a request."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, into)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.002, (out, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in shapes]  # else peers take part of the file and say nothing
    words = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": BASE_CODE,
        "target_modules": targets,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(words))
    sha256 = sha256_of(folder / "adapter_model.safetensors")
    return {"adapter_id": folder.name, "adapter_path": str(folder), "adapter_sha256": sha256}


async def one_request(port: int, values: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first token, and the number of tokens."""
    began = time.perf_counter()
    first_s = 0.0
    async for reply in exchange(port, generate_request(**values)):
        if isinstance(reply, Trouble):
            raise RuntimeError(reply.code)
        if isinstance(reply, TokenText) and not first_s:
            first_s = time.perf_counter() - began
        if isinstance(reply, Done):
            return first_s, reply.completion_tokens
    raise RuntimeError("the worker closed the connection")


class Figures(NamedTuple):
    """Of one run: output tokens by the clock and by the worker's processor time, and its memory at the end."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    ttft_ms: float
    rss_mb: float

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_s:7.1f} tok/s {self.tokens_per_cpu_s:7.1f} tok/CPU-s  TTFT p50 {self.ttft_ms:7.0f} ms  "
            f"RSS {self.rss_mb:6.0f} MB"
        )


def prompts(n: int, adapters: int, vocabulary: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Those of a run of n requests; peers get the same. Other runs have others: nothing is to be remembered."""
    rng = random.Random(1000 * n + adapters)
    return [[rng.randrange(100, vocabulary) for _ in range(tokens)] for _ in range(n)]


async def run(
    port: int, process: psutil.Process, vocabulary: int, n: int, adapters: list[dict[str, str]],
    *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS,
) -> Figures:  # fmt: skip
    """n requests at once, spread over the adapters; without any, all to the base."""
    requests: list[dict[str, Any]] = [
        {"prompt_ids": prompt, "max_tokens": new_tokens, **(adapters[i % len(adapters)] if adapters else {})}
        for i, prompt in enumerate(prompts(n, len(adapters), vocabulary, prompt_tokens))
    ]
    began, busy = time.perf_counter(), sum(process.cpu_times()[:2])
    results = await asyncio.gather(*(one_request(port, values) for values in requests))
    elapsed_s = time.perf_counter() - began
    busy_s = sum(process.cpu_times()[:2]) - busy
    tokens = sum(count for _, count in results)
    ttft_ms = 1000 * statistics.median(first_s for first_s, _ in results)
    return Figures(tokens / elapsed_s, tokens / busy_s, ttft_ms, process.memory_info().rss / 1e6)


@contextmanager
def worker_with(model: Path, adapters: int, **changes: Any) -> Iterator[tuple[WorkerRun, list[dict[str, str]]]]:
    """A worker and the adapter fields of requests to so many adapters."""
    with tempfile.TemporaryDirectory() as folder:
        written = [write_adapter(model, Path(folder) / f"a{seed}", seed) for seed in range(adapters)]
        spec = worker_spec(
            model, base_code=BASE_CODE, adapters=max(1, adapters), queue=256, context_tokens=1024, **changes
        )
        worker = WorkerRun(Path(folder) / "worker", spec).start(limit_s=600)
        try:
            yield worker, written
        finally:
            worker.kill()


def process_of(worker: WorkerRun) -> psutil.Process:
    """For its processor time and memory."""
    return psutil.Process(worker.process.pid if worker.process else None)


def load(worker: WorkerRun, adapters: list[dict[str, str]]) -> None:
    """Have the worker load adapters; without any, warm up."""
    for values in adapters or [{}]:
        asyncio.run(one_request(worker.port, {"prompt_ids": [100] * 8, "max_tokens": 2, **values}))


def vocabulary_of(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4])
    parser.add_argument("--precision", default="auto", choices=["auto", "fastest", "float32", "bfloat16"])
    parser.add_argument("--weights", default="exact", choices=["exact", "float16", "int8"])
    parser.add_argument("--core", type=int, help="pin client and worker to this core")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    with worker_with(
        arguments.model, max(arguments.adapters), threads=arguments.threads, slots=max(arguments.concurrent),
        precision=arguments.precision, weights=arguments.weights,
    ) as (worker, adapters):  # fmt: skip
        measure(worker, adapters, arguments)


def measure(worker: WorkerRun, adapters: list[dict[str, str]], arguments: argparse.Namespace) -> None:
    """Print the table."""
    process, vocabulary = process_of(worker), vocabulary_of(arguments.model)
    load(worker, [])
    print("".join(line for line in worker.log().splitlines(True) if " INFO " in line), end="")
    print(f"worker ready in {worker.start_s:.1f} s, RSS {process.memory_info().rss / 1e6:.0f} MB")
    for n in arguments.concurrent:
        print(f"base only    {n:>3} concurrent {asyncio.run(run(worker.port, process, vocabulary, n, []))}", flush=True)
    before = process.memory_info().rss
    load(worker, adapters)
    size = (Path(adapters[0]["adapter_path"]) / "adapter_model.safetensors").stat().st_size
    each = (process.memory_info().rss - before) / len(adapters)
    print(f"an adapter takes {each / 1e6:.1f} MB, {each / size:.2f} times its file of {size / 1e6:.1f} MB")
    for count in arguments.adapters:
        for n in arguments.concurrent:
            figures = asyncio.run(run(worker.port, process, vocabulary, n, adapters[:count]))
            print(f"{count:>2} adapters  {n:>3} concurrent {figures}", flush=True)


if __name__ == "__main__":
    main()
