"""Our trainer beside its peers: `make bench-train`, or `python benchmarks/bench_train.py --base BASE_FOLDER`.

Every run is a process of its own, every peer's by the Python of an environment of its own under `.venvs/`. Same model, same
rows (long_tailed_chat.py), 8 rows a step, rank 8 on all linear layers, AdamW, at most 1,024 tokens a row. Counted are tokens
that are not padding and CPU-seconds over the optimizer steps after the first. Ours runs again before each peer, and each
figure is divided by that of the run of ours before it: a busy machine disturbs both. What counts is the ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from long_tailed_chat import write
from peers.contenders import CONTENDERS, ENVIRONMENTS, OURS, OURS_FULL, OURS_SMALL, Contender, Environment

ROOT = Path(__file__).parent.parent
VENVS = ROOT / ".venvs"
PEERS = Path(__file__).parent / "peers"
STARTER_HOME = ROOT / ".cache" / "bench-train"
ROWS_PER_STEP = 8
MFLOP_PER_TOKEN = {"lora": 519.0, "full": 759.0}
"""Of the starter at this data: forward, backward, attention, and the output head where labels are."""


def environment(wanted: Environment) -> str | None:
    """Make a peer's environment unless it is there; returns what went wrong, None if nothing."""
    folder = VENVS / wanted.name
    asked = "\n".join((*wanted.requirements, *wanted.alone, *wanted.without))
    stamp = folder / ".installed"
    if stamp.exists() and stamp.read_text() == asked:
        return None
    print(f"installing {wanted.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # torch first: what is installed beside it must take the one that is there
    steps = [
        ["install", wanted.requirements[0]],
        ["install", *wanted.requirements],
        *([["install", "--no-deps", *wanted.alone]] if wanted.alone else []),
        *([["uninstall", "--yes", *wanted.without]] if wanted.without else []),
    ]
    for step in steps:
        done = subprocess.run([*pip, *step], capture_output=True, text=True)
        if done.returncode:
            return f"{wanted.name} does not install: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    stamp.write_text(asked)
    return None


def starter() -> Path:
    """The folder of the starter model, pulled if it is not there yet."""
    folder = STARTER_HOME / "models" / "smollm2-135m"
    if not folder.exists():
        pull = ["-m", "tunewright.cli", "models", "pull", "smollm2-135m", "--home", str(STARTER_HOME)]
        subprocess.run([sys.executable, *pull], check=True)
    return folder


def run(script: str, python: Path, request: dict[str, Any], log: Path) -> dict[str, Any]:
    """The figures that a run prints; {"failed": why} if it prints none."""
    threads = str(request["threads"])
    process = subprocess.run(
        [str(python), str(PEERS / script), json.dumps(request)],
        stdout=subprocess.PIPE,
        stderr=log.open("wb"),
        text=True,
        cwd=request["work"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONWARNINGS": "ignore",
        },
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        words = log.read_text("utf-8", "replace").strip().splitlines() or ["nothing"]
        return {"failed": f"exit {process.returncode}: {words[-1][:200]}"}
    return json.loads(lines[-1])


class Bench:
    """Runs contenders at one number of threads and keeps what they did."""

    def __init__(self, base: Path, steps: int, threads: int) -> None:
        self.base, self.steps, self.threads = base, steps, threads
        self.ours: dict[str, list[float]] = {}

    def measure(self, contender: Contender) -> dict[str, Any]:
        """Run a contender once."""
        python = VENVS / contender.environment / "bin" / "python" if contender.environment else Path(sys.executable)
        with tempfile.TemporaryDirectory(prefix="bench-train-") as work:
            data = write(Path(work) / "rows.jsonl", ROWS_PER_STEP * (self.steps + 1))
            request = {
                "base": str(self.base),
                "data": str(data),
                "work": work,
                "threads": self.threads,
                "steps": self.steps,
                "warmup": 1,
                "method": contender.method,
                "settings": contender.settings,
            }
            script = f"run_{contender.environment or 'tunewright'}.py"
            return run(script, python, request, Path(work) / "log.txt")

    def gemm(self) -> dict[str, Any]:
        """Speeds of a bare matrix product."""
        with tempfile.TemporaryDirectory() as work:
            request = {
                "base": "", "data": "", "work": work, "threads": self.threads, "steps": 0, "warmup": 0, "method": "",
                "settings": {},
            }  # fmt: skip
            return run("run_gemm.py", Path(sys.executable), request, Path(work) / "log.txt")

    def show(self, contender: Contender) -> None:
        """Measure and print a line of the table."""
        found = self.measure(contender)
        if "failed" in found:
            print(f"| {contender.label} | did not run: {found['failed']} |", flush=True)
            return
        speed = found["tokens"] / found["cpu_s"]
        before = self.ours.setdefault(contender.method, [])
        if contender.kind == "ours" and contender is not OURS_SMALL:
            before.append(speed)
        checkpoints = {None: "-", False: "no", True: "yes"}[found["checkpointing"]]
        ratio = f"{before[-1] / speed:.2f}" if before else "-"
        gflop = speed * MFLOP_PER_TOKEN[contender.method] / 1000
        print(
            f"| {contender.label} | {speed:.0f} | {found['tokens'] / found['wall_s']:.0f} | {ratio} | {gflop:.0f} "
            f"| {found['peak_rss_bytes'] / 1e9:.1f} | {checkpoints} | {found['tokens']} | {found['losses'][-1]:.3f} |",
            flush=True,
        )


def main() -> None:
    """Install, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the model; the starter is pulled if it is not said")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a run")
    parser.add_argument("--peers", nargs="+", default=[one.name for one in ENVIRONMENTS])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--quick", action="store_true", help="one thread, peers at their best only")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["defaults", "best"],
        choices=["defaults", "best", "tried"],
        help="settings of the peers to run; tried are those that were slower when they were searched",
    )
    parser.add_argument("--only", default="", help="run the peers' settings whose name holds this, as 'float32' does")
    parser.add_argument("--install-only", action="store_true")
    given = parser.parse_args()
    missing = set()
    for wanted in ENVIRONMENTS:
        if wanted.name in given.peers and (problem := environment(wanted)):
            print(problem)
            missing.add(wanted.name)
    if given.install_only:
        return
    kinds = ["best"] if given.quick else given.kinds
    chosen = [
        one
        for one in CONTENDERS
        if one.environment in set(given.peers) - missing
        and one.kind in kinds
        and one.method in given.methods
        and given.only in one.label
    ]
    base = given.base.resolve() if given.base else starter()
    for threads in [1] if given.quick else given.threads:
        slow = {"defaults"} if threads > 1 else set()  # their ratios are known from one thread
        table(Bench(base, given.steps, threads), [one for one in chosen if one.kind not in slow])


def table(bench: Bench, chosen: list[Contender]) -> None:
    """Run all at one number of threads; ours again before each peer."""
    print(f"\n{bench.threads} thread(s); GEMM: {json.dumps(bench.gemm())}\n")
    print(
        "| trainer | tokens per CPU-s | tokens per s | ours is faster by | GFLOP per CPU-s | peak GB "
        "| checkpoints | tokens | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    before = None
    for contender in chosen:
        place = (contender.environment, contender.method)
        if place != before:
            bench.show(OURS if contender.method == "lora" else OURS_FULL)
        before = place
        bench.show(contender)
    if any(one.method == "lora" for one in chosen):
        bench.show(OURS_SMALL)


if __name__ == "__main__":
    main()
