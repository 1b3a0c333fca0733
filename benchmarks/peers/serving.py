"""What the serving runs of all peers have in common: what they are asked for, and the lines of figures that they print.

Runs in the environments of the peers: nothing but the standard library here.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """`model`: a folder in Hugging Face layout, or a GGUF file. `weights`: the number format, under the peer's own name.

    `runs`: the prompts of each run, as token ids. Prompt i goes to adapter i modulo their number, or to the base if there
    are none. `started_s`: when the process was started, in seconds since 1970. `most`: prompts of the largest run.
    """

    model: str
    kind: str
    weights: str
    adapters: list[str]
    new_tokens: int
    context_tokens: int
    started_s: float
    runs: list[list[list[int]]]

    @property
    def most(self) -> int:
        return max(len(prompts) for prompts in self.runs)


Answer = Callable[[list[list[int]], int], Sequence[float]]
"""Answers prompts with so many tokens each, greedily, all at once; returns each prompt's seconds to the first token,
or nothing if the peer does not tell. Raises if tokens are missing."""


def request() -> Request:
    """What the driver asks this process for."""
    return Request(**json.loads(Path(sys.argv[1]).read_text()))


def measure(asked: Request, answer: Answer) -> None:
    """Print a line of JSON when the model is loaded (now), and one after each run."""
    print("\n" + json.dumps({"ready_s": time.time() - asked.started_s}), flush=True)
    answer([asked.runs[0][0][::-1]] * max(1, len(asked.adapters)), 2)  # warm up, every adapter too
    for prompts in asked.runs:
        began, busy = time.perf_counter(), time.process_time()
        firsts = answer(prompts, asked.new_tokens)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - busy
        tokens = len(prompts) * asked.new_tokens
        figures = {
            "tokens_per_s": tokens / wall_s,
            "tokens_per_cpu_s": tokens / cpu_s,
            "ttft_ms": 1000 * statistics.median(firsts) if firsts else None,
            "rss_mb": rss_mb(),
        }
        print("\n" + json.dumps(figures), flush=True)


def rss_mb() -> float:
    """Memory that this process has now."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024 / 1e6
