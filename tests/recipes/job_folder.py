"""A job's work folder as the server would make it, around a tiny model, and the real trainer process in it."""

import atexit
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from tests.recipes.nursery import Child, Nursery
from tunewright.errors import TunewrightError
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Hyperparameters, JournalRecord, Metrics, Note, TrainingSpec, decode_record
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.integrity import verify_inputs
from tunewright.recipes.journal_writer import JournalWriter
from tunewright.recipes.run import run

ROWS = [
    ("What is the capital of France?", "Paris."),
    ("Who are you?", "I am a small model, and I was trained in a test."),
    ("你好", "你好，我是一个很小的模型。"),
    ("Count to five.", "one two three four five"),
    ("Is the sea blue?", "yes"),
    ("Name a tool.", "A call of a tool: get_weather"),
    ("What comes after nine?", "ten"),
]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    """One chat row for each (question, answer)."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in rows
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_job(folder: Path, base: Path, rows: list[tuple[str, str]] = ROWS, **changes: Any) -> TrainingSpec:
    """Make the folder of a job with a first attempt. `changes` replace fields of the spec or of its hyperparameters."""
    (folder / "data").mkdir(parents=True)
    data = write_rows(folder / "data" / "train.jsonl", rows)
    numbers: dict[str, Any] = {
        "n_epochs": 3,
        "batch_size": 2,
        "learning_rate_multiplier": 1.0,
        "learning_rate": 5e-3,
        "lora_rank": 4,
        "lora_alpha": 8,
        "max_length": 128,
        "precision": "float32",
    }
    fields: dict[str, Any] = {
        "job_id": "job-1",
        "attempt": 1,
        "work_folder": str(folder),
        "base_code": "tiny",
        "base_path": str(base),
        "base_files": {path.name: sha256_of(path) for path in sorted(base.iterdir())},
        "training_data": str(data),
        "training_sha256": sha256_of(data),
        "seed": 7,
        "threads": 1,
        "checkpoint_every_s": 1000.0,
        "max_line_bytes": 2**20,
        "memory_limit_bytes": 2**40,  # or how it is computed would depend on what is free just now
    }
    for name, value in changes.items():
        (numbers if name in Hyperparameters.__struct_fields__ else fields)[name] = value
    spec = TrainingSpec(hyperparameters=Hyperparameters(**numbers), **fields)
    put_spec(spec)
    return spec


def put_spec(spec: TrainingSpec) -> None:
    """Write the spec and its attempt number, as the server does before it starts a trainer."""
    folder = Path(spec.work_folder)
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    (folder / "attempt").write_text(str(spec.attempt))


def next_attempt(spec: TrainingSpec, **changes: Any) -> TrainingSpec:
    """Ready the folder for another trainer."""
    spec = msgspec.structs.replace(spec, attempt=spec.attempt + 1, **changes)
    put_spec(spec)
    return spec


def start_trainer(spec: TrainingSpec) -> subprocess.Popen[bytes]:
    """Start the process that the server starts; its output goes to the attempt's log."""
    with (Path(spec.work_folder) / f"log-{spec.attempt}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tunewright.recipes.run", spec.work_folder],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@cache
def nursery() -> Nursery:
    """One for all tests."""
    found = Nursery()
    atexit.register(found.close)
    return found


def fork_trainer(spec: TrainingSpec, death: tuple[str, int] | None = None) -> Child:
    """The same as `start_trainer`, but for the import of libraries, which is done already. `death` is one of `deaths.py`."""
    return nursery().start(Path(spec.work_folder), Path(spec.work_folder) / f"log-{spec.attempt}.txt", death)


def run_trainer(spec: TrainingSpec, death: tuple[str, int] | None = None) -> int:
    """Run a trainer process to its end; returns the exit code."""
    return fork_trainer(spec, death).wait(120)


def records(spec: TrainingSpec) -> list[JournalRecord]:
    """The whole lines of the attempt's journal."""
    path = Path(spec.work_folder) / f"journal-{spec.attempt}.jsonl"
    if not path.exists():
        return []
    return [decode_record(line) for line in path.read_bytes().split(b"\n")[:-1]]


def log_text(spec: TrainingSpec) -> str:
    """What the attempt printed."""
    return (Path(spec.work_folder) / f"log-{spec.attempt}.txt").read_text("utf-8", "replace")


class SteppedJournal(JournalWriter):
    """A real journal that calls `at_step` after it wrote the metrics of a step: a way to interrupt between two steps."""

    def __init__(self, path: Path, at_step: Callable[[int], None]) -> None:
        super().__init__(path)
        self._at_step = at_step

    def write(self, record: JournalRecord) -> None:
        super().write(record)
        if isinstance(record, Metrics):
            self._at_step(record.step)


def train_here(spec: TrainingSpec, *, stop_at: int | None = None) -> list[JournalRecord]:
    """Run the recipe in this process (no imports to wait for); SIGTERM's effect after step `stop_at`. Returns the records."""
    verified: Future[None] = Future()

    def at_step(step: int) -> None:
        if step == stop_at:
            attempt.stop.set()

    journal = SteppedJournal(Path(spec.work_folder) / f"journal-{spec.attempt}.jsonl", at_step)
    attempt = Attempt(spec, journal, verified)
    try:
        verify_inputs(spec)
        verified.set_result(None)
    except TunewrightError as error:
        verified.set_exception(error)
    with closing(journal):
        attempt.write(run(attempt))
    return records(spec)


def metrics(found: list[JournalRecord]) -> list[Metrics]:
    """The metrics among the records."""
    return [record for record in found if isinstance(record, Metrics)]


def losses(found: list[JournalRecord]) -> dict[int, float | None]:
    """Step -> loss."""
    return {record.step: record.loss for record in metrics(found)}


def codes(found: list[JournalRecord]) -> list[str]:
    """Codes of the notes among the records."""
    return [record.code for record in found if isinstance(record, Note)]
