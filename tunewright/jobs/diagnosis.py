"""Why a job failed and what to try next, from the code of its failure. Pure; one row for each code (docs/operations.md has
the same table, a test compares). Of what a trainer died that left no code is read by `last_words.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from tunewright.i18n import mark
from tunewright.jobs.hyperparameters import resolve
from tunewright.jobs.records import Job, JobError, Suggestion
from tunewright.jobs.signatures import Signature
from tunewright.jobs.spec import Hyperparameters
from tunewright.models.records import FULL, LORA, Base

_UNKNOWN_CONTEXT = 1024
_HIGHEST_MULTIPLIER, _MOST_EPOCHS = 10.0, 50
LEAST_LENGTH = 128
"""`max_length` is not halved below this: rows would be cut to nothing."""


class Case(NamedTuple):
    """What advice may look at. `numbers` are the job's hyperparameters; before its rows are counted, those of few rows."""

    job: Job
    numbers: Hyperparameters
    values: Mapping[str, Any]
    base: Base | None


class Explanation(NamedTuple):
    """`cause` and the sentence of `advise` are marked templates; `advise` gets what a suggestion can be made of."""

    cause: str
    advise: Callable[[Case], Suggestion]


def explain(
    job: Job,
    base: Base | None,
    code: str,
    message: str,
    param: str | None,
    values: Mapping[str, Any],
    *,
    signature: Signature | None = None,
    evidence: str = "",
) -> JobError:
    """The error of a job that failed with `code`. `base` is None if the catalogue has it no more; what `signature` says of a
    trainer's death goes before what the code says. `values` fill `message` and `cause`."""
    explanation = EXPLANATIONS.get(code, UNKNOWN)
    shown = {name: value if isinstance(value, str | int | float) else str(value) for name, value in values.items()}
    return JobError(
        code=code,
        message=message,
        param=param,
        values=shown,
        cause=explanation.cause if signature is None else signature.cause,
        evidence=evidence,
        suggestion=Suggestion(message=signature.advice)
        if signature is not None and signature.advice
        else explanation.advise(Case(job, _numbers(job, base), values, base)),
    )


def _numbers(job: Job, base: Base | None) -> Hyperparameters:
    if job.hyperparameters:
        return msgspec.convert(job.hyperparameters, Hyperparameters)
    context_tokens = _UNKNOWN_CONTEXT if base is None else base.context_tokens
    return resolve(
        job.requested, rows=1, training_type=job.training_type, method=job.method, context_tokens=context_tokens
    )


def _say(text: str) -> Callable[[Case], Suggestion]:
    """Advice that no field of a request can follow."""
    return lambda case: Suggestion(message=text)


def _with(changes: dict[str, Any], text: str) -> Suggestion:
    flat = {**changes, **changes.get("hyperparameters", {})}
    flat.pop("hyperparameters", None)
    told = ", ".join(f"{name} {'-' if value is None else value}" for name, value in flat.items())
    return Suggestion(message=text, values={"changes": told}, changes=changes)


def _less_memory(case: Case) -> Suggestion:
    if case.job.training_type == FULL and case.base is not None and LORA in case.base.methods:
        text = mark("Train an adapter instead of all weights, which takes about a quarter of the memory: {changes}.")
        return _with({"training_type": LORA}, text)
    smaller: dict[str, Any] = {}
    numbers = case.numbers
    if numbers.max_length >= 2 * LEAST_LENGTH:
        smaller["max_length"] = numbers.max_length // 2
    if numbers.batch_size > 1:
        smaller["batch_size"] = numbers.batch_size // 2
    if numbers.lora_rank > 16 and case.job.training_type == LORA:
        smaller["lora_rank"] = numbers.lora_rank // 2
    if not smaller:
        return Suggestion(message=mark("Choose a smaller base model, or a machine with more memory."))
    text = mark("Retry with {changes}; longer rows are then cut. A smaller base model takes less memory too.")
    return _with({"hyperparameters": smaller}, text)


def _gentler(case: Case) -> Suggestion:
    changes = {"learning_rate_multiplier": _rounded(case.numbers.learning_rate_multiplier / 4)}
    if case.numbers.warmup_ratio < 0.1:
        changes["warmup_ratio"] = 0.1
    text = mark("Retry with a lower learning rate: {changes}. If it happens again, look for broken rows in the data.")
    return _with({"hyperparameters": changes}, text)


