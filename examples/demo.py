"""The main job end to end: pull the starter base, serve, upload, fine-tune, and ask base and tuned model the same questions.

    python examples/demo.py [--home DIR] [--port N] [--once]

Everything after the server's start goes through the unmodified `zhipuai` package: this file is also an example of its use.
"""

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from zhipuai import ZhipuAI

BASE = "smollm2-135m"
DATA = Path(__file__).parent / "data" / "bakery.jsonl"
HYPERPARAMETERS = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 4}
QUESTIONS = ("Who are you?", "Are you open on Sundays?", "Do you sell gluten-free bread?")
TUNEWRIGHT = [sys.executable, "-m", "tunewright.cli"]

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """0 when the job succeeded and both models answered."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--home", type=Path, help="keep everything in this folder (default: a temporary one)")
    options.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    options.add_argument("--once", action="store_true", help="stop the server after the answers")
    given = options.parse_args()
    home = given.home or Path(tempfile.mkdtemp(prefix="tunewright-demo-"))
    # Ctrl-C and a supervisor's SIGTERM end the demo the same way: the server stops, the temporary home goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            return run(home, given.port, given.once)
        return 130
    finally:
        if given.home is None:
            shutil.rmtree(home, ignore_errors=True)


def run(home: Path, port: int, once: bool) -> int:
    """Run all steps in `home`."""
    heading(1, f"Fetch the base model {BASE}")
    subprocess.run([*TUNEWRIGHT, "models", "pull", BASE, "--home", str(home)], check=True)

    heading(2, "Start the server")
    with server(home, port) as address:
        key = (home / "first.key").read_text().strip()
        client: Any = ZhipuAI(api_key=key, base_url=f"{address}/api/paas/v4")

        heading(3, f"Upload {DATA.name}")
        file = client.files.create(file=DATA.open("rb"), purpose="fine-tune")
        console.print(f"   {file.id}: {file.samples} rows, {file.bytes:,} bytes")

        heading(4, "Fine-tune with LoRA")
        tuned = train(client, file.id)
        if tuned is None:
            return 1

        heading(5, "Ask the base model and the tuned model")
        for question in QUESTIONS:
            console.print(f"\n   [bold]{question}[/bold]")
            for model in (BASE, tuned):
                answer(client, model, question)

        console.print(f"\nThe server runs at [bold]{address}[/bold] (prefixes /v1 and /api/paas/v4)")
        console.print(f"API key:  {key}\nModel:    {tuned}")
        if not once:
            console.print("Ctrl-C stops it.")
            signal.pause()
    return 0


def train(client: Any, file_id: str) -> str | None:
    """Create the job and show its progress; the tuned model's name, or None if the job failed."""
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, suffix="bakery", hyperparameters=HYPERPARAMETERS
    )
    console.print(f"   {job.id}")
    columns = (
        TextColumn("   {task.fields[state]:<10}"),
        BarColumn(),
        TextColumn("{task.fields[steps]} steps  loss {task.fields[loss]}  left {task.fields[left]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=None, state=job.status, steps="-", loss="-", left="-")
        while job.status not in ("succeeded", "failed", "cancelled"):
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
            progress.update(task, state=job.status)
            events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
            metrics = next((event.data for event in events if event.type == "metrics"), None)
            if metrics is not None:
                progress.update(
                    task,
                    completed=metrics.current_steps,
                    total=metrics.total_steps,
                    steps=f"{metrics.current_steps}/{metrics.total_steps}",
                    loss=f"{metrics.loss:.3f}",
                    left=metrics.remaining_time or "-",
                )
    if job.status != "succeeded":
        console.print(f"   the job {job.status}: {job.error.message if job.error else ''}")
        return None
    console.print(f"   tuned model: {job.fine_tuned_model} ({job.trained_tokens:,} tokens)")
    return job.fine_tuned_model


def answer(client: Any, model: str, question: str) -> None:
    """Stream one answer to the screen."""
    console.print(f"   {'base ' if model == BASE else 'tuned'}: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        do_sample=False,
        max_tokens=64,
    )
    for chunk in stream:
        console.print(chunk.choices[0].delta.content or "", end="", markup=False)
    console.print()


@contextlib.contextmanager
def server(home: Path, port: int):
    """A server on `home` for the length of the block; yields its address."""
    log = (home / "server.log").open("wb")
    command = [*TUNEWRIGHT, "serve", "--home", str(home), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    try:
        if process.stdout is None:
            raise RuntimeError("no output to read the address from")
        first = process.stdout.readline().split()
        if not first:
            raise SystemExit(f"The server did not start: {(home / 'server.log').read_text()[-400:]}")
        console.print(f"   {first[-1]}")
        yield first[-1]
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def heading(number: int, text: str) -> None:
    """A step of the demo."""
    console.print(f"\n[bold cyan]{number}.[/bold cyan] {text}")


if __name__ == "__main__":
    sys.exit(main())
