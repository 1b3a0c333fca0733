"""Speed and memory of the text trainer: `python benchmarks/train_speed.py BASE_FOLDER [--threads 1 2] [--types lora full] ...`.

Prints a table, each line from a process of its own, and each ratio from one run:

    tok/CPU-s    tokens of the timed steps (prompts included, no padding) for each second of processor time
    GFLOP/s      those at the arithmetic that a token of the starter needs on these rows (bench_train.py): with another base
                 or --data only tok/CPU-s and GB mean something
    of ...       that against a bare matrix product on one core, in float32 and in bfloat16, timed right after
    peak GB      the process's largest resident set; estimate is what the trainer expected before
    first step   seconds of processor time and of wall time from the start of the process to the first metrics: imports,
                 hashing of base and data, tokenising, loading, choosing, one step

The first step is warm-up. Rows are those of long_tailed_chat.py unless --data names a file; in their order the longest, 999
tokens, comes in the third step. Compare ratios, not figures of different machines.
"""

import argparse
import itertools
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import long_tailed_chat
import psutil
from bench_train import MFLOP_PER_TOKEN

from tunewright.files_on_disk import sha256_of
from tunewright.jobs import memory_estimate
from tunewright.jobs.spec import Hyperparameters, JournalRecord, Metrics, Started, TrainingSpec
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.integrity import verify_inputs
from tunewright.recipes.journal_writer import JournalWriter
from tunewright.recipes.run import run

_RANK = 8
_SEED = 26
"""With it the longest of the made rows is among the first 24."""
_LINE = "{:<5} {:<7} {:<9} {:<5} {:>7} {:>10} {:>8} {:>11} {:>11} {:>8} {:>9} {:>13}"
_HEADS = (
    *("type", "layers", "precision", "ckpt", "threads", "tok/CPU-s", "GFLOP/s", "of float32", "of bfloat16"),
    *("peak GB", "estimate", "first step s"),
)


class TimedJournal(JournalWriter):
    """Notes wall and CPU time at every step and asks for the end after `steps` of them."""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__(path)
        self.steps = steps
        self.seen: list[tuple[int, float, float]] = []
        self.choices: dict[str, Any] = {}
        self.attempt: Attempt | None = None

    def write(self, record: JournalRecord) -> None:
        super().write(record)
        if isinstance(record, Started):
            self.choices = record.choices
        if isinstance(record, Metrics):
            self.seen.append((record.tokens, time.time(), time.process_time()))
            if len(self.seen) > self.steps and self.attempt is not None:
                self.attempt.stop.set()


def measure(
    given: argparse.Namespace, training_type: str, layers: str, precision: str, checkpointing: str, threads: int
) -> None:
    """Train for one step of warm-up and `given.steps` timed ones, and print a line."""
    if layers == "plain":
        from tunewright.recipes import fast_layers

        memory_estimate.FAST_MODEL_TYPES = ()
        fast_layers.speed_up = lambda *_, **__: False
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(1) as hashing:
        journal = TimedJournal(Path(work) / "journal.jsonl", given.steps)
        spec = _spec(given, work, threads, training_type, precision, checkpointing)
        journal.attempt = Attempt(spec, journal, hashing.submit(verify_inputs, spec))
        run(journal.attempt)
        journal.close()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (tokens, began, cpu_began), (last_tokens, _, cpu_ended) = journal.seen[0], journal.seen[-1]
    speed = (last_tokens - tokens) / (cpu_ended - cpu_began)
    achieved = speed * MFLOP_PER_TOKEN[training_type] / 1000
    products = {name: gemm_gflop_per_cpu_s(threads, name) for name in ("float32", "bfloat16")}
    print(
        _LINE.format(
            training_type,
            journal.choices["layers"],
            journal.choices["precision"],
            "on" if journal.choices["activation_checkpointing"] else "off",
            threads,
            f"{speed:.0f}",
            f"{achieved:.0f}",
            *(f"{achieved / product:.2f} of {product:.0f}" for product in products.values()),
            f"{peak_bytes / 1e9:.2f}",
            f"{journal.choices['measured']['memory_estimate_gb']:.2f}",
            f"{cpu_began:.1f} / {began - psutil.Process().create_time():.1f}",
        ),
        flush=True,
    )


def _spec(
    given: argparse.Namespace, work: str, threads: int, training_type: str, precision: str, checkpointing: str
) -> TrainingSpec:
    hyperparameters = Hyperparameters(
        n_epochs=1000,
        batch_size=given.batch_size,
        learning_rate_multiplier=1.0,
        learning_rate=1e-4 if training_type == "lora" else 1e-5,
        lora_rank=_RANK,
        lora_alpha=2 * _RANK,
        precision=precision,
        activation_checkpointing=checkpointing,
        micro_batch_tokens=given.micro_batch_tokens,
    )
    return TrainingSpec(
        job_id="benchmark",
        attempt=1,
        work_folder=work,
        base_code="benchmark",
        base_path=given.base,
        base_files={path.name: sha256_of(path) for path in Path(given.base).iterdir()},
        training_type=training_type,
        training_data=given.data,
        training_sha256=sha256_of(Path(given.data)),
        hyperparameters=hyperparameters,
        seed=_SEED,
        threads=threads,
        checkpoint_every_s=1e9,
        max_line_bytes=2**24,
    )


def gemm_gflop_per_cpu_s(threads: int, precision: str) -> float:
    """Speed of one core in a matrix product of a size that training has, the best of some."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)
    left, right = torch.randn(1024, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = 0.0
    for _ in range(5):
        began = time.process_time()
        for _ in range(10):
            torch.mm(left, right.t())
        best = max(best, 10 * 2 * 1024 * 576 * 1536 / (time.process_time() - began) / 1e9)
    return best


def main() -> None:
    """Measure each combination in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a base model in Hugging Face layout")
    parser.add_argument("--data", help="chat rows, JSONL; without it, 512 long-tailed ones are made")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--types", nargs="+", default=["lora", "full"])
    parser.add_argument("--layers", nargs="+", default=["hand"], choices=["hand", "plain"], help="ours, transformers'")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"])
    parser.add_argument("--steps", type=int, default=2, help="timed ones, after one of warm-up")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-tokens", type=int, help="without it, the product's own choice")
    given = parser.parse_args()
    start = multiprocessing.get_context("spawn")
    print(_LINE.format(*_HEADS))
    with tempfile.TemporaryDirectory() as folder:
        if given.data is None:
            given.data = str(long_tailed_chat.write(Path(folder) / "chat.jsonl", 512))
        ways = (given.types, given.layers, given.precisions, given.checkpointing, given.threads)
        for chosen in itertools.product(*ways):
            process = start.Process(target=measure, args=(given, *chosen))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