def _stronger(case: Case) -> Suggestion:
    changes: dict[str, Any] = {}
    multiplier, n_epochs = case.numbers.learning_rate_multiplier, case.numbers.n_epochs
    if multiplier < _HIGHEST_MULTIPLIER:
        changes["learning_rate_multiplier"] = _rounded(min(_HIGHEST_MULTIPLIER, multiplier * 2))
    if n_epochs < _MOST_EPOCHS:
        changes["n_epochs"] = min(_MOST_EPOCHS, n_epochs * 2)
    if not changes:
        return Suggestion(
            message=mark("Use more rows, or rows that say something the base model does not say already.")
        )
    return _with({"hyperparameters": changes}, mark("Retry with more training: {changes}."))


def _longer(case: Case) -> Suggestion:
    length = case.numbers.max_length
    most = length if case.base is None else case.base.context_tokens
    if length >= most:
        return Suggestion(message=mark("Use shorter rows: the answers must begin within the base model's context."))
    return _with({"hyperparameters": {"max_length": min(most, 2 * length)}}, mark("Retry with longer rows: {changes}."))


def _without_bad_rows(case: Case) -> Suggestion:
    found, rows = case.values.get("found"), case.values.get("rows")
    if not isinstance(found, int) or not isinstance(rows, int) or 2 * found > rows:
        return Suggestion(
            message=mark("Mend the file: POST /api/v1/datasets/{file}/repair with its id."),
            values={"file": case.job.training_file},
        )
    text = mark("Mend the file, or leave the bad rows out: {changes}.")
    return _with({"max_bad_rows": found, "max_bad_ratio": None}, text)


def _from_the_base(case: Case) -> Suggestion:
    if case.job.model == case.job.base_code:
        return Suggestion(message=_AGAIN)
    return _with({"model": case.job.base_code}, mark("Start from the base model: {changes}."))


def _without_split(case: Case) -> Suggestion:
    return _with({"validation_split": None}, mark("Use more rows, or train without a split: {changes}."))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


_AGAIN = mark("Nothing needs to change: retry the job as it is.")
_UPLOAD = mark("Upload the file again and create the job with the new id.")
_PULL = mark("An operator must fetch the base model again: tunewright models pull. Then retry the job as it is.")
_BUG = mark("Retry the job as it is. If it fails again, an operator finds the details in the server's log.")
_ROOM = mark(
    "An operator must make room on the disk. A job that has failed can then be retried; any other goes on by itself."
)
_OTHER_BASE = mark("Choose another base model or another method.")

UNKNOWN = Explanation(mark("The code says what happened; nothing more is known."), _say(_BUG))

