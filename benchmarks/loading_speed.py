"""How long adapters take to load, and what they take: `python benchmarks/loading_speed.py MODEL_FOLDER [--core 0]`.

32 adapters of rank 16 on all linear layers, each loaded by its first request: half of them while nothing else runs, half
while four others stream. The time is the worker's own, from the first byte read to the last factor in its place.
"""

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from serve_speed import load, one_request, process_of, worker_with

from tests.engines.engine_worker import health

ADAPTERS, STREAMS, CONTEXT_TOKENS = 32, 4, 1024


async def load_each(port: int, adapters: list[dict[str, str]]) -> list[float]:
    """Milliseconds of each load."""
    before = (await health(port)).adapter_load_ms
    found: list[float] = []
    for values in adapters:
        await one_request(port, {"prompt_ids": [100] * 8, "max_tokens": 1, **values})
        after = (await health(port)).adapter_load_ms
        found.append(after - before)
        before = after
    return found


async def load_beside_streams(port: int, adapters: list[dict[str, str]]) -> list[float]:
    """The same while others stream, who are asked for again when they end."""

    async def stream(number: int) -> None:
        while True:
            await one_request(port, {"prompt_ids": [200 + number] * 8, "max_tokens": CONTEXT_TOKENS - 8})

    streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    await asyncio.sleep(1)
    found = await load_each(port, adapters)
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return found


def print_loading(model: Path) -> None:
    """Print times and memory of loads in a worker of its own."""
    with worker_with(model, ADAPTERS, threads=1, slots=STREAMS + 1) as (worker, adapters):
        process, half = process_of(worker), ADAPTERS // 2
        load(worker, [])

        def busy_s(work: Coroutine[Any, Any, Any]) -> float:
            before = sum(process.cpu_times()[:2])
            asyncio.run(work)
            return sum(process.cpu_times()[:2]) - before

        alone = asyncio.run(load_each(worker.port, adapters[:1]))
        rss, others = process.memory_info().rss, adapters[1:half]

        async def load_others() -> None:
            alone.extend(await load_each(worker.port, others))

        cpu_s = (busy_s(load_others()) - busy_s(load_each(worker.port, others))) / len(others)  # then all are there
        each = (process.memory_info().rss - rss) / len(others)
        beside = asyncio.run(load_beside_streams(worker.port, adapters[half:]))
        size = (Path(adapters[0]["adapter_path"]) / "adapter_model.safetensors").stat().st_size
        print(f"\n{ADAPTERS} adapters of rank 16 on all linear layers, {size / 1e6:.1f} MB each:")
        print(f"loading one takes {1000 * cpu_s:.0f} ms of processor time")
        for found, when in ((alone, "alone"), (beside, f"while {STREAMS} others stream")):
            print(f"by the clock {when}: p50 {statistics.median(found):.0f} ms, most {max(found):.0f} ms")
        print(f"memory: {each / 1e6:.1f} MB for each further one, {each / size:.2f} times the file", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--core", type=int, default=0)
    given = parser.parse_args()
    os.sched_setaffinity(0, {given.core})
    print_loading(given.model)


if __name__ == "__main__":
    main()
