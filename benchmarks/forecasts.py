"""How true the time is that a job is said to take: `python benchmarks/forecasts.py BASE_FOLDER [--rows N] [--epochs N]`.

Runs one job on long-tailed chat rows, rehearsed beforehand, on a real server with a temporary home, and compares when it ended
with what its rehearsal had said and with what each step said. Neighbours that come and go make every forecast worse: run it on
a quiet machine.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.long_tailed_chat import write
from tests.live_server import LiveServer

FIRST_PART = 0.1
"""What is said before is not counted: the demand is for after a tenth of the steps."""
TOLERANCE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a base model in Hugging Face layout")
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        rows = Path(folder) / "rows.jsonl"
        write(rows, given.rows)
        server = LiveServer(Path(folder) / "home")
        server.run("models", "add", str(given.base), "--code", "base")
        server.start()
        try:
            with server.api() as api:
                run(api, rows, {"n_epochs": given.epochs, "batch_size": given.batch_size})
        finally:
            server.stop()


def run(api: httpx.Client, rows: Path, hyperparameters: dict[str, int]) -> None:
    """Train and print how true the forecasts were."""
    file_id = api.post("/files", data={"purpose": "fine-tune"}, files={"file": rows.open("rb")}).json()["id"]
    body = {"model": "base", "training_file": file_id, "hyperparameters": hyperparameters, "rehearsal": "always"}
    job = api.post("/fine_tuning/jobs", json=body).json()
    said: list[tuple[float, float, float]] = []  # (part of the steps done, when it was said, what was left)
    seen = 0
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = api.get(f"/fine_tuning/jobs/{job['id']}").json()
        step, total = job["progress"]["step"], job["progress"]["total_steps"]
        if step > seen and job["estimated_finish"] is not None:
            seen = step
            said.append((step / total, time.time(), job["estimated_finish"] - time.time()))
    if job["status"] != "succeeded":
        raise SystemExit(f"the job ended as {job['status']}: {job['error']}")
    report(job, said)


def report(job: dict[str, Any], said: list[tuple[float, float, float]]) -> None:
    """Print what was said beside what was true."""
    ended = job["finished_at"]
    took = ended - job["running_at"]
    rehearsed = job["rehearsal"]
    print(f"training took {took} s; rehearsal ({rehearsed['seconds']:.0f} s) said {rehearsed['estimated_seconds']}")
    print(f"rehearsed peak {rehearsed['memory_peak_bytes'] / 1e9:.2f} GB")
    errors = [(part, left / (ended - when) - 1) for part, when, left in said if part >= FIRST_PART and ended - when > 2]
    sizes = [abs(error) for _, error in errors]
    within = sum(size <= TOLERANCE for size in sizes)
    print(f"time left, after a tenth of the steps: {within} of {len(sizes)} forecasts within {TOLERANCE:.0%},")
    print(f"median error {statistics.median(sizes):.0%}, largest {max(sizes):.0%}")
    for tenth in range(1, 10):
        error = next((error for part, error in errors if part >= tenth / 10), None)
        print(f"  at {tenth * 10} %: " + ("nothing was said" if error is None else f"{error:+.0%}"))


if __name__ == "__main__":
    main()
