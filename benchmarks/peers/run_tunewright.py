"""One run of our own trainer, by the project's Python: `python run_tunewright.py REQUEST_JSON`."""

import json
import sys
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import measuring
import msgspec

from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import Finished, Hyperparameters, JournalRecord, Metrics, Started, TrainingSpec
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.journal_writer import JournalWriter
from tunewright.recipes.run import run


class MeteredJournal(JournalWriter):
    """A real journal that also tells a meter of every step."""

    def __init__(self, path: Path, meter: measuring.Meter) -> None:
        super().__init__(path)
        self.meter = meter

    def write(self, record: JournalRecord) -> None:
        super().write(record)
        if isinstance(record, Started):
            print(json.dumps(record.choices), file=sys.stderr)
        elif isinstance(record, Metrics):
            self.meter.tokens = record.tokens
            self.meter.losses.append(record.loss or 0.0)
            self.meter.step_ended()


def spec_of(asked: measuring.Request, seed: int = 0, **changes: Any) -> TrainingSpec:
    """A job that does what is asked for; `changes` replace fields of it. The settings are hyperparameters."""
    numbers: dict[str, Any] = {
        "n_epochs": 1,
        "batch_size": asked.rows_per_step,
        "learning_rate_multiplier": 1.0,
        "learning_rate": asked.learning_rate,
        "lora_rank": 8,
        "lora_alpha": 16,
        "max_length": asked.max_length,
    }
    spec = TrainingSpec(
        job_id="benchmark",
        attempt=1,
        work_folder=asked.work,
        base_code="benchmark",
        base_path=asked.base,
        base_files={},
        training_type=asked.method,
        training_data=asked.data,
        training_sha256=sha256_of(Path(asked.data)),
        hyperparameters=Hyperparameters(**numbers | asked.settings),
        seed=seed,
        threads=asked.threads,
        checkpoint_every_s=1e9,
        max_line_bytes=2**24,
    )
    return msgspec.structs.replace(spec, **changes)


def train(spec: TrainingSpec, meter: measuring.Meter) -> None:
    """Run the job in this process. Raises RuntimeError if it does not finish."""
    (Path(spec.work_folder) / "attempt").write_text("1")
    verified: Future[None] = Future()
    verified.set_result(None)
    with closing(MeteredJournal(Path(spec.work_folder) / "journal-1.jsonl", meter)) as journal:
        last = run(Attempt(spec, journal, verified))
    if not isinstance(last, Finished):
        raise RuntimeError(last)


if __name__ == "__main__":
    asked = measuring.request()
    meter = measuring.Meter(asked)
    train(spec_of(asked), meter)
    meter.print_line()
