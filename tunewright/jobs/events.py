"""The lines of a job's history: built here, stored by whoever made the thing happen. Pure but for ids and the clock."""

import math
from typing import Any

import msgspec

from tunewright.clock import wall_s
from tunewright.datasets.checking.check import VALIDATION_LEAK
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.jobs.records import VALIDATING, Job, JobCheckpoint, JobEvent
from tunewright.jobs.spec import Checkpoint, Metrics, RowChoice

_LEVELS = {"warn": "warn", "warning": "warn", "error": "error"}
_RESULT_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "acc",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "eval_acc",
}
"""Column of the OpenAI API -> name in the data of a metrics event."""
_PAIR_COLUMNS = (
    *("step", "train_loss", "train_reward_accuracy", "train_reward_margin"),
    *("valid_loss", "valid_reward_accuracy", "valid_reward_margin"),
)


def message(job: Job, code: str, text: str, /, *, level: str = "info", **values: Any) -> JobEvent:
    """A sentence for people. `text` is a marked English template; `level` is info, warn or error."""
    return JobEvent(
        id=new_id("ftevent"),
        job_id=job.id,
        project_id=job.project_id,
        type="message",
        level=_LEVELS.get(level, "info"),
        code=code,
        message=text,
        values={name: finite(value) for name, value in values.items()},
        created_at=wall_s(),
    )


def created(job: Job) -> JobEvent:
    """The first line of every job, with the job that it was copied from."""
    if job.retry_of is not None:
        text = mark("Created fine-tuning job {job} to try job {source} again")
        return message(job, "created", text, job=job.id, source=job.retry_of)
    if job.cloned_from is not None:
        text = mark("Created fine-tuning job {job} as a copy of job {source}")
        return message(job, "created", text, job=job.id, source=job.cloned_from)
    return message(job, "created", mark("Created fine-tuning job {job}"), job=job.id)


def prepared(job: Job, choice: RowChoice, leaked: int) -> list[JobEvent]:
    """What is used of the files of a job that goes into the queue or into its rehearsal, and what is not.

    `leaked`: rows of the validation file that also stand in the training file.
    """
    found = []
    bad = len(choice.train.skip) + (len(choice.validation.skip) if choice.validation else 0)
    if bad:
        text = mark("{rows} bad rows are left out, as max_bad_rows or max_bad_ratio allow")
        found.append(message(job, "bad_rows_left_out", text, level="warn", rows=bad))
    if leaked and choice.validation is not None:
        text = mark(
            "{found} of {rows} rows of the validation file also stand in the training file: the validation loss will look "
            "better than it is"
        )
        rows = choice.validation.rows
        found.append(message(job, VALIDATION_LEAK, text, level="warn", found=leaked, rows=rows))
    if job.validation_split is not None and choice.validation is not None:
        text = mark("{validation} rows are kept for validation, {train} are trained on")
        found.append(message(job, "validation_split", text, validation=choice.validation.rows, train=choice.train.rows))
    if job.status == VALIDATING:
        text = mark("The files are in place: {rows} rows. The dress rehearsal is next")
        return [*found, message(job, "rehearsing", text, rows=choice.train.rows)]
    text = mark("The files are in place: {rows} rows. The job is queued")
    return [*found, message(job, "queued", text, rows=choice.train.rows)]


def rehearsed(job: Job, found: dict[str, Any]) -> list[JobEvent]:
    """What the rehearsal of a job that goes into the queue has measured (`rehearsals.measured`)."""
    text = mark(
        "Rehearsed with the rows of lines {lines}: memory peak {memory} GB, {step_s} s a step. Training will take between "
        "{least} and {most}"
    )
    values: dict[str, Any] = {
        "lines": ", ".join(map(str, found["rows"])),
        "memory": f"{found['memory_peak_bytes'] / 1e9:.1f}",
        "step_s": f"{found['seconds_per_step']:.2g}",
        "least": clock_text(found["estimated_seconds"]["least"]),
        "most": clock_text(found["estimated_seconds"]["most"]),
    }
    if found["price"] is not None:
        text = mark(
            "Rehearsed with the rows of lines {lines}: memory peak {memory} GB, {step_s} s a step. Training will take between "
            "{least} and {most}, at a price of {price}"
        )
        values["price"] = found["price"]["most"]
    event = msgspec.structs.replace(message(job, "rehearsed", text, **values), data={"rehearsal": found})
    return [event, message(job, "queued", mark("The dress rehearsal went well. The job is queued"))]


