"""What a failed job says: a cause for every code, and advice that a create request can follow."""

from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract import rows
from tunewright.i18n import translate
from tunewright.jobs import creation
from tunewright.jobs.creation import CreateJob, with_changes
from tunewright.jobs.diagnosis import EXPLANATIONS, explain
from tunewright.jobs.hyperparameters import parse, resolve
from tunewright.jobs.records import Job, JobError, Suggestion
from tunewright.jobs.signatures import SIGNATURES
from tunewright.models.records import Base, Source

CONTEXT = 2048
BASE = Base(
    code="tiny",
    name="tiny",
    source=Source(kind="folder"),
    licence="none",
    context_tokens=CONTEXT,
    methods=("lora", "full", "dpo"),
)
LEAST: dict[str, Any] = {
    "n_epochs": 1,
    "batch_size": 1,
    "learning_rate_multiplier": 1e-9,
    "lora_rank": 1,
    "max_length": 16,
    "warmup_ratio": 0,
}
MOST: dict[str, Any] = {
    "n_epochs": 50,
    "batch_size": 256,
    "learning_rate_multiplier": 10,
    "lora_rank": 256,
    "max_length": CONTEXT,
    "warmup_ratio": 0.5,
}
KINDS = (("supervised", "lora"), ("supervised", "full"), ("dpo", "lora"))
VALUES = {"found": 3, "rows": 10, "allowed": 1, "step": 4, "other": Path("/x")}


def a_job(wanted: dict[str, Any] | None = None, *, resolved: bool = True, **fields: Any) -> Job:
    job = rows.job("p", base_code="tiny", model="tiny", **fields)
    requested = parse(wanted, method=job.method, context_tokens=CONTEXT)
    kind: dict[str, Any] = {"training_type": job.training_type, "method": job.method}
    numbers = resolve(requested, rows=100, context_tokens=CONTEXT, **kind)
    return msgspec.structs.replace(
        job, requested=requested, hyperparameters=msgspec.to_builtins(numbers) if resolved else {}
    )


def error_of(job: Job, code: str, base: Base | None = BASE) -> JobError:
    return explain(job, base, code, "Something at step {step}", None, VALUES)


def changes_of(job: Job, code: str, **case: Any) -> dict[str, Any]:
    suggestion = error_of(job, code, **case).suggestion
    assert suggestion is not None
    return suggestion.changes


@pytest.mark.parametrize("code", [*EXPLANATIONS, "something_new"])
def test_every_suggestion_is_a_request_that_is_taken(code: str) -> None:
    for (method, training_type), wanted, resolved, base in product(
        KINDS, ({}, LEAST, MOST), (True, False), (BASE, None)
    ):
        model = "tiny" if training_type == "full" else "tiny:of:mine"
        job = msgspec.structs.replace(
            a_job(wanted, resolved=resolved, method=method, training_type=training_type), model=model
        )
        error = error_of(job, code, base)
        assert error.suggestion is not None
        for language in ("en", "zh"):
            assert translate(error.cause, language, **error.values)
            assert translate(error.suggestion.message, language, **error.suggestion.values)
        before = CreateJob(
            model=job.model,
            training_file="f",
            method=method,
            training_type=training_type,
            hyperparameters=job.requested,
            validation_split=0.1,
            max_bad_ratio=0.2,
        )
        after = with_changes(before, error.suggestion.changes)
        parse(after.hyperparameters, method=method, context_tokens=CONTEXT)
        creation.check_method(BASE, after.method, after.training_type)
        creation.check_tolerance(after.max_bad_rows, after.max_bad_ratio)
        creation.check_split(after.validation_split, after.validation_file)
        assert after.training_file == before.training_file and isinstance(after.model, str)
        assert (after == before) == (not error.suggestion.changes)
        msgspec.json.encode(error)


def test_less_memory_step_by_step() -> None:
    job = a_job({"max_length": 1024, "batch_size": 8, "lora_rank": 64})
    assert changes_of(job, "out_of_memory") == {
        "hyperparameters": {"max_length": 512, "batch_size": 4, "lora_rank": 32}
    }
    assert changes_of(a_job(LEAST), "out_of_memory") == {}
    assert changes_of(a_job(training_type="full"), "out_of_memory") == {"training_type": "lora"}
    only_full = msgspec.structs.replace(BASE, methods=("full",))
    assert "max_length" in changes_of(a_job(training_type="full"), "out_of_memory", base=only_full)["hyperparameters"]


def test_gentler_after_divergence_and_stronger_after_no_effect() -> None:
    job = a_job({"learning_rate_multiplier": 2, "n_epochs": 4})
    for code in ("loss_not_finite", "diverged"):
        assert changes_of(job, code) == {"hyperparameters": {"learning_rate_multiplier": 0.5, "warmup_ratio": 0.1}}
    assert changes_of(job, "no_effect") == {"hyperparameters": {"learning_rate_multiplier": 4.0, "n_epochs": 8}}
    assert changes_of(a_job(MOST), "no_effect") == {}


def test_data_and_models() -> None:
    assert changes_of(a_job({"max_length": 64}), "nothing_to_train") == {"hyperparameters": {"max_length": 128}}
    assert changes_of(a_job({"max_length": CONTEXT}), "nothing_to_train") == {}
    assert changes_of(a_job(), "too_many_bad_rows") == {"max_bad_rows": 3, "max_bad_ratio": None}
    assert changes_of(a_job(), "split_leaves_nothing") == {"validation_split": None}
    tuned = msgspec.structs.replace(a_job(), model="tiny:of:mine")
    assert changes_of(tuned, "base_mismatch") == {"model": "tiny"}
    assert changes_of(a_job(), "base_mismatch") == {}


def test_what_a_death_says_goes_before_what_the_code_says() -> None:
    signatures = {row.name: row for row in SIGNATURES}
    error = explain(a_job(), BASE, "crashed", "m", "p", {}, signature=signatures["missing_library"], evidence="line")
    assert (error.cause, error.evidence, error.param) == (signatures["missing_library"].cause, "line", "p")
    assert error.suggestion == Suggestion(message=signatures["missing_library"].advice)
    error = explain(a_job(), BASE, "out_of_memory", "m", "p", {}, signature=signatures["cuda_out_of_memory"])
    assert "GPU" in error.cause and error.suggestion is not None and error.suggestion.changes


def test_changes_of_a_request_keep_what_they_do_not_name() -> None:
    request = CreateJob(model="m", hyperparameters={"n_epochs": 2, "batch_size": 8}, validation_split=0.1)
    changed = with_changes(request, {"hyperparameters": {"batch_size": 4}, "validation_split": None})
    assert changed.hyperparameters == {"n_epochs": 2, "batch_size": 4}
    assert (changed.model, changed.validation_split) == ("m", None)
    assert with_changes(CreateJob(), {"hyperparameters": {"batch_size": 4}}).hyperparameters == {"batch_size": 4}
