"""Speed and memory of the text trainer: `python benchmarks/train_speed.py BASE_FOLDER DATA.jsonl [--threads 1 2]`.

Prints, for each number of threads (each in a process of its own): tokens per CPU-second and per second over the timed
steps, peak memory, and the speed of a bare float32 matrix product beside it. Unit: tokens, prompt tokens included, no
padding. Run it on a quiet machine; compare ratios, not figures of different machines.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Hyperparameters, Metrics, TrainingSpec
from tunewright.recipes.attempt import Attempt, StopRequested
from tunewright.recipes.journal_writer import JournalWriter


class TimedJournal(JournalWriter):
    """Notes wall and CPU time at every step and asks for the end after `steps` of them."""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__(path)
        self.steps = steps
        self.seen: list[tuple[int, float, float]] = []
        self.attempt: Attempt | None = None

    def write(self, record: object) -> None:
        super().write(record)  # type: ignore[arg-type]
        if isinstance(record, Metrics):
            self.seen.append((record.tokens, time.perf_counter(), time.process_time()))
            if len(self.seen) > self.steps and self.attempt is not None:
                self.attempt.stop.set()


def measure(base: str, data: str, threads: int, steps: int, batch_size: int, rank: int, token_budget: int) -> None:
    """Train for one step of warm-up and `steps` timed ones, and print a line."""
    from tunewright.recipes import text

    text.TOKEN_BUDGET = token_budget or text.TOKEN_BUDGET
    with tempfile.TemporaryDirectory() as work:
        hyperparameters = Hyperparameters(
            n_epochs=1000,
            batch_size=batch_size,
            learning_rate_multiplier=1.0,
            learning_rate=1e-4,
            lora_rank=rank,
            lora_alpha=2 * rank,
        )
        spec = TrainingSpec(
            job_id="benchmark",
            attempt=1,
            work_folder=work,
            base_code="benchmark",
            base_path=base,
            base_files={},
            training_data=data,
            training_sha256=sha256_of(Path(data)),
            hyperparameters=hyperparameters,
            seed=0,
            threads=threads,
            checkpoint_every_s=1e9,
            max_line_bytes=2**24,
        )
        verified: Future[None] = Future()
        verified.set_result(None)
        journal = TimedJournal(Path(work) / "journal.jsonl", steps)
        journal.attempt = Attempt(spec, journal, verified)
        try:
            text.train(journal.attempt)
        except StopRequested:
            pass
        journal.close()
    (tokens, wall, cpu), (last_tokens, last_wall, last_cpu) = journal.seen[0], journal.seen[-1]
    done = last_tokens - tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{threads} threads: {done / (last_cpu - cpu):.0f} tokens/CPU-s, {done / (last_wall - wall):.0f} tokens/s, "
        f"peak {peak:.2f} GB, {done / (len(journal.seen) - 1):.0f} tokens/step, "
        f"float32 GEMM {gemm_gflop_per_cpu_s(threads):.0f} GFLOP/CPU-s",
        flush=True,
    )


def gemm_gflop_per_cpu_s(threads: int) -> float:
    """Speed of one core in a float32 matrix product of a size that training has."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(2048, 576), torch.randn(576, 1536)
    out = left @ right
    began = time.process_time()
    for _ in range(50):
        torch.mm(left, right, out=out)
    return 50 * 2 * 2048 * 576 * 1536 / (time.process_time() - began) / 1e9


def main() -> None:
    """Measure each thread count in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a base model in Hugging Face layout")
    parser.add_argument("data", help="chat rows, JSONL")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--token-budget", type=int, default=0, help="tokens of one micro-batch; 0 means the product's own"
    )
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    start = multiprocessing.get_context("spawn")
    for threads in given.threads:
        numbers = (threads, given.steps, given.batch_size, given.rank, given.token_budget)
        process = start.Process(target=measure, args=(given.base, given.data, *numbers))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
