"""How long a person waits: server start to ready, and a job's success to the first word of the tuned model.

    python benchmarks/latencies.py BASE_FOLDER ROWS.jsonl [--runs 5]

BASE_FOLDER is a model in Hugging Face layout. Prints medians with the smallest and largest value; nothing is judged.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

TUNEWRIGHT = [sys.executable, "-m", "tunewright.cli"]
HYPERPARAMETERS = {"n_epochs": 1, "batch_size": 8}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("base", type=Path)
    options.add_argument("rows", type=Path)
    options.add_argument("--runs", type=int, default=5)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        home = Path(folder) / "home"
        add = [*TUNEWRIGHT, "models", "add", str(given.base), "--code", "base", "--home", str(home)]
        subprocess.run(add, check=True, stdout=subprocess.DEVNULL)
        first = start(home)
        stop(first[0])
        starts = []
        for _ in range(given.runs):
            process, _, seconds = start(home)
            starts.append(seconds)
            stop(process)
        print(f"first start to ready, home made: {first[2]:.2f} s")
        print(f"start to ready:                  {spread(starts)} s")
        process, address, _ = start(home)
        try:
            waits = [success_to_first_word(address, home, given.rows) for _ in range(given.runs)]
            print(f"succeeded to first word:         {spread(waits)} s")
            mapped = "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
            print(f"torch in the server's process:   {'yes' if mapped else 'no'}")
        finally:
            stop(process)


def start(home: Path) -> tuple[subprocess.Popen[str], str, float]:
    """(process, address, seconds from its start until /readyz says yes)."""
    began = time.perf_counter()
    command = [*TUNEWRIGHT, "serve", "--home", str(home), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if process.stdout is None:
        raise RuntimeError("no stdout")
    address = process.stdout.readline().split()[-1]
    while httpx.get(f"{address}/readyz", trust_env=False).status_code != 200:
        time.sleep(0.01)
    return process, address, time.perf_counter() - began


def stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGTERM)
    process.wait(60)


def success_to_first_word(address: str, home: Path, rows: Path) -> float:
    """Seconds from the moment a poll sees `succeeded` to the first streamed text of the new model."""
    headers = {"Authorization": f"Bearer {(home / 'first.key').read_text().strip()}"}
    with httpx.Client(base_url=f"{address}/v1", headers=headers, timeout=300, trust_env=False) as api:
        upload = {"file": (rows.name, rows.read_bytes())}
        file_id = api.post("/files", data={"purpose": "fine-tune"}, files=upload).raise_for_status().json()["id"]
        body = {"model": "base", "training_file": file_id, "hyperparameters": HYPERPARAMETERS}
        job = api.post("/fine_tuning/jobs", json=body).raise_for_status().json()
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(0.2)
            job = api.get(f"/fine_tuning/jobs/{job['id']}").raise_for_status().json()
        began = time.perf_counter()
        chat = {
            "model": job["fine_tuned_model"],
            "messages": [{"role": "user", "content": "Who are you?"}],
            "stream": True,
            "max_tokens": 8,
        }
        with api.stream("POST", "/chat/completions", json=chat) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return time.perf_counter() - began
    raise RuntimeError(f"no answer: {job}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
