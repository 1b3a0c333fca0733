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
from pathlib import Path
from typing import Any

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
    words = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": BASE_CODE}
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


async def run(port: int, process: psutil.Process, vocabulary: int, n: int, adapters: list[dict[str, str]]) -> str:
    """One line of the table."""
    rng = random.Random(n)
    requests: list[dict[str, Any]] = [
        {
            "prompt_ids": [rng.randrange(100, vocabulary) for _ in range(PROMPT_TOKENS)],
            "max_tokens": NEW_TOKENS,
            **(adapters[i % len(adapters)] if adapters else {}),
        }
        for i in range(n)
    ]
    began, busy = time.perf_counter(), sum(process.cpu_times()[:2])
    results = await asyncio.gather(*(one_request(port, values) for values in requests))
    elapsed_s = time.perf_counter() - began
    busy_s = sum(process.cpu_times()[:2]) - busy
    tokens = sum(count for _, count in results)
    ttft_ms = 1000 * statistics.median(first_s for first_s, _ in results)
    what = f"{len(adapters)} adapters" if adapters else "base only"
    speed = f"{tokens / elapsed_s:7.1f} tok/s {tokens / busy_s:7.1f} tok/CPU-s"
    held = f"RSS {process.memory_info().rss / 1e6:6.0f} MB"
    return f"{what:<12} {n:>3} concurrent  {speed}  TTFT p50 {ttft_ms:7.0f} ms  {held}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4])
    parser.add_argument("--precision", default="auto", choices=["auto", "fastest", "float32", "bfloat16"])
    parser.add_argument("--weights", default="exact", choices=["exact", "int8"])
    parser.add_argument("--core", type=int, help="pin client and worker to this core")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    with tempfile.TemporaryDirectory() as folder:
        most = max(arguments.adapters)
        adapters = [write_adapter(arguments.model, Path(folder) / f"a{seed}", seed) for seed in range(most)]
        spec = worker_spec(
            arguments.model, base_code=BASE_CODE, threads=arguments.threads, slots=max(arguments.concurrent),
            adapters=most, queue=256, context_tokens=1024, precision=arguments.precision, weights=arguments.weights,
        )  # fmt: skip
        worker = WorkerRun(Path(folder) / "worker", spec).start()
        try:
            measure(worker, adapters, arguments)
        finally:
            worker.kill()


def measure(worker: WorkerRun, adapters: list[dict[str, str]], arguments: argparse.Namespace) -> None:
    """Print the table."""
    process = psutil.Process(worker.process.pid if worker.process else None)
    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    warm: dict[str, Any] = {"prompt_ids": [100] * 8, "max_tokens": 2}
    asyncio.run(one_request(worker.port, warm))
    before = process.memory_info().rss
    print("".join(line for line in worker.log().splitlines(True) if " INFO " in line), end="")
    print(f"worker ready in {worker.start_s:.1f} s, RSS {before / 1e6:.0f} MB")
    for n in arguments.concurrent:
        print(asyncio.run(run(worker.port, process, vocabulary, n, [])), flush=True)
    before = process.memory_info().rss
    for values in adapters:
        asyncio.run(one_request(worker.port, {**warm, **values}))
    size = (Path(adapters[0]["adapter_path"]) / "adapter_model.safetensors").stat().st_size
    each = (process.memory_info().rss - before) / len(adapters)
    print(f"an adapter takes {each / 1e6:.1f} MB, {each / size:.2f} times its file of {size / 1e6:.1f} MB")
    for count in arguments.adapters:
        for n in arguments.concurrent:
            print(asyncio.run(run(worker.port, process, vocabulary, n, adapters[:count])), flush=True)


if __name__ == "__main__":
    main()