def succeeded(job: Job) -> JobEvent:
    """The last line of a job that made a model. Its `data` repeats what happened to the rows."""
    text = mark("The job has successfully completed: {used} rows used, {skipped} skipped, {cut} cut")
    counts: dict[str, Any] = {name: job.rows.get(name, 0) for name in ("used", "skipped", "cut")}
    return msgspec.structs.replace(message(job, "succeeded", text, **counts), data={"rows": job.rows})


def metrics(job: Job, record: Metrics) -> JobEvent:
    """One optimizer step, under the names that either dialect's clients read."""
    loss = finite(record.loss)
    text = mark("Step {step}/{total_steps}: loss={loss}")
    if record.reward_margin is not None:
        text = mark("Step {step}/{total_steps}: loss={loss}, margin={margin}")
    if loss is None:
        text = mark("Step {step}/{total_steps}")
    return JobEvent(
        id=new_id("ftevent"),
        job_id=job.id,
        project_id=job.project_id,
        type="metrics",
        code="metrics",
        message=text,
        values={
            "step": record.step,
            "total_steps": record.total_steps,
            "loss": None if loss is None else f"{loss:.4f}",
        }
        | ({} if record.reward_margin is None else {"margin": f"{record.reward_margin:.4f}"}),
        data=_metrics_data(record),
        step=record.step,
        created_at=wall_s(),
    )


def checkpoint(job: Job, record: Checkpoint) -> JobCheckpoint:
    """A checkpoint as users see it. Numbers that JSON lacks become null."""
    return JobCheckpoint(
        id=new_id("ftckpt"),
        job_id=job.id,
        project_id=job.project_id,
        step=record.step,
        metrics={name: finite(value) for name, value in record.metrics.items()},
        path=record.path,
        adapter_sha256=record.adapter_sha256,
        renderer_hash=record.renderer_hash,
        created_at=wall_s(),
    )


def result_table(events: list[JobEvent]) -> bytes:
    """The metrics of a run as CSV, a row for each step in order; empty cells where nothing was measured. The columns are those of
    the OpenAI API; of preference training, which has other measures, their names in the events."""
    steps = {event.step: event.data or {} for event in events if event.type == "metrics"}
    pairs = any("train_reward_accuracy" in data for data in steps.values())
    columns = {name: name for name in _PAIR_COLUMNS} if pairs else _RESULT_COLUMNS
    lines = [",".join(columns)]
    for step in sorted(step for step in steps if step is not None):
        cells = (steps[step].get(name) for name in columns.values())
        lines.append(",".join("" if cell is None else repr(cell) for cell in cells))
    return ("\n".join(lines) + "\n").encode()


def finite(value: Any) -> Any:
    """`value`, or None for the floats that JSON can't say (NaN, infinities)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clock_text(seconds: float | None) -> str | None:
    """`h:mm:ss`, None for None."""
    if seconds is None or not math.isfinite(seconds):
        return None
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _metrics_data(record: Metrics) -> dict[str, Any]:
    loss, accuracy = finite(record.loss), finite(record.accuracy)
    data: dict[str, Any] = {
        "epoch": finite(record.epoch),
        "current_steps": record.step,
        "total_steps": record.total_steps,
        "elapsed_time": clock_text(record.elapsed_s),
        "remaining_time": clock_text(record.remaining_s),
        "trained_tokens": record.tokens,
        "loss": loss,
        "acc": accuracy,
        "learning_rate": finite(record.learning_rate),
        "step": record.step,
        "train_loss": loss,
    }
    pairs = record.reward_margin is not None
    margin = finite(record.reward_margin)
    data |= (
        {"train_reward_accuracy": accuracy, "reward_margin": margin, "train_reward_margin": margin}
        if pairs
        else {"train_mean_token_accuracy": accuracy}
    )
    if record.eval_loss is not None or record.eval_accuracy is not None:
        eval_loss, eval_accuracy = finite(record.eval_loss), finite(record.eval_accuracy)
        measured = {"loss": eval_loss}
        if pairs:
            eval_margin = finite(record.eval_reward_margin)
            measured |= {"reward_accuracy": eval_accuracy, "reward_margin": eval_margin}
            data["eval_reward_margin"] = eval_margin
        else:
            measured["mean_token_accuracy"] = eval_accuracy
        data |= {"eval_loss": eval_loss, "eval_acc": eval_accuracy}
        for prefix in ("valid", "full_valid"):  # all validation rows are looked at each time
            data |= {f"{prefix}_{name}": value for name, value in measured.items()}
    return data