EXPLANATIONS: dict[str, Explanation] = {
    # memory, numbers, effect
    "out_of_memory": Explanation(
        mark(
            "Memory ran out. What is needed grows with the longest row (max_length), the rows per step (batch_size), the "
            "adapter (lora_rank) and most of all with the base model."
        ),
        _less_memory,
    ),
    "not_enough_memory": Explanation(
        mark("All the memory that this machine has for training would not be enough, so the job was not started."),
        _less_memory,
    ),
    "loss_not_finite": Explanation(
        mark("The numbers of the training grew beyond what a float can hold, most often by too high a learning rate."),
        _gentler,
    ),
    "diverged": Explanation(
        mark(
            "The training went away from its goal: the loss stayed far above where it began, most often by too high a "
            "learning rate."
        ),
        _gentler,
    ),
    "no_effect": Explanation(
        mark("The training ended, but the model answers as its base does: it learned too little to be measured."),
        _stronger,
    ),
    # data
    "nothing_to_train": Explanation(
        mark("Only answers are learned, and none is left in any row once rows are cut to max_length."), _longer
    ),
    "too_few_rows": Explanation(
        mark("The file has fewer rows than this server trains on."), _say(mark("Add rows to the file."))
    ),
    "file_has_errors": Explanation(mark("Rows of the file can't be trained on."), _without_bad_rows),
    "too_many_bad_rows": Explanation(
        mark(
            "More rows of the file have errors than the job puts up with; the check has changed since it was created."
        ),
        _without_bad_rows,
    ),
    "split_leaves_nothing": Explanation(mark("All rows came to lie on one side of validation_split."), _without_split),
    "file_not_found": Explanation(mark("The file was deleted before it was read."), _say(_UPLOAD)),
    "blob_missing": Explanation(mark("The bytes of the file are gone from the store of files."), _say(_UPLOAD)),
    "file_integrity": Explanation(
        mark("The bytes of the file on the disk are no longer those that were uploaded."), _say(_UPLOAD)
    ),
    "wrong_format": Explanation(
        mark("The rows are of a kind that this method does not read, or changed since their check."), _say(_UPLOAD)
    ),
    "line_too_long": Explanation(
        mark("A line is longer than this server reads; the limit has changed since the check."), _say(_UPLOAD)
    ),
    "invalid_unicode": Explanation(
        mark("A row holds half of a character, which no tokenizer can read."), _say(_UPLOAD)
    ),
    "conversation_not_supported": Explanation(
        mark("The base model's chat template refuses the order of messages in a row."), _say(_OTHER_BASE)
    ),
    # bases and models
    "model_not_pulled": Explanation(
        mark("The weights of the base model are not on this machine any more."), _say(_PULL)
    ),
    "base_model_integrity": Explanation(mark("Files of the base model are damaged or were changed."), _say(_PULL)),
    "base_changed": Explanation(mark("Files of the base model are damaged or were changed."), _say(_PULL)),
    "model_folder_incomplete": Explanation(mark("Files of the base model's tokenizer are missing."), _say(_PULL)),
    "no_stop_token": Explanation(mark("The base model's files do not say how an answer ends."), _say(_OTHER_BASE)),
    "template_unsupported": Explanation(
        mark("The base model's chat template can't be used safely."), _say(_OTHER_BASE)
    ),
    "base_model_unsupported": Explanation(
        mark("This release does not know the base model's architecture."), _say(_OTHER_BASE)
    ),
    "base_unsupported": Explanation(
        mark("The engine's decoder does not agree with the base model's own code, so no effect can be proven."),
        _say(_OTHER_BASE),
    ),
    "int8_inexact": Explanation(
        mark("With weights of 8 bits the base model's answers are too far from its own, so no effect can be proven."),
        _say(_OTHER_BASE),
    ),
    "unsupported_method": Explanation(
        mark("This release has no recipe for this method and training type."), _say(_OTHER_BASE)
    ),
    "unsafe_artifact": Explanation(mark("The folder of the model holds files that could run code."), _say(_OTHER_BASE)),
    "model_not_found": Explanation(mark("The model to continue from was deleted."), _from_the_base),
    "base_mismatch": Explanation(mark("The model to continue from belongs to another base model."), _from_the_base),
    "adapter_mismatch": Explanation(
        mark("The adapter to continue from has not the shape that its own description says."), _from_the_base
    ),
    "invalid_artifact": Explanation(mark("The adapter to continue from can't be read."), _from_the_base),
    "artifact_integrity": Explanation(
        mark("The adapter to continue from is not the one that was published: its bytes differ."), _from_the_base
    ),
    "model_deleted": Explanation(mark("The model was deleted while it was being trained."), _say(_AGAIN)),
    "model_not_reserved": Explanation(
        mark("The name of the model was given up while it was being trained."), _say(_AGAIN)
    ),
    "model_files_changed": Explanation(
        mark("The trained model's files changed between the end of training and their proof."), _say(_AGAIN)
    ),
    "adapter_invalid": Explanation(
        mark("What the trainer left is not what it said it wrote, or does not fit the base model."), _say(_AGAIN)
    ),
    "renderer_changed": Explanation(
        mark("The tokenizer or chat template of the base model changed while the job ran."), _say(_AGAIN)
    ),
    # the machine
    "insufficient_storage": Explanation(mark("The disk is full."), _say(_ROOM)),
    "checkpoint_not_restored": Explanation(
        mark("A checkpoint does not come back from the disk as it was written."),
        _say(mark("Let an operator look at the disk; then retry the job as it is.")),
    ),
    "checkpoint_unrecoverable": Explanation(
        mark("Every checkpoint of the job is damaged; they were put aside. Starting again in silence would hide that."),
        _say(mark("Retry the job as it is: it begins at step 0. Let an operator look at the disk.")),
    ),
    "stalled": Explanation(
        mark("The trainer stood still: it was stopped from outside, or a device or disk did not answer."), _say(_BUG)
    ),
    "crashed": Explanation(mark("The trainer ended by itself without saying why."), _say(_BUG)),
    "internal_error": Explanation(mark("A bug of the server."), _say(_BUG)),
    "engine_not_ready": Explanation(mark("The engine that proves the effect did not start in time."), _say(_AGAIN)),
    "engine_lost": Explanation(mark("The engine that proves the effect ended while it did so."), _say(_AGAIN)),
    "engine_busy": Explanation(mark("The engine that proves the effect did not answer in time."), _say(_AGAIN)),
    "engine_overloaded": Explanation(mark("The engine that proves the effect had too much to do."), _say(_AGAIN)),
}
